"""A gang: ranks that live and die together, such as the processes that train one model.

A collective operation needs every rank, so one lost rank spoils the call for all, and its owner rebuilds the gang as a whole.
Left out: the collectives themselves, for which a rank's `connect(address, port)` sets up whatever it uses, and what the ranks knew: new ones
begin with what their constructor gives them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Fault, RunError, classify, last_lines
from cluster.handshake import Fingerprint, compare
from cluster.pulse import Pulse
from cluster.spawn import WorkerInfo

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

_GRACE_S = 2.0  # after a first error: the rank that caused it may report later than the peers it tore down
_REMOTENESS = {Fault.USER_ERROR: 0, Fault.INPUT_LOST: 0, Fault.WORKER_LOST: 1, Fault.EXPIRED: 2, Fault.PEER_LOST: 3}  # from the root cause, probably


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    rank: int
    fault: Fault
    error: BaseException


class Ticket:
    """One call to all ranks of a gang, running or done."""

    def __init__(self, role: str, phase: str, pump: Pump, sent: Sequence[tuple[ObjectRef[Any], ...]], timeout_s: float, peer_timeout_s: float) -> None:
        """timeout_s: for all ranks. peer_timeout_s: for the others once the first has answered, since ranks do the same work at the same time."""
        self._role = role
        self.phase = phase
        self._pump = pump
        self._sent = sent  # per rank: the report, then data
        self._reports: dict[int, Any] = {}
        self._failures: list[_Failure] = []
        self._failed_at = 0.0
        self._peer_timeout_s = peer_timeout_s
        for rank, (report, *_) in enumerate(sent):
            self._watch(rank, report, timeout_s)

    @property
    def done(self) -> bool:
        """Every rank has answered, or one has failed and the others have had their moment to say why."""
        if len(self._reports) + len(self._failures) == len(self._sent):
            return True
        return bool(self._failures) and time.monotonic() > self._failed_at + _GRACE_S

    def results(self) -> list[Any]:
        """The reports in the order of ranks. Raises RunError naming the rank that most likely caused a failure, with `fault` set."""
        assert self.done, f"{self._role} '{self.phase}' is still running"
        if not self._failures:
            return [self._reports[rank] for rank in range(len(self._sent))]
        self.forget()
        failure = min(self._failures, key=lambda failure: (_REMOTENESS[failure.fault], failure.rank))
        rank, fault, cause = failure.rank, failure.fault, failure.fault.value
        silent = set(range(len(self._sent))) - self._reports.keys() - {failure.rank for failure in self._failures}
        if fault is Fault.PEER_LOST and len(silent) == 1:  # a collective's deadline is shorter than the call's
            rank, fault, cause = silent.pop(), Fault.EXPIRED, f"no answer; its peer {self._name(rank)} reports"
            self._log_lost(rank, fault)
        raise RunError(self._name(rank), self.phase, f"{cause}:\n{last_lines(failure.error)}\n", fault=fault) from failure.error

    def forget(self) -> None:
        """Nobody wants to hear of it any more: what a rank still answers is ignored, and `done` need not come true."""
        for report, *_ in self._sent:
            self._pump.forget(report)

    def refs(self, rank: int) -> tuple[ObjectRef[Any], ...]:
        """The data references that `send` returned for a rank besides its report."""
        return tuple(self._sent[rank][1:])

    def _watch(self, rank: int, report: ObjectRef[Any], timeout_s: float) -> None:
        def done(value: Any) -> None:
            self._reports[rank] = value
            if len(self._reports) == 1:
                for report, *_ in self._sent:
                    self._pump.hasten(report, self._peer_timeout_s)

        def failed(error: BaseException) -> None:
            self._failed_at = self._failed_at or time.monotonic()
            self._failures.append(_Failure(rank=rank, fault=classify(error), error=error))
            if self._failures[-1].fault in (Fault.WORKER_LOST, Fault.EXPIRED):
                self._log_lost(rank, self._failures[-1].fault)

        self._pump.watch(report, who=self._name(rank), phase=self.phase, timeout_s=timeout_s, on_done=done, on_error=failed)

    def _log_lost(self, rank: int, fault: Fault) -> None:
        log.info("%s lost in '%s': %s", self._name(rank), self.phase, fault.value)

    def _name(self, rank: int) -> str:
        return f"{self._role}[{rank}]"


class Gang:
    """The ranks of one role."""

    def __init__(self, role: str, spawn: Callable[[int], Any], ranks: int, pump: Pump, config: ClusterConfig, fingerprint: Fingerprint) -> None:
        """spawn(rank) starts a rank and returns its handle."""
        self.role = role
        self._spawn = spawn
        self.ranks = ranks
        self._pump = pump
        self._config = config
        self._fingerprint = fingerprint
        self._handles: list[Any] = []
        self._pulse = Pulse(pump, config.pulse_timeout_s)

    def start(self) -> None:
        """Start all ranks; returns at once."""
        self._handles = [self._spawn(rank) for rank in range(self.ranks)]
        for rank, handle in enumerate(self._handles):
            self._pulse.follow(f"{self.role}[{rank}]", handle)

    def connect(self) -> list[Any]:
        """Wait for every rank's constructor, check its code, then let all of them meet at an address of rank 0: `connect(address, port)`.

        Returns what their `connect` returned. Raises RunError, at the latest at the deadlines.
        """
        ready_s = self._config.ready_timeout_s
        workers: list[WorkerInfo] = self.call("start", lambda handle, rank: handle.describe.remote(), timeout_s=ready_s)
        for rank, worker in enumerate(workers):
            compare(self._fingerprint, worker.fingerprint, f"{self.role}[{rank}]")
            log.info("%s[%d] ready: pid %d on %s", self.role, rank, worker.pid, worker.node_ip)
        address, port = workers[0].node_ip, self._free_port()
        return self.call("connect", lambda handle, rank: handle.connect.remote(address, port), timeout_s=ready_s)

    def rebuild(self) -> list[Any]:
        """Kill all ranks, whatever state they are in, seat new ones and `connect` them at a new port; what their `connect` returned.

        May be called again and again, also after it has failed. Raises RunError, at the latest at the deadlines: a new rank waits within
        ready_timeout_s for its seat, which a stopped process leaves about six seconds after it was killed. Forget running tickets first.
        """
        began = time.monotonic()
        self.close()
        self.start()
        connected = self.connect()
        log.info("%s rebuilt in %.1f s", self.role, time.monotonic() - began)
        return connected

    def begin(self, phase: str, send: Callable[[Any, int], ObjectRef[Any] | tuple[ObjectRef[Any], ...]], timeout_s: float | None = None) -> Ticket:
        """Start send(handle, rank) on every rank; it returns the report's reference, alone or followed by data references."""
        assert self._handles, f"the {self.role} gang is not started"
        sent = [_as_tuple(send(handle, rank)) for rank, handle in enumerate(self._handles)]
        if timeout_s is not None:  # a start, where ranks take turns at the same disk and cores
            return Ticket(self.role, phase, self._pump, sent, timeout_s, timeout_s)
        return Ticket(self.role, phase, self._pump, sent, self._config.call_timeout_s, self._config.peer_timeout_s)

    def call(self, phase: str, send: Callable[[Any, int], ObjectRef[Any] | tuple[ObjectRef[Any], ...]], timeout_s: float | None = None) -> list[Any]:
        """`begin`, serve events until it is done, and its results."""
        return self._finish(self.begin(phase, send, timeout_s), self._config.call_timeout_s if timeout_s is None else timeout_s)

    def close(self) -> None:
        """Kill all ranks."""
        import ray

        for rank, handle in enumerate(self._handles):
            self._pulse.leave(f"{self.role}[{rank}]")
            ray.kill(handle)
        self._handles = []

    def _free_port(self) -> int:
        sent = [(self._handles[0].free_port.remote(),)]
        ticket = Ticket(self.role, "find a port", self._pump, sent, self._config.ready_timeout_s, self._config.ready_timeout_s)
        return int(self._finish(ticket, self._config.ready_timeout_s)[0])

    def _finish(self, ticket: Ticket, timeout_s: float) -> list[Any]:
        """The ticket's own deadline comes first; the pump's is there in case it does not."""
        self._pump.run_until(lambda: ticket.done, timeout_s=timeout_s + 2 * _GRACE_S, waiting_for=f"{self.role} '{ticket.phase}'")
        return ticket.results()


def _as_tuple(refs: ObjectRef[Any] | tuple[ObjectRef[Any], ...] | list[ObjectRef[Any]]) -> tuple[ObjectRef[Any], ...]:
    return tuple(refs) if isinstance(refs, (tuple, list)) else (refs,)
