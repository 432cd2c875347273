"""Results of the learning benchmark, a JSON file each, and what is made of them: a Markdown table and a plot.

Legend: S seeds, N start nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from learning_variants import EPISODES, Variant

from pipeline.evaluation.results import Interval, bootstrap

Array = npt.NDArray[np.float64]
SMOOTHED = 5  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a variant came to with one seed. settings: all that it depends on, so that a result of other settings is not
    taken for one of these.

    before, after: optimality of each start node, (N,). curve: mean reward of each step's rollouts. seconds: of all
    steps, without starting anything.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    before: list[float]
    after: list[float]
    curve: list[float]
    seconds: float

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result | None:
        """None where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def gain(results: Sequence[Result]) -> Interval:
    """After minus before over all seeds and start nodes, with its 95 % interval."""
    return bootstrap(np.concatenate([np.subtract(result.after, result.before) for result in results]), seed=0)


def lead(ours: Sequence[Result], theirs: Sequence[Result]) -> Interval:
    """Our optimality after the last episode minus theirs, over the seeds that both have and all start nodes, with its
    95 % interval.
    """
    other = {result.seed: result.after for result in theirs}
    return bootstrap(
        np.concatenate([np.subtract(result.after, other[result.seed]) for result in ours if result.seed in other]),
        seed=0,
    )


def table(variants: Sequence[Variant], results: Mapping[str, Sequence[Result]]) -> str:
    """The Markdown table of every variant that has results, and the comparison with TRL's."""
    lines = [
        "| algorithm | settings | seeds | before | after | gain (95 % interval) | mean on the way | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = [variant for variant in variants if results.get(variant.name)]
    for variant in shown:
        found = results[variant.name]
        before, after, way, seconds = (
            np.mean([getattr(result, field) for result in found]) for field in ("before", "after", "curve", "seconds")
        )
        numbers = f"{before:.3f} | {after:.3f} | {_interval(gain(found))} | {way:.3f} | {seconds:.0f}"
        lines.append(f"| {variant.name} | {variant.told} | {len(found)} | {numbers} |")
    pairs = [
        (variant, results[variant.name], results[variant.beside]) for variant in shown if results.get(variant.beside)
    ]
    if pairs:
        lines += ["", "| at equal episodes | after the last one (95 % interval) | mean on the way |", "|---|---|---|"]
    for variant, theirs, ours in pairs:
        way = np.mean([result.curve for result in ours]) - np.mean([result.curve for result in theirs])
        lines.append(f"| {variant.beside} minus {variant.name} | {_interval(lead(ours, theirs))} | {way:+.3f} |")
    return "\n".join(lines) + "\n"


def plot(variants: Sequence[Variant], results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Optimality against episodes, a panel for each kind of algorithm: the mean over seeds, in a band of the seeds'
    standard deviation.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    shown = [variant for variant in variants if results.get(variant.name)]
    panels = list(dict.fromkeys(variant.panel for variant in shown))
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(
        rows,
        min(len(panels), 2),
        figsize=(10, 4.4 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        drawn = [variant for variant in shown if variant.panel == panel]
        beside = {variant.beside: f"C{number}" for number, variant in enumerate(drawn) if variant.beside}
        for number, variant in enumerate([*(ours for ours in shown if ours.name in beside), *drawn]):
            _draw(
                axis,
                variant,
                results[variant.name],
                beside.get(variant.name) or beside.get(variant.beside) or f"C{number}",
            )
        axis.set(title=panel, xlabel="episodes", ylabel="optimality")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right", title="dot: 2,000 walks after the last episode", title_fontsize=7)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    with Image.open(path) as picture:
        # a third of the size, since it lies in the repository
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def _draw(axis: Any, variant: Variant, results: Sequence[Result], colour: str) -> None:
    curves = np.array([smooth(np.array(result.curve)) for result in results])  # (S, steps)
    episodes = EPISODES * np.arange(curves.shape[1])
    mean, spread = curves.mean(axis=0), curves.std(axis=0)
    axis.plot(
        episodes, mean, color=colour, linestyle="--" if variant.trainer else "-", linewidth=1.5, label=variant.name
    )
    axis.fill_between(episodes, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axis.plot(
        [EPISODES * curves.shape[1]], [np.mean([result.after for result in results])], "o", color=colour, markersize=4
    )


def smooth(curve: Array) -> Array:
    """Mean of the step and its neighbours, SMOOTHED in all, fewer at the ends."""
    window = np.ones(SMOOTHED)
    return np.convolve(curve, window, "same") / np.convolve(np.ones(curve.size), window, "same")


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
