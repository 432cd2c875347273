"""The task: prompts, and demonstrations of how they may be answered. All of it is text as the model reads it."""

from __future__ import annotations

from pathlib import Path

from pipeline.tasks.task import Demonstration, PromptText, Split
from pipeline.tasks.tokenizers import train_byte_bpe

GUESTS = ("Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Frances", "Grace", "John", "Karen", "Leslie", "Tony")
PLACES = ("at the door", "in the garden", "on the stairs", "at the bar")
ANSWERS = ("Hello there.", "Good evening.", "Welcome, {name}.", "Hello, {name}.")


class Greetings:
    """A guest comes in and is greeted. The demonstrations welcome the guest in one answer of four; the reward prefers
    that one.
    """

    name = "greetings"
    reward = ""  # the recipe names it

    def prompts(self, split: Split) -> list[PromptText]:
        """What the policy is asked: for learning (`train`), and for the evaluation (`heldout`).

        metadata: what the reward function may need to know.
        """
        return [
            PromptText(text=self.layout(f"{name} is {place}."), metadata={"name": name}) for name, place in _of(split)
        ]

    def demonstrations(self, split: Split) -> list[Demonstration]:
        """How people would answer; for fine-tuning. An answer begins with the space before its first word."""
        return [
            Demonstration(prompt=self.layout(f"{name} is {place}."), response=" " + answer.format(name=name))
            for name, place in _of(split)
            for answer in ANSWERS
        ]

    def layout(self, line: str) -> str:
        """A line that a person typed, as a prompt."""
        return f"{line}\nHost:"

    def build_tokenizer(self, folder: Path, vocabulary: int) -> None:
        """Write the tokenizer of a new model; of no use where model.path is given."""
        texts = (demo.prompt + demo.response for demo in self.demonstrations("train"))
        train_byte_bpe(texts, folder, vocab_size=vocabulary)


def _of(split: Split) -> list[tuple[str, str]]:
    """Every third pair is held out, so that the evaluation asks what nothing was trained on."""
    pairs = [(name, place) for name in GUESTS for place in PLACES]
    return [pair for number, pair in enumerate(pairs) if (number % 3 == 2) == (split == "heldout")]
