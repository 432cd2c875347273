"""TensorBoard's event file of a run.

Events are written in the caller's thread. tensorboardX's own writer has a thread that a full disk ends, after which
whoever writes waits for ever, and it prints tracebacks when the interpreter ends. A failure to write ends the charts,
never the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

log = logging.getLogger(__name__)


class TensorBoard:
    """One event file. purge_step: from this step on, TensorBoard ignores the folder's earlier files."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._writer: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        except OSError as error:
            log.warning("no TensorBoard file: %s", error)
        if purge_step is not None:
            self._write([Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the finite values; TensorBoard shows no others."""
        self._write(
            [Event(step=step, summary=scalar(name, value)) for name, value in values.items() if math.isfinite(value)]
        )

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                log.warning("the TensorBoard file is not whole: %s", error)

    def _write(self, events: list[Any]) -> None:
        if self._writer is None:
            return
        try:
            for event in events:
                event.wall_time = time.time()
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            log.warning("no further charts for TensorBoard: %s", error)
            self._writer = None
