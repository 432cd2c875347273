"""The events of a training that reach the driver: workers send them to the supervisor, or it sends its own failure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.faults import RunError
from cluster.storage import StoredFile
from pipeline.training.job import Record, TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """A rank's process has passed the handshake. log_file: its log; "" where the run folder cannot be written."""

    rank: int
    pid: int
    node: str
    log_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """All ranks begin a new phase."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message for the user."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The training begins, or resumes from a checkpoint. history: the checkpoint's records, or none."""

    history: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A few more updates are done; `record` describes them."""

    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The training has failed for good. trace: the traceback, for the log."""

    error: RunError
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The training is over, or has stopped because it was asked to.

    state: None where nothing was trained. outcome: what the job's `finish` returned; empty if the training is not over.
    files: the files of the exported model, as rank 0 sees them.
    """

    state: TrainingState | None
    outcome: dict[str, Any] = field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()


Event = WorkerReady | Phase | Message | Restored | Progressed | Failed | Finished
