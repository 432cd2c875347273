"""Where a run's numbers go: a JSON line a step, TensorBoard, and the live view in the terminal."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.storage import Folder
from pipeline.observe.board import Board
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.progress import Progress

METRICS = "metrics.jsonl"


class Observer:
    """Context manager; every line is flushed as it is written, so that a lost run keeps its metrics, and `rewind` takes back those of steps undone."""

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self.progress = progress
        self._run_dir = run_dir
        self._open(purge_step=None)

    def _open(self, purge_step: int | None) -> None:
        self._lines = (self._run_dir / METRICS).open("a", encoding="utf-8")
        self._board = Board(self._run_dir / "tensorboard", purge_step)

    def phase(self, name: str) -> None:
        """What the run is doing now."""
        self.progress.phase(name)

    def remark(self, text: str) -> None:
        """What the user must see even among much else."""
        self.progress.remark(text)

    def sync(self) -> None:
        """Put the lines on the disk: a commit must not outlive the metrics of its steps."""
        os.fsync(self._lines.fileno())

    def rewind(self, step: int) -> None:
        """Forget the metrics of this step and later ones, and a last line that was broken off; those steps are done again."""
        self._close()
        kept = [record for record in read_metrics(self._run_dir) if record["step"] < step]
        Folder(self._run_dir).write_text(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self._open(purge_step=step)
        self.progress.rewind(step)

    def step(self, metrics: StepMetrics) -> None:
        """One step is done."""
        self._lines.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        self._lines.flush()
        self._board.scalars(metrics.values, metrics.step)
        self.progress.step(metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(*(() if error is None else (OSError,))):  # the disk may be what is full, and `error` says so better
            self._close()

    def _close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics, a step each, in order; none where there is no file. A line that was broken off is left out."""
    path, records = run_dir / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
