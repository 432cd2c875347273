"""The best play of the world by dynamic programming, and the exact return of any other play.

    V(s) = max over choices c of  sum over deeds d  P(d | c, s)  sum over s'  P(s' | s, d) (reward(s') + V(s'))

In flat play a choice is a deed itself. In hierarchical play a manager chooses an option, one of SUBTASKS, and a
`Worker` gives the probability of each deed. A perfect worker carries the option out to the point; then both kinds of
play have the same value. With a worker whose probabilities were measured, the solution is the best that any manager can
do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

from pipeline.environments.world.rules import (
    DEEDS,
    MOODS,
    OPENING_MOODS,
    SUBTASKS,
    Deed,
    State,
    expected_gain,
    outcomes,
    reward,
)

Choice = TypeVar("Choice", bound=Hashable)
Distribution = Mapping[Deed, float]
Worker = Callable[[State, str], Distribution]
"""From (state, option) to the probability of each deed."""
Play = Callable[[State], Distribution]
"""From a state to the probability of each deed of a speaker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution(Generic[Choice]):
    """The best play. best: the choice in each state that is not over. values: the return to go of each such state."""

    best: dict[State, Choice]
    values: dict[State, float]

    @property
    def value(self) -> float:
        """The mean return of a conversation."""
        return _from_the_openings(self.values)


def solve_flat(deeds: Sequence[Deed] = DEEDS) -> Solution[Deed]:
    """The best flat play: the speaker chooses among all these deeds."""
    return _solve(tuple(deeds), lambda state, deed: {deed: 1.0})


def perfect_worker(state: State, option: str) -> Distribution:
    """A worker that always carries out the option, to the point."""
    return {Deed(subtask=option, to_the_point=True): 1.0}


def solve_hierarchical(worker: Worker = perfect_worker, options: Sequence[str] = SUBTASKS) -> Solution[str]:
    """The best hierarchical play: a manager chooses an option for each turn, and this worker carries it out."""
    return _solve(tuple(options), worker)


def values_of(play: Play) -> dict[State, float]:
    """The exact return to go of a play, in every state that is not over."""

    @cache
    def value(state: State) -> float:
        if state.over:
            return 0.0
        return sum(chance * _worth(state, deed, value) for deed, chance in play(state).items())

    return {state: value(state) for state in states()}


def return_of(play: Play) -> float:
    """The exact mean return of the conversations of a play."""
    return _from_the_openings(values_of(play))


def myopic_play(state: State) -> Distribution:
    """The play that looks only one reply ahead: the deed with the highest expected gain in the mood."""
    return {max(DEEDS, key=lambda deed: expected_gain(state, deed)): 1.0}


def states() -> list[State]:
    """Every state that a conversation can be in before a reply."""
    found: dict[State, None] = dict.fromkeys(State(mood=mood) for mood in MOODS)
    queue = list(found)
    while queue:
        state = queue.pop()
        new = {
            after: None for deed in DEEDS for after in outcomes(state, deed) if not after.over and after not in found
        }
        found |= new
        queue += new
    return list(found)


def _solve(choices: Sequence[Choice], carried_out: Callable[[State, Choice], Distribution]) -> Solution[Choice]:
    best: dict[State, Choice] = {}

    @cache
    def value(state: State) -> float:
        if state.over:
            return 0.0
        worth = {
            choice: sum(chance * _worth(state, deed, value) for deed, chance in carried_out(state, choice).items())
            for choice in choices
        }
        best[state] = max(worth, key=worth.__getitem__)  # the first of equally good ones
        return worth[best[state]]

    values = {state: value(state) for state in states()}
    return Solution(best=best, values=values)


def _worth(state: State, deed: Deed, value: Callable[[State], float]) -> float:
    return sum(chance * (reward(after) + value(after)) for after, chance in outcomes(state, deed).items())


def _from_the_openings(values: Mapping[State, float]) -> float:
    return sum(chance * values[State(mood=mood)] for mood, chance in OPENING_MOODS.items())
