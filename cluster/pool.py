"""A pool: workers of one role that can be replaced one by one, and the queue of work they share.

`decide` says what a fault means, `Pool` does it. A call is watched under one reference per attempt, and a failed attempt's reference is
never looked at again, so a worker that was declared dead and still answers is not heard.
Left out: which worker gets which work. What a piece of work yields must not depend on it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One piece of work, and whom to tell.

    send(handle, attempt) starts it on a worker and returns (report, *data): the report is fetched, the data references stay references.
    on_input_lost: an object that `send` passed is gone; the owner makes it anew and submits again. Without it the run stops.
    on_expired: the deadline passed; True: the owner has dealt with it, False: send it again. The worker is replaced in either case.
    on_retry: its worker was lost or hangs, and it was queued once more.
    """

    phase: str
    send: Callable[[Any, int], tuple[ObjectRef[Any], ...]]
    on_done: Callable[[Any, tuple[ObjectRef[Any], ...], int], None]
    on_input_lost: Callable[[], None] | None = None
    on_expired: Callable[[], bool] | None = None
    on_retry: Callable[[], None] | None = None
    timeout_s: float | None = None  # None: cluster.call_timeout_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do about a fault."""

    replace: bool = False  # kill the worker and seat a new one
    requeue: bool = False  # send the work again, as the next attempt
    stop: str = ""  # stop the run for this reason


def decide(fault: Fault, *, attempt: int, replaced: int, config: ClusterConfig) -> Decision:
    """What a pool does about a fault in attempt number `attempt`, after having replaced `replaced` workers.

    Attempts count from 1; 0 means that the work's owner has taken the work back or dropped it, so that only the worker is at issue.
    """
    if fault in (Fault.USER_ERROR, Fault.PEER_LOST):  # workers of a pool have no peers: if one of its own making is gone, so be it
        return Decision() if attempt == 0 else Decision(stop="its code raised an error, which a second attempt would only repeat")
    if fault is Fault.INPUT_LOST:
        return Decision() if attempt == 0 else Decision(stop="nobody can make the lost object anew")
    if replaced >= config.max_replacements:
        return Decision(stop=f"the pool has already replaced {replaced} workers (cluster.max_replacements = {config.max_replacements})")
    if attempt >= config.max_attempts:
        return Decision(stop=f"attempt {attempt} of {config.max_attempts} failed (cluster.max_attempts)")
    return Decision(replace=True, requeue=attempt > 0)


@dataclass(slots=True, eq=False)
class _Task:
    """One attempt at a piece of work. dropped: nobody wants to hear of it any more."""

    work: Work
    attempt: int = 1
    dropped: bool = False


@dataclass(slots=True)
class _Worker:
    """A seat and who sits in it. `call` is the reference being watched: of its task, or of describe() while it starts."""

    index: int
    handle: Any
    call: ObjectRef[Any] | None = None
    info: WorkerInfo | None = None  # None: still starting
    task: _Task | None = None


class Pool:
    """Workers of one role. Everything it waits for it waits for through the pump, hence only while the driver is in `run_until`."""

    def __init__(self, role: str, spawn: Callable[[int], Any], size: int, pump: Pump, config: ClusterConfig, fingerprint: Fingerprint) -> None:
        """spawn(index) starts the worker of seat `index` and returns its handle; called again for each replacement."""
        self.role = role
        self.replaced = 0
        self.busy_seconds = 0.0  # of all workers together, from sending a call to its answer
        self._spawn = spawn
        self._size = size
        self._pump = pump
        self._config = config
        self._fingerprint = fingerprint
        self._workers: list[_Worker] = []
        self._queue: deque[_Task] = deque()
        self._pulse = Pulse(pump, config.pulse_timeout_s)

    def start(self) -> None:
        """Start all workers; returns at once."""
        self._workers = [self._seat(index) for index in range(self._size)]

    def wait_ready(self) -> None:
        """Until every worker's constructor is through and its code is seen to be the driver's. Raises RunError, at the latest at the deadline."""
        self._pump.run_until(
            lambda: all(worker.info for worker in self._workers),
            timeout_s=self._config.ready_timeout_s * (1 + self._config.max_replacements),
            waiting_for=f"the {self.role} pool to start",
        )

    def submit(self, work: Work) -> None:
        """Queue work; it is sent as soon as a worker is idle."""
        self._queue.append(_Task(work))
        self._dispatch()

    def drop_work(self) -> None:
        """Nobody is called back any more for what was submitted so far. The workers live, and a busy one finishes what it is doing before it is
        given new work; if it fails at that, it is replaced where it is lost or hangs, and nothing else happens."""
        self._queue.clear()
        for worker in self._workers:
            if worker.task is not None:
                worker.task.dropped = True

    @property
    def unfinished(self) -> int:
        """Pieces of work that are queued or running and not dropped."""
        return len(self._queue) + sum(worker.task is not None and not worker.task.dropped for worker in self._workers)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """Who is ready at this moment, in the order of the seats."""
        return tuple(worker.info for worker in self._workers if worker.info)

    def close(self) -> None:
        """Kill all workers and drop all work; nobody is called back any more."""
        self._queue.clear()
        for worker in self._workers:
            self._dismiss(worker)
        self._workers = []

    def _seat(self, index: int) -> _Worker:
        handle = self._spawn(index)
        worker = _Worker(index, handle)
        self._pulse.follow(self._name(worker), handle)
        worker.call = handle.describe.remote()
        self._pump.watch(
            worker.call,
            who=self._name(worker),
            phase="start",
            timeout_s=self._config.ready_timeout_s,
            on_done=lambda info: self._ready(worker, info),
            on_error=lambda error: self._start_failed(worker, error),
        )
        return worker

    def _ready(self, worker: _Worker, info: WorkerInfo) -> None:
        compare(self._fingerprint, info.fingerprint, self._name(worker))
        log.info("%s ready: pid %d on %s", self._name(worker), info.pid, info.node_ip)
        worker.call, worker.info = None, info
        self._dispatch()

    def _start_failed(self, worker: _Worker, error: BaseException) -> None:
        fault = classify(error)
        if fault is Fault.EXPIRED:
            remedy = "Raise cluster.ready_timeout_s if loading really takes that long."
            raise RunError(self._name(worker), "start", f"not ready within {self._config.ready_timeout_s:g} s", remedy, fault) from error
        decision = decide(fault, attempt=1, replaced=self.replaced, config=self._config)
        if decision.stop:
            raise self._stopped(worker, "start", decision.stop, fault, error) from error
        self._replace(worker, "start", fault)

    def _dispatch(self) -> None:
        """Send queued work to idle workers, lowest seat first."""
        for worker in self._workers:
            if not self._queue:
                return
            if worker.info is not None and worker.call is None:
                self._send(worker, self._queue.popleft())

    def _send(self, worker: _Worker, task: _Task) -> None:
        sent_at, work = time.monotonic(), task.work
        worker.call, *data = work.send(worker.handle, task.attempt)
        worker.task = task

        def done(report: Any) -> None:
            self.busy_seconds += time.monotonic() - sent_at
            worker.call = worker.task = None
            self._dispatch()  # first, so that the worker does not idle while the owner thinks
            if not task.dropped:
                work.on_done(report, tuple(data), task.attempt)

        def failed(error: BaseException) -> None:
            self.busy_seconds += time.monotonic() - sent_at
            self._failed(worker, task, error)

        timeout_s = self._config.call_timeout_s if work.timeout_s is None else work.timeout_s
        self._pump.watch(worker.call, who=self._name(worker), phase=work.phase, timeout_s=timeout_s, on_done=done, on_error=failed)

    def _failed(self, worker: _Worker, task: _Task, error: BaseException) -> None:
        """The worker still counts as busy while its owner is called back, so nothing that the owner submits there is sent to it."""
        fault, work = classify(error), task.work
        taken_back = not task.dropped and _take_back(work, fault)
        decision = decide(fault, attempt=0 if taken_back or task.dropped else task.attempt, replaced=self.replaced, config=self._config)
        if decision.stop:
            raise self._stopped(worker, work.phase, decision.stop, fault, error) from error
        if decision.requeue:
            self._queue.appendleft(_Task(work, task.attempt + 1))
            if work.on_retry is not None:
                work.on_retry()
        if decision.replace:
            self._replace(worker, work.phase, fault)
        else:
            worker.call = worker.task = None
        self._dispatch()

    def _replace(self, worker: _Worker, phase: str, fault: Fault) -> None:
        """Seat a new worker in the place of one that is lost or hangs."""
        self.replaced += 1
        log.info("%s lost in '%s': %s", self._name(worker), phase, fault.value)
        log.info("%s replaced, number %d of at most %d in its pool", self._name(worker), self.replaced, self._config.max_replacements)
        self._dismiss(worker)
        self._workers[self._workers.index(worker)] = self._seat(worker.index)

    def _dismiss(self, worker: _Worker) -> None:
        import ray

        if worker.call is not None:
            self._pump.forget(worker.call)
        self._pulse.leave(self._name(worker))
        ray.kill(worker.handle)

    def _stopped(self, worker: _Worker, phase: str, reason: str, fault: Fault, error: BaseException) -> RunError:
        output = f"Its output is in {worker.info.log_file}." if worker.info and worker.info.log_file else ""
        return RunError(self._name(worker), phase, f"{reason}:\n{last_lines(error)}\n", output, fault)

    def _name(self, worker: _Worker) -> str:
        return f"{self.role}[{worker.index}]"


def _take_back(work: Work, fault: Fault) -> bool:
    """Whether the owner deals with the fault itself."""
    if fault is Fault.INPUT_LOST and work.on_input_lost is not None:
        work.on_input_lost()
        return True
    return fault is Fault.EXPIRED and work.on_expired is not None and work.on_expired()
