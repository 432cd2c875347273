"""What tests of whole runs share: a small recipe, running it, breaking it off, and the comparison of two runs to the
bit.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.config import CriticConfig, LearnerConfig, RolloutConfig, SamplingConfig, TrainingConfig
from actors.experience import Experience
from cluster.config import ClusterConfig
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.config.recipe import save
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Commit, DriverState

ROOT = Path(__file__).parents[1]
STEPS = 4


def is_repeatable(name: str) -> bool:
    """Whether a metric is a function of the recipe alone; the others measure time, or what the run went through."""
    return not name.startswith(("time/", "incident/")) and name != "rollout/tokens_per_second"


def recipe(**changes: Any) -> RunConfig:
    """PPO with critic, reference, an adaptive KL controller, the learner's own log-probs and shaped rewards on
    two-layer walks, a commit every two steps.
    """
    config = RunConfig(
        task="walks",
        steps=STEPS,
        commit_every=2,
        model=ModelConfig(layers=2, width=32, heads=2, context=16),
        finetune=FinetuneConfig(epochs=1, learner=TrainingConfig(learning_rate=3e-3, micro_batch_size=32)),
        batch=BatchConfig(prompts=16, epochs=2, minibatches=2, max_prompt_tokens=1),
        algorithm=PPO(kl_coef=0.05, kl_target=0.01, kl_horizon=100, decoupled=True, importance_cap=2.0),
        shaping=ShapingConfig(
            missing_eos="add", eos_penalty=-0.25, overlong_tokens=4, overlong_penalty=0.25, whiten="scale"
        ),
        sampling=SamplingConfig(max_new_tokens=9),
        rollout=RolloutConfig(chunk_size=8, slots=8),
        policy=LearnerConfig(learning_rate=1e-3),
        critic=CriticConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(prompts=4),
        cluster=ClusterConfig(cpus_per_bundle=1, start_timeout_s=300, peer_timeout_s=60),
    )
    return config.model_copy(update=changes)


def new_run(path: Path, config: RunConfig) -> RunFolder:
    """The folder of a run that has begun and done nothing yet."""
    folder = RunFolder.take(path)
    save(config, path / "config.toml")
    folder.begin(config, from_step=0)
    return folder


def both(**settings: Any) -> dict[str, LearnerConfig]:
    """The same learner for policy and critic."""
    return {"policy": LearnerConfig(**settings), "critic": CriticConfig(**settings)}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def final_commit(run_dir: Path) -> Commit:
    """The newest one, which must be of the run's last step."""
    folder = max((run_dir / "checkpoints").iterdir())
    commit = Commit.from_text((folder / "commit.json").read_text())
    assert commit.state.step == len(learning(run_dir))
    return commit


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learning(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that do not measure time."""
    return [{name: value for name, value in record.items() if is_repeatable(name)} for record in metrics_of(run_dir)]


def assert_same(run_dir: Path, whole: Path, *, reissued: bool = False, metrics: bool = True) -> None:
    """Master weights, moments and step counters of policy and critic, the driver's state, metrics, experience, exported
    policy, evaluation.

    reissued: samples may have been given to another worker, so that the count of attempts may differ. metrics: compare
    them.
    """
    ours, theirs = final_commit(run_dir), final_commit(whole)
    assert ours.shards == theirs.shards, "the checksums of every rank's shard"
    if reissued:
        assert without_attempts(ours) == without_attempts(theirs)
    else:
        assert ours.state == theirs.state
        assert not metrics or learning(run_dir) == learning(whole)
    for step in range(ours.state.step):
        a, b = (
            Experience.read(run / "experience" / f"step={step}" / "experience.parquet").table
            for run in (run_dir, whole)
        )
        assert a.equals(b)
    assert (run_dir / "policy" / "model.safetensors").read_bytes() == (
        whole / "policy" / "model.safetensors"
    ).read_bytes()
    found, expected = (
        json.loads((run / "evaluation.json").read_text()) | {"baseline": "named from elsewhere"}
        for run in (run_dir, whole)
    )
    assert found == expected


def without_attempts(commit: Commit) -> DriverState:
    """The driver's state, however often samples had to be issued again."""
    ledger = commit.state.ledger
    chunks = tuple(chunk.model_copy(update={"attempt": 0}) for chunk in ledger.open)
    return commit.state.model_copy(update={"ledger": ledger.model_copy(update={"reissued": 0, "open": chunks})})


def pid_of(run_dir: Path, who: str) -> int:
    """The newest process of that name."""
    return int(re.findall(rf"{re.escape(who)} ready: pid (\d+)", (run_dir / "log" / "driver.log").read_text())[-1])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *arguments]


def forked_command(*arguments: str) -> list[str]:
    """The same, but its workers are forked from a process that has imported the libraries."""
    return [sys.executable, str(ROOT / "tests" / "forked_workers.py"), "run", *arguments]


def environment() -> dict[str, str]:
    """Of a user who has no Ray running."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def await_log(run_dir: Path, text: str, process: subprocess.Popen[str], timeout_s: float = 600) -> None:
    """Wait for a line in the run's log."""
    await_that(lambda: says(run_dir / "log" / "driver.log", text), process, timeout_s)


def await_that(holds: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 600) -> None:
    """Wait for something while a process runs."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"it has not come within {timeout_s} s"
        time.sleep(0.02)


def says(file: Path, text: str) -> bool:
    """Whether that stands in a file, which need not be there yet."""
    return file.is_file() and text in file.read_text()
