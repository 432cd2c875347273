"""The rollout worker: samples a chunk of prompts with one version of the policy's weights.

consumes: chunks of Prompts, a source of weights    yields: Rollouts, a report    state: the weights last loaded

What a chunk yields depends on (weights, prompts, group size, sampling, seed) and nothing else, so a re-issued chunk reproduces the
lost one on whichever worker. What was left out: turns and options (a rollout here is one prompt and one completion), and the choice of engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors import ragged
from actors.config import RolloutConfig, SamplingConfig
from actors.device import assigned_compute
from actors.experience import Prompts, Rollouts
from actors.generation.engine import Completion, Engine, Request

if TYPE_CHECKING:
    from actors.weights import Weights


class WeightsSource(Protocol):
    """A handle on one published version: cheap to pass along, fetched only by a worker that holds other weights."""

    @property
    def version(self) -> int: ...

    @property
    def checksum(self) -> str: ...

    def fetch(self) -> Weights:
        """The weights of that version and checksum, within a deadline of the source's own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What the driver learns of a chunk: scalars, and one length a sample. B samples.

    chunk, attempt: as given, so that a late answer can be told from the one awaited.
    version, checksum: of the weights that sampled it. stopped, truncated: samples that ended by themselves, or for want of room.
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
    seconds: float


class RolloutWorker:
    """One worker of the rollout pool."""

    def __init__(self, *, path: str, config: RolloutConfig, sampling: SamplingConfig, seed: int, untie_head: bool = False) -> None:
        """Load the model at `path`. Raises ValueError when there is none, or it has no tokenizer.

        untie_head: the published weights have an output head of their own (see `load_causal_lm`).
        """
        from actors.generation.torch_engine import TorchEngine  # late: whoever only reads reports needs no torch

        self._engine: Engine = TorchEngine(path, config, assigned_compute(config.gpus).device, untie_head=untie_head)
        self._sampling = sampling
        self._seed = seed
        self._version = -1  # none published yet
        self._checksum = ""

    def generate(self, prompts: pa.Table, group_size: int, chunk: int, attempt: int, weights: WeightsSource) -> tuple[RolloutReport, pa.Table]:
        """`group_size` samples of every prompt, as Rollouts in the order of their sample ids.

        Raises ValueError naming the sample whose prompt is empty or fills the model's context, or what is wrong with the weights.
        """
        started = time.perf_counter()
        table = self.sample(prompts, group_size, self._sampling, self._seed, weights)
        lengths = ragged.lengths(table.column("tokens")).astype(np.int32)
        starts = ragged.flat(table.column("turn_starts"))[0]
        stopped = table.column("finish").to_pylist().count("stop")
        report = RolloutReport(
            chunk=chunk,
            attempt=attempt,
            version=self._version,
            checksum=self._checksum,
            samples=len(lengths),
            prompt_tokens=int(starts.sum()),
            action_tokens=int(lengths.sum() - starts.sum()),
            lengths=lengths,
            stopped=stopped,
            truncated=len(lengths) - stopped,
            seconds=time.perf_counter() - started,
        )
        return report, table

    def sample(self, prompts: pa.Table, group_size: int, sampling: SamplingConfig, seed: int, weights: WeightsSource) -> pa.Table:
        """The same with sampling and seed of the caller's choice, as evaluation wants it; Rollouts without a report."""
        self._load(weights)
        ids = np.asarray(Prompts(prompts).table.column("group_id"))
        values, offsets = ragged.flat(prompts.column("tokens"))
        requests = [
            Request(sample_id=int(group) * group_size + k, group_id=int(group), prompt=values[offsets[row] : offsets[row + 1]])
            for row, group in enumerate(ids)
            for k in range(group_size)
        ]
        metadata = prompts.column("metadata").take(pa.array(np.repeat(np.arange(len(ids)), group_size)))
        return _rollouts(requests, self._engine.generate(requests, sampling, seed=seed), metadata, self._version)

    def _load(self, source: WeightsSource) -> None:
        """Swap to the source's weights: all of them are verified before any is copied, and only then does the worker say it has them.

        The checksum decides, not the version: after a rollback the same version may come again with other weights.
        """
        if source.checksum != self._checksum:
            weights = source.fetch()
            assert weights.checksum == source.checksum, f"source of {source.checksum} (version {source.version}) gave {weights.checksum}"
            weights.verify()
            self._engine.load_weights(weights.tensors())
        self._version, self._checksum = source.version, source.checksum


def _rollouts(requests: list[Request], completions: list[Completion], metadata: pa.ChunkedArray, version: int) -> pa.Table:
    """One row a request, in order. N is the sum of all lengths."""
    parts = [part for r, c in zip(requests, completions, strict=True) for part in (r.prompt, c.tokens)]
    starts = np.array([len(r.prompt) for r in requests], np.int32)
    lengths = starts + np.array([len(c.tokens) for c in completions], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    action = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) >= np.repeat(starts, lengths)  # (N,)
    logprobs = np.zeros(offsets[-1], np.float32)
    logprobs[action] = np.concatenate([c.logprobs for c in completions])
    rows = np.arange(len(requests) + 1)
    none = np.zeros(len(requests) + 1, np.int32)
    return Rollouts.of(
        {
            "sample_id": np.array([r.sample_id for r in requests], np.int64),
            "group_id": np.array([r.group_id for r in requests], np.int64),
            "tokens": ragged.unflat(np.concatenate(parts), offsets, pa.int32()),
            "action_mask": ragged.unflat(action, offsets, pa.bool_()),
            "logprobs": ragged.unflat(logprobs, offsets, pa.float32()),
            "versions": ragged.unflat(np.where(action, version, -1).astype(np.int32), offsets, pa.int32()),
            "turn_starts": ragged.unflat(starts, rows, pa.int32()),
            "option": ragged.unflat(np.zeros(0, np.int16), none, pa.int16()),
            "option_logprobs": ragged.unflat(np.zeros(0, np.float32), none, pa.float32()),
            "finish": [c.finish for c in completions],
            "metadata": metadata,
        }
    ).table
