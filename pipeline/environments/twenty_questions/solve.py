"""The best play of twenty questions, and its value, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pipeline.environments.twenty_questions.game import REPLY_COST, Things, guess_of
from pipeline.environments.twenty_questions.things import QUESTIONS, THINGS


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
        yield bound, guess_of(thing), 1 / size, parts


@cache
def _bound(size: int) -> float:
    """The value of `size` possible things if there were a question for every way to divide them in two."""
    if size == 0:
        return 0.0
    guess = 1 / size + (size - 1) / size * _bound(size - 1)
    asks = (k / size * _bound(k) + (size - k) / size * _bound(size - k) for k in range(1, size))
    return max([guess, *asks]) - REPLY_COST
