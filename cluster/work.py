"""A piece of work for a pool, and the pool's decision when it fails. Pure: `pool.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.faults import Fault

if TYPE_CHECKING:
    from ray import ObjectRef

    Send = Callable[[Any, int], tuple[ObjectRef[Any], ...]]
    Done = Callable[[Any, tuple[ObjectRef[Any], ...], int], None]

SLOWEST_RETRY_S = 16.0  # longest pause between two starts in a seat where process after process is lost
LOSING_S = 30.0  # a seat whose starts have all been lost for so long is left empty for now
_ONLY_REPEATS = "its code raised an error, which a second attempt would only repeat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One piece of work, and the callbacks of its owner.

    send(handle, attempt): starts it on a worker and returns (report, *data). The report is fetched; data stay
        references.
    on_done(report, data, attempt): it is done.
    on_input_lost(): an object that `send` passed is gone. The owner makes it again and submits the work again. Without
        this callback the run stops.
    on_retry(): the worker was lost or hung, and the work was queued again.
    on_spent(fault): the last attempt lost or hung its worker, too. It returns True if the owner has dealt with it.
        Without this callback, or for False, the run stops.
    cause: the same object for all work whose losses are one incident.
    """

    phase: str
    send: Send
    on_done: Done
    on_input_lost: Callable[[], None] | None = None
    on_retry: Callable[[], None] | None = None
    on_spent: Callable[[Fault], bool] | None = None
    timeout_s: float | None = None  # None: cluster.call_timeout_s
    attempts: int | None = None  # None: cluster.max_attempts
    cause: object = field(default_factory=object)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The reaction to a fault."""

    replace: bool = False  # kill the worker and seat a new one
    requeue: bool = False  # send the work again, as the next attempt
    spent: bool = False  # no attempt is left: stop, unless the work's owner deals with it
    stop: str = ""  # stop the run for this reason


def decide(fault: Fault, *, attempt: int, attempts: int, incidents: int, config: ClusterConfig) -> Decision:
    """The reaction of a pool to a fault in attempt number `attempt`, from 1, of at most `attempts`.

    attempt: 0 if the owner has taken the work back or dropped it, so that only the worker matters. incidents: the
    number that counts now, this one included.
    """
    # workers of a pool have no peers, so a lost peer is one that the user's code made
    if fault in (Fault.USER_ERROR, Fault.PEER_LOST):
        return Decision() if attempt == 0 else Decision(stop=_ONLY_REPEATS)
    if fault is Fault.INPUT_LOST:
        return Decision() if attempt == 0 else Decision(stop="nobody can make the lost object anew")
    if incidents > config.max_replacements:
        return Decision(stop=_unhealthy(incidents, config))
    if attempt >= attempts:
        return Decision(replace=True, spent=True, stop=f"attempt {attempt} of {attempts} failed (cluster.max_attempts)")
    return Decision(replace=True, requeue=attempt > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The reaction to a process that did not get ready. absent: the pool goes on without its seat for now."""

    after_s: float = 0.0
    absent: bool = False
    stop: str = ""


def decide_start(
    fault: Fault, *, failures: int, failing_s: float, incidents: int, others: bool, config: ClusterConfig
) -> Restart:
    """The reaction of a pool to a failed start.

    failures: of this seat in a row, this one included, within `failing_s` seconds. others: whether any other worker is
    ready or may still get ready.
    """
    if not fault.of_a_process or fault is Fault.PEER_LOST:
        return Restart(stop=_ONLY_REPEATS)
    if incidents > config.max_replacements:
        return Restart(stop=_unhealthy(incidents, config))
    if fault is not Fault.EXPIRED and (failures < config.max_attempts or failing_s < LOSING_S):
        return Restart(after_s=min(2.0 ** (failures - 1), SLOWEST_RETRY_S))
    if others:
        return Restart(absent=True, after_s=LOSING_S)
    if fault is Fault.EXPIRED:
        return Restart(stop=f"not ready within {config.ready_timeout_s:g} s")
    return Restart(stop=f"{failures} starts in a row were lost within {failing_s:.0f} s, and no other worker is left")


def _unhealthy(incidents: int, config: ClusterConfig) -> str:
    within = f"within {config.replacement_window_s:g} s" if incidents > 1 else "and may lose none"
    return (
        f"its pool has lost workers {_times(incidents)} {within} (cluster.max_replacements = {config.max_replacements})"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
