"""A TCP port that nobody else will be given before a test's process listens on it."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST = 20_000, 65_535  # Ray's own workers listen below


def free_port() -> int:
    """A port on which nothing listens, outside the range from which the kernel serves whoever asks for any port: one of
    those may be given to another process, such as a second Ray, before the test's own process has started.
    """
    first, last = (int(each) for each in _RANGE.read_text().split())
    apart = [port for port in range(_LOWEST, _HIGHEST + 1) if not first <= port <= last]
    for port in random.SystemRandom().sample(apart, len(apart)):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    with socket.socket() as listener:  # the kernel serves from all of them
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
