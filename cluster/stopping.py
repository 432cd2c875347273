"""Stopping on a signal without losing work: the first SIGTERM, SIGINT or SIGHUP is a request, the second a command.

    at_once   start-up, reading data, sampling, evaluation     raises StopNow at once: nothing is half done
    (noted)   waits of the loop, and of foreign code           the request is noted; the next `check` acts on it
    held      commits, a step from learning on, imports        the request waits for the end of the block

A second signal raises KeyboardInterrupt wherever the program is. The run ends as it stands, and `resume` can still go
on with it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.signals import catch, give_back


class StopNow(KeyboardInterrupt):
    """The current work is given up; earlier results stand. The text says where the run stands, or is empty.

    It is a KeyboardInterrupt, so that foreign code lets it pass: Ray's waits, and everything that catches Exception.
    """


class Stopped(Exception):  # noqa: N818 (no error: the run ends as it was asked to)
    """A run that was asked to stop, stops. number: of the signal. where: it stands. step: number of committed steps."""

    def __init__(self, number: int, where: str, step: int = 0) -> None:
        super().__init__(number, where, step)
        self.number = number
        self.where = where
        self.step = step

    def __str__(self) -> str:
        return f"stopped by {name_of(self.number)} {self.where}"


class StopRequest:
    """Context manager, which may be nested: inside it the first signal is noted.

    It has no effect outside the main thread.
    """

    def __init__(self) -> None:
        self.number = 0
        self.tell: Callable[[str], None] | None = None
        """Called once by `check`, with a line that says that the request was heard."""
        self._depth = 0
        self._at_once = self._held = self._told = False
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether a stop was asked for."""
        return self.number > 0

    def check(self) -> None:
        """Raises StopNow if a stop was asked for and is not held. To be called wherever the run waits."""
        if not self:
            return
        if self.tell is not None and not self._told:
            self._told = True
            self.tell(f"{name_of(self.number)}: stopping as soon as everything is kept; a second signal stops at once")
        if not self._held:
            raise StopNow

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a stop waits for the end of the block, because the work must be done whole."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def at_once(self, on: bool = True) -> Iterator[None]:
        """Inside, a request raises StopNow in the main thread at once; with on=False it is only noted again."""
        before, self._at_once = self._at_once, on
        try:
            if on:
                self.check()
            yield
        finally:
            self._at_once = before

    def __enter__(self) -> Self:
        if not self._depth:
            self._former = catch(self._note)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            give_back(self._former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.number = number
        if self._at_once and not self._held:
            raise StopNow


def name_of(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
