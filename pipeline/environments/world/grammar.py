"""A probabilistic grammar of everyday sentences, and its exact parser.

    sentence = opener frame closer        each a sentence of its own; "" stands for a missing opener or closer
    frame    = words with {noun}, a word of some topic, and {the}, one of ARTICLES

The frame is drawn uniformly. The i-th opener, closer or article is drawn with a weight of 1/i, so the first ones are
common and the last ones rare. The parser accepts exactly the sentences of the grammar; it only ignores white space at
both ends.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random
from typing import Generic, TypeVar

Label = TypeVar("Label", bound=Hashable)
ARTICLES = ("your", "the")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSet:
    """The ways to say one thing: any opener, with any frame and any closer."""

    openers: tuple[str, ...]
    frames: tuple[str, ...]
    closers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence(Generic[Label]):
    """The meaning of a sentence: its label (such as the sub-task that it carries out) and the noun that it names."""

    label: Label
    noun: str


class Grammar(Generic[Label]):
    """Sentences by label; no sentence may belong to two labels, so that the parser finds exactly one."""

    def __init__(self, frames: Mapping[Label, FrameSet], nouns: Sequence[str]) -> None:
        self.frames = dict(frames)
        self.nouns = tuple(nouns)

    def generate(self, random: Random, label: Label, noun: str, articles: Sequence[str] = ARTICLES) -> str:
        """A random sentence with this label and noun; a frame with {the} takes one of `articles`."""
        own = self.frames[label]
        frame = _fill(random.choice(own.frames), noun, _common(random, articles))
        return _join(_common(random, own.openers), frame, _common(random, own.closers))

    def parse(self, text: str) -> Sentence[Label] | None:
        """The meaning of a text, or None if it is not a sentence of the grammar."""
        text = text.strip()
        found = self._noun.search(text)
        if found is None:
            return None
        label = self._templates.get(f"{text[: found.start()]}{{noun}}{text[found.end() :]}")
        return None if label is None else Sentence(label=label, noun=found[0])

    def sentences(self, label: Label) -> Iterator[str]:
        """Every sentence of a label."""
        for template in self.templates(label):
            for noun in self.nouns:
                yield template.replace("{noun}", noun)

    def templates(self, label: Label) -> Iterator[str]:
        """Every sentence of a label with `{noun}` in place of the noun."""
        own = self.frames[label]
        for opener, frame, closer in product(own.openers, own.frames, own.closers):
            for article in ARTICLES if "{the}" in frame else ("",):
                yield _join(opener, _fill(frame, "{noun}", article), closer)

    @cached_property
    def _templates(self) -> dict[str, Label]:
        """The label of each template.

        Raises ValueError naming a template that two labels share, or in which `{noun}` is not the only noun.
        """
        labels: dict[str, Label] = {}
        for label in self.frames:
            for template in self.templates(label):
                if template.count("{noun}") != 1 or self._noun.search(template.replace("{noun}", "")):
                    raise ValueError(f"grammar: a sentence must name one noun, got {template!r}; change its frame")
                if labels.setdefault(template, label) != label:
                    raise ValueError(
                        f"grammar: a sentence must have one label, got {template!r} for {labels[template]!r} and "
                        f"{label!r}; change one of the frames"
                    )
        return labels

    @cached_property
    def _noun(self) -> re.Pattern[str]:
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, self.nouns))})\b")


def _common(random: Random, choices: Sequence[str]) -> str:
    """Draw one of these choices, the i-th with a weight of 1/i."""
    return random.choices(choices, [1 / (place + 1) for place in range(len(choices))])[0]


def _fill(frame: str, noun: str, article: str) -> str:
    return frame.replace("{the}", article).replace("{noun}", noun)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
