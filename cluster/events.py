"""The driver's event pump: one thread that waits for all running calls and hands each answer to its owner.

Consumes: references of running calls. Waits for: the first answer, the nearest deadline, the next tick. Unblocked by:
any of these. Left out: threads and asyncio. A callback runs to its end, and what it raises comes out of `run_until`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.faults import Expired, Fault, RunError

if TYPE_CHECKING:
    from ray import ObjectRef

_LONGEST_WAIT_S = 0.5  # Python serves signals only between two waits
_FETCH_TIMEOUT_S = 60.0  # for an answer that has arrived; longer means that it was lost with its node


@dataclass(slots=True, kw_only=True)
class _Watched:
    who: str
    phase: str
    timeout_s: float
    deadline: float
    on_done: Callable[[Any], None]
    on_error: Callable[[BaseException], None]


@dataclass(slots=True, kw_only=True)
class _Tick:
    call: Callable[[], None]
    every_s: float
    due: float


class Pump:
    """Watches references of running calls and calls back, one answer at a time."""

    def __init__(self) -> None:
        self._watched: dict[ObjectRef[Any], _Watched] = {}
        self._ticks: list[_Tick] = []
        self._timers: dict[int, tuple[float, Callable[[], None]]] = {}  # number -> when it is due, whom to call
        self._numbers = itertools.count()
        self._patient_until = -math.inf

    def watch(
        self,
        ref: ObjectRef[Any],
        *,
        who: str,
        phase: str,
        timeout_s: float,
        on_done: Callable[[Any], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Call `on_done(value)` or `on_error(exception)` once, from within `run_until`.

        The value is fetched into the driver: keep it small. After the deadline `on_error` receives an Expired, and a
        later answer is ignored.
        """
        deadline = time.monotonic() + timeout_s
        self._watched[ref] = _Watched(
            who=who, phase=phase, timeout_s=timeout_s, deadline=deadline, on_done=on_done, on_error=on_error
        )

    def forget(self, ref: ObjectRef[Any]) -> None:
        """Ignore the answer of `ref` from now on."""
        self._watched.pop(ref, None)

    def hasten(self, ref: ObjectRef[Any], within_s: float) -> None:
        """Wait for `ref` no longer than `within_s` from now, if it is watched."""
        if ref in self._watched:
            watched = self._watched[ref]
            watched.timeout_s = within_s
            watched.deadline = min(watched.deadline, time.monotonic() + within_s)

    def give_up(self, who: str, silent_s: float) -> None:
        """Expire all unanswered calls of a worker that has been silent for `silent_s` seconds."""
        import ray

        for ref in [ref for ref, watched in self._watched.items() if watched.who == who]:
            watched = self._watched.get(ref)
            if watched is None:  # a callback before it has forgotten it
                continue
            if ray.wait([ref], timeout=0)[0]:
                self._answer(ref)
            else:
                del self._watched[ref]
                watched.on_error(Expired(watched.who, watched.phase, silent_s))

    def lose(self, who: str, cause: str) -> int:
        """Fail all unanswered calls of a worker whose node is gone; returns their number."""
        running = [ref for ref, watched in self._watched.items() if watched.who == who]
        for ref in running:
            watched = self._watched.pop(ref, None)
            if watched is not None:  # else a callback before it has forgotten it
                watched.on_error(RunError(who, watched.phase, cause, fault=Fault.WORKER_LOST))
        return len(running)

    def patient(self, within_s: float) -> None:
        """Let a wait that is going on last so long from now, whatever its own deadline: for a node that must come."""
        self._patient_until = max(self._patient_until, time.monotonic() + within_s)

    def add_tick(self, call: Callable[[], None], every_s: float) -> None:
        """Call `call` about every `every_s` seconds while the pump waits."""
        self._ticks.append(_Tick(call=call, every_s=every_s, due=time.monotonic() + every_s))

    def later(self, delay_s: float, call: Callable[[], None]) -> int:
        """Call `call` once, `delay_s` from now, from within `run_until`; returns a number for `cancel`.

        Until then `run_until` has something to wait for.
        """
        number = next(self._numbers)
        self._timers[number] = (time.monotonic() + delay_s, call)
        return number

    def cancel(self, number: int) -> None:
        """Cancel the call that `later` gave this number, unless it was made already."""
        self._timers.pop(number, None)

    def run_until(self, condition: Callable[[], bool], *, timeout_s: float, waiting_for: str) -> None:
        """Serve events until `condition()` holds.

        Raises RunError when `timeout_s` pass without any answer, or when nothing is running that could make the
        condition hold. Work of many calls may take longer than that while answers keep coming; each call has its own
        deadline.
        """
        until = time.monotonic() + timeout_s
        while not condition():
            if not self._watched and not self._timers:
                raise RunError(
                    "driver",
                    waiting_for,
                    "nothing is running that it could wait for",
                    "This is a defect of the program, not of the settings.",
                )
            if time.monotonic() >= max(until, self._patient_until):
                raise RunError(
                    "driver", waiting_for, f"no answer within {timeout_s:g} s, still waiting for {self._names()}"
                )
            if self._serve(max(until, self._patient_until)):
                until = time.monotonic() + timeout_s

    def _serve(self, until: float) -> bool:
        """Wait for the next event, at most to `until`, and serve it; returns whether it was an answer."""
        import ray

        now = time.monotonic()
        nearest = min((watched.deadline for watched in self._watched.values()), default=until)
        due = min((tick.due for tick in self._ticks), default=until)
        timer = min((at for at, _ in self._timers.values()), default=until)
        wait_s = max(0.0, min(until, nearest, due, timer, now + _LONGEST_WAIT_S) - now)
        ready: list[ObjectRef[Any]] = []
        if self._watched:
            ready, _ = ray.wait(list(self._watched), num_returns=1, timeout=wait_s)
        else:
            time.sleep(wait_s)
        for ref in ready:
            self._answer(ref)
        now = time.monotonic()
        if now >= nearest:
            self._expire(now)
        if now >= due:
            self._tick(now)
        for number in [number for number, (at, _) in self._timers.items() if at <= now]:
            if number in self._timers:  # a call before it may have cancelled it
                self._timers.pop(number)[1]()
        return bool(ready)

    def _answer(self, ref: ObjectRef[Any]) -> None:
        import ray

        watched = self._watched.pop(ref)
        try:
            value = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
        except ray.exceptions.RayError as error:  # also what the worker raised; its owner decides what it means
            watched.on_error(error)
        else:
            watched.on_done(value)

    def _expire(self, now: float) -> None:
        import ray

        late = [ref for ref, watched in self._watched.items() if watched.deadline <= now]
        # answers that arrived while the driver did something else count
        arrived, _ = ray.wait(late, num_returns=len(late), timeout=0) if late else ([], [])
        for ref in late:
            if ref not in self._watched:  # a callback before it has forgotten it
                continue
            if ref in arrived:
                self._answer(ref)
            else:
                watched = self._watched.pop(ref)
                watched.on_error(Expired(watched.who, watched.phase, watched.timeout_s))

    def _tick(self, now: float) -> None:
        for tick in self._ticks:
            if tick.due <= now:
                tick.due = now + tick.every_s
                tick.call()

    def _names(self) -> str:
        names = [f"{watched.who} ('{watched.phase}')" for watched in self._watched.values()]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
