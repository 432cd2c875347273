"""The rules of the world: how a reply changes the partner's mood, as tables of exact probabilities.

Moods are the rungs of a ladder. A reply moves the partner up or down the ladder by chance. The reply's effect sets the
probability of each move. EFFECTS gives the effect by the mood, the sub-task and whether the reply is to the point. A
reply is to the point when it names the partner's topic. Once a question to the point was asked, the partner trusts the
speaker, and then moves up more easily.

    return = value of the last mood - TURN_COST * number of replies

Since all probabilities are known, the best play is computed (`solve.py`), not estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Effect = Literal["settles", "helps much", "helps", "nothing", "hurts", "hurts much"]

LADDER = ("left", "angry", "sad", "worried", "bored", "cheerful", "content")
VALUES: Mapping[str, float] = MappingProxyType(
    {"left": 0.0, "angry": 0.1, "sad": 0.3, "worried": 0.5, "bored": 0.65, "cheerful": 0.85, "content": 1.0}
)
ENDS = ("left", "content")
MOODS = LADDER[1:-1]  # the moods in which the conversation goes on
OPENING_MOODS: Mapping[str, float] = MappingProxyType(
    {"angry": 0.25, "sad": 0.25, "worried": 0.2, "bored": 0.2, "cheerful": 0.1}
)
SUBTASKS = ("comfort", "calm", "ask", "inform", "joke", "goodbye")
RUDE = "rude"  # the label of rude sentences; it is not a sub-task
NO_SENTENCE = "no sentence"
MAX_REPLIES = 6
TURN_COST = 0.02

CLOSED: Mapping[Effect, Mapping[int, float]] = MappingProxyType(
    {
        "settles": {1: 1.0},
        "helps much": {1: 0.5, 0: 0.5},
        "helps": {1: 0.2, 0: 0.8},
        "nothing": {0: 1.0},
        "hurts": {-1: 0.5, 0: 0.5},
        "hurts much": {-2: 0.4, -1: 0.6},
    }
)
"""Probability of each move, in rungs, for a partner that does not trust the speaker."""
OPEN: Mapping[Effect, Mapping[int, float]] = MappingProxyType(
    {**CLOSED, "helps much": {2: 0.3, 1: 0.5, 0: 0.2}, "helps": {1: 0.4, 0: 0.6}}
)
"""Probability of each move, in rungs, for a partner that trusts the speaker."""

_SIGNS: dict[str, Effect] = {
    "!": "settles",
    "++": "helps much",
    "+": "helps",
    "0": "nothing",
    "-": "hurts",
    "--": "hurts much",
}
_TO_THE_POINT = """
          comfort calm ask inform joke goodbye rude
angry     -       ++   -   -      --   --      --
sad       ++      0    0   -      -    --      --
worried   +       +    0   ++     -    -       --
bored     0       -    0   +      ++   -       --
cheerful  0       -    0   0      +    !       --
"""
_BESIDE = """
          comfort calm ask inform joke goodbye rude
angry     -       0    -   --     --   --      --
sad       0       -    -   -      --   --      --
worried   0       0    -   0      -    -       --
bored     -       -    -   -      0    -       --
cheerful  -       -    0   -      0    0       --
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state of a conversation.

    trusts: whether the partner trusts the speaker. replies: number of replies so far. over: whether it has ended.
    """

    mood: str
    trusts: bool = False
    replies: int = 0
    over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """What a reply does.

    subtask: one of SUBTASKS, RUDE or NO_SENTENCE. to_the_point: whether the reply names the partner's topic.
    """

    subtask: str
    to_the_point: bool = False


def _table(text: str) -> dict[tuple[str, str], Effect]:
    head, *rows = (line.split() for line in text.strip().splitlines())
    return {(row[0], subtask): _SIGNS[sign] for row in rows for subtask, sign in zip(head, row[1:], strict=True)}


EFFECTS: Mapping[bool, Mapping[tuple[str, str], Effect]] = MappingProxyType(
    {True: _table(_TO_THE_POINT), False: _table(_BESIDE)}
)
"""EFFECTS[to the point][mood, sub-task]."""
SPOKEN = tuple(Deed(subtask=subtask, to_the_point=aim) for subtask in (*SUBTASKS, RUDE) for aim in (True, False))
DEEDS = (*SPOKEN, Deed(subtask=NO_SENTENCE))
"""Everything that a reply can do."""


def outcomes(state: State, deed: Deed) -> dict[State, float]:
    """The probability of each state after a reply.

    The conversation is over when the partner is content, has left, was told goodbye, or has heard MAX_REPLIES replies.
    A reply that is not a sentence has the effect "hurts much".
    """
    assert not state.over, state
    effect = "hurts much" if deed.subtask == NO_SENTENCE else EFFECTS[deed.to_the_point][state.mood, deed.subtask]
    asked = deed.subtask == "ask" and deed.to_the_point
    after: dict[State, float] = {}
    for move, chance in (OPEN if state.trusts else CLOSED)[effect].items():
        rung = min(max(LADDER.index(state.mood) + move, 0), len(LADDER) - 1)
        replies = state.replies + 1
        over = LADDER[rung] in ENDS or deed.subtask == "goodbye" or replies >= MAX_REPLIES
        reached = State(mood=LADDER[rung], trusts=state.trusts or asked, replies=replies, over=over)
        after[reached] = after.get(reached, 0.0) + chance
    return after


def reward(after: State) -> float:
    """The reward of the reply that led to this state: -TURN_COST, plus the value of the mood if the state is over."""
    return (VALUES[after.mood] if after.over else 0.0) - TURN_COST


def expected_gain(state: State, deed: Deed) -> float:
    """The expected rise in the value of the mood by this reply, one reply ahead; in [-1, 1].

    A reply that is not a sentence has the lowest gain, -1.
    """
    if deed.subtask == NO_SENTENCE:
        return -1.0
    after = outcomes(state, deed)
    return sum(chance * VALUES[reached.mood] for reached, chance in after.items()) - VALUES[state.mood]
