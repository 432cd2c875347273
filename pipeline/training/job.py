"""A training job: everything that its result depends on, and the state that the training has reached."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from pydantic import Field

from actors.config import LearnerConfig, TrainingConfig
from cluster.config import Config
from pipeline.training.probes import Probes

if TYPE_CHECKING:
    from actors.learner.learner import Learner
    from actors.learner.trainees.base import Trainee

Record = Mapping[str, Any]
"""One line of metrics.jsonl: the metrics of a few consecutive updates."""

# Learner settings that change the weights by rounding alone.
_SAME_WEIGHTS = {"ranks", "gpus", "zero_stage", "micro_batch_size", "pack_tokens"}


class HeldoutLoss(Config):
    """How good the weights are on held-out rows."""

    loss: float
    """The loss that early stopping compares; lower is better."""
    values: dict[str, float]
    """The numbers for the metrics, by name."""
    text: str
    """The same numbers as a line for the user."""


class Measure(Protocol):
    """Measures the held-out loss; called on all ranks together, and returns the same on all of them.

    It must be a frozen dataclass, because its `repr` is part of `TrainingJob.digest`.
    """

    def __call__(self, learner: Learner, heldout: pa.Table) -> HeldoutLoss: ...


class Finish(Protocol):
    """Examines the best weights in `job.best`, on rank 0, and returns JSON values.

    It must be a frozen dataclass, as a `Measure` is. It calls `say` often, with what it does at the moment.
    """

    def __call__(self, job: TrainingJob, state: TrainingState, say: Callable[[str], None]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A training: everything that its result depends on.

    name:             the training's name in messages and of its log files.
    title:            the text of its progress bar.
    section:          the recipe's section that configures it, named in remedies.
    trainee:          the kind of model, with the loss that it learns by.
    model:            folder or hub name of the weights to begin from.
    best:             folder that the best weights so far are exported to.
    train, heldout:   Parquet files that every worker can read; train has `rows` rows.
    batch:            rows of one update.
    checkpoint_every: updates between two checkpoints, and between two records.
    new_head:         the model begins with an untrained head, so any held-out loss after training counts as better.
    probes:           held-out rows by which `finish` checks that the saved weights are those in memory.
    """

    name: str
    title: str
    section: str
    trainee: Trainee[Any]
    model: str
    train: Path
    heldout: Path
    rows: int
    best: Path
    learner: LearnerConfig
    measure: Measure
    epochs: int
    early_stop: bool
    batch: int
    checkpoint_every: int
    seed: int
    new_head: bool = False
    probes: Probes = field(default_factory=Probes)
    finish: Finish | None = None

    @property
    def minibatches(self) -> int:
        """Number of updates in one epoch."""
        return math.ceil(self.rows / self.batch)

    @property
    def updates(self) -> int:
        """Number of updates in the whole training, unless it stops early."""
        return self.epochs * self.minibatches

    @property
    def records(self) -> int:
        """Number of lines in metrics.jsonl, unless the training stops early."""
        return self.epochs * math.ceil(self.minibatches / self.checkpoint_every)

    @property
    def digest(self) -> str:
        """The hash of everything that decides the weights.

        It leaves out the paths of folders, because a run folder may be moved, and settings that may change between two
        starts, because they change the weights by rounding alone (compatibility.py).
        """
        learner = self.learner.model_dump(mode="json", exclude=_SAME_WEIGHTS)
        # the caller that begins the stage compares the content of a model folder, so its path does not matter here
        model = "" if Path(self.model).is_dir() else self.model
        rest = replace(self, model=model, learner=TrainingConfig(), checkpoint_every=1, finish=None)
        text = repr((rest, learner))
        for path in (self.train, self.heldout, self.best):
            text = text.replace(str(path), path.name)
        return hashlib.sha256(text.encode()).hexdigest()


class TrainingState(Config):
    """How far a training has come; the rest of the training depends on this and the learner's shards alone."""

    before: HeldoutLoss
    best: HeldoutLoss
    """The held-out loss of the exported weights."""
    scale: float
    """What `Learner.export` returned for the exported weights."""
    probe_values: dict[str, list[float]] = Field(default_factory=dict)
    """Row of a probe -> the learner's numbers for it when the weights were exported."""
    epoch: int = 0
    """Number of complete epochs."""
    done: int = 0
    """Number of updates done in the current epoch."""
    saved: int = 0
    """Number of updates, over all epochs, that the last checkpoint holds."""
    over: bool = False
    """Whether nothing is left to train."""
    history: tuple[dict[str, Any], ...] = ()
    """All records so far."""
