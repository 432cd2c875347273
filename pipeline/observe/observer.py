"""Where a run's numbers go: a JSON line a step, TensorBoard, and the live view in the terminal."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.storage import Folder
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.progress import Progress
from pipeline.observe.tensorboard import TensorBoard
from pipeline.observe.warnings import Watch

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Observer:
    """Context manager that writes the metrics of a run.

    Every line is flushed as it is written, so a lost run keeps its metrics. `rewind` removes those of undone steps.
    """

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self.progress = progress
        self._run_dir = run_dir
        self._said: set[str] = set()
        self._watch = Watch()
        self._open(purge_step=None)

    def _open(self, purge_step: int | None) -> None:
        self._lines = (self._run_dir / METRICS).open("a", encoding="utf-8")
        self._board = TensorBoard(self._run_dir / "tensorboard", purge_step)

    def phase(self, name: str) -> None:
        """Show what the run is doing now."""
        self.progress.phase(name)

    def remark(self, text: str) -> None:
        """Print a line that stays on the screen, for what the user must not miss."""
        self.progress.remark(text)

    def say(self, kind: str, text: str) -> None:
        """Remark on something that may happen often: only the first of its kind is shown; the metrics count them."""
        if kind not in self._said:
            self._said.add(kind)
            self.remark(text)

    def sync(self) -> None:
        """Flush the lines to the disk: a commit must not outlive the metrics of its steps."""
        os.fsync(self._lines.fileno())

    def rewind(self, step: int) -> None:
        """Remove the metrics of this step and later ones, which are done again, and a torn last line."""
        self._close()
        kept = [record for record in read_metrics(self._run_dir) if record["step"] < step]
        Folder(self._run_dir).write_text(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self._open(purge_step=step)
        self._watch = Watch(kept)

    def step(self, metrics: StepMetrics) -> None:
        """Record a finished step everywhere, with the warnings that it gives rise to."""
        self._lines.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        self._lines.flush()
        self._board.scalars(metrics.values, metrics.step)
        log.info("%s", metrics.line())
        self.progress.step(metrics)
        for warning in self._watch.step(metrics.values):
            log.warning("after step %d: %s", metrics.step, warning)
            self.remark(f"warning: {warning}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # the disk may be full, and then `error` says so better
        with suppress(*(() if error is None else (OSError,))):
            self._close()

    def _close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one record a step, in order; empty without a file. A torn line is left out."""
    path, records = run_dir / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
