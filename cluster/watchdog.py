"""Finds out whether NCCL's watchdog ended a lost rank; then one of its peers is at fault, not the rank.

On GPUs a rank that waits longer than peer_timeout_s for a peer raises nothing. Torch's watchdog thread writes a line
and ends the process, because the GPU's memory may hold half of a result (TORCH_NCCL_ASYNC_ERROR_HANDLING = 3, torch's
default, which is kept). Ray only sees a dead process; the line is in the rank's log. Left out: logs that the driver
cannot read; such a rank counts as lost.

A test has a process that writes the line and aborts, as torch 2.13's source does. It was not seen with NCCL itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

_LINE = b"Watchdog caught collective operation timeout"
_TAIL = 1 << 20  # bytes at the end of a log that are searched: other threads and C++ stacks write after the line


@dataclass(frozen=True, slots=True)
class RankLog:
    """The log file of a rank.

    path: "" if the driver cannot read it. start: its length when the rank was ready, because earlier processes wrote
    into the same file.
    """

    path: str
    start: int

    @classmethod
    def now(cls, path: str) -> Self:
        try:
            return cls(path, os.stat(path).st_size)
        except OSError:
            return cls("", 0)

    def watchdog_line(self) -> str:
        """The line that the watchdog wrote when it ended this process; "" if it did not."""
        if not self.path:
            return ""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self.start, os.fstat(file.fileno()).st_size - _TAIL))
                lines = file.read().splitlines()
        except OSError:
            return ""
        return next((line.decode(errors="replace").strip() for line in lines if _LINE in line), "")
