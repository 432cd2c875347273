"""A driver over fake workers, for tests of the driver itself."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.config import RewardConfig, RolloutConfig
from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.placement import place
from cluster.runtime import Runtime
from cluster.session import Session
from fakes import FakeLearner, FakeReference, FakeReward, FakeRollout
from pipeline.algorithms.reinforce import Reinforce
from pipeline.assembly.assembler import Assembler
from pipeline.config.run_config import RunConfig
from pipeline.config.sections import BatchConfig
from pipeline.encoding.prompt_stream import PromptStream
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.driver import Driver
from pipeline.loop.wiring import Roles, demands
from pipeline.observe.observer import Observer
from pipeline.observe.progress import Progress
from pipeline.tasks.task import PromptText
from run_helpers import new_run


class Letters:
    """A `TextCodec` of one token a letter, as far as prompts need it."""

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


def config(
    *, prompts: int = 12, group_size: int = 1, chunk: int = 4, steps: int = 3, commit_every: int = 10, **cluster: Any
) -> RunConfig:
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


@contextlib.contextmanager
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
    lose_at: str = "",
    deadly_to_generate: tuple[int, ...] = (),
    deadly_to_score: tuple[int, ...] = (),
    deadly_to_reference: tuple[int, ...] = (),
    rollout: Mapping[str, Any] = {},
    learner: Mapping[str, Any] = {},
) -> Iterator[Driver]:
    """A driver whose rollout, reward, reference and policy actors are fakes; everything else is real.

    A folder with a run in it is gone on with.
    """
    known = (run_dir / "history.json").is_file()
    with contextlib.ExitStack() as undo:
        placed = session.place(place(run.cluster, demands(run)))
        undo.callback(placed.remove)  # whatever fails: a later test needs the seats
        runtime = Runtime(placed=placed, pump=Pump(), fingerprint=session.fingerprint, config=run.cluster)
        roles = Roles(
            rollout=runtime.pool(
                "rollout",
                run.rollout.workers,
                FakeRollout,
                reads=[],
                length=length,
                die_at=die_at,
                deadly=deadly_to_generate,
                **rollout,
            ),
            reward=runtime.pool(
                "reward",
                run.reward.workers,
                FakeReward,
                reads=[],
                fail=fail,
                flat=flat,
                hang_at=hang_at,
                hang_chunk=hang_chunk,
                lose_at=lose_at,
                deadly=deadly_to_score,
            ),
            reference=runtime.pool(
                "reference", run.reference.workers, FakeReference, reads=[], deadly=deadly_to_reference
            )
            if run.algorithm.needs_reference
            else None,
            critic=None,
            policy=runtime.gang("policy", 1, FakeLearner, seen=str(run_dir / "seen"), **learner),
            assembler=runtime.beside("assembler", Assembler),
        )
        letters: Any = Letters()
        stream = PromptStream(
            [PromptText(text=c * 2, metadata={}) for c in "abcdef"],
            letters,
            seed=0,
            max_prompt_tokens=4,
            context=64,
            max_new_tokens=4,
        )
        undo.callback(roles.close)
        roles.start()
        folder = undo.enter_context(RunFolder.open(run_dir) if known else new_run(run_dir, run))
        observer = undo.enter_context(Observer(run_dir, Progress(Console(file=io.StringIO()))))
        driver = Driver(run, folder, roles, runtime, stream, observer)
        if known:
            commit = driver.checkpoints.latest(observer.remark)
            folder.begin(run, commit.state.step if commit else 0)
        driver.begin(commit if known else None)
        yield driver
