"""Measures of generated text."""

from __future__ import annotations

import re
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Share of distinct word n-grams over all texts together, in (0, 1] (Li et al. 2016).

    1 when no n-gram repeats, also when the texts are too short to have one.
    """
    if n < 1:
        raise ValueError(f"n: must be >= 1, got {n}")
    grams: list[tuple[str, ...]] = []
    for text in texts:
        found = words(text)
        grams += zip(*(found[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 1.0
