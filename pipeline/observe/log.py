"""The driver's log, `log/driver.log`: who started, who was lost, what was committed, and the last traceback."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.faults import RunError
from cluster.stopping import Stopped

log = logging.getLogger(__name__)

_FLOORS = ("cluster", "actors", "pipeline")


class _Quiet(logging.FileHandler):
    """A file handler that prints no traceback when it cannot write, as on a full disk.

    The error that ends the run is printed anyway.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


class DriverLog:
    """Context manager: inside it, all that the three floors log goes to the folder's `driver.log` and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)  # an old run's may have been tidied away
        self._handler = _Quiet(self._folder / "driver.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for floor in _FLOORS:
            logger = logging.getLogger(floor)
            logger.setLevel(logging.INFO)
            logger.addHandler(self._handler)
            logger.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the disk may be full
            if isinstance(error, RunError):
                error.find_logs(self._folder)
            if isinstance(error, Exception):
                log.error("the run ends: %s", error, exc_info=None if isinstance(error, Stopped) else error)
            for floor in _FLOORS:
                logging.getLogger(floor).removeHandler(self._handler)
                logging.getLogger(floor).propagate = True
            self._handler.close()
