"""What a reward model is worth on held-out comparisons: how often it agrees, how sure it may be of it, and whether it only likes long replies.

Shapes: C comparisons, K replies of one of them (the best first), P pairs of a better and a worse reply, K (K - 1) / 2 from each comparison.

- accuracy: share of pairs whose better reply has the higher reward; a tie is half right. Every comparison counts once, however many pairs it has
  (Ouyang et al. 2022). Wilson's interval (1927; Brown, Cai & DasGupta 2001) over comparisons, which for K > 2 is on the safe side.
- calibration: the Bradley-Terry model says that the reply with the higher reward is better with probability sigmoid(difference). Pairs in bins of that
  probability, against the share that is; the expected calibration error is the mean distance, weighted by pairs (Guo et al. 2017).
- length: accuracy in fifths of the pairs by how much longer the better reply is, beside that of the rule "the longer one is better", and how often the
  reward agrees with that rule (Singhal et al. 2023). A model that only counts tokens is right in the last fifth, wrong in the first.

Left out: margins and ratings. What is judged is the order, which all data have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # of the normal distribution
_BINS = 5  # of calibration, equal in width, and of length, equal in pairs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share with its 95 % interval. of: comparisons it is estimated from."""

    value: float
    low: float
    high: float
    of: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % (95 % interval {100 * self.low:.1f} to {100 * self.high:.1f} %, {self.of:,} comparisons)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Pairs whose more rewarded reply is better with a probability in [low, high), as the model has it: on average so (predicted), in truth so (observed)."""

    low: float
    high: float
    pairs: int
    predicted: float
    observed: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Fifth:
    """Pairs whose better reply has so many tokens more than the worse (fewest, most). longer: accuracy of the rule that the longer one is better."""

    fewest: int
    most: int
    pairs: int
    accuracy: Share
    longer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """See the module. mean, std: of all rewards. longer: accuracy of the rule "the longer one is better"; prefers_longer: how often the reward follows it."""

    comparisons: int
    pairs: int
    accuracy: Share
    calibration: tuple[Confidence, ...]
    calibration_error: float
    longer: Share
    prefers_longer: float
    by_length: tuple[Fifth, ...]
    mean: float
    std: float

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Back from JSON values, such as `asdict` gives."""
        made = dict(fields) | {"accuracy": Share(**fields["accuracy"]), "longer": Share(**fields["longer"])}
        made["calibration"] = tuple(Confidence(**part | {"observed": Share(**part["observed"])}) for part in fields["calibration"])
        made["by_length"] = tuple(Fifth(**part | {"accuracy": Share(**part["accuracy"])}) for part in fields["by_length"])
        return cls(**made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """difference: of rewards, better minus worse, (P,). length: of tokens, likewise. owner: the comparison of each, (P,)."""

    difference: Floats
    length: Ints
    owner: Ints

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Pairs:
        return _Pairs(difference=self.difference[chosen], length=self.length[chosen], owner=self.owner[chosen])

    def __len__(self) -> int:
        return len(self.owner)


def judge(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], scale: float = 1.0) -> Judgement:
    """rewards, lengths (tokens): of the replies of each comparison, the best first. scale: nats of the Bradley-Terry model that one unit of reward is.

    Raises ValueError without comparisons, and naming the first whose rewards are not finite.
    """
    if not rewards:
        raise ValueError("rewards: must be of at least one comparison, got none")
    for number, own in enumerate(rewards):
        if not np.isfinite(own).all():
            raise ValueError(f"rewards: must be finite, got {list(own)} in comparison {number}")
    pairs, everything = _pairs_of(rewards, lengths), np.concatenate([np.asarray(own, np.float64) for own in rewards])
    calibration = _calibration(pairs, scale)
    return Judgement(
        comparisons=len(rewards),
        pairs=len(pairs),
        accuracy=_share(_right(pairs.difference), pairs.owner),
        calibration=calibration,
        calibration_error=sum(part.pairs * abs(part.observed.value - part.predicted) for part in calibration) / len(pairs),
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
    """1 where the better one is preferred, 0 where the worse one is, 1/2 for a tie."""
    return np.asarray((np.sign(difference) + 1) / 2, np.float64)


def _share(right: Floats, owner: Ints) -> Share:
    """Mean over comparisons of the mean over their pairs."""
    _, place = np.unique(owner, return_inverse=True)
    means = np.bincount(place, right) / np.bincount(place)
    low, high = wilson(float(means.mean()), len(means))
    return Share(value=float(means.mean()), low=low, high=high, of=len(means))


def wilson(share: float, of: int) -> tuple[float, float]:
    """The 95 % score interval of a share that was observed in `of` trials; also of the mean of numbers in [0, 1], whose variance is at most a share's."""
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
    """How often the more rewarded reply is the longer one, of pairs of different lengths; 1/2 where there are none."""
    told = pairs.where(pairs.length != 0)
    return float(_right(told.difference * np.sign(told.length)).mean()) if len(told) else 0.5


def _by_length(pairs: _Pairs) -> tuple[Fifth, ...]:
    """Fewer than five where many pairs have the same difference: equal ones stay together."""
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
