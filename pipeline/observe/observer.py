"""Where a run's numbers go: a JSON line a step, TensorBoard, and the live view in the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter

from pipeline.observe.metrics import StepMetrics
from pipeline.observe.progress import Progress


class Observer:
    """Context manager; every line is flushed as it is written, so that a lost run keeps its metrics."""

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self.progress = progress
        self._lines = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def phase(self, name: str) -> None:
        """What the run is doing now."""
        self.progress.phase(name)

    def step(self, metrics: StepMetrics) -> None:
        """One step is done."""
        self._lines.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in metrics.values.items():
            if math.isfinite(value):  # TensorBoard shows no others, and its writer prints a complaint
                self._board.add_scalar(name, value, metrics.step)
        self.progress.step(metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.close()
        self._board.close()
