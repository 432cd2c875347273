"""The report of a step's experience: scalars for the driver, the metrics and the KL controller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import torch

from actors import ragged
from actors.experience import Experience
from actors.reward.worker import flat_groups
from pipeline.algorithms.losses import KLEstimator, kl_out_of_bounds
from pipeline.assembly.joined import JoinedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class AssemblyReport:
    """What the driver learns of a step's experience: scalars only.

    KL in nats, nan without a reference; lengths in tokens.

    reward: as the reward function gave it. shaped_mean: of the scores as the algorithm was given them. kl_bounded:
    share of action tokens whose KL estimate was cut off (see `losses.kl_estimate`). flat_groups: share of groups of two
    and more whose rewards are all the same; nan where there is no such group.
    """

    samples: int
    action_tokens: int
    prompt_tokens: int
    reward_mean: float
    reward_std: float
    shaped_mean: float
    kl_per_rollout: float
    kl_per_token: float
    kl_bounded: float
    flat_groups: float
    advantage_std: float
    return_mean: float
    value_mean: float
    explained_variance: float
    response_tokens: float
    stopped: float
    token_distinct_2: float
    version_min: int = 0
    """Oldest version that has sampled a token of the step; version_mean: over all action tokens."""
    version_mean: float = 0.0
    conversation: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the step's conversations, see `conversation_metrics`; empty where rollouts are single replies."""
    option: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the use of options, see `option_metrics`; empty without a manager."""


def report_of(experience: Experience, step: JoinedStep, shaped_mean: float, estimator: KLEstimator) -> AssemblyReport:
    """The report of an experience that was made from `step`.

    Moments are computed in float64: equal rewards must have a deviation of 0.
    """
    table, acted = experience.table, step.acted
    kl = step.kl[acted] if step.has_reference else np.full(1, np.nan, np.float32)
    cut = kl_out_of_bounds(torch.from_numpy(kl), estimator).numpy() if step.has_reference else kl
    rewards = table["reward"].to_numpy().astype(np.float64)
    returns, values, advantages = (
        ragged.flat(table[name])[0][acted].astype(np.float64) for name in ("returns", "values", "advantages")
    )
    versions, spread = ragged.flat(table["versions"])[0][acted], returns.var()
    return AssemblyReport(
        samples=len(experience),
        action_tokens=int(acted.sum()),
        prompt_tokens=int((~acted).sum()),
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        shaped_mean=shaped_mean,
        kl_per_rollout=float(kl.sum() / len(experience)),
        kl_per_token=float(kl.mean()),
        kl_bounded=float(cut.mean()),
        flat_groups=_flat_groups(table["group_id"].to_pylist(), table["reward"].to_pylist()),
        advantage_std=float(advantages.std()),
        return_mean=float(returns.mean()),
        value_mean=float(values.mean()),
        explained_variance=float(1 - (returns - values).var() / spread) if spread > 0 else 0.0,
        response_tokens=float(acted.sum() / len(experience)),
        stopped=float(pc.mean(pc.equal(table["finish"], "stop")).as_py()),
        version_min=int(versions.min(initial=np.iinfo(np.int32).max)),
        version_mean=float(versions.mean()),
        token_distinct_2=_distinct_2(ragged.flat(table["tokens"])[0], acted, step.offsets),
    )


def _flat_groups(groups: Sequence[int], rewards: Sequence[float]) -> float:
    """Of the groups of two and more samples, the share that compares to nothing."""
    several = {group for group, size in Counter(groups).items() if size > 1}
    return len(several.intersection(flat_groups(groups, rewards))) / len(several) if several else float("nan")


def _distinct_2(tokens: ragged.Array, acted: ragged.Array, offsets: ragged.Array) -> float:
    """Different pairs of neighbouring sampled tokens over all such pairs; falls when replies become alike.

    Source: Li et al. 2016.
    """
    row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    neighbours = acted[:-1] & acted[1:] & (row[:-1] == row[1:])
    pairs = tokens[:-1].astype(np.int64)[neighbours] << 32 | tokens[1:][neighbours]
    return float(np.unique(pairs).size / pairs.size) if pairs.size else 1.0
