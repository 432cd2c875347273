"""The picture of an evaluation: reward against KL, of the policy and of best-of-n sampling from the baseline.

matplotlib is imported when a picture is drawn, not before, and draws without a display. Left out: interaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.evaluation.results import BestOf, Evaluation

_POLICY, _BEST_OF, _WAY = "#c1440e", "#1f4e79", "#999999"


def draw(evaluation: Evaluation, steps: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG. steps: the lines of a run's metrics.jsonl, whose course is drawn faintly; empty without a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    _draw_way(axes, steps)
    if evaluation.best_of is not None:
        _draw_best_of(axes, evaluation.best_of, evaluation.optimised.baseline.mean)
    judged, kl = evaluation.optimised, evaluation.kl
    axes.errorbar(
        [0],
        [judged.baseline.mean],
        yerr=_bars(judged.baseline),
        fmt="o",
        color=_BEST_OF,
        capsize=3,
        label="baseline",
        zorder=4,
        clip_on=False,
    )
    axes.errorbar(
        [max(kl.mean, 0)],
        [judged.policy.mean],
        xerr=_bars(kl),
        yerr=_bars(judged.policy),
        fmt="D",
        color=_POLICY,
        capsize=3,
        label="policy",
        zorder=5,
    )
    axes.set_title(
        f"What the reward costs: {len(evaluation.replies)} held-out prompts, 95 % intervals", loc="left", fontsize=11
    )
    axes.set_xlabel("KL to the baseline (nats per reply, square-root scale)")
    axes.set_ylabel(f"mean reward by the {evaluation.judge}")
    axes.spines[["top", "right"]].set_visible(False)
    _scale(
        axes,
        [
            kl.mean,
            kl.high,
            *(evaluation.best_of.kl if evaluation.best_of else ()),
            *(step["kl/per_rollout"] or 0 for step in steps),
        ],
    )
    axes.legend(frameon=False, fontsize=9, loc="best")
    figure.savefig(path, dpi=110, format="png")


def _draw_best_of(axes: Any, best: BestOf, start: float) -> None:
    curve = best.rewards[best.judge]
    axes.fill_between(
        best.kl,
        [point.low for point in curve],
        [point.high for point in curve],
        color=_BEST_OF,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(best.kl, [point.mean for point in curve], color=_BEST_OF, label="best-of-n from the baseline")
    for n in best.shown[1:]:
        height = curve[n - 1].mean
        axes.plot([best.kl[n - 1]], [height], ".", color=_BEST_OF)
        axes.annotate(
            f"n = {n}",
            (best.kl[n - 1], height),
            xytext=(-5, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_BEST_OF,
        )


def _draw_way(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    """Draw the course of training: KL and reward of each step, on its own prompts.

    Neighbouring steps are averaged, because a single step scatters more than the run moves.
    """
    points = [
        (step["kl/per_rollout"], step["reward/mean"])
        for step in steps
        if None not in (step["kl/per_rollout"], step["reward/mean"])
    ]
    if len(points) < 2:
        return
    kl, reward = (
        smoothed(np.array(values, np.float64), max(len(points) // 12, 1)) for values in zip(*points, strict=True)
    )
    axes.plot(
        np.maximum(kl, 0),
        reward,
        color=_WAY,
        alpha=0.6,
        linewidth=1,
        label="the policy's way (training prompts, smoothed)",
        zorder=1,
    )


def smoothed(values: np.ndarray[Any, Any], reach: int) -> np.ndarray[Any, Any]:
    """A running mean: each value with its neighbours up to `reach` places away, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = (
        np.maximum(np.arange(len(values)) - reach, 0),
        np.minimum(np.arange(len(values)) + reach + 1, len(values)),
    )
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _bars(interval: Any) -> list[list[float]]:
    """An interval as matplotlib takes it: (2, 1), the distances below and above the mean."""
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def _scale(axes: Any, kls: Sequence[float]) -> None:
    """Set round ticks that lie well apart on a square-root scale."""
    largest = max(*kls, 1e-3) * 1.08
    axes.set_xlim(0, largest)
    step = 10 ** np.floor(np.log10(largest))
    ticks = [tick for tick in (0, 0.01, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9) if tick * step <= largest]
    far_apart: list[float] = []
    for tick in ticks:
        if not far_apart or np.sqrt(tick * step / largest) - np.sqrt(far_apart[-1] / largest) > 0.05:
            far_apart.append(float(tick * step))
    axes.set_xticks(far_apart, [f"{tick:g}" for tick in far_apart])
    axes.minorticks_off()
