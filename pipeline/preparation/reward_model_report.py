"""The report on a reward model from held-out comparisons: accuracy, calibration, length bias.

Shapes: C comparisons, K replies of one comparison (the best first), P pairs of a better and a worse reply. Each
comparison gives K (K - 1) / 2 pairs.

- accuracy: share of pairs whose better reply has the higher reward; a tie is half right. Every comparison counts once,
  however many pairs it has (Ouyang et al. 2022). The interval is Wilson's (1927; Brown, Cai & DasGupta 2001) over
  comparisons, which is conservative for K > 2.
- calibration: under the Bradley-Terry model the reply with the higher reward is better with probability
  sigmoid(difference). The pairs are binned by this probability. In each bin the mean probability is compared with the
  share of pairs in which that reply is better. The expected calibration error is the mean distance between the two,
  weighted by pairs (Guo et al. 2017).
- length: the pairs are cut into fifths by how much longer the better reply is, and the accuracy is reported in each
  fifth. Beside it stand the accuracy of the rule "the longer one is better", and how often the reward agrees with that
  rule (Singhal et al. 2023). A model that only counts tokens is right in the last fifth and wrong in the first.

Left out: margins and ratings. The report judges only the order of replies, because all data have an order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
_BINS = 5  # of calibration, with equal widths; and of length, with equal numbers of pairs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """A share with its 95 % interval. of: number of comparisons that it is estimated from."""

    value: float
    low: float
    high: float
    of: int

    def __str__(self) -> str:
        return (
            f"{100 * self.value:.1f} % (95 % interval {100 * self.low:.1f} to {100 * self.high:.1f} %, {self.of:,} "
            "comparisons)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """The pairs in which the more rewarded reply is better with a predicted probability in [low, high).

    pairs: their number. predicted: the mean predicted probability. observed: the share of pairs in which that reply is
    better.
    """

    low: float
    high: float
    pairs: int
    predicted: float
    observed: Proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class Fifth:
    """A fifth of the pairs: the better reply has from `fewest` to `most` more tokens than the worse one.

    pairs: their number. longer: accuracy of the rule "the longer one is better".
    """

    fewest: int
    most: int
    pairs: int
    accuracy: Proportion
    longer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelReport:
    """The report on a reward model; the module explains its numbers.

    comparisons, pairs: how many there are. mean, std: mean and standard deviation of all rewards. longer: accuracy of
    the rule "the longer one is better". prefers_longer: how often the reward agrees with that rule.
    """

    comparisons: int
    pairs: int
    accuracy: Proportion
    calibration: tuple[Confidence, ...]
    calibration_error: float
    longer: Proportion
    prefers_longer: float
    by_length: tuple[Fifth, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Build the report from JSON values, such as `asdict` returns."""
        made = dict(fields) | {"accuracy": Proportion(**fields["accuracy"]), "longer": Proportion(**fields["longer"])}
        made["calibration"] = tuple(
            Confidence(**part | {"observed": Proportion(**part["observed"])}) for part in fields["calibration"]
        )
        made["by_length"] = tuple(
            Fifth(**part | {"accuracy": Proportion(**part["accuracy"])}) for part in fields["by_length"]
        )
        return cls(**made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """All pairs, as arrays (P,).

    difference: reward of the better reply minus that of the worse one. length: the same difference in tokens. owner:
    number of the comparison that the pair is from.
    """

    difference: Floats
    length: Ints
    owner: Ints

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Pairs:
        return _Pairs(difference=self.difference[chosen], length=self.length[chosen], owner=self.owner[chosen])

    def __len__(self) -> int:
        return len(self.owner)


def judge(
    rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], scale: float = 1.0
) -> RewardModelReport:
    """The report from the rewards and the lengths in tokens of each comparison's replies, the best reply first.

    scale: one unit of reward in nats of the Bradley-Terry model. Raises ValueError when there is no comparison, or when
    a reward is not finite, naming the comparison.
    """
    if not rewards:
        raise ValueError("rewards: must be of at least one comparison, got none")
    for number, own in enumerate(rewards):
        if not np.isfinite(own).all():
            raise ValueError(f"rewards: must be finite, got {list(own)} in comparison {number}")
    pairs, everything = _pairs_of(rewards, lengths), np.concatenate([np.asarray(own, np.float64) for own in rewards])
    calibration = _calibration(pairs, scale)
    return RewardModelReport(
        comparisons=len(rewards),
        pairs=len(pairs),
        accuracy=_share(_right(pairs.difference), pairs.owner),
        calibration=calibration,
        calibration_error=sum(part.pairs * abs(part.observed.value - part.predicted) for part in calibration)
        / len(pairs),
        longer=_share(_right(pairs.length), pairs.owner),
        prefers_longer=_agreement(pairs),
        by_length=_by_length(pairs),
        mean=float(everything.mean()),
        std=float(everything.std()),
    )


def _pairs_of(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> _Pairs:
    difference, length, owner = [], [], []
    for number, (own, tokens) in enumerate(zip(rewards, lengths, strict=True)):
        better, worse = np.triu_indices(len(own), 1)
        own_rewards, own_lengths = np.asarray(own, np.float64), np.asarray(tokens, np.int64)
        difference.append(own_rewards[better] - own_rewards[worse])
        length.append(own_lengths[better] - own_lengths[worse])
        owner.append(np.full(len(better), number))
    return _Pairs(difference=np.concatenate(difference), length=np.concatenate(length), owner=np.concatenate(owner))


def _right(difference: npt.NDArray[Any]) -> Floats:
    """1 where the better reply is preferred, 0 where the worse one is, 1/2 for a tie."""
    return np.asarray((np.sign(difference) + 1) / 2, np.float64)


def _share(right: Floats, owner: Ints) -> Proportion:
    """The mean over comparisons of the mean over each comparison's pairs."""
    _, place = np.unique(owner, return_inverse=True)
    means = np.bincount(place, right) / np.bincount(place)
    low, high = wilson(float(means.mean()), len(means))
    return Proportion(value=float(means.mean()), low=low, high=high, of=len(means))


def wilson(share: float, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was observed in `of` trials.

    It also holds for the mean of numbers in [0, 1], because their variance is at most the variance of a share.
    """
    centre, spread = share + _Z95**2 / (2 * of), _Z95 * math.sqrt(share * (1 - share) / of + _Z95**2 / (4 * of**2))
    return max(0.0, (centre - spread) / (1 + _Z95**2 / of)), min(1.0, (centre + spread) / (1 + _Z95**2 / of))


def _calibration(pairs: _Pairs, scale: float) -> tuple[Confidence, ...]:
    predicted = 1 / (1 + np.exp(-np.minimum(np.abs(scale * pairs.difference), 700.0)))  # (P,) in [1/2, 1]
    edges = np.linspace(0.5, 1.0, _BINS + 1)
    place = np.minimum(np.searchsorted(edges, predicted, side="right") - 1, _BINS - 1)
    return tuple(
        Confidence(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            pairs=int((place == i).sum()),
            predicted=float(predicted[place == i].mean()),
            observed=_share(_right(pairs.difference[place == i]), pairs.owner[place == i]),
        )
        for i in range(_BINS)
        if (place == i).any()
    )


def _agreement(pairs: _Pairs) -> float:
    """Share of pairs of different lengths in which the more rewarded reply is the longer one; 1/2 without any pair."""
    told = pairs.where(pairs.length != 0)
    return float(_right(told.difference * np.sign(told.length)).mean()) if len(told) else 0.5


def _by_length(pairs: _Pairs) -> tuple[Fifth, ...]:
    """The accuracy in each fifth of the pairs by length; pairs of equal difference share one, so there may be fewer."""
    edges = np.unique(np.quantile(pairs.length, np.linspace(0, 1, _BINS + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, pairs.length, side="left")
    parts = [pairs.where(place == i) for i in range(len(edges) + 1)]
    return tuple(
        Fifth(
            fewest=int(part.length.min()),
            most=int(part.length.max()),
            pairs=len(part),
            accuracy=_share(_right(part.difference), part.owner),
            longer=float(_right(part.length).mean()),
        )
        for part in parts
        if len(part)
    )
