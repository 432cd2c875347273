"""The statistics of an evaluation: means with intervals, win rates, best-of-n from a pool of samples. Pure numpy.

Shapes: P prompts, S samples of each, N samples in the pool that best-of-n draws from, R resamples.

Prompts are the unit of every interval: one prompt counts once however often it was sampled. A reward that failed is
NaN; it is left out, never zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # numbers drawn at once, to bound the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


def bootstrap(values: Floats, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The mean with its 95 % percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    values: (P,); NaN is left out. Raises ValueError when nothing is left.
    """
    values = values[~np.isnan(values)]
    if values.size == 0:
        raise ValueError("evaluation: must have at least one scored response, got none; see the examiners' logs")
    return interval(float(values.mean()), resampled(values[:, None], seed, resamples)[:, 0])


def ratio(numerators: Floats, denominators: Floats, seed: int) -> Interval:
    """sum(numerators) / sum(denominators) with its bootstrap interval over prompts, such as a mean per token.

    Both (P,); denominators are positive.
    """
    means = resampled(np.stack([numerators, denominators], axis=1), seed)
    return interval(float(numerators.sum() / denominators.sum()), means[:, 0] / means[:, 1])


def resampled(columns: Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means of the columns over R draws of P rows with replacement: (P, K) -> (R, K).

    The draws depend on P and the seed alone.
    """
    rows = len(columns)
    random, block = np.random.Generator(np.random.Philox(seed)), max(_AT_ONCE // max(columns.size, 1), 1)
    starts = range(0, resamples, block)
    return np.concatenate(
        [columns[random.integers(0, rows, (min(block, resamples - start), rows))].mean(axis=1) for start in starts]
    )


def interval(mean: float, draws: Floats) -> Interval:
    """An estimate with the middle 95 % of its resamples.

    With infinite resamples, a quantile is the nearest draw and not a value between two.
    """
    finite = bool(np.isfinite(draws).all())
    low, high = np.quantile(draws, [0.025, 0.975], method="linear" if finite else "nearest")
    return Interval(mean=mean, low=float(low), high=float(high))


def prompt_means(values: Floats) -> Floats:
    """Mean of each prompt's samples, NaN left out: (P, S) -> (P,); NaN where all are."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    return np.where(counts > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def win_rates(policy: Floats, baseline: Floats) -> Floats:
    """For each prompt, the share of pairs of replies in which the policy's is better; ties count half.

    (P, S) and (P, M) -> (P,); NaN where there is no pair of scored replies. All S x M pairs are compared: the U
    statistic of Mann & Whitney 1947.
    """
    ours, theirs = policy[:, :, None], baseline[:, None, :]  # (P, S, 1), (P, 1, M)
    points = np.where(np.isnan(ours) | np.isnan(theirs), np.nan, (ours > theirs) + 0.5 * (ours == theirs))
    return prompt_means(points.reshape(len(points), -1))


def best_of_kl(n: npt.NDArray[np.int64]) -> Floats:
    """KL divergence of best-of-n sampling from its base model, in nats: log n - (n - 1) / n.

    Stiennon et al. 2020, app. G.3; Nakano et al. 2021. It is an upper bound, exact where no two replies are equally
    good (Beirami et al. 2024), so best-of-n never looks better than it is.
    """
    return np.asarray(np.log(n) - (n - 1) / n)


def best_of_at(kl: float) -> float:
    """The real number n at which best-of-n is `kl` nats away: the inverse of `best_of_kl`; inf if too large."""
    low, high = 0.0, max(kl, 0.0) + 1.0  # bounds of log n, because log n - 1 <= kl
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + np.exp(-middle) - 1 < kl else (low, middle)
    return float(np.exp(min(high, 709.0))) if high < 709 else float("inf")


def best_of_weights(pool: int) -> Floats:
    """Weights (N, N) with which the sorted samples of a pool of N give E[max of n] for every n.

    weights[n - 1, i] = C(i, n - 1) / C(N, n): the probability that the i-th smallest sample is the largest of n drawn
    without replacement. weights @ sorted samples is the unbiased estimate of least variance (Nakano et al. 2021, app.
    I).
    """
    n = np.arange(1, pool + 1)
    weights = np.zeros((pool, pool))
    weights[:, -1] = n / pool
    for i in range(pool - 1, 0, -1):
        weights[:, i - 1] = weights[:, i] * np.maximum(i - n + 1, 0) / i
    return weights


def best_of(judge: Floats, wanted: Floats) -> Floats:
    """Expected value of the reply that a judge prefers among n replies, for n = 1 to N.

    judge: (P, N), the rewards by which it picks. wanted: (P, N), the value read off the picked reply: the same rewards,
    or another judge's. Returns (P, N). Equal rewards are picked with equal probability. A prompt with a NaN is all NaN.
    """
    order = np.argsort(judge, axis=1, kind="stable")
    ranked, read = np.take_along_axis(judge, order, axis=1), np.take_along_axis(wanted, order, axis=1)
    for row in range(len(read)):
        _, first, counts = np.unique(ranked[row], return_index=True, return_counts=True)
        read[row] = np.repeat(np.add.reduceat(read[row], first) / counts, counts)
    read[np.isnan(judge).any(axis=1)] = np.nan
    return np.asarray(read @ best_of_weights(judge.shape[1]).T)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfMatch:
    """The policy against best-of-n from the baseline, on the same prompts.

    reward: of best-of-n at the policy's KL. lead: the policy's reward minus that. kl: nats at which best-of-n has the
    policy's reward; infinite if the largest n does not reach it. is_bound: the policy is further from the baseline than
    the largest n that was sampled, so `reward` is that of the largest n. It is then a lower bound, because the judge
    that picks never prefers the best of fewer samples.
    """

    prompts: int
    reward: Interval
    lead: Interval
    is_bound: bool
    kl: Interval


def match(rewards: Floats, kls: Floats, curve: Floats, seed: int) -> BestOfMatch:
    """Compare the policy with best-of-n at equal KL, and at equal reward.

    rewards, kls: (P,), of the policy. curve: (P, N), expected rewards of best-of-n, linear in KL between two n. Prompts
    with a NaN are left out. Policy and curve are resampled together. Raises ValueError when nothing is left.
    """
    table = np.concatenate([rewards[:, None], kls[:, None], curve], axis=1)
    table = table[~np.isnan(table).any(axis=1)]
    if not len(table):
        raise ValueError(
            "evaluation: must have a prompt whose replies are all scored, got none; see the examiners' logs"
        )
    means, draws = table.mean(axis=0, keepdims=True), resampled(table, seed)
    steps = best_of_kl(np.arange(1, curve.shape[1] + 1))

    def both(read: Callable[[Floats], Floats]) -> Interval:
        return interval(float(read(means)[0]), read(draws))

    return BestOfMatch(
        prompts=len(table),
        reward=both(lambda rows: _curve_at(rows[:, 1], steps, rows[:, 2:])),
        lead=both(lambda rows: rows[:, 0] - _curve_at(rows[:, 1], steps, rows[:, 2:])),
        is_bound=bool(means[0, 1] > steps[-1]),
        kl=both(lambda rows: _first_reaching(rows[:, 0], steps, rows[:, 2:])),
    )


def _curve_at(kl: Floats, steps: Floats, curves: Floats) -> Floats:
    """Height of each row's curve at its KL: (R,), (N,), (R, N) -> (R,). Beyond its ends the curve is level."""
    if len(steps) == 1:
        return curves[:, 0]
    right = np.clip(np.searchsorted(steps, kl), 1, len(steps) - 1)
    share = np.clip((kl - steps[right - 1]) / (steps[right] - steps[right - 1]), 0, 1)
    rows = np.arange(len(curves))
    return np.asarray(curves[rows, right - 1] * (1 - share) + curves[rows, right] * share)


def _first_reaching(reward: Floats, steps: Floats, curves: Floats) -> Floats:
    """The smallest KL at which each row's curve reaches its reward: (R,), (N,), (R, N) -> (R,); else infinite."""
    # how many steps come before the first that is high enough
    below = (np.maximum.accumulate(curves, axis=1) < reward[:, None]).sum(axis=1)
    rows, right = (
        np.arange(len(curves)),
        np.clip(below, 1, len(steps) - 1) if len(steps) > 1 else np.zeros(len(curves), np.int64),
    )
    left = np.maximum(right - 1, 0)
    low, high = curves[rows, left], curves[rows, right]
    share = np.divide(reward - low, high - low, out=np.ones_like(low), where=high > low)
    between = steps[left] + np.clip(share, 0, 1) * (steps[right] - steps[left])
    return np.where(below == 0, 0.0, np.where(below == len(steps), np.inf, between))
