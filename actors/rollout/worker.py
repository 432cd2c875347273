"""The rollout worker: samples a chunk of prompts with one version of the policy's weights.

consumes: chunks of Prompts, a source of weights    yields: Rollouts, a report    state: the weights last loaded

The samples of a chunk depend on (weights, prompts, group size, sampling, seed) alone, so a chunk that is issued again
reproduces the lost one on any worker. With an environment a sample is a conversation, and depends on the environment's
answers besides. Left out: the choice of engine, and how a conversation is had (dialogues.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actors import ragged
from actors.config import EnvironmentConfig, ManagerConfig, ReferenceConfig, RolloutConfig, SamplingConfig
from actors.device import assigned_compute
from actors.engine.protocol import Engine, Request
from actors.experience import Prompts, Rollouts
from actors.manager.option_head import OptionHead
from actors.rollout.dialogues import DialogueRunner
from actors.rollout.rows import rollouts_of

if TYPE_CHECKING:
    from actors.rollout.conversations import Environment
    from actors.weights import WeightsSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """The driver's view of a chunk of B samples: scalars, and the length of each sample.

    chunk, attempt: as given, to tell a late answer from the expected one. version, checksum: of the weights that were
    used. action_tokens: sampled by this call. stopped, truncated: samples whose last reply ended by itself, and those
    whose last reply was cut off. seconds: wall-clock.
    """

    chunk: int
    attempt: int
    version: int
    checksum: str
    samples: int
    prompt_tokens: int  # over all samples, shared prompts counted once for each
    action_tokens: int
    lengths: npt.NDArray[np.int32]  # (B,) prompt and action tokens of each sample, in table order
    stopped: int
    truncated: int
    failed: int  # the environment failed in them
    paused: int  # to be gone on with
    seconds: float


KL_ROLLOUTS = 32  # rollouts of a chunk that an estimate of the KL uses


@dataclass(frozen=True, slots=True, kw_only=True)
class StartKL:
    """An estimate of the KL divergence from the policy to its starting model, in nats.

    rollouts: number that it rests on. problem: the reason if there is no estimate.
    """

    rollouts: int
    per_rollout: float
    per_token: float
    problem: str = ""


class RolloutWorker:
    """One worker of the rollout pool."""

    def __init__(
        self,
        *,
        path: str,
        config: RolloutConfig,
        sampling: SamplingConfig,
        seed: int,
        untie_head: bool = False,
        talk: EnvironmentConfig | None = None,
        environment: Callable[[], Environment] | None = None,
        manager: ManagerConfig | None = None,
    ) -> None:
        """Load the model at `path`. Raises ValueError when there is none, or it has no tokenizer.

        untie_head: the published weights have a separate output head (see `load_causal_lm`). environment: makes the
        other side of conversations; `talk`: their limits. Without them a sample is one reply. manager: its
        options and their check; without options there is no manager.
        """
        from actors.engine.torch_engine import TorchEngine  # late, because readers of reports need no torch

        self._engine: Engine = TorchEngine(path, config, assigned_compute(config.gpus).device, untie_head=untie_head)
        self._dialogues = (
            DialogueRunner(environment(), talk or EnvironmentConfig(), self._engine, manager) if environment else None
        )
        self._path = path
        self._config = config
        self._sampling = sampling
        self._seed = seed
        self._version = -1  # none published yet
        self._checksum = ""

    def generate(
        self,
        prompts: pa.Table,
        group_size: int,
        chunk: int,
        attempt: int,
        weights: WeightsSource,
        without: Collection[int] = (),
        pause_after: int = 0,
    ) -> tuple[RolloutReport, pa.Table]:
        """Sample `group_size` completions of every prompt, as Rollouts in the order of their sample ids.

        without: ids of samples that are left out, which does not change the others. pause_after: leave a reply after so
        many tokens, to be gone on with by `go_on`; 0: never.

        Raises ValueError naming the sample whose prompt is empty or fills the model's context, or what is wrong with
        the weights.
        """
        started = time.perf_counter()
        table = self.sample(prompts, group_size, self._sampling, self._seed, weights, without, pause_after)
        return self._report(table, chunk, attempt, started, begun=0), table

    def go_on(
        self,
        begun: pa.Table,
        chunk: int,
        attempt: int,
        weights: WeightsSource,
        without: Collection[int] = (),
        pause_after: int = 0,
    ) -> tuple[RolloutReport, pa.Table]:
        """Go on with the replies of a chunk that were paused, with these weights; the others stay as they are.

        What a reply has so far is read again with these weights, and keeps its log-probs and versions. See `generate`.
        """
        started = time.perf_counter()
        self._load(weights)
        known = Rollouts(begun).without(without).table
        rows = known.filter(pc.equal(known["finish"], "paused")).to_pylist()
        requests = [_resumed(row) for row in rows]
        completions = self._engine.generate(requests, self._sampling, seed=self._seed, pause_after=pause_after)
        table = rollouts_of(
            requests,
            completions,
            [completion.finish for completion in completions],
            [row["metadata"] for row in rows],
            self._version,
            begun_versions=[
                np.array(row["versions"][len(row["versions"]) - len(request.begun) :], np.int32)
                for row, request in zip(rows, requests, strict=True)
            ],
        )
        done = known.filter(pc.not_equal(known["finish"], "paused"))
        table = pa.concat_tables([done, table]).sort_by("sample_id")
        return self._report(table, chunk, attempt, started, begun=_actions(known)), table

    def _report(self, table: pa.Table, chunk: int, attempt: int, started: float, *, begun: int) -> RolloutReport:
        """begun: tokens that earlier calls have sampled."""
        lengths = ragged.lengths(table.column("tokens")).astype(np.int32)
        acted = _actions(table)
        finishes = table.column("finish").to_pylist()
        return RolloutReport(
            chunk=chunk,
            attempt=attempt,
            version=self._version,
            checksum=self._checksum,
            samples=len(lengths),
            prompt_tokens=int(lengths.sum()) - acted,
            action_tokens=acted - begun,
            lengths=lengths,
            stopped=finishes.count("stop"),
            truncated=finishes.count("length"),
            failed=finishes.count("error"),
            paused=finishes.count("paused"),
            seconds=time.perf_counter() - started,
        )

    def sample(
        self,
        prompts: pa.Table,
        group_size: int,
        sampling: SamplingConfig,
        seed: int,
        weights: WeightsSource,
        without: Collection[int] = (),
        pause_after: int = 0,
    ) -> pa.Table:
        """Like `generate`, with sampling and seed of the caller's choice, and without a report; for evaluation."""
        self._load(weights)
        ids = np.asarray(Prompts(prompts).table.column("group_id"))
        values, offsets = ragged.flat(prompts.column("tokens"))
        wanted = [
            (row, int(group), int(group) * group_size + k) for row, group in enumerate(ids) for k in range(group_size)
        ]
        wanted = [(row, group, sample) for row, group, sample in wanted if sample not in without]
        requests = [
            Request(sample_id=sample, group_id=group, prompt=values[offsets[row] : offsets[row + 1]])
            for row, group, sample in wanted
        ]
        metadata = prompts.column("metadata").take(pa.array([row for row, _, _ in wanted], pa.int64()))
        if self._dialogues is None:
            completions = self._engine.generate(requests, sampling, seed=seed, pause_after=pause_after)
            return rollouts_of(requests, completions, [c.finish for c in completions], metadata, self._version)
        head = OptionHead(weights.manager) if weights.manager is not None else None
        had = self._dialogues.run(requests, metadata.to_pylist(), sampling, seed, head)
        return rollouts_of(
            [one.request for one in had],
            [one.completion for one in had],
            [one.finish for one in had],
            [one.metadata for one in had],
            self._version,
            [one.offered for one in had] if head else (),
        )

    def start_kl(self, rollouts: pa.Table) -> StartKL:
        """Estimate the KL to the starting model on a table's first rollouts, for a run without a reference.

        The model at `path` is loaded and freed again, so it takes no memory between two estimates. The samples of later
        calls do not change.
        """
        from actors.models.tokenizer import first_line
        from actors.reference import ReferenceWorker

        few = rollouts.slice(0, KL_ROLLOUTS)
        settings = ReferenceConfig(gpus=self._config.gpus, dtype=self._config.dtype, batch_size=8)
        try:
            start = ReferenceWorker(path=self._path, config=settings, temperature=self._sampling.temperature)
            found = start.logprobs(few, chunk=0, attempt=0)[1]
        # no memory for it beside the engine, or no folder any more: the estimate is only shown
        except (RuntimeError, OSError, ValueError) as error:
            return StartKL(rollouts=0, per_rollout=float("nan"), per_token=float("nan"), problem=first_line(error))
        acted = ragged.flat(few.column("action_mask"))[0]
        nats = (ragged.flat(few.column("logprobs"))[0].astype(np.float64) - ragged.flat(found.column("logprobs"))[0])[
            acted
        ]
        return StartKL(
            rollouts=few.num_rows,
            per_rollout=float(nats.sum() / few.num_rows),
            per_token=float(nats.sum() / max(nats.size, 1)),
        )

    def _load(self, source: WeightsSource) -> None:
        """Load the source's weights, unless the worker has them; all are verified before any is copied.

        The checksum decides, not the version: after a rollback the same version may have other weights.
        """
        if source.checksum != self._checksum:
            weights = source.fetch()
            assert weights.checksum == source.checksum, (
                f"source of {source.checksum} (version {source.version}) gave {weights.checksum}"
            )
            weights.verify()
            self._engine.load_weights(weights.tensors())
        self._version, self._checksum = source.version, source.checksum


def _actions(table: pa.Table) -> int:
    """Sampled tokens of a table of Rollouts."""
    return int(ragged.flat(table.column("action_mask"))[0].sum())


def _resumed(row: dict[str, Any]) -> Request:
    """The request of a reply that was begun; a group of its own, since nobody else has said the same."""
    [start], tokens = row["turn_starts"], np.array(row["tokens"], np.int32)
    logprobs = np.array(row["logprobs"], np.float32)
    return Request(
        sample_id=row["sample_id"],
        group_id=row["group_id"],
        prompt=tokens[:start],
        begun=tokens[start:],
        begun_logprobs=logprobs[start:],
    )
