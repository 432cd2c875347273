"""How a command ends early: by an error that names its phase, or by a signal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.faults import RunError
from cluster.stopping import Stopped, StopRequest
from pipeline.folder.standing import kept_work
from pipeline.observe.progress import Progress


@contextmanager
def errors_named_by_phase(progress: Progress) -> Iterator[None]:
    """Whatever goes wrong inside becomes an error that names its phase."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError("driver", progress.name, str(error)) from error


@contextmanager
def stoppable(stop: StopRequest, progress: Progress, run_dir: Path | None = None) -> Iterator[None]:
    """A stop that was asked for inside ends as Stopped, which says where, and what is kept in the folder of the run."""
    stop.tell = progress.remark
    try:
        yield
    except KeyboardInterrupt as end:
        if not stop:
            raise
        found = kept_work(run_dir) if run_dir else ""
        raise Stopped(
            stop.number, str(end) or f"during '{progress.name}'" + (f" (kept: {found})" if found else "")
        ) from None
    finally:
        stop.tell = None
