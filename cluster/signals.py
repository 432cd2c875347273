"""Stopping signals while foreign code is at work, which may crash on an exception from a signal handler.

A signal that was ignored when the program began stays ignored, as is the custom: SIGHUP under nohup, SIGINT in a
shell's background.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], None]


def catch(handler: Handler) -> dict[int, Any]:
    """Let `handler` receive every stopping signal that is not ignored.

    Returns the handlers before it, by signal; outside the main thread, which receives no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    former: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
    former = {number: before for number, before in former.items() if before not in (signal.SIG_IGN, None)}
    for number in former:
        signal.signal(number, handler)
    return former


def give_back(former: dict[int, Any]) -> None:
    """Undo `catch`."""
    for number, handler in former.items():
        signal.signal(number, handler)


class PostponedStop:
    """Context manager: inside it stopping signals are only noted; `deliver` gives the first to its former handler.

    It has no effect outside the main thread.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.count = 0
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether there was a signal, so that the wait should end."""
        return self.number > 0

    def __enter__(self) -> Self:
        self._former = catch(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        give_back(self._former)

    def deliver(self) -> None:
        """After the block: do what the signal would have done, which is mostly to raise."""
        if not self:
            return
        handler = self._former[self.number]
        if callable(handler):
            handler(self.number, None)
        else:
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1


@contextmanager
def postponed() -> Iterator[None]:
    """A `PostponedStop` that is delivered at the end of the block, but not after an error."""
    signals = PostponedStop()
    with signals:
        yield
    signals.deliver()


@contextmanager
def hang_up_blocked() -> Iterator[None]:
    """Inside, started processes ignore SIGHUP, which a closed terminal sends to a whole process group.

    The driver alone handles it. They inherit the signal mask, as Ray's processes do for SIGINT. A SIGHUP to this
    process that no other thread takes waits until the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load(*modules: str) -> None:
    """Import modules, which may take seconds; signals wait, because half an import may crash the interpreter."""
    with postponed():
        for module in modules:
            importlib.import_module(module)
