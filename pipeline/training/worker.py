"""The function that Ray Train calls on every rank: it prepares the process and runs the training loop in it.

Left out: the loop itself (training_loop.py), and restarting workers (supervisor.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.config import ClusterConfig
from cluster.faults import RunError, classify, last_lines
from cluster.handshake import Fingerprint, compare, fingerprint
from cluster.placement import Bundle
from cluster.shared import FolderMark
from cluster.spawn import settle
from cluster.storage import files_in
from pipeline.training.checkpoints import TrainingCheckpoints
from pipeline.training.events import Event, Failed, Finished, Phase, WorkerReady
from pipeline.training.job import TrainingJob
from pipeline.training.training_loop import TrainingLoop

START, LOADING = "start", "load the model"  # the phases before training: ending them loses no work


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """The inputs of supervisor and workers.

    folder: the training's folder. bundle, threads: the resources and the number of threads of each worker. mark: the
    driver's mark in the run folder. is_alone: the cluster is one node, which cannot grow.
    """

    job: TrainingJob
    folder: Path
    log_dir: Path
    cluster: ClusterConfig
    bundle: Bundle
    threads: int
    fingerprint: Fingerprint
    packages: tuple[str, ...]
    mark: FolderMark | None
    is_alone: bool


class _StopAsked(Exception):  # noqa: N818 (no error: the way out of `finish`)
    pass


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Train on this rank; Ray Train calls it on every rank, and rank 0 sends the training's result.

    Raises when a process was lost, this one or a peer, so that Ray Train starts all workers again. Any other error
    would only happen again: it is sent as an event, and the driver then ends the training.
    """
    setup: TrainingSetup = settings["setup"]
    peers = RayPeers(settings["supervisor"], setup.cluster.peer_timeout_s)
    who = f"{setup.job.name}[{peers.rank}]"
    log_file = settle(setup.log_dir / f"{setup.job.name}-{peers.rank}.log", setup.threads, setup.job.learner.gpus)
    try:
        compare(setup.fingerprint, fingerprint(setup.packages, setup.mark), who)
        peers.send(WorkerReady(rank=peers.rank, pid=os.getpid(), node=socket.gethostname(), log_file=log_file))
        peers.tell(_train(setup, peers))
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be full
            traceback.print_exc()
        if classify(error).of_a_process:
            raise
        trace = "".join(traceback.format_exception(error))
        peers.send(Failed(error=as_run_error(error, who, peers.phase), trace=trace))


class RayPeers:
    """Connects this rank with the other ranks and with the driver; implements `Peers`."""

    def __init__(self, supervisor: Any, timeout_s: float) -> None:
        """timeout_s: deadline for each answer of the supervisor, in seconds."""
        from ray import train

        self.rank, self.ranks = train.get_context().get_world_rank(), train.get_context().get_world_size()
        self.phase = START
        self._supervisor = supervisor
        self._timeout_s = timeout_s

    def send(self, event: Event) -> bool:
        """Send an event to the driver, from any rank; returns whether the training is asked to stop."""
        import ray

        return bool(ray.get(self._supervisor.tell.remote(event), timeout=self._timeout_s))

    def tell(self, event: Event) -> bool:
        if isinstance(event, Phase):
            self.phase = event.name
        return self.rank == 0 and self.send(event)

    def is_stopping(self) -> bool:
        import ray

        mine = self.rank == 0 and ray.get(self._supervisor.is_asked_to_stop.remote(), timeout=self._timeout_s)
        return bool(self.gather(mine)[0])

    def gather(self, value: Any) -> list[Any]:
        if self.ranks == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, value)
        return found


def _train(setup: TrainingSetup, peers: RayPeers) -> Finished:
    from actors.learner.learner import Learner, LearnerSpec

    job = setup.job
    peers.tell(Phase(name=LOADING))
    spec = LearnerSpec(
        trainee=job.trainee,
        path=job.model,
        config=job.learner,
        total_updates=job.updates,
        seed=job.seed,
    )
    learner = Learner(spec=spec, rank=peers.rank, ranks=peers.ranks, timeout_s=setup.cluster.peer_timeout_s)
    learner.connect()
    train, heldout = (pq.read_table(path, memory_map=True, partitioning=None) for path in (job.train, job.heldout))
    checkpoints = TrainingCheckpoints(setup.folder, job.name)
    state = TrainingLoop(
        job=job, learner=learner, train=train, heldout=heldout, checkpoints=checkpoints, peers=peers
    ).run()
    if state is None or not state.over or peers.rank:
        return Finished(state=state)

    def say(phase: str) -> None:
        if peers.tell(Phase(name=phase)):
            raise _StopAsked

    try:
        outcome = job.finish(job, state, say) if job.finish else {}
    except _StopAsked:
        return Finished(state=state)
    return Finished(state=state, outcome=outcome, files=files_in(job.best))


def as_run_error(error: Exception, who: str, phase: str) -> RunError:
    """The error as a RunError; a ValueError keeps its text, any other error only the last lines of its text."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, ValueError):
        return RunError(who, phase, str(error))
    return RunError(who, phase, f"the called code raised:\n{type(error).__name__}: {last_lines(error)}\n")
