"""The statistics of an evaluation: means with intervals, win rates, best-of-n from a pool of samples. Pure numpy.

P prompts, S samples a prompt, N samples in the pool that best-of-n draws from, R resamples. Prompts are the unit of every interval:
one prompt counts once however often it was sampled. A reward that failed is NaN, and is left out, never zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # numbers drawn at once, so that many prompts do not fill the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


def bootstrap(values: Floats, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the mean, 95 %. values: (P,), nan is left out. Efron & Tibshirani 1993, ch. 13.

    Raises ValueError when nothing is left.
    """
    values = values[~np.isnan(values)]
    if values.size == 0:
        raise ValueError("evaluation: must have at least one scored response, got none; see the examiners' logs")
    return interval(float(values.mean()), resampled(values[:, None], seed, resamples)[:, 0])


def ratio(numerators: Floats, denominators: Floats, seed: int) -> Interval:
    """The same of sum(numerators) / sum(denominators), (P,) each: a mean a token, say, with prompts as the unit. Denominators are positive."""
    means = resampled(np.stack([numerators, denominators], axis=1), seed)
    return interval(float(numerators.sum() / denominators.sum()), means[:, 0] / means[:, 1])


def resampled(columns: Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means of the columns over each of R draws of P rows with replacement: (P, K) -> (R, K). The draws depend on P and the seed alone."""
    rows = len(columns)
    random, block = np.random.Generator(np.random.Philox(seed)), max(_AT_ONCE // max(columns.size, 1), 1)
    starts = range(0, resamples, block)
    return np.concatenate([columns[random.integers(0, rows, (min(block, resamples - start), rows))].mean(axis=1) for start in starts])


def interval(mean: float, draws: Floats) -> Interval:
    """An estimate and the middle 95 % of its resamples. Infinite ones are allowed, so quantiles are draws, not between two."""
    finite = bool(np.isfinite(draws).all())
    low, high = np.quantile(draws, [0.025, 0.975], method="linear" if finite else "nearest")
    return Interval(mean=mean, low=float(low), high=float(high))


def prompt_means(values: Floats) -> Floats:
    """Mean of each prompt's samples that are not nan, (P, S) -> (P,); nan where there is none."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    return np.where(counts > 0, np.where(known, values, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)


def win_rates(policy: Floats, baseline: Floats) -> Floats:
    """Of each prompt, the share of pairs (a reply of the policy, one of the baseline) in which the policy's is better; ties count half.

    (P, S) and (P, M) -> (P,), nan where there is no pair of scored replies. All S x M pairs are compared: the U statistic of Mann & Whitney 1947.
    """
    ours, theirs = policy[:, :, None], baseline[:, None, :]  # (P, S, 1), (P, 1, M)
    points = np.where(np.isnan(ours) | np.isnan(theirs), np.nan, (ours > theirs) + 0.5 * (ours == theirs))
    return prompt_means(points.reshape(len(points), -1))


def best_of_kl(n: npt.NDArray[np.int64]) -> Floats:
    """Nats between best-of-n sampling and what it samples from: log n - (n - 1) / n (Stiennon et al. 2020, app. G.3; Nakano et al. 2021).

    An upper bound, exact where no two replies are equally good (Beirami et al. 2024); so best-of-n is not made to look better than it is.
    """
    return np.asarray(np.log(n) - (n - 1) / n)


def best_of_at(kl: float) -> float:
    """The n, not whole, whose best-of-n is `kl` nats away: the inverse of `best_of_kl`. Infinite where it is too large for a float."""
    low, high = 0.0, max(kl, 0.0) + 1.0  # of log n, since log n - 1 <= kl
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + np.exp(-middle) - 1 < kl else (low, middle)
    return float(np.exp(min(high, 709.0))) if high < 709 else float("inf")


def best_of_weights(pool: int) -> Floats:
    """weights[n - 1, i]: the chance that the i-th smallest of N samples is the largest of n drawn without replacement, C(i, n - 1) / C(N, n); (N, N).

    So weights @ sorted samples is the unbiased estimate of E[max of n] for every n up to N at once, of least variance (Nakano et al. 2021, app. I).
    """
    n = np.arange(1, pool + 1)
    weights = np.zeros((pool, pool))
    weights[:, -1] = n / pool
    for i in range(pool - 1, 0, -1):
        weights[:, i - 1] = weights[:, i] * np.maximum(i - n + 1, 0) / i
    return weights


def best_of(judge: Floats, wanted: Floats) -> Floats:
    """What is expected of the reply that `judge` prefers among n, n = 1 ... N: both (P, N) -> (P, N).

    wanted: what to read off that reply; the judge's own rewards, or another's. Equal rewards are taken with equal chance. A prompt with a nan is all nan.
    """
    order = np.argsort(judge, axis=1, kind="stable")
    ranked, read = np.take_along_axis(judge, order, axis=1), np.take_along_axis(wanted, order, axis=1)
    for row in range(len(read)):
        _, first, counts = np.unique(ranked[row], return_index=True, return_counts=True)
        read[row] = np.repeat(np.add.reduceat(read[row], first) / counts, counts)
    read[np.isnan(judge).any(axis=1)] = np.nan
    return np.asarray(read @ best_of_weights(judge.shape[1]).T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The policy against best-of-n from the baseline, on the same prompts.

    reward: of best-of-n at the policy's KL. lead: the policy's reward minus that. is_bound: the policy is further away than the largest n that was
    sampled, which stands in for it; since more samples are never worse by the judge that picks, best-of-n has at least this reward.
    kl: nats at which best-of-n has the policy's reward; infinite where the largest n does not reach it.
    """

    prompts: int
    reward: Interval
    lead: Interval
    is_bound: bool
    kl: Interval


def match(rewards: Floats, kls: Floats, curve: Floats, seed: int) -> Matched:
    """rewards, kls: the policy's, a prompt each (P,). curve: best-of-n's expected rewards (P, N). Rows with a nan are left out.

    Between two n the curve is a straight line over KL. Policy and curve are resampled together. Raises ValueError when nothing is left.
    """
    table = np.concatenate([rewards[:, None], kls[:, None], curve], axis=1)
    table = table[~np.isnan(table).any(axis=1)]
    if not len(table):
        raise ValueError("evaluation: must have a prompt whose replies are all scored, got none; see the examiners' logs")
    means, draws = table.mean(axis=0, keepdims=True), resampled(table, seed)
    steps = best_of_kl(np.arange(1, curve.shape[1] + 1))

    def both(read: Callable[[Floats], Floats]) -> Interval:
        return interval(float(read(means)[0]), read(draws))

    return Matched(
        prompts=len(table),
        reward=both(lambda rows: _curve_at(rows[:, 1], steps, rows[:, 2:])),
        lead=both(lambda rows: rows[:, 0] - _curve_at(rows[:, 1], steps, rows[:, 2:])),
        is_bound=bool(means[0, 1] > steps[-1]),
        kl=both(lambda rows: _first_reaching(rows[:, 0], steps, rows[:, 2:])),
    )


def _curve_at(kl: Floats, steps: Floats, curves: Floats) -> Floats:
    """Height of each row's curve at its KL: (R,), (N,), (R, N) -> (R,). Beyond the ends it is level."""
    if len(steps) == 1:
        return curves[:, 0]
    right = np.clip(np.searchsorted(steps, kl), 1, len(steps) - 1)
    share = np.clip((kl - steps[right - 1]) / (steps[right] - steps[right - 1]), 0, 1)
    rows = np.arange(len(curves))
    return np.asarray(curves[rows, right - 1] * (1 - share) + curves[rows, right] * share)


def _first_reaching(reward: Floats, steps: Floats, curves: Floats) -> Floats:
    """The smallest KL at which each row's curve is as high as its reward: (R,), (N,), (R, N) -> (R,), infinite where it never is."""
    below = (np.maximum.accumulate(curves, axis=1) < reward[:, None]).sum(axis=1)  # steps before the first that is high enough
    rows, right = np.arange(len(curves)), np.clip(below, 1, len(steps) - 1) if len(steps) > 1 else np.zeros(len(curves), np.int64)
    left = np.maximum(right - 1, 0)
    low, high = curves[rows, left], curves[rows, right]
    share = np.divide(reward - low, high - low, out=np.ones_like(low), where=high > low)
    between = steps[left] + np.clip(share, 0, 1) * (steps[right] - steps[left])
    return np.where(below == 0, 0.0, np.where(below == len(steps), np.inf, between))
