"""Stopping on a signal without losing anything: the first SIGTERM or SIGINT is a request, obeyed where the state can be committed.

Where it is obeyed: at once while a step's rollouts are made, since the learners still hold the last step's state; after the step once
learning has begun (`held`). A second signal does what it would have done without this file: the run ends as it stands.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(Exception):  # noqa: N818 (no error: a way out of a step)
    """The step at hand is given up; the last one's state stands."""


class Stopped(Exception):  # noqa: N818 (no error: the run ends as it was asked to)
    """A run that was asked to stop has committed and stops. number: of the signal. step: steps that are committed, of `steps`."""

    def __init__(self, number: int, step: int, steps: int) -> None:
        super().__init__(number, step, steps)
        self.number = number
        self.step = step
        self.steps = steps

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name} after step {self.step} of {self.steps}, which is committed"


class StopRequest:
    """A context manager: inside it the first signal is noted, and `check` acts on it. Without effect outside the main thread, which has no signals."""

    def __init__(self) -> None:
        self.number = 0
        self._held = False
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether a stop was asked for."""
        return self.number > 0

    def check(self) -> None:
        """Raises StopNow when a stop was asked for and nothing holds it. To be called wherever the run waits."""
        if self and not self._held:
            raise StopNow

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a stop waits: what is done here must be done whole."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


class Postponed:
    """A context manager for a wait inside foreign code, which would make errors of its own of what a signal's handler raises: inside it the first SIGTERM or
    SIGINT is only noted, and `deliver` hands it to the handler there was before. Without effect outside the main thread."""

    def __init__(self) -> None:
        self.number = 0
        self._former: dict[int, Any] = {}

    def __bool__(self) -> bool:
        """Whether there was a signal: the wait is to be ended."""
        return self.number > 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Outside the block again: what the signal's handler does, which is mostly to raise; StopNow if it only takes note."""
        if self:
            former = self._former[self.number]
            if callable(former):
                former(self.number, None)
            raise StopNow

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
