"""Results of the conversations' benchmark, a JSON file each, and what is made of them: Markdown tables and a plot.

Legend: S seeds, P held-out openings.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from conversation_variants import Game
from learning_report import Array, smooth

from pipeline.environments.twenty_questions.solve import best_reply
from pipeline.environments.world.layout import layout, read_scene
from pipeline.environments.world.solve import solve_flat
from pipeline.evaluation.statistics import Interval, ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a variant came to with one seed. settings: all that it depends on.

    before, after, best: mean return on each held-out opening, and the best possible one, (P,). curve: mean return of
    each step's conversations; tokens, conversations: sampled in it; turns: of a conversation. options: means of the
    last steps. seconds: of all steps, without starting anything.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    before: list[float]
    after: list[float]
    best: list[float]
    curve: list[float]
    tokens: list[float]
    conversations: list[float]
    turns: list[float]
    options: dict[str, float]
    seconds: float

    def share(self, when: str) -> float:
        """The return before or after, as a share of the best possible one."""
        return float(np.sum(getattr(self, when)) / np.sum(self.best))

    def shares(self) -> Array:
        """The share of the best possible return in each step."""
        return np.asarray(self.curve) / np.mean(self.best)

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result | None:
        """None where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    @classmethod
    def all_of(cls, folder: Path) -> dict[str, list[Result]]:
        """Variant -> its results, by seed."""
        found = sorted(
            (cls(**json.loads(path.read_text())) for path in folder.glob("*.json")), key=lambda one: one.seed
        )
        return {name: [one for one in found if one.variant == name] for name in {one.variant for one in found}}


def best_returns(game: str, openings: Sequence[str]) -> list[float]:
    """The best possible mean return of a conversation that begins so, for each opening."""
    if game != "world":
        return [best_reply().value] * len(openings)
    values = solve_flat().values
    return [values[read_scene(layout([opening])).state] for opening in openings]


def of_best(results: Sequence[Result], when: str) -> Interval:
    """The return as a share of the best possible one over all seeds and openings, with its 95 % interval.

    Seeds and openings are resampled together, as if each were its own game.
    """
    given = np.concatenate([getattr(result, when) for result in results])
    return ratio(given, np.concatenate([result.best for result in results]), 0)


def at_equal_tokens(results: Sequence[Result], tokens: float) -> float:
    """The share of the best return around the step in which so many tokens had been sampled; mean over the seeds."""
    found = []
    for result in results:
        spent = np.cumsum(result.tokens)
        step = int(np.searchsorted(spent, tokens * (1 - 1e-9)))
        found.append(float(smooth(result.shares())[min(step, len(spent) - 1)]))
    return float(np.mean(found))


def tables(games: Mapping[str, Game], results: Mapping[str, Mapping[str, Sequence[Result]]]) -> str:
    """The Markdown page."""
    parts = [_heading()]
    for name, game in games.items():
        found = results.get(name, {})
        shown = [variant for variant in game.variants if found.get(variant.name)]
        if not shown:
            continue
        fewest = min(float(np.sum(result.tokens)) for variant in shown for result in found[variant.name])
        parts.append(f"## {game.name[0].upper()}{game.name[1:]}")
        lines = [
            "| algorithm | seeds | before | after (95 % interval) | worst and best seed | "
            f"at {fewest:,.0f} tokens | replies, first and last | tokens of a conversation, last | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for variant in shown:
            own = found[variant.name]
            after, each = of_best(own, "after"), [result.share("after") for result in own]
            turns = [np.mean([result.turns[place] for result in own]) for place in (0, -1)]
            length = np.mean([result.tokens[-1] / result.conversations[-1] for result in own])
            seconds = np.mean([result.seconds for result in own])
            cells = (
                variant.name,
                str(len(own)),
                f"{of_best(own, 'before').mean:.1%}",
                f"{after.mean:.1%} ({after.low:.1%} to {after.high:.1%})",
                f"{min(each):.1%}, {max(each):.1%}",
                f"{at_equal_tokens(own, fewest):.1%}",
                f"{turns[0]:.1f}, {turns[1]:.1f}",
                f"{length:.0f}",
                f"{seconds:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        parts += [_options(own) for variant in shown if (own := found[variant.name])[0].options]
    return "\n\n".join(parts) + "\n"


def _options(results: Sequence[Result]) -> str:
    """A paragraph on how the last steps used the options."""
    mean = {name: float(np.mean([result.options[name] for result in results])) for name in results[0].options}
    used = [f"{name.removeprefix('option/usage_')} {share:.0%}" for name, share in mean.items() if "/usage_" in name]
    said = f"Options in the last steps of {results[0].variant}: {', '.join(used)}; "
    said += f"entropy {mean['option/entropy']:.2f} nats"
    for name, what in (
        ("mutual_information", "mutual information with what was carried out {:.2f} nats"),
        ("check", "carried out by {:.0%} of the replies"),
    ):
        if f"option/{name}" in mean:
            said += ", " + what.format(mean[f"option/{name}"])
    return f"{said}."


def _heading() -> str:
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "transformers"))
    return f"""# How near to the best play each algorithm comes

Return of whole conversations as a share of the best possible one (100 %: the best play, by dynamic programming), on
64 held-out openings, two conversations from each, at temperature 1. All algorithms of a game have the same number of
conversations; "at so many tokens" compares them where each had sampled as many tokens as the most frugal one did in
all, by the conversations of training. One fine-tuned model a game (another with options for the hierarchical one);
seeds are those of reinforcement learning, so intervals (bootstrap over seeds and openings) say nothing about
fine-tuning. Seconds: of all steps, one run of two at a time.

Made by `python tests/benchmarks/conversation_learning.py`, commit {commit or "unknown"}, {time.strftime("%Y-%m-%d")}:
Python {platform.python_version()}, {packages}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores.

![share of the best return against conversations](conversations.png)"""


def plot(games: Mapping[str, Game], results: Mapping[str, Mapping[str, Sequence[Result]]], path: Path) -> None:
    """Share of the best return against conversations and against tokens: the mean of the seeds, in a band of their
    standard deviation.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    shown = {name: game for name, game in games.items() if results.get(name)}
    if not shown:
        return
    figure, axes = pyplot.subplots(
        len(shown), 2, figsize=(10, 4.2 * len(shown)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, (name, game) in zip(axes, shown.items(), strict=True):
        for variant in game.variants:
            own = results[name].get(variant.name)
            if not own:
                continue
            curves = np.array([smooth(result.shares()) for result in own])  # (S, steps)
            mean, spread = curves.mean(axis=0), curves.std(axis=0)
            for axis, amount in zip(row, ("conversations", "tokens"), strict=True):
                spent = np.mean([np.cumsum(getattr(result, amount)) for result in own], axis=0)
                [line] = axis.plot(spent, mean, label=variant.name, linewidth=1.5)
                axis.fill_between(spent, mean - spread, mean + spread, color=line.get_color(), alpha=0.12, linewidth=0)
                axis.set(title=game.name, xlabel=amount)
                axis.grid(alpha=0.3)
        row[0].set_ylabel("return, share of the best")
        row[0].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        row[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    with Image.open(path) as picture:
        # a third of the size, since it lies in the repository
        picture.convert("RGB").quantize(128).save(path, optimize=True)
