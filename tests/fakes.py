"""Workers that need no model: real actors in real pools and gangs, with made-up tables of the declared schemas.

They let a test see what the driver does with many tokens, with failures and with wrong answers, in seconds; hence what
needs torch is imported late, and only the learner needs it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.experience import Prompts, Rollouts, Scores, TokenLogprobs
from actors.reward.worker import RewardReport, flat_groups
from actors.rollout.worker import RolloutReport, StartKL
from cluster.storage import Folder, StoredFile, files_in
from pipeline.evaluation.examiner import Examiner

if TYPE_CHECKING:
    from actors.learner.learner import LearnerReady, ShardReport, UpdatePlan, UpdateReport, VersionReport
    from actors.weights import Manifest


def rollouts(sample_ids: np.ndarray[Any, Any], group_size: int, length: int, version: int) -> Rollouts:
    """Rollouts of 2 prompt tokens and `length` sampled ones, which are a function of the sample's id."""
    rows, width = len(sample_ids), 2 + length
    offsets = np.arange(rows + 1) * width
    acted = np.tile(np.arange(width) >= 2, rows)
    tokens = (np.repeat(sample_ids, width) * 31 + np.tile(np.arange(width), rows)) % 97
    one, none = np.arange(rows + 1), np.zeros(rows + 1, np.int32)
    return Rollouts.of(
        {
            "sample_id": sample_ids,
            "group_id": sample_ids // group_size,
            "tokens": ragged.unflat(tokens.astype(np.int32), offsets, pa.int32()),
            "action_mask": ragged.unflat(acted, offsets, pa.bool_()),
            "logprobs": ragged.unflat(np.where(acted, -1.5, 0).astype(np.float32), offsets, pa.float32()),
            "versions": ragged.unflat(np.where(acted, version, -1).astype(np.int32), offsets, pa.int32()),
            "turn_starts": ragged.unflat(np.full(rows, 2, np.int32), one, pa.int32()),
            "option": ragged.unflat(np.zeros(0, np.int16), none, pa.int16()),
            "option_logprobs": ragged.unflat(np.zeros(0, np.float32), none, pa.float32()),
            "finish": ["length"] * rows,
            "metadata": ["{}"] * rows,
        }
    )


def _once(marker: str) -> bool:
    """True for the first process to ask: a file is its memory."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class FakeRollout:
    """Samples of a fixed length. die_at: a file; the first worker to generate the second chunk creates it and dies.
    deadly: samples that nobody survives. seconds: how long a chunk takes. straggler: a file; the first worker creates
    it and takes three times as long.
    """

    def __init__(
        self,
        length: int,
        die_at: str = "",
        deadly: tuple[int, ...] = (),
        seconds: float = 0.0,
        straggler: str = "",
    ) -> None:
        self.length = length
        self.seconds = seconds * (3 if straggler and _once(straggler) else 1)
        self.die_at = die_at
        self.deadly = deadly

    def generate(
        self,
        prompts: pa.Table,
        group_size: int,
        chunk: int,
        attempt: int,
        weights: Any,
        without: Collection[int] = (),
        pause_after: int = 0,
    ) -> tuple[RolloutReport, pa.Table]:
        groups = Prompts(prompts).table["group_id"].to_numpy()
        if self.die_at and chunk == 1 and _once(self.die_at):
            os._exit(1)
        ids = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        ids = ids[~np.isin(ids, list(without))]
        if np.isin(ids, self.deadly).any():
            os._exit(1)
        time.sleep(self.seconds)
        table = rollouts(ids, group_size, self.length, weights.version).table
        report = RolloutReport(
            chunk=chunk,
            attempt=attempt,
            version=weights.version,
            checksum="",
            samples=len(ids),
            prompt_tokens=2 * len(ids),
            action_tokens=self.length * len(ids),
            lengths=np.full(len(ids), 2 + self.length, np.int32),
            stopped=0,
            truncated=len(ids),
            failed=0,
            paused=0,
            seconds=0.001,
        )
        return report, table

    def start_kl(self, table: pa.Table) -> StartKL:
        return StartKL(rollouts=len(Rollouts(table)), per_rollout=0.75, per_token=0.25)


class FakeReward:
    """Scores sample s with s % 5, those of the groups `flat` with 1. fail: sample ids that never get a reward.

    hang_at: as FakeRollout.die_at, but it sleeps, over chunk hang_chunk. lose_at: likewise, but it reports an input as
    lost. deadly: as FakeRollout's.
    """

    def __init__(
        self,
        fail: tuple[int, ...] = (),
        hang_at: str = "",
        hang_chunk: int = 1,
        flat: tuple[int, ...] = (),
        lose_at: str = "",
        deadly: tuple[int, ...] = (),
    ) -> None:
        self.fail, self.flat = fail, flat
        self.hang_at, self.hang_chunk, self.lose_at = hang_at, hang_chunk, lose_at
        self.deadly = deadly

    def score(
        self, table: pa.Table, chunk: int, attempt: int, without: Collection[int] = (), within_s: float = math.inf
    ) -> tuple[RewardReport, pa.Table]:
        if self.hang_at and chunk == self.hang_chunk and _once(self.hang_at):
            time.sleep(600)
        if self.lose_at and chunk == self.hang_chunk and _once(self.lose_at):
            from ray.exceptions import OwnerDiedError

            raise OwnerDiedError("00" * 28, b"", "")
        ids, groups = (Rollouts(table).table[name].to_numpy() for name in ("sample_id", "group_id"))
        left_out = np.isin(ids, list(without))
        if np.isin(ids[~left_out], self.deadly).any():
            os._exit(1)
        ok = ~np.isin(ids, self.fail) & ~left_out
        rewards = np.where(ok, np.where(np.isin(groups, self.flat), 1, ids % 5), np.nan).astype(np.float32)
        scores = Scores.of(
            {
                "sample_id": ids,
                "reward": rewards,
                "turn_rewards": ragged.unflat(np.zeros(0, np.float32), np.zeros(len(ids) + 1, np.int32), pa.float32()),
                "status": np.where(ok, "ok", "error").tolist(),
                "detail": np.where(ok, "", "told to fail").tolist(),
            }
        )
        report = RewardReport(
            chunk=chunk,
            attempt=attempt,
            samples=len(ids),
            ok=int(ok.sum()),
            failed=int((~ok).sum()),
            mean=0.0,
            seconds=0.001,
            failures={int(s): "error: told to fail" for s in ids[~ok & ~left_out]},
            flat_groups=flat_groups(groups.tolist(), rewards.tolist()),
        )
        return report, scores.table


class FakeReference:
    """Finds every token as likely as the sampler did. deadly: as FakeRollout's."""

    def __init__(self, deadly: tuple[int, ...] = ()) -> None:
        self.deadly = deadly

    def logprobs(
        self, table: pa.Table, chunk: int, attempt: int, without: Collection[int] = ()
    ) -> tuple[None, pa.Table]:
        kept = Rollouts(table).without(without).table
        if np.isin(kept["sample_id"].to_numpy(), self.deadly).any():
            os._exit(1)
        return None, kept.select(TokenLogprobs.schema.names)


class FakeLearner:
    """Takes experience and learns nothing; writes down which samples it was given.

    It dies at step die_step: once when die_at names a file, else every time.

    die_in: methods, "__init__" among them, in which it dies, each once. never_starts: it always dies in its
    constructor, or in "connect" raises instead. seconds: how long an update takes.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        seen: str,
        timeout_s: float,
        die_at: str = "",
        die_step: int = -1,
        model: str = "",
        die_in: tuple[str, ...] = (),
        never_starts: str = "",
        seconds: float = 0.0,
    ) -> None:
        self.seconds = seconds
        self.seen = Path(seen)
        self.die_at, self.die_step = die_at, die_step
        self.die_in, self.never_starts = die_in, never_starts
        self.model = model
        self.steps = 0
        self._pass("__init__")

    def _pass(self, method: str) -> None:
        if method == self.never_starts:
            with self.seen.with_name("starts").open("a") as file:
                file.write(f"{method}\n")
            if method == "connect":
                raise ValueError("a model that cannot be loaded")
            os._exit(1)
        if method in self.die_in and _once(f"{self.seen}-{method}"):
            os._exit(1)

    def connect(self, address: str, port: int) -> LearnerReady:
        self._pass("connect")
        from actors.learner.learner import LearnerReady

        return LearnerReady(parameters=1, trainable=1, device="cpu", dtype="float32", context=64, checksum=self.model)

    def infer(self, *parts: pa.Table) -> tuple[None, pa.Table]:
        """It finds every sampled token a quarter of a nat likelier than the sampler did."""
        table = Rollouts.concat([Rollouts(part) for part in parts]).table
        logprobs, offsets = ragged.flat(table["logprobs"])
        own = ragged.unflat(np.where(logprobs != 0, logprobs + np.float32(0.25), 0), offsets, pa.float32())
        return None, TokenLogprobs.of({"sample_id": table["sample_id"].to_numpy(), "logprobs": own}).table

    def update(self, experience: pa.Table, plan: UpdatePlan) -> UpdateReport:
        if plan.step == self.die_step and (not self.die_at or _once(self.die_at)):
            os._exit(1)
        from actors.learner.learner import UpdateReport

        assert plan.step == self.steps, f"asked to learn step {plan.step} after {self.steps} steps"
        self.steps += 1
        time.sleep(self.seconds)
        with self.seen.open("a") as file:
            file.write("".join(f"{s}\n" for s in experience["sample_id"].to_pylist()))
        return UpdateReport(
            samples=experience.num_rows,
            updates=1,
            skipped=0,
            loss=0.0,
            grad_norm=0.0,
            grad_norm_max=0.0,
            learning_rate=0.0,
            statistics={"entropy": 0.0},
            ratio_deviation=0.0,
            logprob_gap=0.0,
            logprob_gap_max=0.0,
            action_tokens=1,
            seconds=0.001,
        )

    def publish(self, version: int, dtype: str) -> tuple[Manifest, None]:
        self._pass("publish")
        from actors.weights import Manifest

        return Manifest(names=(), shapes=(), dtype="float32", offsets=(), checksum=f"version {version}"), None

    def keep_version(self, folder: str, source: Any) -> StoredFile:
        """A version is known by its checksum alone."""
        return Folder(folder).write_file(
            f"version-{source.version}.safetensors", lambda path: path.write_text(source.checksum)
        )

    def read_version(self, folder: str, name: str, version: int) -> tuple[VersionReport, None]:
        from actors.learner.learner import VersionReport

        return VersionReport(version=version, checksum=Folder(folder).read_text(name), manager=None), None

    def save(self, folder: str) -> ShardReport:
        """Its whole state is how many steps it has learned."""
        from actors.learner.learner import ShardReport

        return ShardReport(
            file=Folder(folder).write_file("rank-0.safetensors", lambda path: path.write_text(str(self.steps))),
            seconds=0.0,
        )

    def restore(self, folder: str, files: list[str]) -> None:
        self._pass("restore")
        self.steps = int(Folder(folder).read_text(files[0]))

    def export(self, folder: str, checked: bool) -> None:
        self._pass("export")
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text(str(self.steps))

    def written(self, folder: str) -> tuple[StoredFile, ...]:
        return files_in(Path(folder))


class DeadlyExaminer(Examiner):
    """A real one that dies over prompt 11 as the policy, the policy's second reply to prompt 10, and demonstration 19:
    the last ones of their chunks, which are found with the fewest deaths.
    """

    FIRST = (1 << 40) + 4  # group id of the first prompt of an evaluation that has 20

    def reply(self, model: str, prompts: pa.Table, samples: int, without: Collection[int] = ()) -> tuple[int, pa.Table]:
        asked = Prompts(prompts).without(without, "group_id").table["group_id"].to_pylist()
        if model.endswith("policy") and self.FIRST + 11 in asked:
            os._exit(1)
        return super().reply(model, prompts, samples, without)

    def logprobs(
        self, model: str, rollouts: pa.Table, temperature: float, without: Collection[int] = ()
    ) -> tuple[int, pa.Table]:
        read = Rollouts(rollouts).without(without).table["sample_id"].to_pylist()
        if 19 in read or (self.FIRST + 10) * 2 + 1 in read:
            os._exit(1)
        return super().logprobs(model, rollouts, temperature, without)
