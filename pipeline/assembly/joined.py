"""The tables of a step, joined by sample: they come by chunk or by rank, in any order.

B samples; T tokens of all samples, flat, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors import ragged
from actors.experience import Rollouts, Scores, TokenLogprobs, TokenValues

Counts = tuple[int, ...]
Typed = TypeVar("Typed", Rollouts, Scores, TokenLogprobs, TokenValues)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """The tables of a step as they came, each list in any order; an empty list where the algorithm needs none."""

    rollouts: Sequence[pa.Table]
    scores: Sequence[pa.Table]
    reference: Sequence[pa.Table]
    values: Sequence[pa.Table]
    proximal: Sequence[pa.Table]
    turn_advantages: Sequence[pa.Table] = ()

    @classmethod
    def of(cls, tables: Sequence[pa.Table], counts: Counts) -> StepTables:
        """Part a flat list. counts: how many of the tables are of each kind, in the order of the fields."""
        assert len(tables) == sum(counts), (len(tables), counts)
        parts = [tables[end - count : end] for end, count in zip(np.cumsum(counts), counts, strict=True)]
        return cls(**dict(zip((field.name for field in fields(cls)), parts, strict=False)))


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedStep:
    """A step's tables in the order of the samples to train on, and their token columns, flat."""

    rollouts: pa.Table  # B rows
    scores: pa.Table  # B rows
    offsets: ragged.Array  # (B + 1,), of the tokens
    acted: ragged.Array  # (T,), whether the policy sampled the token
    reference: ragged.Array  # (T,), 0 without a reference
    values: ragged.Array  # (T,), 0 without a critic
    proximal: ragged.Array  # (T,), the log-probs they were sampled with, unless computed again
    has_reference: bool
    turn_advantages: pa.Table | None  # the manager's, if there is one

    @classmethod
    def of(cls, parts: StepTables, sample_ids: Sequence[int]) -> JoinedStep:
        """Join the tables by sample_id, in the order of `sample_ids`."""
        wanted = np.asarray(sample_ids, np.int64)
        rollouts = _in_order(Rollouts, parts.rollouts, wanted)
        scores = _in_order(Scores, parts.scores, wanted)
        assert pc.all(pc.equal(scores["status"], "ok"), min_count=0).as_py(), (
            "Scores: a sample without a reward is about to be trained on"
        )
        tokens, offsets = ragged.flat(rollouts["tokens"])

        def column(kind: type[Typed], tables: Sequence[pa.Table], name: str, instead: ragged.Array) -> ragged.Array:
            return _aligned(_in_order(kind, tables, wanted)[name], offsets) if tables else instead

        none = np.zeros(tokens.size, np.float32)
        sampled = ragged.flat(rollouts["logprobs"])[0]
        return cls(
            rollouts=rollouts,
            scores=scores,
            offsets=offsets,
            acted=ragged.flat(rollouts["action_mask"])[0],
            reference=column(TokenLogprobs, parts.reference, "logprobs", none),
            values=column(TokenValues, parts.values, "values", none),
            proximal=column(TokenLogprobs, parts.proximal, "logprobs", sampled),
            has_reference=bool(parts.reference),
            turn_advantages=parts.turn_advantages[0] if parts.turn_advantages else None,
        )

    @property
    def kl(self) -> ragged.Array:
        """Log-prob ratio of the policy to the reference for each token, in nats (T,); 0 without a reference."""
        return self.proximal - self.reference if self.has_reference else np.zeros(self.acted.size, np.float32)


def _in_order(kind: type[Typed], parts: Sequence[pa.Table], wanted: ragged.Array) -> pa.Table:
    """The rows of `wanted`, in that order.

    A sample that is missing or there twice is a broken invariant, never passed over.
    """
    table = kind.concat([kind(part) for part in parts]).table
    ids = table["sample_id"].to_numpy()
    for what, some in ((kind.__name__, ids), ("sample_ids", wanted)):
        assert np.unique(some).size == some.size, f"{what}: samples are doubled"
    missing = np.setdiff1d(wanted, ids)
    assert missing.size == 0, (
        f"{kind.__name__}: {missing.size} of {wanted.size} samples are missing, the first is {missing[0]}"
    )
    if np.array_equal(ids, wanted):
        return table
    order = np.argsort(ids, kind="stable")
    return table.take(order[np.searchsorted(ids, wanted, sorter=order)])


def _aligned(column: pa.ChunkedArray, offsets: ragged.Array) -> ragged.Array:
    """The flat values of a column whose rows are as long as the tokens'."""
    values, own = ragged.flat(column)
    assert np.array_equal(own, offsets), "a joined column is not aligned with tokens"
    return values
