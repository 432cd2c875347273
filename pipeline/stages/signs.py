"""How the workers of a training tell the driver how far they are: small files in the folder of the stage, which all of them share.

    metrics.jsonl    a line for every part of the training that is done; the loss curve
    phase.json       what rank 0 does at the moment
    worker-0.json    which process is rank 0, and so on for every rank
    error-0.json     why that rank gave up: an error of the code or the data, which another attempt would only repeat

Anything new in them is a sign of life. Left out: locks. Each file has one writer, and is replaced whole; a line is read once it ends.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.faults import RunError, last_lines

METRICS, _PHASE = "metrics.jsonl", "phase.json"
START = "start"  # the phase before rank 0 has said anything

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A rank's process."""

    rank: int
    pid: int
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error that ends the training. trace: for the log."""

    who: str
    phase: str
    cause: str
    remedy: str = ""
    trace: str = ""

    @classmethod
    def of(cls, error: Exception, who: str, phase: str) -> Failure:
        """A RunError as it is; of any other error its own words, which for a ValueError are meant for the user."""
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, RunError):
            return cls(who=error.who, phase=error.phase, cause=error.cause, remedy=error.remedy, trace=trace)
        cause = str(error) if isinstance(error, ValueError) else f"the called code raised:\n{type(error).__name__}: {last_lines(error)}\n"
        return cls(who=who, phase=phase, cause=cause, trace=trace)

    def error(self) -> RunError:
        return RunError(self.who, self.phase, self.cause, self.remedy)


class Signs:
    """The files of one stage's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.phase = START

    # ---- a worker ----

    def enter(self, phase: str) -> None:
        """Rank 0 begins something else."""
        self.phase = phase
        self._put(_PHASE, {"name": phase})

    def appear(self, rank: int) -> None:
        self._put(f"worker-{rank}.json", asdict(Worker(rank=rank, pid=os.getpid(), node=socket.gethostname())))

    def add(self, record: Record) -> None:
        """A part is done."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def restart(self, history: Sequence[Record]) -> None:
        """The training stands where these parts are done, and no others."""
        self._write(METRICS, "".join(json.dumps(record) + "\n" for record in history))

    def fail(self, rank: int, failure: Failure) -> None:
        self._put(f"error-{rank}.json", asdict(failure))

    # ---- the driver ----

    def clear(self) -> None:
        """Before a start: what an earlier one has left says nothing of this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / _PHASE, *self.folder.glob("worker-*.json"), *self.folder.glob("error-*.json")):
            path.unlink(missing_ok=True)

    def read_phase(self) -> str:
        return str((self._get(_PHASE) or {"name": START})["name"])

    def read_metrics(self) -> list[Record]:
        """The parts that are done; a line that is being written is not one yet."""
        with suppress(OSError):
            lines = (self.folder / METRICS).read_text(encoding="utf-8").split("\n")
            return [json.loads(line) for line in lines[:-1]]
        return []

    def read_workers(self) -> list[Worker]:
        found = [self._get(path.name) for path in sorted(self.folder.glob("worker-*.json"))]
        return [Worker(**fields) for fields in found if fields]

    def read_failure(self) -> Failure | None:
        """Of the lowest rank that has failed."""
        for path in sorted(self.folder.glob("error-*.json")):
            if fields := self._get(path.name):
                return Failure(**fields)
        return None

    def _put(self, name: str, fields: Record) -> None:
        self._write(name, json.dumps(fields))

    def _write(self, name: str, text: str) -> None:
        draft = self.folder / f".{name}.{os.getpid()}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.folder / name)

    def _get(self, name: str) -> dict[str, Any] | None:
        with suppress(OSError):
            found: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
            return found
        return None
