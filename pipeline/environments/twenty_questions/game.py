"""The game of twenty questions as an environment: the policy must find out which thing the partner thinks of.

    <|user|> I am thinking of something. What is it?<|bot|> Is it alive?<|user|> No, lifeless.<|bot|> Is it the radio?

A reply is one of QUESTIONS, or a guess: `Is it the radio?`. The game is terminated by the right guess, or by the
twentieth reply. Any other text is not understood, and counts as a reply.

    return = (1 if the thing was found, else 0) - REPLY_COST * number of replies
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from random import Random

from pipeline.environments.environment import Turn
from pipeline.environments.lockstep import Lockstep
from pipeline.environments.twenty_questions.things import ANSWERS, QUESTIONS, THINGS
from pipeline.tasks.task import PromptText

MAX_REPLIES = 20
REPLY_COST = 0.02
OPENING = "I am thinking of something. What is it?"
FOUND, WRONG, CONFUSED = "Yes!", "No.", "I do not understand."
_PROPERTIES = {question: name for name, question in QUESTIONS.items()}
_GUESS = re.compile(rf"Is it the ({'|'.join(THINGS)})\?")
Things = frozenset[str]


def guess_of(thing: str) -> str:
    """The reply that guesses a thing."""
    return f"Is it the {thing}?"


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
        """The partner's answer: yes or no, and to a question in words that say what was asked."""
        self._replies += 1
        reply = reply.strip()
        guess, question = _GUESS.fullmatch(reply), _PROPERTIES.get(reply)
        found = guess is not None and guess[1] == self._thing
        if question is not None:
            text = ANSWERS[question][question not in THINGS[self._thing]]
        else:
            text = CONFUSED if guess is None else FOUND if found else WRONG
        return Turn(
            text=text,
            reward=float(found) - REPLY_COST,
            terminated=found or self._replies >= MAX_REPLIES,
            info={"found": found, "parsed": guess is not None or question is not None, "replies": self._replies},
        )

    def close(self) -> None:
        """It holds nothing."""


def possible_after(exchanges: Iterable[tuple[str, str]]) -> Things:
    """The things that are still possible after these (reply, answer) pairs."""
    possible = frozenset(THINGS)
    for reply, answer in exchanges:
        guess, question = _GUESS.fullmatch(reply.strip()), _PROPERTIES.get(reply.strip())
        if guess is not None:
            possible = frozenset({guess[1]}) if answer == FOUND else possible - {guess[1]}
        elif question is not None:
            possible = frozenset(
                thing for thing in possible if (question in THINGS[thing]) == (answer == ANSWERS[question][0])
            )
    return possible
