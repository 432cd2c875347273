"""A time limit on a user's function, which holds whatever the function does with signals of its own.

A timer of the kernel interrupts the main thread with a real-time signal. It needs no lock of the interpreter, so it
also ends a long regular expression. It is not the process's one alarm, which math verifiers set and clear for
themselves. The signal is repeated until the function has ended, because `except:` may swallow it. Code that nothing can
interrupt is given up: the process stops giving signs of life, and is replaced.

Python runs signal handlers only in the main thread, where Ray runs the methods of an ordinary actor; in any other
thread there is no limit. Linux only: the timer is `timer_create` of the C library, which Python does not offer.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.pulse import silent_from

T = TypeVar("T")

GRACE_S = 10.0  # after the limit, for code that ends by itself; then the process is given up
_AGAIN_S = 0.25  # between two interruptions
_LONGEST_S = 1e8  # three years, which a C long holds anywhere
_SIGNAL = int(signal.SIGRTMAX) - 1 if hasattr(signal, "SIGRTMAX") else 0
_CLOCK_MONOTONIC, _SIGEV_THREAD_ID = 1, 4  # of Linux


class OutOfTimeError(BaseException):
    """Not an `Exception`, so that a function's own `except Exception` does not swallow it."""


class _Limit:
    """The state of one call."""

    def __init__(self) -> None:
        self.is_on = True
        self.has_passed = False


_limit = _Limit()
_limit.is_on = False


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function within a time limit and return its result.

    Raises OutOfTimeError if it took longer, also if it swallowed the interruption and returned or raised something
    else.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    global _limit
    outer, limit = _limit, _Limit()
    _limit = limit
    try:
        with _alarm_kept(), _interrupted_after(seconds):
            try:
                result = function()
            finally:
                limit.is_on = False
    except (Exception, SystemExit) as error:
        if limit.has_passed:
            raise OutOfTimeError from error
        raise
    finally:
        limit.is_on = False
        _limit = outer
    if limit.has_passed:
        raise OutOfTimeError
    return result


def _interrupt(number: int, frame: object) -> None:
    if _limit.is_on:
        _limit.has_passed = True
        raise OutOfTimeError


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt the block after a time. The handler stays afterwards, because a late signal would end the process."""
    if signal.getsignal(_SIGNAL) is not _interrupt:
        signal.signal(_SIGNAL, _interrupt)
    timer = _start_timer(min(max(seconds, 1e-3), _LONGEST_S))
    silent_from(time.monotonic() + seconds + GRACE_S)
    try:
        yield
    finally:
        silent_from(math.inf)
        _c_library().timer_delete(timer)


@contextmanager
def _alarm_kept() -> Iterator[None]:
    """Let the block use the process's alarm; an alarm that was set before, as by a test runner, goes on afterwards."""
    began, handler, (left_s, every_s) = (
        time.monotonic(),
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL),
    )
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if handler is not None:
            signal.signal(signal.SIGALRM, handler)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - began), 1e-3), every_s)


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of the C library."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_byte * 64),
    )


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec`: interval and first expiry, each in seconds and nanoseconds."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


def _start_timer(seconds: float) -> ctypes.c_void_p:
    """Signal this thread after some seconds, and then every _AGAIN_S."""
    library, timer = _c_library(), ctypes.c_void_p()
    event = _SignalEvent(signal=_SIGNAL, notify=_SIGEV_THREAD_ID, thread=threading.get_native_id())
    _succeeds(library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
    spec = _TimerSpec(0, int(_AGAIN_S * 1e9), int(seconds), int(seconds % 1 * 1e9))
    _succeeds(library.timer_settime(timer, 0, ctypes.byref(spec), None))
    return timer


def _succeeds(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _c_library() -> ctypes.CDLL:
    """The C library with timers; before version 2.34 of glibc they were in a separate library."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(_library, "timer_create"):
            _library = ctypes.CDLL("librt.so.1", use_errno=True)
    return _library


_library: ctypes.CDLL | None = None
