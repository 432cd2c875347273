"""The game of twenty questions, with an exact solution: the policy must find out which thing the partner thinks of.

    <|user|> I am thinking of something. What is it?<|bot|> Is it alive?<|user|> No.<|bot|> Is it the radio?

A reply is one of QUESTIONS, or a guess: `Is it the radio?`. The game is terminated by the right guess, or by the
twentieth reply. Any other text is not understood, and counts as a reply.

    return = (1 if the thing was found, else 0) - REPLY_COST * number of replies
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from pipeline.environments.environment import Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.things import QUESTIONS, THINGS
from pipeline.tasks.task import PromptText

MAX_REPLIES = 20
REPLY_COST = 0.02
OPENING = "I am thinking of something. What is it?"
_PROPERTIES = {question: name for name, question in QUESTIONS.items()}
_GUESS = re.compile(rf"Is it the ({'|'.join(THINGS)})\?")
Things = frozenset[str]


class TwentyQuestions(Lockstep):
    """The environment; the thing is the prompt's metadata "thing", or is drawn by the seed if there is none."""

    def __init__(self) -> None:
        super().__init__(Game)


class Game:
    """One game."""

    def __init__(self) -> None:
        self._thing = ""
        self._replies = 0

    def begin(self, prompt: PromptText, seed: int) -> Turn:
        """Choose the thing. Raises ValueError for a thing that is not in THINGS."""
        self._thing = prompt.metadata.get("thing") or Random(seed).choice(list(THINGS))
        if self._thing not in THINGS:
            raise ValueError(f"thing: must be one of {', '.join(THINGS)}, got {self._thing!r}")
        return Turn()

    def answer(self, reply: str) -> Turn:
        """The partner's answer, mostly yes or no."""
        self._replies += 1
        reply = reply.strip()
        guess, question = _GUESS.fullmatch(reply), _PROPERTIES.get(reply)
        found = guess is not None and guess[1] == self._thing
        if guess is None and question is None:
            text = "I do not understand."
        elif found:
            text = "Yes!"
        else:
            text = "Yes." if question in THINGS[self._thing] else "No."
        return Turn(
            text=text,
            reward=float(found) - REPLY_COST,
            terminated=found or self._replies >= MAX_REPLIES,
            info={"found": found, "parsed": guess is not None or question is not None, "replies": self._replies},
        )

    def close(self) -> None:
        """It holds nothing."""


def prompts() -> list[PromptText]:
    """One prompt for each thing; all have the same text, so that the text does not reveal the thing."""
    from pipeline.tasks.smalltalk import BOT, USER

    return [PromptText(text=f"{USER} {OPENING}{BOT}", metadata={"thing": thing}) for thing in THINGS]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestReply:
    """The best reply when each thing of a set is equally likely.

    value: the expected return to go. replies: the largest number of replies that the best play still needs.
    """

    reply: str
    value: float
    replies: int


@cache
def best_reply(possible: Things = frozenset(THINGS)) -> BestReply:
    """The best reply, by dynamic programming over the set S of things that are still possible.

        V(S) = max of  1/|S| - cost + (1 - 1/|S|) V(S without x)                    guess x
                       |Y|/|S| V(Y) + |N|/|S| V(N) - cost                           ask; Y have the property, N do not

    A reply is skipped if even perfect questions afterwards (`_bound`) could not make it the best. The limit of
    MAX_REPLIES is ignored, so the value is exact as long as `replies` does not exceed it.
    """
    best = BestReply(reply="", value=-math.inf, replies=0)
    for bound, reply, chance, parts in sorted(_choices(possible), reverse=True, key=lambda choice: choice[0]):
        if bound <= best.value:
            break
        after = [(len(part) / len(possible), best_reply(part)) for part in parts]
        value = chance - REPLY_COST + sum(share * part.value for share, part in after)
        if value > best.value:
            replies = 1 + max((part.replies for _, part in after), default=0)
            best = BestReply(reply=reply, value=value, replies=replies)
    return best


def _choices(possible: Things) -> Iterator[tuple[float, str, float, list[Things]]]:
    """Every useful reply: (upper bound of its value, reply, chance that it ends the game, sets possible after it)."""
    size = len(possible)
    for name, question in QUESTIONS.items():
        yes = frozenset(thing for thing in possible if name in THINGS[thing])
        if 0 < len(yes) < size:
            parts = [yes, possible - yes]
            yield sum(len(part) / size * _bound(len(part)) for part in parts) - REPLY_COST, question, 0.0, parts
    for thing in sorted(possible):
        parts = [possible - {thing}] if size > 1 else []
        bound = 1 / size - REPLY_COST + (size - 1) / size * _bound(size - 1)
        yield bound, f"Is it the {thing}?", 1 / size, parts


@cache
def _bound(size: int) -> float:
    """The value of `size` possible things if there were a question for every way to divide them in two."""
    if size == 0:
        return 0.0
    guess = 1 / size + (size - 1) / size * _bound(size - 1)
    asks = (k / size * _bound(k) + (size - k) / size * _bound(size - k) for k in range(1, size))
    return max([guess, *asks]) - REPLY_COST


def possible_after(exchanges: Iterable[tuple[str, str]]) -> Things:
    """The things that are still possible after these (reply, answer) pairs."""
    possible = frozenset(THINGS)
    for reply, answer in exchanges:
        guess, question = _GUESS.fullmatch(reply.strip()), _PROPERTIES.get(reply.strip())
        if guess is not None:
            possible = frozenset({guess[1]}) if answer == "Yes!" else possible - {guess[1]}
        elif question is not None:
            possible = frozenset(thing for thing in possible if (question in THINGS[thing]) == (answer == "Yes."))
    return possible
