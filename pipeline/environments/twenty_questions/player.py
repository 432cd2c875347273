"""A mediocre player: it asks at random, often what it knows already, and guesses too early, or late, or at random.

A model is first fine-tuned on its games, so reinforcement learning then has much to improve. Most of the player's
guesses agree with all answers, or a small model would not learn to read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pipeline.environments.twenty_questions.game import OPENING, Game, guess_of, possible_after
from pipeline.environments.twenty_questions.things import QUESTIONS, THINGS
from pipeline.tasks.task import PromptText

GUESSES = 0.3  # share of replies that are guesses, however many things are still possible; the others are questions
ATTENTIVE = 0.9  # share of the guesses that agree with all answers; the others are any of the things


def mediocre_reply(random: Random, said: list[tuple[str, str]]) -> str:
    """The player's next reply after these (reply, answer) pairs."""
    if random.random() < GUESSES:
        is_attentive = random.random() < ATTENTIVE
        return guess_of(random.choice(sorted(possible_after(said)) if is_attentive else list(THINGS)))
    return random.choice(list(QUESTIONS.values()))


def games(seed: int) -> Iterator[list[str]]:
    """An endless stream of the player's games: lines, alternately the partner's and the player's."""
    random = Random(seed)
    while True:
        game = Game()
        game.begin(PromptText(text="", metadata={"thing": random.choice(list(THINGS))}), seed)
        said: list[tuple[str, str]] = []
        is_over = False
        while not is_over:
            reply = mediocre_reply(random, said)
            turn = game.answer(reply)
            said.append((reply, turn.text))
            is_over = turn.over
        yield [OPENING, *(line for pair in said for line in pair)]
