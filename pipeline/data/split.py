"""The split of a conversation, by how it begins; so added or shuffled rows move no other."""

from __future__ import annotations

import xxhash

from pipeline.data.turns import Turns
from pipeline.tasks.task import Split
from pipeline.tasks.text_measures import words

_PARTS = 10_000


def split_of(prompt: Turns, heldout: float) -> Split:
    """The split of a prompt, by the hash of the words of its first turn.

    A conversation at several lengths, its several replies, and a question with other punctuation or capitals are in the
    same split. A system message is ignored, because many conversations share it.
    """
    first = next(turn.text for turn in prompt if turn.role != "system")
    key = " ".join(words(first)) or first.strip()
    return "heldout" if xxhash.xxh3_64_intdigest(key.encode()) % _PARTS < heldout * _PARTS else "train"
