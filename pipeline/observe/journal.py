"""The run's own log, `log/driver.log`: who started, who was lost, what was committed, and the traceback a run ended with."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.stopping import Stopped

log = logging.getLogger(__name__)

_FLOORS = ("cluster", "actors", "pipeline")


class _Quiet(logging.FileHandler):
    """Where it cannot write, as on a full disk, it does not print a traceback of its own on the terminal; what ends the run is said there anyway."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


class Journal:
    """A context manager: inside it what the three floors log is written to the folder's `driver.log`, and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._handler = _Quiet(self._folder / "driver.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for floor in _FLOORS:
            logger = logging.getLogger(floor)
            logger.setLevel(logging.INFO)
            logger.addHandler(self._handler)
            logger.propagate = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(OSError):  # the disk may be what is full
            if isinstance(error, Exception):
                log.error("the run ends: %s", error, exc_info=None if isinstance(error, Stopped) else error)
            for floor in _FLOORS:
                logging.getLogger(floor).removeHandler(self._handler)
                logging.getLogger(floor).propagate = True
            self._handler.close()
