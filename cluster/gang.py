"""A gang: ranks that live and die together, such as the processes that train one model.

A collective operation needs every rank, so one lost rank spoils the call for all, and the owner rebuilds the whole
gang. Left out: the collectives themselves, which a rank sets up in its `connect(address, port)`, and the state of lost
ranks: new ones begin with what their constructor gives them.
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
from cluster.watchdog import RankLog

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

_GRACE_S = 2.0  # after a first error, because the rank that caused it may report later than its peers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    rank: int
    fault: Fault
    error: BaseException
    said: str  # the end of its error text


class Ticket:
    """One call to all ranks of a gang, running or done."""

    def __init__(
        self,
        role: str,
        phase: str,
        pump: Pump,
        sent: Sequence[tuple[ObjectRef[Any], ...]],
        timeout_s: float,
        peer_timeout_s: float,
        logs: Sequence[RankLog] = (),
    ) -> None:
        """timeout_s: for all ranks. peer_timeout_s: for the others once the first has answered. logs: if known."""
        self._role = role
        self.phase = phase
        self._pump = pump
        self._sent = sent  # per rank: the report, then data
        self._reports: dict[int, Any] = {}
        self._failures: list[_Failure] = []
        self._failed_at = 0.0
        self._peer_timeout_s = peer_timeout_s
        self._logs = logs
        for rank, (report, *_) in enumerate(sent):
            self._watch(rank, report, timeout_s)

    @property
    def done(self) -> bool:
        """Whether every rank has answered, or one has failed and the grace time of the others is over."""
        if len(self._reports) + len(self._failures) == len(self._sent):
            return True
        return bool(self._failures) and time.monotonic() > self._failed_at + _GRACE_S

    def results(self) -> list[Any]:
        """The reports in the order of ranks.

        Raises RunError naming the rank that most likely caused a failure, with `fault` set.
        """
        assert self.done, f"{self._role} '{self.phase}' is still running"
        if not self._failures:
            return [self._reports[rank] for rank in range(len(self._sent))]
        self.forget()
        failure = min(self._failures, key=lambda failure: (failure.fault.remoteness, failure.rank))
        rank, fault, cause = failure.rank, failure.fault, failure.fault.value
        if fault is Fault.EXPIRED and (
            others := [
                self._name(other.rank) for other in self._failures if other.fault is fault and other is not failure
            ]
        ):
            cause += (
                f", and neither did {', '.join(others)}; which of them holds up the others cannot be told from here"
            )
        silent = set(range(len(self._sent))) - self._reports.keys() - {failure.rank for failure in self._failures}
        if fault is Fault.PEER_LOST and len(silent) == 1:  # a collective's deadline is shorter than the call's
            rank, fault, cause = silent.pop(), Fault.EXPIRED, f"no answer; its peer {self._name(rank)} reports"
            self._log_lost(rank, fault)
        raise RunError(self._name(rank), self.phase, f"{cause}:\n{failure.said}\n", fault=fault) from failure.error

    def forget(self) -> None:
        """Ignore the answers of the ranks from now on; `done` may then never become true."""
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
            self._failures.append(self._failure(rank, error))
            if self._failures[-1].fault in (Fault.WORKER_LOST, Fault.EXPIRED):
                self._log_lost(rank, self._failures[-1].fault)

        self._pump.watch(
            report, who=self._name(rank), phase=self.phase, timeout_s=timeout_s, on_done=done, on_error=failed
        )

    def _failure(self, rank: int, error: BaseException) -> _Failure:
        fault = classify(error)
        if fault is Fault.WORKER_LOST and self._logs and (line := self._logs[rank].watchdog_line()):
            return _Failure(rank=rank, fault=Fault.PEER_LOST, error=error, said=line)
        return _Failure(rank=rank, fault=fault, error=error, said=last_lines(error))

    def _log_lost(self, rank: int, fault: Fault) -> None:
        log.info("%s lost in '%s': %s", self._name(rank), self.phase, fault.value)

    def _name(self, rank: int) -> str:
        return f"{self._role}[{rank}]"


class Gang:
    """The ranks of one role."""

    def __init__(
        self,
        role: str,
        spawn: Callable[[int], Any],
        ranks: int,
        pump: Pump,
        config: ClusterConfig,
        fingerprint: Fingerprint,
    ) -> None:
        """A gang that is not started yet. spawn(rank) starts a rank and returns its handle."""
        self.role = role
        self._spawn = spawn
        self.ranks = ranks
        self._pump = pump
        self._config = config
        self._fingerprint = fingerprint
        self.workers: tuple[WorkerInfo, ...] = ()
        """Its ranks, as they were when they last met."""
        self._handles: list[Any] = []
        self._logs: list[RankLog] = []
        self._pulse = Pulse(pump, config.pulse_timeout_s)
        self._restarted_at = 0.0
        self.is_connected = False  # whether its ranks have met, and `close` has not killed them since

    def start(self) -> None:
        """Start all ranks; returns at once. Raises RunError when a seat has no node."""
        started = [self._spawn(rank) for rank in range(self.ranks)]
        self._handles = [handle for handle in started if handle is not None]
        if len(self._handles) < self.ranks:
            who = f"{self.role}[{started.index(None)}]"
            raise RunError(who, "start", "its seat has no node", fault=Fault.WORKER_LOST)
        self._logs = []
        for rank, handle in enumerate(self._handles):
            self._pulse.follow(f"{self.role}[{rank}]", handle)

    def connect(self) -> list[Any]:
        """Wait for every rank's constructor, check its code, then call `connect(address, port)` on all of them.

        The address is one of rank 0. Returns the results of `connect`, by rank. Raises RunError, at the latest at the
        deadlines.
        """
        workers: list[WorkerInfo] = self._call_start("start", lambda handle, rank: handle.describe.remote())
        for rank, worker in enumerate(workers):
            compare(self._fingerprint, worker.fingerprint, f"{self.role}[{rank}]")
            log.info("%s[%d] ready: pid %d on %s", self.role, rank, worker.pid, worker.node_ip)
        self.workers = tuple(workers)
        self._logs = [RankLog.now(worker.log_file) for worker in workers]
        address, port = workers[0].node_ip, self._free_port()
        met = self._call_start("connect", lambda handle, rank: handle.connect.remote(address, port))
        self.is_connected = True
        if self._restarted_at:
            log.info("%s rebuilt in %.1f s", self.role, time.monotonic() - self._restarted_at)
        return met

    def restart(self) -> None:
        """Kill all ranks, whatever state they are in, and start new ones; returns at once, and `connect` comes next.

        Forget running tickets first. May be called repeatedly, also after `connect` has failed. A new rank waits for
        its seat within ready_timeout_s; a stopped process leaves it about six seconds after it was killed.
        """
        self.close()
        self.start()
        self._restarted_at = time.monotonic()

    def begin(
        self,
        phase: str,
        send: Callable[[Any, int], ObjectRef[Any] | tuple[ObjectRef[Any], ...]],
        timeout_s: float | None = None,
        *,
        uneven: bool = False,
    ) -> Ticket:
        """Start send(handle, rank) on every rank.

        send returns the reference of the report, alone or followed by references of data. uneven: one rank writes or
        reads more than the others, and none waits for another in a collective; so each has the whole deadline of the
        call.
        """
        assert self._handles, f"the {self.role} gang is not started"
        sent = [_as_tuple(send(handle, rank)) for rank, handle in enumerate(self._handles)]
        if timeout_s is not None:  # a start, where ranks take turns at the same disk and cores
            return Ticket(self.role, phase, self._pump, sent, timeout_s, timeout_s, self._logs)
        whole_s = self._config.call_timeout_s
        return Ticket(
            self.role, phase, self._pump, sent, whole_s, whole_s if uneven else self._config.peer_timeout_s, self._logs
        )

    def call(
        self,
        phase: str,
        send: Callable[[Any, int], ObjectRef[Any] | tuple[ObjectRef[Any], ...]],
        timeout_s: float | None = None,
        *,
        uneven: bool = False,
    ) -> list[Any]:
        """`begin` a call, serve events until it is done, and return its results."""
        return self._finish(
            self.begin(phase, send, timeout_s, uneven=uneven),
            self._config.call_timeout_s if timeout_s is None else timeout_s,
        )

    def close(self) -> None:
        """Kill all ranks."""
        import ray

        self.is_connected = False
        for rank, handle in enumerate(self._handles):
            self._pulse.leave(f"{self.role}[{rank}]")
            ray.kill(handle)
        self._handles = []

    def occupy(self, index: int) -> None:
        """The seat of a rank has a node. The owner starts ranks, all together."""

    def retire(self, index: int) -> None:
        """The node of a rank will leave. The owner moves the gang, between two steps."""

    def vacate(self, index: int, *, lost: bool) -> None:
        """The seat of a rank has no node any more; lost: a call that it was in has failed.

        Raises RunError if it was in none, so that the owner need not wait for its next call to hear of it.
        """
        self.is_connected = False
        who, cause = f"{self.role}[{index}]", "its node is gone"
        if lost and self._handles and not self._pump.lose(who, cause):
            raise RunError(who, "waiting for its next call", cause, fault=Fault.WORKER_LOST)

    def _call_start(self, phase: str, send: Callable[[Any, int], ObjectRef[Any]]) -> list[Any]:
        try:
            return self.call(phase, send, timeout_s=self._config.ready_timeout_s)
        except RunError as error:
            if error.fault is not Fault.EXPIRED:
                raise
            remedy = "Raise cluster.ready_timeout_s if loading really takes that long."
            raise RunError(error.who, error.phase, error.cause, remedy, error.fault) from error

    def _free_port(self) -> int:
        sent = [(self._handles[0].free_port.remote(),)]
        ticket = Ticket(
            self.role, "find a port", self._pump, sent, self._config.ready_timeout_s, self._config.ready_timeout_s
        )
        return int(self._finish(ticket, self._config.ready_timeout_s)[0])

    def _finish(self, ticket: Ticket, timeout_s: float) -> list[Any]:
        """Wait for a ticket. Its own deadline comes first; the pump's is there in case it does not."""
        self._pump.run_until(
            lambda: ticket.done, timeout_s=timeout_s + 2 * _GRACE_S, waiting_for=f"{self.role} '{ticket.phase}'"
        )
        return ticket.results()


def _as_tuple(refs: ObjectRef[Any] | tuple[ObjectRef[Any], ...] | list[ObjectRef[Any]]) -> tuple[ObjectRef[Any], ...]:
    return tuple(refs) if isinstance(refs, (tuple, list)) else (refs,)
