"""What Ray Train runs on every rank of a training: this process made one of the run's, a learner, and its course; and which errors are tried again.

Left out: the course itself (`loop.py`), and who starts the workers again (`trainer.py`).
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.faults import classify
from cluster.handshake import Fingerprint, compare, fingerprint
from cluster.spawn import settle
from pipeline.stages.loop import Course, Job, read_table
from pipeline.stages.signs import Failure, Record, Signs

LOADING = "load the model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker is told besides the job: where it is done, and with what."""

    job: Job
    folder: Path
    log_dir: Path
    fingerprint: Fingerprint
    packages: tuple[str, ...]
    threads: int
    peer_timeout_s: float


def work(settings: dict[str, Any]) -> dict[str, Any] | Failure | None:
    """What Ray Train calls on every rank.

    Raises when a process is to blame, this one's peers included, so that Ray Train starts all of them again. Any other error is written down, which
    makes the driver stop the training; it is also returned, in case it cannot be written.
    """
    from ray import train

    order: Order = settings["order"]
    rank, ranks = train.get_context().get_world_rank(), train.get_context().get_world_size()
    who = f"{order.job.name}[{rank}]"
    settle(order.log_dir / f"{order.job.name}-{rank}.log", order.threads, order.job.learner.gpus)
    signs = Signs(order.folder)
    try:
        compare(order.fingerprint, fingerprint(order.packages), who)
        signs.appear(rank)
        return _work(order, rank, ranks, signs)
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be what is full
            traceback.print_exc()
        if classify(error).of_a_process:
            raise
        failure = Failure.of(error, who, signs.phase)
        with contextlib.suppress(OSError):
            signs.fail(rank, failure)
        return failure


def _work(order: Order, rank: int, ranks: int, signs: Signs) -> dict[str, Any]:
    from actors.learner import Learner

    job = order.job
    if rank == 0:
        signs.enter(LOADING)
    learner = Learner(
        role=job.role,
        rank=rank,
        ranks=ranks,
        path=job.model,
        config=job.learner,
        temperature=1.0,
        objective=job.objective,
        total_updates=job.epochs * job.minibatches,
        seed=job.seed,
        timeout_s=order.peer_timeout_s,
        reference=job.reference,
    )
    learner.connect()
    standing = Course(job, learner, read_table(job.train), read_table(job.heldout), signs, _RayKeeper()).run()
    outcome: dict[str, Any] = {}
    if rank == 0 and job.finish is not None:
        outcome = job.finish(job, standing, signs.enter)
    return {"standing": standing.to_text(), "outcome": outcome}


class _RayKeeper:
    """Checkpoints through Ray Train, which gathers the files of all ranks in one folder of its storage."""

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep(self, name: str, write: Callable[[Path], None], metrics: Record) -> None:
        from ray import train

        with tempfile.TemporaryDirectory(prefix="raylign-checkpoint-") as folder:
            write(Path(folder))
            train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
