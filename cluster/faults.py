"""What can go wrong with a process or an object, and the error a run stops with.

`classify` is the one place that knows Ray's exceptions; everything above it speaks of four faults.
Left out: what to do about a fault, which `pool.decide` and the driver's recovery say.
"""

from __future__ import annotations

import re
from enum import Enum

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Fault(Enum):
    """What happened to a call."""

    WORKER_LOST = "the process or its node is gone"
    INPUT_LOST = "an object the call needs is gone with its node"
    USER_ERROR = "the called code raised"
    EXPIRED = "it did not answer in time"


class RunError(RuntimeError):
    """A failure the run cannot go on from: who failed, in which phase, why, and what to do about it.

    `fault` is set where a call failed, so that a driver can tell a lost process (rebuild, roll back) from an error in the code (stop).
    """

    def __init__(self, who: str, phase: str, cause: str, remedy: str = "", fault: Fault | None = None) -> None:
        super().__init__(who, phase, cause, remedy, fault)  # all of them, so that it survives pickling
        self.who = who
        self.phase = phase
        self.cause = cause
        self.remedy = remedy
        self.fault = fault

    def __str__(self) -> str:
        text = f"{self.who} failed during '{self.phase}': {self.cause.rstrip()}"
        if text[-1] not in ".!?":
            text += "."
        return f"{text} {self.remedy}".rstrip()


class Expired(RunError):  # noqa: N818 (a kind of RunError)
    """A watched call did not answer in time."""

    def __init__(self, who: str, phase: str, timeout_s: float) -> None:
        super().__init__(who, phase, f"no answer within {timeout_s:g} s", fault=Fault.EXPIRED)
        self.args = (who, phase, timeout_s)
        self.timeout_s = timeout_s


def classify(error: BaseException) -> Fault:
    """The fault behind an exception that a call's reference raised.

    An exception in a constructor is the code's own error although Ray reports it as a dead actor: a replacement would only repeat it.
    A lost argument reaches us wrapped in a RayTaskError; so does an argument whose producer died before it was made.
    """
    from ray import exceptions as ray_errors

    if isinstance(error, (Expired, ray_errors.GetTimeoutError)):
        return Fault.EXPIRED
    cause = error
    while isinstance(cause, ray_errors.RayTaskError) and isinstance(cause.cause, ray_errors.RayError):
        cause = cause.cause
    if isinstance(cause, ray_errors.ObjectLostError):
        return Fault.INPUT_LOST
    if isinstance(cause, ray_errors.RayActorError) and cause.actor_init_failed:
        return Fault.USER_ERROR
    lost = (
        ray_errors.RayActorError,
        ray_errors.NodeDiedError,
        ray_errors.WorkerCrashedError,
        ray_errors.LocalRayletDiedError,
        ray_errors.OutOfMemoryError,
    )
    if isinstance(cause, lost):
        return Fault.WORKER_LOST if cause is error else Fault.INPUT_LOST
    return Fault.USER_ERROR


def last_lines(error: BaseException, count: int = 6) -> str:
    """The end of an error's text, which for an error raised in a worker is the end of the worker's own traceback, without colours and carets."""
    text = error.cause if isinstance(error, RunError) else str(error)  # the error around it names actor and phase
    lines = [line.rstrip() for line in _ANSI.sub("", text).splitlines()]
    kept = [line for line in lines if line.strip() and line.strip(" ^~")]
    return "\n".join(kept[-count:]) or type(error).__name__
