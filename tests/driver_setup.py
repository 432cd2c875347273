"""A driver over fake workers, for tests of the driver itself."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.session import Session
from fakes import FakeLearner, FakeReward, FakeRollout
from pipeline.algorithms.reinforce import Reinforce
from pipeline.assemble import Assembler
from pipeline.config import BatchConfig, RewardConfig, RolloutConfig, RunConfig
from pipeline.driver import Driver
from pipeline.observe.observer import Observer
from pipeline.observe.progress import Progress
from pipeline.roles import Roles, Stage, demands, place
from pipeline.run_folder import RunFolder
from pipeline.tasks.task import PromptStream, PromptText


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


def config(*, prompts: int = 12, group_size: int = 1, chunk: int = 4, steps: int = 3, commit_every: int = 10, **cluster: Any) -> RunConfig:
    return RunConfig(
        task="walks",
        steps=steps,
        commit_every=commit_every,
        batch=BatchConfig(prompts=prompts, group_size=group_size),
        algorithm=Reinforce(),
        rollout=RolloutConfig(chunk_size=chunk, workers=2),
        reward=RewardConfig(max_failed=0.2),
        cluster=ClusterConfig(cpus_per_bundle=1, **cluster),
    )


@contextmanager
def fake_driver(
    session: Session,
    run: RunConfig,
    run_dir: Path,
    *,
    length: int = 3,
    die_at: str = "",
    fail: tuple[int, ...] = (),
    flat: tuple[int, ...] = (),
    hang_at: str = "",
    hang_chunk: int = 1,
    learner: Mapping[str, Any] = {},
) -> Iterator[Driver]:
    """A driver whose rollout, reward and policy actors are fakes; everything else is real. A folder with a run in it is gone on with."""
    known = (run_dir / "history.json").is_file()
    placed = session.place(place(run, demands(run)))
    stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=run.cluster.call_timeout_s)
    roles = Roles(
        rollout=stage.pool("rollout", run.rollout.workers, run, FakeRollout, length=length, die_at=die_at),
        reward=stage.pool("reward", run.reward.workers, run, FakeReward, fail=fail, flat=flat, hang_at=hang_at, hang_chunk=hang_chunk),
        reference=None,
        critic=None,
        policy=stage.gang("policy", 1, run, FakeLearner, seen=str(run_dir / "seen"), **learner),
        assembler=stage.beside("assembler", run, Assembler),
    )
    stream = PromptStream([PromptText(text=c * 2, metadata={}) for c in "abcdef"], Letters(), seed=0, max_prompt_tokens=4, context=64, max_new_tokens=4)
    try:
        roles.start()
        with (
            RunFolder.open(run_dir) if known else RunFolder.create(run_dir, run) as folder,
            Observer(run_dir, Progress(Console(file=io.StringIO()))) as observer,
        ):
            driver = Driver(run, folder, roles, stage, stream, observer)
            if known:
                commit = driver.checkpoints.latest(observer.remark)
                folder.begin(run, commit.state.step if commit else 0)
                driver.restore(commit)
            yield driver
    finally:
        roles.close()
        placed.remove()
