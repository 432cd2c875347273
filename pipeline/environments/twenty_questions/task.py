"""Twenty questions as a task: games of a mediocre player to imitate, and a prompt for each thing.

    I am thinking of something. What is it? Is it alive? No, lifeless. Is it the radio? Yes!

The lines follow one another as plain text, and a reply ends with its question mark: the recipe has `stop = ["?"]`. So a
whole game is one demonstration, the partner's answers included. It teaches all replies in one pass, and a model that
learns to predict the answers learns to read them.

The thing stands in a prompt's metadata, which the environment reads and the policy never sees. The 32 things are the
whole game, and the best return is a mean over all of them. So none is held out: an evaluation plays other games with
the same things, and only the demonstrations have a split.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from pipeline.environments.twenty_questions.game import CONFUSED, FOUND, OPENING, WRONG, guess_of
from pipeline.environments.twenty_questions.player import games
from pipeline.environments.twenty_questions.things import ANSWERS, QUESTIONS, THINGS
from pipeline.tasks.task import Demonstration, PromptText, Split

GAMES: Mapping[Split, int] = MappingProxyType({"train": 4000, "heldout": 100})
SEEDS: Mapping[Split, int] = MappingProxyType({"train": 7, "heldout": 8})


class TwentyQuestionsTask:
    """The task; see the module. It has no reward of its own, because the environment rewards each reply."""

    name = "twenty-questions"
    reward = ""

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Save a tokenizer with one token for each word of the game; it ignores `vocabulary`."""
        from pipeline.tasks.tokenizers import word_tokenizer

        word_tokenizer(map(self.continuation, all_lines()), folder)

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """Games of the mediocre player: the prompt is the opening, the response all that follows."""
        return [
            Demonstration(prompt=self.layout(opening), response="".join(map(self.continuation, lines)))
            for opening, *lines in islice(games(SEEDS[split]), GAMES[split])
        ]

    def prompts(self, split: Split) -> list[PromptText]:
        """One prompt for each thing, in both splits."""
        return prompts()

    def layout(self, line: str) -> str:
        """The prompt made of a line that a person typed."""
        return self.continuation(line)

    def continuation(self, line: str) -> str:
        """The text of a line in a game."""
        return f" {line.strip()}"


def prompts() -> list[PromptText]:
    """One prompt for each thing; all have the same text, so that the text does not reveal the thing."""
    return [PromptText(text=f" {OPENING}", metadata={"thing": thing}) for thing in THINGS]


def all_lines() -> list[str]:
    """Every line of the partner, and every reply that it understands, in a fixed order."""
    answers = [answer for pair in ANSWERS.values() for answer in pair]
    return [OPENING, FOUND, WRONG, CONFUSED, *answers, *QUESTIONS.values(), *map(guess_of, THINGS)]
