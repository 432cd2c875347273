"""The experience buffer: scored chunks that wait to be trained on.

It is a view of the ledger with references to the data: the driver holds object references, ids and versions here, never
a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.samples.chunk import State
from pipeline.samples.ledger import Ledger

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's scored chunks, in sample order."""

    step: int
    chunks: tuple[int, ...]
    emptied: tuple[int, ...]  # chunks that end with the step, without any sample to train on
    rollouts: tuple[ObjectRef, ...]  # one Rollouts table a chunk
    scores: tuple[ObjectRef, ...]  # one Scores table a chunk
    sample_ids: tuple[int, ...]  # to train on; the tables may hold others, which are quarantined
    oldest: int = 0  # version of the oldest weights that may have sampled them
    staleness: int = 0  # by how many versions these are behind the weights that are trained


class Buffer:
    """Consumes: scored chunks. Waits for: whole groups, a step's worth. Unblocked by: the reward pool.

    Step t trains version t. In logical time its samples are of version max(0, t - max_staleness), never of another one;
    with the schedule `freshest` their tokens are of that version or of newer ones.
    """

    def __init__(self, ledger: Ledger, samples: int, max_staleness: int) -> None:
        self.ledger = ledger
        self.samples = samples
        self.max_staleness = max_staleness
        self._rollouts: dict[int, ObjectRef] = {}
        self._scores: dict[int, ObjectRef] = {}

    def put_rollouts(self, chunk: int, rollouts: ObjectRef) -> None:
        self._rollouts[chunk] = rollouts

    def put_scores(self, chunk: int, scores: ObjectRef) -> None:
        self._scores[chunk] = scores

    def rollouts(self, chunk: int) -> ObjectRef:
        return self._rollouts[chunk]

    def forget(self, chunk: int) -> None:
        """Drop the references of a chunk that has ended, or is generated again."""
        self._rollouts.pop(chunk, None)
        self._scores.pop(chunk, None)

    def close(self, batch: Batch, trained: int) -> None:
        """End the chunks of a batch, whose samples were trained on; trained: the learner's number of samples."""
        ended = (*batch.chunks, *batch.emptied)
        self.ledger.close(ended, trained)
        for chunk in ended:
            self.forget(chunk)

    def sampled_by(self, step: int) -> int:
        """The version of the weights that are the newest when the samples of a step are issued."""
        return max(0, step - self.max_staleness)

    def is_ready(self, step: int) -> bool:
        """Whether all chunks of a step are scored and fill it."""
        chunks = self.ledger.of_step(step)
        scored = all(c.state is State.SCORED for c in chunks)
        return scored and sum(len(c.trainable()) for c in chunks) >= self.samples

    def take(self, step: int, version: int) -> Batch:
        """The batch of a step. version: of the present weights."""
        assert self.is_ready(step), f"step {step} was taken before it was full"
        ready = self.ledger.of_step(step)
        chunks = [c for c in ready if c.trainable()]
        assert all(c.version == self.sampled_by(step) for c in ready), (
            f"step {step}: must be sampled by version {self.sampled_by(step)}, got {sorted({c.version for c in ready})}"
        )
        return Batch(
            step=step,
            chunks=tuple(c.number for c in chunks),
            emptied=tuple(c.number for c in ready if not c.trainable()),
            rollouts=tuple(self._rollouts[c.number] for c in chunks),
            scores=tuple(self._scores[c.number] for c in chunks),
            sample_ids=tuple(s for c in chunks for s in c.trainable()),
            oldest=self.sampled_by(step),
            staleness=version - self.sampled_by(step),
        )
