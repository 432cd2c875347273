"""Rollouts, scores, reference log-probs and values become experience: one call over the whole step, in an actor beside the driver.

Everything that must see the whole step at once happens here, so that it cannot depend on ranks or micro-batches:
reward shaping, KL penalty, returns, advantages, whitening. Tables come in by chunk or by rank, in any order; they are joined by
sample_id and leave in the order of `sample_ids`.

An actor and not a Ray task: a step longer than a second lets Ray end a task's idle process, and the next would import torch again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actors import ragged
from actors.experience import Experience, Rollouts, Scores, TokenLogprobs, TokenValues
from pipeline.algorithms.base import Algorithm, Trajectories
from pipeline.algorithms.estimators import token_rewards, whiten
from pipeline.algorithms.losses import kl_estimate
from pipeline.algorithms.shaping import ShapingConfig, shape_scores, shape_token_rewards

if TYPE_CHECKING:
    from pipeline.config import RunConfig

Counts = tuple[int, int, int, int, int]
Typed = TypeVar("Typed", Rollouts, Scores, TokenLogprobs, TokenValues)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """How experience is made. kl_coef: as it is in this step; max_new_tokens: longest completion."""

    algorithm: Algorithm
    kl_coef: float
    shaping: ShapingConfig
    max_new_tokens: int

    @classmethod
    def of(cls, config: RunConfig, kl_coef: float) -> Assembly:
        return cls(algorithm=config.algorithm, kl_coef=kl_coef, shaping=config.shaping, max_new_tokens=config.sampling.max_new_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """The tables of a step as they came, each list in any order; an empty list where the algorithm needs none."""

    rollouts: Sequence[pa.Table]
    scores: Sequence[pa.Table]
    reference: Sequence[pa.Table]
    values: Sequence[pa.Table]
    proximal: Sequence[pa.Table]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssemblyReport:
    """What the driver learns of a step's experience: scalars only. KL in nats, nan without a reference; lengths in tokens.

    reward: as the reward function gave it. shaped_mean: of the scores as the algorithm was given them.
    """

    samples: int
    action_tokens: int
    prompt_tokens: int
    reward_mean: float
    reward_std: float
    shaped_mean: float
    kl_per_rollout: float
    kl_per_token: float
    advantage_std: float
    return_mean: float
    value_mean: float
    explained_variance: float
    response_tokens: float
    stopped: float
    token_distinct_2: float


def assemble(how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table) -> tuple[AssemblyReport, pa.Table]:
    """Join, shape, estimate, whiten. `counts`: how many of `tables` are rollouts, scores, reference, values, proximal, in that order.

    (Ray resolves references only among a call's own arguments, hence the flat list.)
    """
    parts = StepTables(**dict(zip(StepTables.__dataclass_fields__, _split(tables, counts), strict=True)))
    wanted = np.asarray(sample_ids, np.int64)
    rollouts = _in_order(Rollouts, parts.rollouts, wanted)
    scores = _in_order(Scores, parts.scores, wanted)
    assert pc.all(pc.equal(scores["status"], "ok"), min_count=0).as_py(), "Scores: a sample without a reward is about to be trained on"
    tokens, offsets = ragged.flat(rollouts["tokens"])
    acted = ragged.flat(rollouts["action_mask"])[0]
    sampled = ragged.flat(rollouts["logprobs"])[0]
    none = np.zeros(tokens.size, np.float32)
    reference = _aligned(_in_order(TokenLogprobs, parts.reference, wanted)["logprobs"], offsets) if parts.reference else none
    values = _aligned(_in_order(TokenValues, parts.values, wanted)["values"], offsets) if parts.values else none
    proximal = _aligned(_in_order(TokenLogprobs, parts.proximal, wanted)["logprobs"], offsets) if parts.proximal else sampled
    kl = proximal - reference if parts.reference else none

    grid = _ActionGrid(acted, offsets)
    stopped = torch.from_numpy(pc.equal(rollouts["finish"], "stop").to_numpy())
    score = shape_scores(how.shaping, torch.from_numpy(scores["reward"].to_numpy().copy()), stopped, grid.mask.sum(dim=1), how.max_new_tokens)
    penalty = how.kl_coef if how.algorithm.kl_in == "reward" else 0.0
    rewards = token_rewards(score, kl_estimate(grid.pad(kl), how.algorithm.kl_estimator), grid.mask, kl_coef=penalty)
    estimates = how.algorithm.advantages(
        Trajectories(
            rewards=shape_token_rewards(how.shaping, rewards, grid.mask),
            values=grid.pad(values),
            scores=score,
            groups=torch.from_numpy(np.unique(rollouts["group_id"].to_numpy(), return_inverse=True)[1]),
            mask=grid.mask,
        )
    )
    advantages = whiten(estimates.advantages, grid.mask) if how.algorithm.whiten_advantages else estimates.advantages
    added = {
        "proximal_logprobs": proximal,
        "reference_logprobs": reference,
        "values": values,
        "advantages": grid.unpad(advantages),
        "returns": grid.unpad(estimates.returns),
    }
    columns = {name: rollouts[name] for name in Rollouts.schema.names} | {name: scores[name] for name in ("reward", "turn_rewards")}
    experience = Experience.of(columns | {name: ragged.unflat(column, offsets, pa.float32()) for name, column in added.items()})
    return _report(experience, float(score.mean()), kl[acted] if parts.reference else np.full(1, np.nan), acted, offsets), experience.table


class Assembler:
    """The pure function `assemble` and the experience log as an actor, so that no token passes through the driver."""

    def assemble(self, how: Assembly, sample_ids: Sequence[int], counts: Counts, *tables: pa.Table) -> tuple[AssemblyReport, pa.Table]:
        """See `assemble`."""
        return assemble(how, sample_ids, counts, *tables)

    def write(self, path: str, table: pa.Table) -> int:
        """Write a step's experience to Parquet and return its rows."""
        experience = Experience(table)
        experience.write(Path(path))
        return len(experience)


class _ActionGrid:
    """Flat token-aligned columns (sum of lengths,) to action tokens side by side (B, A), and back."""

    def __init__(self, acted: ragged.Array, offsets: ragged.Array) -> None:
        self.acted = acted
        self.offsets = np.concatenate([[0], np.cumsum(acted)])[offsets]  # of the action tokens, (B + 1,)
        self.width = max(int(np.diff(self.offsets).max(initial=0)), 1)
        self.mask = torch.from_numpy(ragged.mask(self.offsets, self.width))

    def pad(self, column: ragged.Array) -> torch.Tensor:
        return torch.from_numpy(ragged.pad(column[self.acted], self.offsets, width=self.width))

    def unpad(self, padded: torch.Tensor) -> ragged.Array:
        column = np.zeros(self.acted.size, np.float32)
        column[self.acted] = ragged.unpad(padded.numpy(), self.offsets)
        return column


def _split(tables: Sequence[pa.Table], counts: Sequence[int]) -> list[Sequence[pa.Table]]:
    assert len(tables) == sum(counts), (len(tables), counts)
    ends = np.cumsum(counts)
    return [tables[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _in_order(kind: type[Typed], parts: Sequence[pa.Table], wanted: ragged.Array) -> pa.Table:
    """The rows of `wanted`, in that order. A sample that is missing or there twice is a broken invariant, never passed over."""
    table = kind.concat([kind(part) for part in parts]).table
    ids = table["sample_id"].to_numpy()
    for what, some in ((kind.__name__, ids), ("sample_ids", wanted)):
        assert np.unique(some).size == some.size, f"{what}: samples are doubled"
    missing = np.setdiff1d(wanted, ids)
    assert missing.size == 0, f"{kind.__name__}: {missing.size} of {wanted.size} samples are missing, the first is {missing[0]}"
    if np.array_equal(ids, wanted):
        return table
    order = np.argsort(ids, kind="stable")
    return table.take(order[np.searchsorted(ids, wanted, sorter=order)])


def _aligned(column: pa.ChunkedArray, offsets: ragged.Array) -> ragged.Array:
    """The flat values of a column whose rows are as long as the tokens'."""
    values, own = ragged.flat(column)
    assert np.array_equal(own, offsets), "a joined column is not aligned with tokens"
    return values


def _report(experience: Experience, shaped_mean: float, kl: ragged.Array, acted: ragged.Array, offsets: ragged.Array) -> AssemblyReport:
    table = experience.table
    rewards = table["reward"].to_numpy()
    returns, values = (ragged.flat(table[name])[0][acted] for name in ("returns", "values"))
    spread = returns.var()
    return AssemblyReport(
        samples=len(experience),
        action_tokens=int(acted.sum()),
        prompt_tokens=int((~acted).sum()),
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        shaped_mean=shaped_mean,
        kl_per_rollout=float(kl.sum() / len(experience)),
        kl_per_token=float(kl.mean()),
        advantage_std=float(ragged.flat(table["advantages"])[0][acted].std()),
        return_mean=float(returns.mean()),
        value_mean=float(values.mean()),
        explained_variance=float(1 - (returns - values).var() / spread) if spread > 0 else 0.0,
        response_tokens=float(acted.sum() / len(experience)),
        stopped=float(pc.mean(pc.equal(table["finish"], "stop")).as_py()),
        token_distinct_2=_distinct_2(ragged.flat(table["tokens"])[0], acted, offsets),
    )


def _distinct_2(tokens: ragged.Array, acted: ragged.Array, offsets: ragged.Array) -> float:
    """Different pairs of neighbouring sampled tokens over all such pairs (Li et al. 2016): falls when replies become alike."""
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    neighbours = acted[:-1] & acted[1:] & (row[:-1] == row[1:])
    pairs = tokens[:-1].astype(np.int64)[neighbours] << 32 | tokens[1:][neighbours]
    return float(np.unique(pairs).size / pairs.size) if pairs.size else 1.0
