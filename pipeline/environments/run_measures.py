"""What the measures of every environment have in common: conversations of a run, step by step, and of its evaluation.

An environment with a known best play has a module `measures`, which says what else is measured and what the best is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Turns = Sequence[Mapping[str, Any]]
"""What the environment said to each reply of a conversation: `metadata.conversation.turns` of a rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationMeasures:
    """The measures of whole conversations.

    mean_return: their mean return. best_return: the highest mean return that is possible. replies: the mean number in a
    conversation. parsed: share of all replies that the environment understood, in [0, 1].
    """

    conversations: int
    mean_return: float
    best_return: float
    replies: float
    parsed: float

    @property
    def share(self) -> float:
        """The mean return as a share of the best possible one."""
        return self.mean_return / self.best_return

    def cells(self) -> dict[str, str]:
        """Name of a column -> what a line of the table says there."""
        return {
            "return": f"{self.mean_return:.3f}",
            "of best": f"{self.share:.1%}",
            "replies": f"{self.replies:.2f}",
            "parsed": f"{self.parsed:.1%}",
            **self.own_cells(),
        }

    def own_cells(self) -> dict[str, str]:
        """The columns of this environment alone."""
        return {}


def in_common(turns: Sequence[Turns], best_return: float) -> dict[str, Any]:
    """The fields of `ConversationMeasures`, of these conversations. Raises ValueError if there is none."""
    if not turns:
        raise ValueError("conversations: must be at least one, got none")
    return {
        "conversations": len(turns),
        "mean_return": sum(turn["reward"] for own in turns for turn in own) / len(turns),
        "best_return": best_return,
        "replies": sum(map(len, turns)) / len(turns),
        "parsed": share_of_replies(turns, "parsed"),
    }


def share_of_replies(turns: Sequence[Turns], name: str) -> float:
    """The share of all replies of which the environment's info says that `name` holds, in [0, 1]."""
    said = [bool(turn["info"][name]) for own in turns for turn in own]
    return sum(said) / len(said)


def read_turns(rows: Sequence[Mapping[str, Any]]) -> list[Turns]:
    """The turns of each row of a step's rollouts or experience."""
    return [json.loads(row["metadata"])["conversation"]["turns"] for row in rows]


def evaluated_returns(record: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """The returns of the policy and of the baseline, for each prompt of an `evaluation.json`.

    They are those of its first judge. Replies without a reward are left out.
    """
    first: Mapping[str, list[list[float | None]]] = next(iter(record["rewards"].values()))
    return {who: [[value for value in own if value is not None] for own in rewards] for who, rewards in first.items()}


def print_measures(
    about: str | None,
    measure: Callable[[Path, Path], ConversationMeasures],
    shares: Callable[[Mapping[str, Any]], Mapping[str, tuple[float, float]]],
) -> None:
    """The command of an environment's measures: print those of a run's steps and of its evaluation.

    about: what `--help` says. measure: gives the measures of a step by the run's folder and the step's table. shares:
    gives (mean return, share of the best one) of each model in an `evaluation.json`.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--every", type=int, default=10, help="steps from one line to the next; the last has one, too")
    arguments = parser.parse_args()
    run_dir: Path = arguments.run_dir
    measured = ((step, measure(run_dir, path).cells()) for step, path in _steps(run_dir, arguments.every))
    for line in _table(measured):
        sys.stdout.write(f"{line}\n")
    if (run_dir / "evaluation.json").exists():
        evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
        for who, (mean, share) in shares(evaluation).items():
            sys.stdout.write(f"{who:10}{mean:9.3f}{share:9.1%}\n")


def _steps(run_dir: Path, every: int) -> Iterator[tuple[int, Path]]:
    """Every so many steps of a run, and the last one, with their tables."""
    found = {int(path.parent.name[5:]): path for path in (run_dir / "experience").glob("step=*/experience.parquet")}
    for step in sorted(found):
        if step % every == 0 or step == max(found):
            yield step, found[step]


def _table(rows: Iterator[tuple[int, Mapping[str, str]]]) -> Iterator[str]:
    """A heading, and a line for each step."""
    is_first = True
    for step, cells in rows:
        widths = {name: max(9, len(name) + 2) for name in cells}
        if is_first:
            yield f"{'':10}" + "".join(f"{name:>{width}}" for name, width in widths.items())
        is_first = False
        yield f"{f'step {step}':10}" + "".join(f"{cells[name]:>{width}}" for name, width in widths.items())
