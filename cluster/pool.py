"""A pool: workers of one role that can be replaced one by one, and the queue of work they share.

`work.decide` decides what a fault means, and `Pool` carries it out. A call is watched under one reference per attempt,
and the reference of a failed attempt is never looked at again, so a worker that was given up and answers later is not
heard. A pool goes on with fewer workers than it should have: a seat whose process does not get ready is left empty for
a while, and one that has no node until it has one, as long as another worker lives. Left out: which worker gets which
work. The result must not depend on it.
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
from cluster.faults import Fault, RunError, classify, told
from cluster.handshake import Fingerprint, compare
from cluster.incidents import Incidents
from cluster.pulse import Pulse
from cluster.spawn import WorkerInfo
from cluster.work import Work, decide, decide_start

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

MOST_SPARED = 8  # nodes that may be lost over one piece of work before it is suspected of killing them


@dataclass(slots=True, eq=False)
class _Task:
    """One attempt at a piece of work. spared: attempts before it that ended by plan, so that they do not count.
    dropped: its result and its errors are ignored.
    """

    work: Work
    attempt: int = 1
    spared: int = 0
    dropped: bool = False


@dataclass(slots=True, eq=False)
class _Worker:
    """A seat and the process in it.

    `call` is the reference being watched: of its task, or of describe() while it starts.
    """

    index: int
    node: str  # until it is ready, the node of the worker before it in this seat; "" if there was none
    handle: Any = None  # None: the seat is empty
    timer: int | None = None  # until a process is started in the seat
    call: ObjectRef[Any] | None = None
    info: WorkerInfo | None = None  # None: not ready
    task: _Task | None = None
    failures: int = 0  # failed starts in this seat, in a row
    failing_since: float = 0.0
    absent: bool = False  # the pool does not wait for it, until it is ready after all
    unplaced: bool = False  # its seat has no node
    retiring: bool = False  # its node will leave, so it gets work only if nobody else can

    @property
    def is_missed(self) -> bool:
        """Whether the pool goes on without it for now."""
        return self.absent or self.unplaced


class Pool:
    """Workers of one role, and their queue. All waiting is done by the pump, while the driver is in `run_until`."""

    def __init__(
        self,
        role: str,
        spawn: Callable[[int], Any],
        size: int,
        pump: Pump,
        config: ClusterConfig,
        fingerprint: Fingerprint,
    ) -> None:
        """spawn(index) starts the worker of seat `index` and returns its handle, also for each replacement.

        It returns None while the seat has no node; the owner of the seats calls `occupy` when it has.
        """
        self.role = role
        self.replaced = 0
        self.busy_seconds = 0.0  # of all workers together, from sending a call to its answer
        self._spawn = spawn
        self.size = size
        self._pump = pump
        self._config = config
        self._fingerprint = fingerprint
        self._workers: list[_Worker] = []
        self._queue: deque[_Task] = deque()
        self._pulse = Pulse(pump, config.pulse_timeout_s)
        self._incidents = Incidents(config.replacement_window_s)
        self._hope: int | None = None  # timer until which some worker must have a node
        self.is_gone: Callable[[int], bool] = lambda index: False
        """Whether the node of a seat is gone; called when its worker was lost."""

    def start(self) -> None:
        """Start all workers; returns at once."""
        self._workers = [_Worker(index, node="") for index in range(self.size)]
        for worker in self._workers:
            self._seat(worker)

    def wait_ready(self) -> None:
        """Wait until every worker is constructed and runs the driver's code, except those the pool goes on without.

        Raises RunError, at the latest at the deadline.
        """
        self._pump.run_until(
            lambda: (
                all(worker.info or worker.is_missed for worker in self._workers)
                and any(worker.info for worker in self._workers)
            ),
            timeout_s=self._config.ready_timeout_s * (1 + self._config.max_replacements),
            waiting_for=f"the {self.role} pool to start",
        )

    def submit(self, work: Work, *, first: bool = False) -> None:
        """Queue work, `first` or last; it is sent as soon as a worker is idle."""
        if first:
            self._queue.appendleft(_Task(work))
        else:
            self._queue.append(_Task(work))
        self._dispatch()

    def forgive(self, cause: object) -> None:
        """Stop counting the workers that were lost over this cause: the deadly item is known and left out."""
        self._incidents.forgive(cause)

    def drop_work(self) -> None:
        """Drop all work so far: nobody is called back for it.

        The workers live on; a busy one finishes before it is given new work. If it is lost or hangs meanwhile, it is
        replaced, and nothing else happens.
        """
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
        """The workers that are ready, in the order of their seats."""
        return tuple(worker.info for worker in self._workers if worker.info)

    @property
    def absent(self) -> int:
        """The number of workers that do not get ready, so that the pool goes on without them."""
        return sum(worker.absent and not worker.unplaced for worker in self._workers)

    @property
    def is_ready(self) -> bool:
        """Whether every worker is ready, except those the pool goes on without."""
        return bool(self._workers) and all(worker.info or worker.is_missed for worker in self._workers)

    def occupy(self, index: int) -> None:
        """The seat of a worker has a node: start a process there, unless one is there."""
        for worker in self._workers:
            if worker.index == index and worker.unplaced:
                worker.unplaced = False
                self._seat(worker)

    def retire(self, index: int) -> None:
        """The node of a worker will leave: send it no more work, as long as others are there."""
        for worker in self._workers:
            worker.retiring = worker.retiring or worker.index == index

    def vacate(self, index: int, *, lost: bool) -> None:
        """The seat of a worker has no node any more: end the process, and do its work again elsewhere.

        lost: not by plan, so that what it was doing has failed once more.
        """
        worker = next((worker for worker in self._workers if worker.index == index), None)
        if worker is None or worker.unplaced:
            return
        task = worker.task
        if lost and task is not None and worker.call is not None:
            self._pump.lose(self._name(worker), "its node is gone")
            return
        log.info(
            "%s leaves its seat%s", self._name(worker), "" if lost else ", since its node will leave or is given back"
        )
        self._dismiss(worker)
        self._workers[self._workers.index(worker)] = _Worker(worker.index, node="", unplaced=True)
        self.replaced += lost
        if task is not None and not task.dropped:
            self._again(task)
        self._hope_for_a_node()
        self._dispatch()

    def close(self) -> None:
        """Kill all workers and drop all work; nobody is called back."""
        self._give_up_hope()
        self._queue.clear()
        for worker in self._workers:
            self._dismiss(worker)
        self._workers = []

    def _seat(self, worker: _Worker) -> None:
        """Start a process in an empty seat."""
        worker.timer, worker.handle = None, self._spawn(worker.index)
        if worker.handle is None:
            worker.unplaced = True
            self._hope_for_a_node()
            return
        self._give_up_hope()
        self._pulse.follow(self._name(worker), worker.handle)
        worker.call = worker.handle.describe.remote()
        self._pump.watch(
            worker.call,
            who=self._name(worker),
            phase="start",
            timeout_s=self._config.ready_timeout_s,
            on_done=lambda info: self._ready(worker, info),
            on_error=lambda error: self._start_failed(worker, error),
        )

    def _hope_for_a_node(self) -> None:
        """Wait for a node, but not for ever, if no worker of the pool has one."""
        if self._hope is None and self._workers and all(worker.unplaced for worker in self._workers):
            within_s = self._config.node_timeout_s
            self._pump.patient(within_s + self._config.ready_timeout_s + 1)
            self._hope = self._pump.later(within_s, self._no_node)

    def _give_up_hope(self) -> None:
        if self._hope is not None:
            self._pump.cancel(self._hope)
            self._hope = None

    def _no_node(self) -> None:
        raise RunError(
            self.role,
            "placement",
            f"the nodes of all its workers are gone, and no other came within {self._config.node_timeout_s:g} s",
            "Raise cluster.node_timeout_s if an autoscaler needs longer, and see what the cluster can provide.",
        )

    def _ready(self, worker: _Worker, info: WorkerInfo) -> None:
        worker.call = None
        compare(self._fingerprint, info.fingerprint, self._name(worker))
        log.info("%s ready: pid %d on %s", self._name(worker), info.pid, info.node_ip)
        worker.info, worker.node = info, info.node_ip
        worker.failures, worker.absent = 0, False
        self._dispatch()

    def _start_failed(self, worker: _Worker, error: BaseException) -> None:
        worker.call = None
        fault, now = classify(error), time.monotonic()
        worker.failing_since = worker.failing_since if worker.failures else now
        worker.failures += 1
        # Trying again to fill a seat that the pool does without costs the run nothing.
        is_gone = fault is Fault.WORKER_LOST and self.is_gone(worker.index)
        is_incident = fault.of_a_process and not worker.absent and not is_gone
        incidents = self._incidents.add(now, worker.node) if is_incident else 0
        others = sum(other is not worker and not other.is_missed for other in self._workers)
        failing_s = now - worker.failing_since
        restart = decide_start(
            fault,
            failures=worker.failures,
            failing_s=failing_s,
            incidents=incidents,
            others=others > 0,
            config=self._config,
        )
        if restart.stop:
            if fault is Fault.EXPIRED:
                remedy = "Raise cluster.ready_timeout_s if loading really takes that long."
                raise RunError(self._name(worker), "start", restart.stop, remedy, fault) from error
            raise self._stopped(worker, "start", restart.stop, fault, error) from error
        if restart.absent and not worker.absent:
            log.warning(
                "%s did not get ready; the pool goes on with %d workers and tries again now and then",
                self._name(worker),
                others,
            )
        worker.absent = worker.absent or restart.absent
        self._replace(worker, "start", fault, after_s=restart.after_s)

    def _dispatch(self) -> None:
        """Send queued work to idle workers, lowest seat first; if all nodes will leave, then to these."""
        staying = [worker for worker in self._workers if worker.info is not None and not worker.retiring]
        for worker in staying or self._workers:
            if not self._queue:
                return
            if worker.info is not None and worker.call is None:
                self._send(worker, self._queue[0])

    def _send(self, worker: _Worker, task: _Task) -> None:
        """Send the task at the head of the queue."""
        sent_at, work = time.monotonic(), task.work
        worker.call, *data = work.send(worker.handle, task.attempt)
        worker.task = task
        self._queue.popleft()

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
        self._pump.watch(
            worker.call, who=self._name(worker), phase=work.phase, timeout_s=timeout_s, on_done=done, on_error=failed
        )

    def _failed(self, worker: _Worker, task: _Task, error: BaseException) -> None:
        """Deal with a failed call.

        While its owner is called back the worker counts as busy, so that it is sent nothing new. Afterwards it does
        not, whatever the owner raises: a run that recovers has work for it.
        """
        fault, replace = classify(error), False
        try:
            replace = self._settle(worker, task, fault, error)
        finally:
            worker.call = worker.task = None
            if fault in (Fault.WORKER_LOST, Fault.EXPIRED):
                worker.info = None  # nothing is sent to it any more, also where the run stops
            if replace:
                self._replace(worker, task.work.phase, fault)
        self._dispatch()

    def _settle(self, worker: _Worker, task: _Task, fault: Fault, error: BaseException) -> bool:
        """Decide about the work of a failed call; returns whether to replace the worker.

        Raises RunError when the run must stop.
        """
        work = task.work
        taken_back = False
        if fault is Fault.INPUT_LOST and work.on_input_lost is not None and not task.dropped:
            work.on_input_lost()
            taken_back = True
        lost = fault in (Fault.WORKER_LOST, Fault.EXPIRED)
        # nodes come and go, and a run on such nodes must last: only what happens on living ones counts
        gone = lost and self.is_gone(worker.index)
        if gone and task.spared < MOST_SPARED and not task.dropped:
            self._again(task)
            return True
        incidents = self._incidents.add(time.monotonic(), worker.node, work.cause) if lost and not gone else 0
        attempt, attempts = (
            0 if taken_back or task.dropped else task.attempt - task.spared,
            work.attempts or self._config.max_attempts,
        )
        decision = decide(fault, attempt=attempt, attempts=attempts, incidents=incidents, config=self._config)
        dealt_with = decision.spent and work.on_spent is not None and work.on_spent(fault)
        if decision.stop and not dealt_with:
            raise self._stopped(worker, work.phase, decision.stop, fault, error) from error
        if decision.requeue:
            self._queue.appendleft(_Task(work, task.attempt + 1, task.spared))
            if work.on_retry is not None:
                work.on_retry()
        return decision.replace

    def _again(self, task: _Task) -> None:
        """Do the work again that was lost with a node; that does not count as an attempt."""
        self._queue.appendleft(_Task(task.work, task.attempt + 1, task.spared + 1))
        if task.work.on_retry is not None:
            task.work.on_retry()

    def _replace(self, worker: _Worker, phase: str, fault: Fault, after_s: float = 0.0) -> None:
        """Seat a new worker in place of one that is lost or hangs, at once or after a delay."""
        self.replaced += 1
        log.info("%s lost in '%s': %s", self._name(worker), phase, fault.value)
        log.info("%s replaced, number %d in its pool", self._name(worker), self.replaced)
        self._dismiss(worker)
        new = _Worker(
            worker.index,
            worker.node,
            failures=worker.failures,
            failing_since=worker.failing_since,
            absent=worker.absent,
        )
        self._workers[self._workers.index(worker)] = new
        if after_s:
            new.timer = self._pump.later(after_s, lambda: self._seat(new))
        else:
            self._seat(new)

    def _dismiss(self, worker: _Worker) -> None:
        import ray

        if worker.timer is not None:
            self._pump.cancel(worker.timer)
        if worker.call is not None:
            self._pump.forget(worker.call)
        if worker.handle is not None:
            self._pulse.leave(self._name(worker))
            ray.kill(worker.handle)

    def _stopped(self, worker: _Worker, phase: str, reason: str, fault: Fault, error: BaseException) -> RunError:
        return RunError(self._name(worker), phase, told(error, reason), fault=fault)

    def _name(self, worker: _Worker) -> str:
        return f"{self.role}[{worker.index}]"
