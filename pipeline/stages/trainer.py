"""Supervised training on Ray Train: one `TorchTrainer`, whose workers each hold a rank of the project's learner.

    driver                     Ray Train's controller            workers
    fit(job) ----------------> starts them, meets them     ----> worker.py, loop.py, on every rank
      ^                        starts them again when one        |
      |                        is lost, keeps checkpoints <------+ report(checkpoint)
      +---- signs.py: metrics.jsonl, phase, errors <-------------+

Who does what: Ray Train places and starts the workers, makes their process group, keeps the last two checkpoints and begins again from them
when a process is lost, `cluster.max_rebuilds` times. What is not a process's fault is not tried again: the worker writes it down, and the driver
stops the training. In the folder of an interrupted training, `fit` goes on.

Consumes: the files in `signs.py`. Waits for: the controller, in the main thread, where Ray Train hands it out; a thread beside it watches for signs.
Unblocked by: the end of the training, an error file, a signal, or `cluster.call_timeout_s` without anything new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.faults import RunError, classify, last_lines
from cluster.placement import Placement, RoleDemand
from cluster.session import Session
from pipeline.config import RunConfig
from pipeline.observe.progress import Progress
from pipeline.roles import place
from pipeline.stages.loop import Job, Standing
from pipeline.stages.signs import START, Failure, Signs
from pipeline.stages.worker import LOADING, Order, work
from pipeline.stopping import Postponed

if TYPE_CHECKING:
    from ray.train import Result

    from pipeline.stages.stoppable import StoppableTrainer

log = logging.getLogger(__name__)

_STORAGE = "checkpoints"
_JOB = "job.txt"
_LOOK_S = 0.1  # between two looks at the signs


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A training that is over. outcome: what its `finish` found."""

    standing: Standing
    outcome: dict[str, Any]


def fit(job: Job, config: RunConfig, session: Session, folder: Path, progress: Progress) -> Fitted:
    """Carry out a training in `folder`, or go on with the same one there; the best weights are in `job.best` afterwards.

    To be called in the main thread. Raises RunError naming the job, its phase and a remedy; nothing of the training runs then any more.
    """
    folder = folder.absolute()
    signs = Signs(folder)
    _claim(folder, job)
    signs.clear()
    placement = place(config, [RoleDemand(role=job.name, workers=job.learner.ranks, gpus=job.learner.gpus)])
    session.preflight(placement)
    order = Order(
        job=job,
        folder=folder,
        log_dir=session.log_dir.absolute(),
        fingerprint=session.fingerprint,
        packages=session.packages,
        threads=placement.slot(job.name, 0).threads,
        peer_timeout_s=config.cluster.peer_timeout_s,
    )
    progress.stage(job.title, job.parts)
    is_alone = len(session.nodes()) == 1
    with _environment(_settings(config.cluster, is_alone)):
        result = _watched(order, _trainer(order, placement, config.cluster, is_alone), config.cluster, signs, progress)
    return Fitted(standing=Standing.from_text(result["standing"]), outcome=result["outcome"])


def _claim(folder: Path, job: Job) -> None:
    """A folder in which another training was begun is emptied: its checkpoints mean nothing for this one."""
    digest = hashlib.sha256(repr(job).encode()).hexdigest()
    mark = folder / _JOB
    if mark.is_file() and mark.read_text(encoding="utf-8") == digest and not _is_damaged(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(digest, encoding="utf-8")


def _is_damaged(folder: Path) -> bool:
    """Ray Train writes its list of checkpoints in place, so that a process killed meanwhile leaves half of it, which it then refuses."""
    path = folder / _STORAGE / "checkpoint_manager_snapshot.json"
    try:
        names = [entry["checkpoint_dir_name"] for entry in json.loads(path.read_text(encoding="utf-8"))["checkpoint_results"]] if path.is_file() else []
    except (ValueError, KeyError, TypeError):
        return True
    return not all((folder / _STORAGE / name).is_dir() for name in names)


def _settings(config: ClusterConfig, is_alone: bool) -> dict[str, str]:
    """Ray Train's own, which it takes from the environment."""
    return {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next look, and so does the end
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{config.pulse_timeout_s:g}",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{config.place_timeout_s:g}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(not is_alone)),  # a process, and one node alone is not taken away in part
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",  # it would take the root logger
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a user's modules are imported from where they stand
    }


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _watched(order: Order, trainer: StoppableTrainer, config: ClusterConfig, signs: Signs, progress: Progress) -> dict[str, Any]:
    """What rank 0 returned. Whatever ends the wait, a signal included, ends the training."""
    signals = Postponed()
    watch = _Watch(order.job, config, signs, progress, signals, trainer.stop)
    try:
        with signals, watch:
            result: Result = trainer.fit()
    except Exception as error:
        signals.deliver()
        if watch.verdict is not None:
            raise watch.verdict from error
        raise _explained(order.job, signs, error) from error
    finally:
        trainer.stop()
    signals.deliver()
    found: dict[str, Any] | Failure = result.return_value
    if isinstance(found, Failure):
        raise found.error()
    return found


def _trainer(order: Order, placement: Placement, config: ClusterConfig, is_alone: bool) -> StoppableTrainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties' imports
        from ray import train
        from ray.train.torch import TorchConfig

        from pipeline.stages.stoppable import StoppableTrainer

    learner, bundle = order.job.learner, placement.bundles[0]
    gpus = {"GPU": bundle.gpus} if learner.gpus else {}
    environment = {
        "OMP_NUM_THREADS": str(order.threads),
        "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "0",  # each rank sees the GPU that is its own, as everywhere else here
    }
    return StoppableTrainer(
        work,
        is_alone=is_alone,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo", timeout_s=max(1, round(config.peer_timeout_s))),
        scaling_config=train.ScalingConfig(num_workers=learner.ranks, use_gpu=bool(learner.gpus), resources_per_worker={"CPU": bundle.cpus, **gpus}),
        run_config=train.RunConfig(
            name=_STORAGE,
            storage_path=str(order.folder),
            failure_config=train.FailureConfig(max_failures=config.max_rebuilds, controller_failure_limit=config.max_rebuilds),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": environment},
        ),
    )


class _Watch:
    """Beside the wait: moves the progress bar, logs who runs, and stops a training that has failed or gives no sign of life.

    A thread of its own, since the main one waits. `verdict` is why it stopped the training, if it did.
    """

    def __init__(self, job: Job, config: ClusterConfig, signs: Signs, progress: Progress, signals: Postponed, stop: Callable[[], None]) -> None:
        self.verdict: Exception | None = None
        self._job = job
        self._config = config
        self._signs = signs
        self._progress = progress
        self._signals = signals
        self._stop = stop
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {job.name}", daemon=True)
        self._seen: tuple[Any, ...] = ()
        self._at = time.monotonic()
        self._logged: set[Any] = set()
        self._shown = 0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self.verdict is None and not self._signals and not self._over.wait(_LOOK_S):
                self.verdict = self._look()
            self._show()
        except Exception as error:  # noqa: BLE001 - raised where the training is waited for
            self.verdict = error
        while not self._over.wait(_LOOK_S):  # again and again: the controller may be about to start
            self._stop()

    def _look(self) -> RunError | None:
        failure = self._signs.read_failure()
        if failure is not None:
            log.error("%s has given up:\n%s", failure.who, failure.trace)
            return failure.error()
        now, seen = time.monotonic(), self._show()
        if seen != self._seen:
            self._seen, self._at = seen, now
            return None
        started = seen[0] not in (START, LOADING)
        limit = self._config.call_timeout_s if started else self._config.place_timeout_s + self._config.ready_timeout_s
        if now - self._at <= limit:
            return None
        keys = "cluster.call_timeout_s" if started else "cluster.place_timeout_s and cluster.ready_timeout_s"
        remedy = f"If it only takes long, raise {keys}" + (f", or lower {self._job.section}.checkpoint_every." if started else ".")
        return RunError(self._job.name, self._signs.read_phase(), f"no sign of progress for {now - self._at:.0f} s", remedy)

    def _show(self) -> tuple[Any, ...]:
        """All signs there are; what is new of them is shown and logged."""
        phase, workers, records = self._signs.read_phase(), self._signs.read_workers(), self._signs.read_metrics()
        for worker in workers:
            if worker not in self._logged:
                self._logged.add(worker)
                log.info("%s[%d] ready: pid %d on %s", self._job.name, worker.rank, worker.pid, worker.node)
        self._progress.phase(phase)
        if len(records) < self._shown or (records and not self._shown):  # taken back to a checkpoint, or gone on from one
            self._shown = max(len(records) - 1, 0)
            self._progress.rewind(self._shown)
        for record in records[self._shown :]:
            self._progress.advance(record["text"])
        self._shown = len(records)
        return phase, workers, len(records)


def _explained(job: Job, signs: Signs, error: Exception) -> RunError:
    """Why Ray Train gave up, in the words of what was behind it."""
    from ray.train import ControllerError, WorkerGroupError

    phase, cause = signs.read_phase(), error
    if isinstance(error, WorkerGroupError):
        rank, cause = min(error.worker_failures.items())
        return RunError(f"{job.name}[{rank}]", phase, f"{classify(cause).value}:\n{last_lines(cause)}\n", "See its log, and cluster.max_rebuilds.")
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
            remedy = "Others use what it needs; wait for them, or raise cluster.place_timeout_s where an autoscaler has yet to add nodes."
            return RunError("cluster", "placement", f"no room for {job.learner.ranks} worker(s) of the {job.name} training", remedy)
    return RunError(job.name, phase, f"Ray Train gave up:\n{last_lines(cause)}\n")
