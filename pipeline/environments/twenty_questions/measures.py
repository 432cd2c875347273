"""Exact measures of games of twenty questions: was the thing found, in how many replies, how near to the best play.

    python -m pipeline.environments.twenty_questions.measures RUN_DIR [--every 10]

prints the measures of a run's games while it trained, and the returns of its evaluation. The best return is the mean
over all things, so it is exact for games in which each thing is equally frequent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.environments.run_measures import (
    ConversationMeasures,
    Turns,
    evaluated_returns,
    in_common,
    print_measures,
    read_turns,
)
from pipeline.environments.twenty_questions.solve import best_reply


@dataclass(frozen=True, slots=True, kw_only=True)
class GameMeasures(ConversationMeasures):
    """The measures of games. found: share of the games in which the thing was found, in [0, 1]."""

    found: float

    def own_cells(self) -> dict[str, str]:
        """The columns of this game alone."""
        return {"found": f"{self.found:.1%}"}


def measure_games(turns: Sequence[Turns]) -> GameMeasures:
    """Measure games by what the environment said to each reply. Raises ValueError if there is no game."""
    common = in_common(turns, best_reply().value)
    return GameMeasures(**common, found=sum(own[-1]["info"]["found"] for own in turns) / len(turns))


def measure_table(path: Path) -> GameMeasures:
    """Measure the games of a step: a Parquet file of its rollouts or experience. Raises as `measure_games` does."""
    import pyarrow.parquet as pq

    return measure_games(read_turns(pq.read_table(path, columns=["metadata"], partitioning=None).to_pylist()))


def shares_of_evaluation(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(mean return, share of the best possible one) of the policy and of the baseline, by an `evaluation.json`."""
    found = {}
    for who, returns in evaluated_returns(record).items():
        values = [value for own in returns for value in own]
        mean = sum(values) / len(values)
        found[who] = (mean, mean / best_reply().value)
    return found


if __name__ == "__main__":
    print_measures(__doc__, lambda run_dir, path: measure_table(path), shares_of_evaluation)
