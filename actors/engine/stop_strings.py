"""Stop strings, looked for in the decoded tail of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.models.text import TextCodec


class StopStrings:
    """Finds out whether a completion has just reached a stop string.

    It is asked after every token, so only the tail that the newest token can complete is decoded: every token stands
    for at least one byte. A tail does not begin within a run of single-byte tokens (`<0xE2>`), because decoders replace
    the whole run when its first character is torn.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._codec = TextCodec(tokenizer)
        self._strings = tuple(strings)
        self._tail = max(len(s.encode()) for s in strings)
        words = tokenizer.get_vocab()
        self._bytes = {words[name] for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in words}

    def reached(self, completions: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.bool_]:
        """One answer for each completion, (B,)."""
        texts = self._codec.decode_replies([c[self._start(c) :] for c in completions], special=True)
        return np.array([any(s in text for s in self._strings) for text in texts], dtype=bool)

    def _start(self, completion: npt.NDArray[np.int32]) -> int:
        start = max(len(completion) - self._tail, 0)
        while start and int(completion[start]) in self._bytes:
            start -= 1
        return start
