"""Standard output and error that cannot end a run, even if their reader goes away (`| head`, a closed terminal).

Once a write fails, the rest of the output is dropped. A character that the terminal cannot show is replaced. The run's
logs are files of their own and lose nothing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def steady_output() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` never fail. Streams that are no files, as in a notebook, are left alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_steady(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


class _Lasting(io.FileIO):
    """A file descriptor whose writes always succeed; after an error they go nowhere."""

    _is_gone = False

    def write(self, data: Any) -> int:
        if not self._is_gone:
            try:
                written = super().write(data)
                # None where the write would block: a full pipe loses a line, nobody waits
                return len(data) if written is None else written
            except OSError:  # EPIPE of a pipe, EIO of a terminal, ENOSPC of a file
                self._is_gone = True
        return len(data)


def _steady(stream: TextIO) -> TextIO:
    buffer = getattr(stream, "buffer", None)
    # neither closed nor somebody's own; under PYTHONUNBUFFERED it has no buffer in between
    if not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=True)
