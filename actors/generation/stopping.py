"""Stop strings, found in the decoded tail of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class StopStrings:
    """Tells whether a completion has just reached one of its stop strings.

    Asked after every token, so only the tail that the newest token can complete is decoded: every token stands for at least one byte.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._tail = max(len(s.encode()) for s in strings) + 1  # one more: some tokenizers strip a space at the start of a text

    def reached(self, completions: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.bool_]:
        """One answer for each completion, (B,)."""
        texts = self._tokenizer.batch_decode([c[-self._tail :] for c in completions], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return np.array([any(s in text for s in self._strings) for text in texts], dtype=bool)
