"""Which conversations are held out: a function of how each begins, so rows that are added or shuffled move no other."""

from __future__ import annotations

import xxhash

from pipeline.data.turns import Turns
from pipeline.observe.text import words
from pipeline.tasks.task import Split

_PARTS = 10_000


def split_of(prompt: Turns, heldout: float) -> Split:
    """The side of a prompt, by the hash of the words of its first turn.

    A conversation at several lengths, its several replies, and a question with other punctuation or capitals are on one side; a system message, which
    many conversations share, says nothing.
    """
    first = next(turn.text for turn in prompt if turn.role != "system")
    key = " ".join(words(first)) or first.strip()
    return "heldout" if xxhash.xxh3_64_intdigest(key.encode()) % _PARTS < heldout * _PARTS else "train"
