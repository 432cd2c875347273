"""The five faults of a call, and the error with which a run stops.

`classify` is the one place that knows Ray's exceptions and torch's; everything above it speaks of five faults.
Left out: what to do about a fault, which `work.decide` and the driver's recovery say.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

# lines in which Ray describes a dead actor; the error around them names it
_OF_AN_ACTOR = re.compile(r"\t(class_name|actor_id|pid|name|namespace|ip|repr): ")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

# What a rank is told when a peer was killed or stopped: seen with gloo and the TCPStore of torch 2.13; of NCCL, which
# needs GPUs, as users report it.
_OF_A_PEER = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|connection (refused|was likely closed)|socket "
    r"closed|connectFullMesh failed"
    r"|timed out|(socket|read|write|connect|wait|barrier|operation) timeout|remote process "
    r"exited|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
_GLOO = re.compile(r"/gloo/\S+:\d+\] ")  # its errors are plain RuntimeErrors that name the line of its source
_CPP_STACK = "Exception raised from"  # what follows names functions, whatever happened


class Fault(Enum):
    """What happened to a call."""

    WORKER_LOST = "the process or its node is gone"
    INPUT_LOST = "an object the call needs is gone with its node"
    USER_ERROR = "the called code raised"
    EXPIRED = "it did not answer in time"
    PEER_LOST = "a peer of its gang is gone or silent"

    @property
    def of_a_process(self) -> bool:
        """Whether a process, not the code, is at fault, so that a new process may succeed."""
        return self in (Fault.WORKER_LOST, Fault.EXPIRED, Fault.PEER_LOST)

    @property
    def remoteness(self) -> int:
        """Rank of a fault by its probable distance from the root cause, when several ranks of a gang fail.

        A process that dies takes the calls of its peers with it.
        """
        return (Fault.USER_ERROR, Fault.INPUT_LOST, Fault.WORKER_LOST, Fault.EXPIRED, Fault.PEER_LOST).index(self)


class RunError(RuntimeError):
    """A failure that stops the run: who failed, in which phase, why, and what to do about it.

    `fault` is set where a call failed, so that a driver can tell a lost process (rebuild, roll back) from an error in
    the code (stop).
    """

    def __init__(self, who: str, phase: str, cause: str, remedy: str = "", fault: Fault | None = None) -> None:
        super().__init__(who, phase, cause, remedy, fault)  # all of them, so that it survives pickling
        self.who = who
        self.phase = phase
        self.cause = cause
        self.remedy = remedy
        self.fault = fault
        self.logs: tuple[Path, ...] = ()
        """The files that say more: the process's own output, and the run's log."""

    def find_logs(self, folder: Path) -> None:
        """Name the logs in a run's log folder that belong to this failure; those that do not exist are left out."""
        role, _, index = self.who.rstrip("]").partition("[")
        own = [folder / f"{role}-{index}.log"] if index else []
        self.logs = tuple(path for path in (*own, folder / "driver.log") if path.is_file())

    def __str__(self) -> str:
        text = f"{self.who} failed during '{self.phase}': {self.cause.rstrip()}"
        if text[-1] not in ".!?":
            text += "."
        logs = f"Logs: {', '.join(map(str, self.logs))}" if self.logs else ""
        return " ".join(filter(None, (text, self.remedy, logs)))


class Expired(RunError):  # noqa: N818 (a kind of RunError)
    """A watched call did not answer in time."""

    def __init__(self, who: str, phase: str, timeout_s: float) -> None:
        super().__init__(who, phase, f"no answer within {timeout_s:g} s", fault=Fault.EXPIRED)
        self.args = (who, phase, timeout_s)
        self.timeout_s = timeout_s


class ContractError(ValueError):
    """The user's code breaks its contract. The message is one line that says all, so no traceback is shown."""


def classify(error: BaseException) -> Fault:
    """The fault behind an exception that a call's reference raised.

    An exception in a constructor is the code's own error although Ray reports it as a dead actor: a replacement would
    only repeat it. A lost argument reaches us wrapped in a RayTaskError; so does an argument whose producer died before
    it was made. PEER_LOST takes both the type and the words of what torch.distributed raises: a user's own "connection
    timed out" is a USER_ERROR.
    """
    from ray import exceptions as ray_errors

    if isinstance(error, RunError) and error.fault is not None and not isinstance(error, ray_errors.RayError):
        return error.fault  # of the pump: silence, or a node that is gone
    if isinstance(error, ray_errors.GetTimeoutError):
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
    return Fault.PEER_LOST if _of_a_peer(cause) else Fault.USER_ERROR


def _of_a_peer(error: BaseException) -> bool:
    from ray.exceptions import RayTaskError

    while isinstance(error, RayTaskError):
        error = error.cause
    text = str(error).partition(_CPP_STACK)[0]
    # by name: torch loads late
    by_torch = any(
        (kind.__module__, kind.__name__) == ("torch.distributed", "DistError") for kind in type(error).__mro__
    )
    return (by_torch or (type(error) is RuntimeError and bool(_GLOO.search(text)))) and bool(_OF_A_PEER.search(text))


def role_of(who: str) -> str:
    """policy[1] -> policy."""
    return who.partition("[")[0]


def told(error: BaseException, reason: str) -> str:
    """The reason of a failure for the user: the line of a ContractError, else `reason` and the end of the traceback."""
    from ray.exceptions import RayTaskError

    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return str(cause) if isinstance(cause, ContractError) else f"{reason}:\n{last_lines(error)}\n"


def last_lines(error: BaseException, count: int = 6) -> str:
    """The last lines of an error's text, without colours and carets.

    For an error raised in a worker they are the end of the worker's traceback.
    """
    text = error.cause if isinstance(error, RunError) else str(error)  # the error around it names actor and phase
    lines = [line.rstrip() for line in _ANSI.sub("", text).splitlines()]
    kept = [line for line in lines if line.strip() and line.strip(" ^~") and not _OF_AN_ACTOR.match(line)]
    return "\n".join(kept[-count:]) or type(error).__name__
