"""What tests of conversations share: their experience assembled by hand, and a recipe of whole runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.config import (
    CriticConfig,
    EnvironmentConfig,
    LearnerConfig,
    ManagerConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
)
from actors.experience import Rollouts, Scores, TokenValues
from actors.manager.turns import TurnAdvantages
from cluster.config import ClusterConfig
from pipeline.algorithms.base import Algorithm
from pipeline.algorithms.ppo import PPO
from pipeline.algorithms.shaping import ShapingConfig
from pipeline.assembly.assembly import Assembly, assemble
from pipeline.assembly.report import AssemblyReport
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig, EvaluationConfig, FinetuneConfig, ModelConfig
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.observer import Observer
from run_helpers import pid_of
from talk_helpers import held

Talk = dict[str, Any]


def talk(
    *turns: list[float],
    end: str = "terminated",
    rewards: list[float] | None = None,
    checks: list[float] | None = None,
) -> Talk:
    """A conversation by the values of its action tokens: two tokens of a prompt, and two of the environment after a
    turn, and where it was broken off one more, whose value is 7.
    """
    acted, values, starts = [False, False], [9.0, 9.0], []
    for number, own in enumerate(turns):
        starts.append(len(acted))
        acted += [True] * len(own)
        values += own
        if number + 1 < len(turns) or end != "terminated":
            acted += [False, False]
            values += [9.0, 9.0]
    if end in ("truncated", "max_turns"):
        acted, values = [*acted, False], [*values, 7.0]
    rewards = rewards or [float(number) for number in range(len(turns))]
    return {"acted": acted, "values": values, "starts": starts, "rewards": rewards, "end": end, "checks": checks}


def assembled(
    algorithm: Algorithm,
    *talks: Talk,
    kl_coef: float = 0.0,
    shaping: ShapingConfig | None = None,
    noise: float = 0.0,
    are_replies: bool = False,
    advantages: list[list[float]] | None = None,
    check_coef: float = 0.0,
    log_q: list[list[float]] | None = None,
    offered: list[list[str]] | None = None,
    diversity_coef: float = 0.0,
) -> tuple[AssemblyReport, list[dict[str, Any]]]:
    """noise: added to what is said of the environment's tokens. are_replies: no environment has rewarded them.

    advantages: a manager's, of each turn. log_q: its discriminator's. offered: the options on offer, letters of "abc".
    """
    ids = list(range(len(talks)))
    spoilt = [np.where(one["acted"], 0.0, noise).astype(np.float32) for one in talks]
    logprobs = [
        np.where(one["acted"], -0.5, 0).astype(np.float32) + more for one, more in zip(talks, spoilt, strict=True)
    ]
    records = [
        {
            "turns": [
                {"reward": r, "line": "x", "info": {"good": r > 0}}
                | ({"option": "a", "check": one["checks"][number]} if one["checks"] else {})
                for number, r in enumerate(one["rewards"])
            ],
            "end": one["end"],
            "failure": "",
        }
        for one in talks
    ]
    rollouts = Rollouts.of(
        {
            "sample_id": ids,
            "group_id": [0] * len(ids),
            "tokens": [np.arange(len(one["acted"]), dtype=np.int32) for one in talks],
            "action_mask": [one["acted"] for one in talks],
            "logprobs": logprobs,
            "versions": [[0] * len(one["acted"]) for one in talks],
            "turn_starts": [one["starts"] for one in talks],
            "option": [[] for _ in talks],
            "option_logprobs": [[] for _ in talks],
            "options_offered": [[name in turn for turn in own for name in "abc"] for own in offered or [[]] * len(ids)],
            "finish": ["stop"] * len(ids),
            "metadata": ["{}" if are_replies else json.dumps({"conversation": record}) for record in records],
        }
    ).table
    scores = Scores.of(
        {
            "sample_id": ids,
            "reward": [sum(one["rewards"]) for one in talks],
            "turn_rewards": [[] if are_replies else one["rewards"] for one in talks],
            "status": ["ok"] * len(ids),
            "detail": [""] * len(ids),
        }
    ).table
    values = [np.array(one["values"], np.float32) for one in talks]
    table = TokenValues.of({"sample_id": ids, "values": values}).table
    manager = ManagerConfig(options=tuple("abc"), check="x:y", check_coef=check_coef, diversity_coef=diversity_coef)
    how = Assembly(
        algorithm=algorithm,
        kl_coef=kl_coef,
        shaping=shaping or ShapingConfig(),
        max_new_tokens=8,
        conversations=not are_replies,
        manager=manager if advantages else ManagerConfig(),
    )
    report, experience = assemble(
        how,
        ids,
        (1, 1, 0, int(algorithm.needs_critic), 0, int(advantages is not None)),
        rollouts,
        scores,
        *([table] if algorithm.needs_critic else []),
        *([advised(advantages, log_q)] if advantages is not None else []),
    )
    return report, experience.to_pylist()


def assert_same_in_every_process(imports: str, value: str) -> None:
    """That a Python expression has one repr, whatever the order in which sets and hashes of strings come out."""
    code = f"{imports}; from hashlib import sha256; print(sha256(repr({value}).encode()).hexdigest())"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def acting(row: dict[str, Any], name: str) -> list[float]:
    return [value for value, acted in zip(row[name], row["action_mask"], strict=True) if acted]


def advised(advantages: list[list[float]], log_q: list[list[float]] | None = None) -> pa.Table:
    """A manager's advantages of the turns of conversations 0, 1, ..., and what its discriminator says of them."""
    rows = [(sample, turn, value) for sample, own in enumerate(advantages) for turn, value in enumerate(own)]
    return TurnAdvantages.of(
        {
            "sample_id": [row[0] for row in rows],
            "turn": [row[1] for row in rows],
            "advantage": [row[2] for row in rows],
            "value": [0.0] * len(rows),
            "log_q": list(chain.from_iterable(log_q)) if log_q else [0.0] * len(rows),
        }
    ).table


def recipe(model: Path, environment: str = "Mirror", **changes: Any) -> RunConfig:
    config = RunConfig(
        task="talk_helpers:Chatter",
        steps=4,
        commit_every=2,
        model=ModelConfig(path=str(model)),
        finetune=FinetuneConfig(epochs=0),
        environment=EnvironmentConfig(name=f"talk_helpers:{environment}", max_turns=3),
        batch=BatchConfig(prompts=8, group_size=2, epochs=2, max_prompt_tokens=16),
        algorithm=PPO(kl_coef=0.01),
        sampling=SamplingConfig(max_new_tokens=8, stop=("e", "\n")),
        rollout=RolloutConfig(chunk_size=8, slots=8),
        reward=RewardConfig(max_failed=0.5),
        policy=LearnerConfig(learning_rate=1e-3),
        critic=CriticConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(prompts=4, samples=2, best_of=2),
        cluster=ClusterConfig(cpus_per_bundle=1, peer_timeout_s=60),
    )
    return config.model_copy(update=changes)


@contextmanager
def killed_in_conversation(run_dir: Path, who: str, after_step: int) -> Iterator[None]:
    """Inside, a process of a run in an environment that is `Held` is killed while the conversations of the step after
    that one are in their second turn.
    """
    write, killings = Observer.step, list[threading.Thread]()

    def kill() -> None:
        while not (held() / "waits").is_file():
            time.sleep(0.02)
        os.kill(pid_of(run_dir, who), signal.SIGKILL)
        shutil.rmtree(held())

    def step_and_kill(self: Observer, metrics: StepMetrics) -> None:
        write(self, metrics)
        if metrics.step == after_step and not killings:
            held().mkdir()
            killings.append(threading.Thread(target=kill, daemon=True))
            killings[0].start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "step", step_and_kill)
        try:
            yield
        finally:
            shutil.rmtree(held(), ignore_errors=True)
    killings[0].join(60)
    assert not killings[0].is_alive(), "nothing was killed"
