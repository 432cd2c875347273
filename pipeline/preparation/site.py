"""Where a stage trains: the cluster, the run folder, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.session import Session
from pipeline.encoding.cache import CACHE
from pipeline.observe.progress import Progress
from pipeline.training.job import TrainingJob
from pipeline.training.trainer import TrainingResult, fit


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSite:
    """The surroundings of a training, on which its result does not depend."""

    session: Session
    cluster: ClusterConfig
    run_dir: Path
    progress: Progress
    copy: Callable[[], None] = lambda: None  # copies what is new to the run's storage, if it has one

    @property
    def cache(self) -> Path:
        """The folder of encoded tables, which runs share."""
        return self.run_dir.parent / CACHE

    def fit(self, job: TrainingJob, folder: str) -> TrainingResult:
        """Run a job in a folder of the run folder, or resume it. Raises as `trainer.fit` does."""
        return fit(job, self.cluster, self.session, self.run_dir / folder, self.progress, self.copy)
