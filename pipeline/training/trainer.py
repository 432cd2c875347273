"""A supervised training as the driver sees it: start it on Ray Train, follow it, end it.

Consumes: the events of supervisor.py, one call at a time. Waits for: the next events, in the pump. Unblocked by: the
end of the training, its failure, a signal, or `cluster.call_timeout_s` without an event.

A first signal is passed on to the workers, which finish the current updates, write a checkpoint and leave. Before the
first update, or at a second signal, the training is ended at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import Expired, RunError, classify, last_lines
from cluster.placement import RoleDemand, place
from cluster.session import Session
from cluster.shared import check_seen
from cluster.signals import PostponedStop
from cluster.stopping import StopNow, name_of
from cluster.storage import Folder
from pipeline.observe.progress import Progress
from pipeline.observe.tensorboard import TensorBoard
from pipeline.training.checkpoints import TrainingCheckpoints
from pipeline.training.events import Event, Failed, Finished, Message, Phase, Progressed, Restored, WorkerReady
from pipeline.training.job import Record, TrainingJob, TrainingState
from pipeline.training.reservations import Reservations
from pipeline.training.supervisor import STORAGE, Supervisor
from pipeline.training.worker import LOADING, START, TrainingSetup

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_JOB = "job.txt"
_CHECK_S = 0.1  # seconds between two checks for a signal
_BEFORE_TRAINING = {START: "starting workers", LOADING: "loading the model"}  # phase -> its name for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a training that is over. outcome: what the job's `finish` returned."""

    state: TrainingState
    outcome: dict[str, Any]


def fit(
    job: TrainingJob,
    config: ClusterConfig,
    session: Session,
    folder: Path,
    progress: Progress,
    copy: Callable[[], None] = lambda: None,
) -> TrainingResult:
    """Run a training in `folder`, or resume it; afterwards the best weights are in `job.best`.

    copy: called after each checkpoint, while the workers go on; what it raises ends the training.

    To be called in the main thread. Raises RunError naming the job, its phase and a remedy. At a signal it raises what
    the signal's handler raises, or StopNow where the handler raises nothing. No process of the training is left then.
    """
    folder = folder.absolute()
    if claim(folder, job):
        progress.remark(
            f"{job.name}: what was done of another training in this folder is of no use for this one, which begins anew"
        )
    placement = place(config, [RoleDemand(role=job.name, workers=job.learner.ranks, gpus=job.learner.gpus)])
    session.preflight(placement)
    progress.stage(job.title, job.records)
    setup = TrainingSetup(
        job=job,
        folder=folder,
        log_dir=session.log_dir.absolute(),
        cluster=config,
        bundle=placement.bundles[0],
        threads=placement.slot(job.name, 0).threads,
        fingerprint=session.fingerprint,
        packages=session.packages,
        mark=session.mark,
        is_alone=len(session.nodes()) == 1,
    )
    finished = _followed(setup, session, progress, copy)
    assert finished.state is not None
    check_seen(f"{job.name}[0]", "export", Folder(job.best), finished.files)
    shutil.rmtree(folder / STORAGE, ignore_errors=True)
    return TrainingResult(state=finished.state, outcome=finished.outcome)


def claim(folder: Path, job: TrainingJob) -> bool:
    """Empty the folder if another training was begun in it, since this one cannot use those checkpoints.

    Returns whether any checkpoints were removed.
    """
    mark = folder / _JOB
    if mark.is_file() and mark.read_text(encoding="utf-8") == job.digest:
        return False
    had_checkpoints = bool(TrainingCheckpoints(folder, job.name).names())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(job.digest, encoding="utf-8")
    return had_checkpoints


def _followed(setup: TrainingSetup, session: Session, progress: Progress, copy: Callable[[], None]) -> Finished:
    """Start the training and wait for its end; whatever ends the wait, a signal included, ends the training."""
    import ray

    job, signals = setup.job, PostponedStop()
    try:
        with signals:
            reservations = Reservations()
            supervisor = session.beside().spawn_beside(Supervisor, f"{job.name}-supervisor", 0)
            follower = Follower(setup, supervisor, progress, signals, copy)
            try:
                finished = follower.follow(supervisor.fit.remote(setup, reservations.lock))
            finally:
                ray.kill(supervisor)
                reservations.release()
                follower.close()
    except (RunError, StopNow):
        _stop_now(signals, job, None)
        raise
    _stop_now(signals, job, finished.state)
    return finished


def _stop_now(signals: PostponedStop, job: TrainingJob, state: TrainingState | None) -> None:
    """Raises what the signal's handler raises, or StopNow, if there was a signal.

    state: what the workers checkpointed before they left.
    """
    if not signals:
        return
    with contextlib.suppress(StopNow):
        signals.deliver()
    if state is None or not state.saved:
        raise StopNow
    raise StopNow(f"after update {state.saved} of {job.updates} of '{job.title}', which is checkpointed")


class Follower:
    """Waits for a training, and shows and logs its events."""

    def __init__(
        self,
        setup: TrainingSetup,
        supervisor: Any,
        progress: Progress,
        signals: PostponedStop,
        copy: Callable[[], None] = lambda: None,
    ) -> None:
        """signals: the signals received so far that ask to stop. copy: called after each checkpoint."""
        self._copy = copy
        self._job = setup.job
        self._config = setup.cluster
        self._supervisor = supervisor
        self._progress = progress
        self._signals = signals
        self._curves = _Curves(setup.folder)
        self._pump = Pump()
        self._pump.add_tick(self.check_signals, every_s=_CHECK_S)
        self._phase = START
        self._starts = 0  # how often rank 0 has started
        self._is_asked_to_stop = False
        self._finished: Finished | None = None

    def follow(self, fit: ObjectRef[None]) -> Finished:
        """Wait until the training is over. fit: the reference of the supervisor's call of `fit`.

        Raises RunError when the training failed or sent no event for too long, StopNow when a signal ends it at once.
        """
        self._progress.phase(_BEFORE_TRAINING[START])
        self._watch(fit, math.inf, lambda nothing: None)  # the outcome arrives as the last event
        self._listen()
        # No deadline here: each call for events has its own.
        self._pump.run_until(lambda: self._finished is not None, timeout_s=math.inf, waiting_for=self._job.title)
        assert self._finished is not None
        return self._finished

    def close(self) -> None:
        """Close the metrics files."""
        self._curves.close()

    def _listen(self) -> None:
        config = self._config
        start_s = config.place_timeout_s + config.ready_timeout_s
        timeout_s = start_s if self._phase in _BEFORE_TRAINING else config.call_timeout_s
        self._watch(self._supervisor.events.remote(), timeout_s, self._hear)

    def _watch(self, call: ObjectRef[Any], timeout_s: float, on_done: Callable[[Any], None]) -> None:
        name, phase = self._job.name, self._phase
        self._pump.watch(call, who=name, phase=phase, timeout_s=timeout_s, on_done=on_done, on_error=self._give_up)

    def _hear(self, events: Sequence[Event]) -> None:
        for event in events:
            self.take(event)
        if self._finished is None:
            self._listen()

    def take(self, event: Event) -> None:
        """Show and log an event. Raises RunError for a failure."""
        job = self._job
        match event:
            case WorkerReady():
                log.info("%s[%d] ready: pid %d on %s", job.name, event.rank, event.pid, event.node)
                self._starts += event.rank == 0
                if event.rank == 0 and self._starts > 1:
                    lost = "a worker was lost; the training goes on from its last checkpoint (log/driver.log)"
                    self._progress.remark(f"{job.name}: {lost}")
            case Phase():
                self._phase = event.name
                self._progress.phase(_BEFORE_TRAINING.get(event.name, event.name))
            case Message():
                log.warning("%s", event.text)
                self._progress.remark(event.text)
            case Restored():
                self._curves.restart(event.history)
                self._progress.rewind(len(event.history))
            case Progressed():
                self._curves.add(event.record)
                self._progress.advance(event.record["text"])
                self._copy()
            case Failed():
                log.error("%s has given up:\n%s", event.error.who, event.trace)
                raise event.error
            case Finished():
                self._finished = event

    def check_signals(self) -> None:
        """Pass a signal on to the workers; raises StopNow when it must end the training at once."""
        if not self._signals:
            return
        if self._signals.count > 1 or self._phase in _BEFORE_TRAINING:
            raise StopNow
        if not self._is_asked_to_stop:
            self._is_asked_to_stop = True
            self._supervisor.ask_to_stop.remote()
            name = name_of(self._signals.number)
            self._progress.remark(
                f"{name}: the workers finish the updates they are doing and write a checkpoint; "
                "a second signal stops now and loses what came after the last checkpoint"
            )
            log.info("%s: the workers are asked to checkpoint and leave", name)

    def _give_up(self, error: BaseException) -> None:
        job, keys, less = self._job, "cluster.call_timeout_s", f", or lower {self._job.section}.checkpoint_every."
        if not isinstance(error, Expired):  # an error of the process that runs Ray Train
            raise RunError(job.name, self._phase, f"{classify(error).value}:\n{last_lines(error)}\n") from error
        if self._phase in _BEFORE_TRAINING:
            keys, less = "cluster.place_timeout_s and cluster.ready_timeout_s", "."
        cause, remedy = f"no sign of progress for {error.timeout_s:.0f} s", f"If it only takes long, raise {keys}{less}"
        raise RunError(job.name, self._phase, cause, remedy) from error


class _Curves:
    """Writes the records of a training as lines of metrics.jsonl and as points in TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._board: TensorBoard | None = None

    def restart(self, history: Sequence[Record]) -> None:
        """Write these records anew, and remove all others."""
        self.close()
        Folder(self._folder).write_text(METRICS, "".join(map(_line, history)))
        self._board = TensorBoard(self._folder / "tensorboard", purge_step=0)
        for record in history:
            self._draw(record)

    def add(self, record: Record) -> None:
        with (self._folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._draw(record)

    def _draw(self, record: Record) -> None:
        if self._board is not None:
            values = {name: float(value) for name, value in record.items() if name not in ("text", "updates")}
            self._board.scalars(values, int(record["updates"]))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
