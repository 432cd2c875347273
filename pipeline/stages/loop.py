"""What every worker of a training does, from the tables to the exported weights: the same on all ranks, each with a learner of its own.

    connect -> [restore] -> measure -> (update -> measure -> export the best -> checkpoint) ... -> finish

A *part* is as many updates as `checkpoint_every` allows within one epoch. It is the unit of progress, and of what a lost worker costs: where a
training stands is written down with the learners' shards, and what follows from there is the same to the bit, because an update depends on the
weights, the table and its number alone.

Left out: Ray Train itself. `Keeper` is all that is asked of it (`trainer.py` has the one that is; a test may have a folder).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import LearnerConfig
from cluster.faults import RunError
from pipeline.stages.signs import Record, Signs

if TYPE_CHECKING:
    from actors.learner import Learner

STANDING = "standing.json"
MAX_LOSS = 700.0  # nats: exp of more is no float64, and a uniform guess among a million words has 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Held-out rows under the weights at hand. loss: what an early stop compares, lower is better. values: for the metrics. text: for a person."""

    loss: float
    values: dict[str, float]
    text: str


class Measure(Protocol):
    """Called on all ranks together, and the same on all of them. A frozen dataclass: its `repr` is part of what decides whether a job is another one."""

    def __call__(self, learner: Learner, heldout: pa.Table) -> Measured: ...


class Finish(Protocol):
    """Called on rank 0 once the best weights are in `job.best`; what it returns (JSON values) is the training's outcome. A frozen dataclass, too.

    say: to be told how far it is, again and again.
    """

    def __call__(self, job: Job, standing: Standing, say: Callable[[str], None]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training: everything that its result depends on.

    name: in messages and of log files. title: of the progress bar. section: of the recipe, for remedies.
    model: folder or hub name of the weights to begin from. best: folder that the best weights so far are exported to.
    train, heldout: Parquet files that every worker can read; train has `rows` rows. reference: the learner's own, see there.
    batch: rows of one optimiser step. checkpoint_every: updates of a part, and between two checkpoints at least.
    """

    name: str
    title: str
    section: str
    role: Literal["policy", "reward"]
    model: str
    train: Path
    heldout: Path
    rows: int
    best: Path
    learner: LearnerConfig
    objective: Any
    measure: Measure
    epochs: int
    early_stop: bool
    batch: int
    checkpoint_every: int
    seed: int
    reference: str = ""
    finish: Finish | None = None

    @property
    def minibatches(self) -> int:
        """Updates of one epoch."""
        return math.ceil(self.rows / self.batch)

    @property
    def parts(self) -> int:
        """Of the whole training, unless it stops early."""
        return self.epochs * math.ceil(self.minibatches / self.checkpoint_every)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a training is. epoch, done: `done` updates of epoch number `epoch` are made. before, best: held-out loss before training, and of the
    weights that are exported, whose `scale` is what `Learner.export` returned. saved: updates behind the last checkpoint. over: nothing is left to train.
    """

    before: Measured
    best: Measured
    scale: float
    epoch: int = 0
    done: int = 0
    saved: int = 0
    over: bool = False
    history: tuple[Record, ...] = ()

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Standing:
        fields = json.loads(text)
        before, best = Measured(**fields.pop("before")), Measured(**fields.pop("best"))
        return cls(before=before, best=best, history=tuple(fields.pop("history")), **fields)


class Keeper(Protocol):
    """Keeps checkpoints. All ranks call together."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The folder of the last one, with the files of all ranks, for as long as the block runs."""
        ...

    def keep(self, name: str, write: Callable[[Path], None], metrics: Record) -> None:
        """`write` puts this rank's files into a folder; afterwards they are kept, or the training before them is."""
        ...


class Course:
    """A training under way, on one rank."""

    def __init__(self, job: Job, learner: Learner, train: pa.Table, heldout: pa.Table, signs: Signs, keeper: Keeper) -> None:
        """learner: connected, with the weights to begin from."""
        self.job = job
        self.learner = learner
        self._train = train
        self._heldout = heldout
        self._signs = signs
        self._keeper = keeper
        self._is_first = learner.rank == 0

    def run(self) -> Standing:
        """Train to the end, from the last checkpoint if there is one. The best weights are in `job.best` then."""
        standing = self._resumed() or self._begun()
        while not standing.over:
            standing = self._part(standing)
        return standing

    def _resumed(self) -> Standing | None:
        with self._keeper.latest() as folder:
            if folder is None:
                return None
            self._enter("restore")
            standing = Standing.from_text((folder / STANDING).read_text(encoding="utf-8"))
            self.learner.restore(str(folder), sorted(path.name for path in folder.glob("rank-*.safetensors")))
        if self._is_first:
            self._signs.restart(standing.history)
        return standing

    def _begun(self) -> Standing:
        if self._is_first:
            self._signs.restart(())
        before = self._measured("measure", "Check the weights it begins from.")
        scale = self._export()  # a model that training cannot improve is kept as it is
        best = before if self.job.role == "policy" else replace(before, loss=MAX_LOSS)  # but a head that has learned nothing is no judge
        return Standing(before=before, best=best, scale=scale)

    def _part(self, standing: Standing) -> Standing:
        """As many updates as make a part; at the end of an epoch, also what follows from its held-out loss."""
        from actors.learner import UpdatePlan

        job, epoch, done = self.job, standing.epoch, standing.done
        count = min(job.checkpoint_every, job.minibatches - done)
        self._enter(f"epoch {epoch + 1}, updates {done + 1}-{done + count} of {job.minibatches}")
        plan = UpdatePlan(step=epoch, epochs=1, minibatches=job.minibatches, seed=job.seed, aggregation="token_mean", first=done, count=count)
        report = self.learner.update(self._train, plan)
        if not report.loss < MAX_LOSS:
            raise _diverged(job, self._signs.phase, report.loss, _remedy(job))
        record: Record = {
            "epoch": epoch + 1,
            "updates": epoch * job.minibatches + done + count,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "skipped": report.skipped,
            "learning_rate": report.learning_rate,
            "seconds": report.seconds,
            "text": f"loss {report.loss:.3f}",
        }
        if done + count < job.minibatches:
            return self._kept(replace(standing, done=done + count), record)
        return self._epoch_done(standing, record)

    def _epoch_done(self, standing: Standing, record: Record) -> Standing:
        job, epoch = self.job, standing.epoch + 1
        now = self._measured(f"measure after epoch {epoch}", _remedy(job))
        worse, last = job.early_stop and now.loss >= standing.best.loss, epoch == job.epochs
        scale = self._export() if not worse and (job.early_stop or last) else standing.scale
        best = standing.best if worse else now
        after = replace(standing, epoch=epoch, done=0, best=best, scale=scale, over=worse or last)
        return self._kept(after, {**record, **now.values, "text": f"{record['text']}  {now.text}"})

    def _kept(self, standing: Standing, record: Record) -> Standing:
        """A part is done: say so, and checkpoint if enough has been done since the last one."""
        standing = replace(standing, history=(*standing.history, record))
        updates = int(record["updates"])
        if standing.over or updates - standing.saved >= self.job.checkpoint_every:
            self._enter(f"checkpoint after update {updates}")
            standing = replace(standing, saved=updates)
            self._keeper.keep(f"updates-{updates:08d}", lambda folder: self._write(folder, standing), {"updates": updates})
        if self._is_first:
            self._signs.add(record)
        return standing

    def _measured(self, phase: str, remedy: str) -> Measured:
        """Raises RunError when the loss is no number to go on with, since nothing that such weights begin can end well."""
        self._enter(phase)
        measured = self.job.measure(self.learner, self._heldout)
        if not measured.loss < MAX_LOSS:
            raise _diverged(self.job, phase, measured.loss, remedy)
        return measured

    def _write(self, folder: Path, standing: Standing) -> None:
        self.learner.save(str(folder))
        if self._is_first:
            (folder / STANDING).write_text(standing.to_text(), encoding="utf-8")

    def _export(self) -> float:
        self._enter("export")
        return self.learner.export(str(self.job.best))

    def _enter(self, phase: str) -> None:
        if self._is_first:
            self._signs.enter(phase)


def _diverged(job: Job, phase: str, loss: float, remedy: str) -> RunError:
    return RunError(job.name, phase, f"its loss is {loss:.3g}, so its weights are not finite or have diverged", remedy)


def _remedy(job: Job) -> str:
    return f"Lower {job.section}.learner.learning_rate, now {job.learner.learning_rate:g}."


def read_table(path: Path) -> pa.Table:
    """Mapped into memory where Parquet allows it."""
    return pq.read_table(path, memory_map=True, partitioning=None)
