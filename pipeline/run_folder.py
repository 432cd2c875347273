"""A run's folder: whose it is at the moment, and who had it before.

Every start of a run takes an epoch, written to `history.json` before anything else is done. What a process of an earlier epoch
still writes is fenced: its commits do not count (`counts`), and it stops itself at its next step (`check_epoch`).
A lock keeps two living processes apart; the kernel releases it however the process ends.

Left out: what lies in the folder, which those who write it know; locks on filesystems that have none, where the epoch alone must do.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import TypeAdapter, ValidationError

from cluster.config import Config
from cluster.faults import RunError
from cluster.storage import Folder
from pipeline.chain import StageName
from pipeline.config import RunConfig, save

log = logging.getLogger(__name__)

HISTORY = "history.json"
_LIBRARIES = ("torch", "ray", "deepspeed", "transformers")


class Epoch(Config):
    """One start of a run. from_step: the step it began with, and the settings, of which nothing may change unnoticed."""

    number: int
    from_step: int
    pid: int
    host: str
    started: str
    versions: dict[str, str]
    config: dict[str, Any]
    until: StageName = "evaluate"
    """The last stage that was wanted."""


_HISTORY = TypeAdapter(tuple[Epoch, ...])


class RunFolder:
    """A run folder that this process holds. A context manager: leaving it gives the folder back."""

    def __init__(self, path: Path, lock: IO[str], history: tuple[Epoch, ...]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.history = history
        self._lock = lock

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """A new run: the folder, its lock, the resolved recipe and epoch 1. Raises ValueError when it is not empty or cannot be written."""
        folder = cls._new(path)
        save(config, path / "config.toml")
        folder.begin(config, from_step=0)
        return folder

    @classmethod
    def _new(cls, path: Path) -> RunFolder:
        try:
            if path.exists() and any(path.iterdir()):
                raise ValueError(f"--run-dir: must be new or empty, or the folder of a run, got {path}; choose another, nothing in it was touched")
            (path / "log").mkdir(parents=True, exist_ok=True)
            return cls(path, _locked(path), ())
        except OSError as error:
            raise ValueError(f"--run-dir: must be a folder that can be written, got {path}: {error.strerror}") from error

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun. Raises ValueError when there is none, or when a living process is at work in it."""
        history = read_history(path)
        try:
            return cls(path, _locked(path), history)
        except OSError as error:
            raise ValueError(f"RUN_DIR: must be a folder that can be written, got {path}: {error.strerror}") from error

    @classmethod
    def take(cls, path: Path) -> RunFolder:
        """A new or empty folder, or one that holds a run; nothing is begun in it yet. Raises ValueError as `create` and `open` do."""
        return cls.open(path) if (path / HISTORY).is_file() else cls._new(path)

    @property
    def epoch(self) -> int:
        return self.history[-1].number

    def begin(self, config: RunConfig, from_step: int, until: StageName = "evaluate") -> None:
        """Take the next epoch; from now on whatever an earlier one still writes does not count."""
        epoch = Epoch(
            number=len(self.history) + 1,
            from_step=from_step,
            pid=os.getpid(),
            host=socket.gethostname(),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            versions={library: metadata.version(library) for library in _LIBRARIES},
            config=config.model_dump(mode="json"),
            until=until,
        )
        self.history = (*self.history, epoch)
        Folder(self.path).write_text(HISTORY, _HISTORY.dump_json(self.history, indent=1).decode())

    def check_epoch(self) -> None:
        """Raises RunError when another process has begun an epoch since: the folder is no longer ours."""
        newest = read_history(self.path)[-1]
        if newest.number != self.epoch:
            cause = f"process {newest.pid} on {newest.host} has taken over {self.path} (epoch {newest.number}, ours is {self.epoch})"
            raise RunError("driver", "checking the run folder", cause, "Two processes must not run in one folder; this one stops.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._lock.close()


def read_history(path: Path) -> tuple[Epoch, ...]:
    """Every start of the run in a folder. Raises ValueError when the folder holds no run, or its history cannot be read."""
    try:
        history = _HISTORY.validate_json((path / HISTORY).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"RUN_DIR: must be the folder of a run, got {path}, which has no {HISTORY}; `raylign run RECIPE` makes one") from error
    except (OSError, ValidationError) as error:
        raise ValueError(f"RUN_DIR: its {HISTORY} must be as a run writes it, got {path / HISTORY}: {str(error).splitlines()[0]}") from error
    if not history:
        raise ValueError(f"RUN_DIR: its {HISTORY} must name at least one epoch, got none in {path}")
    return history


def counts(history: Sequence[Epoch], epoch: int, step: int) -> bool:
    """Whether a commit of that epoch after that many steps is part of the run's history: no later epoch went back to before it."""
    return all(step <= later.from_step for later in history if later.number > epoch)


def _locked(path: Path) -> IO[str]:
    """The folder's lock file, locked and signed with who holds it."""
    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "a process"
        file.close()
        raise ValueError(f"RUN_DIR: must not be in use, but {holder} is at work in {path}; wait until it ends, or stop it") from error
    except OSError as error:  # a filesystem without locks
        log.warning("%s cannot be locked (%s); two processes in it would be noticed by their epochs only", path, error)
    with suppress(OSError):
        file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
    file.flush()
    return file
