"""Both splits of the given data in tokens, and the training job that learns from one and measures on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.sections import FinetuneConfig, RewardModelConfig
from pipeline.encoding.encode import EncodedTable
from pipeline.training.job import TrainingJob

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class EncodedSplits:
    """The training table and the held-out table."""

    train: EncodedTable
    heldout: EncodedTable

    @property
    def excluded(self) -> int:
        """Number of rows that the tables leave out, since they do not fit the model's context."""
        return len(self.train.excluded) + len(self.heldout.excluded)

    @property
    def given(self) -> int:
        """Number of rows that the task gave."""
        return self.train.rows + self.heldout.rows + self.excluded

    def heldout_of(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the task's held-out rows that are in the held-out table, in its order."""
        left_out = set(self.heldout.excluded)
        return [row for number, row in enumerate(rows) if number not in left_out]

    def job(self, config: FinetuneConfig | RewardModelConfig, *, best: Path, **others: Any) -> TrainingJob:
        """The job that trains on these tables as the recipe's section says. others: the remaining fields."""
        return TrainingJob(
            train=self.train.path.absolute(),
            heldout=self.heldout.path.absolute(),
            rows=self.train.rows,
            best=best.absolute(),
            learner=config.learner,
            epochs=config.epochs,
            early_stop=config.early_stop,
            batch=config.batch_size,
            checkpoint_every=config.checkpoint_every,
            **others,
        )
