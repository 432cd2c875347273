"""The folder of a run: which process holds it, and every start of the run so far.

Every start takes the next epoch, written to `history.json` before anything else is done. A process of an earlier epoch
is fenced: its commits do not count (`counts`), and it stops itself at its next step (`check_epoch`). A lock keeps two
living processes apart; the kernel releases it however the process ends. On a filesystem without locks the epoch alone
does this.

Left out: the other contents of the folder, which those who write them know.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any, Self

from pydantic import Field, TypeAdapter, ValidationError

from cluster.config import Config
from cluster.faults import RunError
from cluster.imports import roots
from cluster.storage import Folder, StoredFile
from pipeline.config.recipe import save
from pipeline.config.run_config import RunConfig
from pipeline.folder.manifests import StageName

log = logging.getLogger(__name__)

HISTORY = "history.json"
_LIBRARIES = ("torch", "ray", "deepspeed", "transformers")


class RunStart(Config):
    """One start of a run: its number (the epoch), the step it began with, its process, libraries and settings."""

    number: int
    from_step: int
    pid: int
    host: str
    started: str
    versions: dict[str, str]
    config: dict[str, Any]
    until: StageName = "evaluate"
    """The last stage that was asked for."""
    data: dict[str, str] = Field(default_factory=dict)
    """Kind -> checksum of the contents of data and models."""
    roots: tuple[str, ...] = ()
    """Folders in which the user's modules were found."""
    code: dict[str, StoredFile] = Field(default_factory=dict)
    """Import path -> file of each user module that the run calls."""


_HISTORY = TypeAdapter(tuple[RunStart, ...])


class RunFolder:
    """A run folder that this process holds. Context manager: leaving it releases the folder."""

    def __init__(self, path: Path, lock: IO[str], history: tuple[RunStart, ...]) -> None:
        """Use `take` or `open`."""
        self.path = path
        self.history = history
        self.copy: Callable[[], None] = lambda: None
        """Copies everything new to the run's storage, if there is one (`mirror.py`)."""
        self._lock = lock

    @classmethod
    def _new(cls, path: Path) -> RunFolder:
        try:
            _check_empty(path)
            (path / "log").mkdir(parents=True, exist_ok=True)
            return cls(path, locked(path), ())
        except OSError as error:
            raise ValueError(
                f"--run-dir: must be a folder that can be written, got {path}: {error.strerror}"
            ) from error

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Hold the folder of an existing run. Raises ValueError when there is none, or when a process works in it."""
        history = read_history(path)
        try:
            return cls(path, locked(path), history)
        except OSError as error:
            raise ValueError(f"RUN_DIR: must be a folder that can be written, got {path}: {error.strerror}") from error

    @classmethod
    def take(cls, path: Path) -> RunFolder:
        """Hold a new or empty folder, or that of a run; begins nothing.

        Raises ValueError when it holds something else, cannot be written, or is in use.
        """
        return cls.open(path) if (path / HISTORY).is_file() else cls._new(path)

    @property
    def epoch(self) -> int:
        return self.history[-1].number

    def begin(
        self,
        config: RunConfig,
        from_step: int,
        until: StageName = "evaluate",
        *,
        data: Mapping[str, str] = MappingProxyType({}),
        code: Mapping[str, StoredFile] = MappingProxyType({}),
    ) -> None:
        """Take the next epoch; from now on, commits of earlier epochs no longer count. data, code: as in `RunStart`.

        Raises RunError when the run has a storage that does not answer.
        """
        epoch = RunStart(
            number=len(self.history) + 1,
            from_step=from_step,
            pid=os.getpid(),
            host=socket.gethostname(),
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            versions={library: metadata.version(library) for library in _LIBRARIES},
            config=config.model_dump(mode="json"),
            until=until,
            data=dict(data),
            roots=roots(),
            code=dict(code),
        )
        self._write((*self.history, epoch))
        self.copy()

    def settle(self, config: RunConfig) -> None:
        """Rewrite this epoch's settings in history and config.toml, once the cluster has decided the open ones."""
        save(config, self.path / "config.toml")
        self._write(
            (*self.history[:-1], self.history[-1].model_copy(update={"config": config.model_dump(mode="json")}))
        )

    def _write(self, history: tuple[RunStart, ...]) -> None:
        self.history = history
        Folder(self.path).write_text(HISTORY, _HISTORY.dump_json(history, indent=1).decode())

    def check_epoch(self) -> None:
        """Raises RunError when another process has begun a later epoch, and so holds the folder."""
        newest = read_history(self.path)[-1]
        if newest.number != self.epoch:
            cause = (
                f"process {newest.pid} on {newest.host} has taken over {self.path} (epoch {newest.number}, ours is "
                f"{self.epoch})"
            )
            raise RunError(
                "driver", "checking the run folder", cause, "Two processes must not run in one folder; this one stops."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()


def check_run_dir(path: Path) -> None:
    """Raises ValueError for a folder that `RunFolder.take` would refuse, without making or locking anything."""
    path = path.absolute()
    if (path / HISTORY).is_file():
        read_history(path)
        return
    try:
        _check_empty(path)
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, f"{there} cannot be written")
    except OSError as error:
        raise ValueError(f"--run-dir: must be a folder that can be written, got {path}: {error.strerror}") from error


def _check_empty(path: Path) -> None:
    if path.exists() and any(path.iterdir()):
        raise ValueError(
            f"--run-dir: must be new or empty, or the folder of a run, got {path}; choose another, nothing in it was "
            "touched"
        )


def read_history(path: Path) -> tuple[RunStart, ...]:
    """Every start of the run in a folder.

    Raises ValueError when the folder holds no run, or its history cannot be read.
    """
    try:
        return history_of((path / HISTORY).read_bytes(), str(path / HISTORY), "RUN_DIR")
    except FileNotFoundError as error:
        raise ValueError(
            f"RUN_DIR: must be the folder of a run, got {path}, which has no {HISTORY}; `raylign run RECIPE` makes one"
        ) from error
    except OSError as error:
        raise ValueError(f"RUN_DIR: its {HISTORY} must be readable, got {path / HISTORY}: {error.strerror}") from error


def history_of(text: str | bytes, where: str, field: str) -> tuple[RunStart, ...]:
    """Every start of a run, from the text of its history. Raises ValueError, naming `field`, for any other text."""
    try:
        history = _HISTORY.validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"{field}: its {HISTORY} must be as a run writes it, got {where}: {str(error).splitlines()[0]}"
        ) from error
    if not history:
        raise ValueError(f"{field}: its {HISTORY} must name at least one epoch, got none in {where}")
    return history


def counts(history: Sequence[RunStart], epoch: int, step: int) -> bool:
    """Whether a commit of this epoch and step belongs to the run: no later epoch began before it."""
    return all(step <= later.from_step for later in history if later.number > epoch)


def steps_at(history: Sequence[RunStart], step: int) -> int:
    """The `steps` setting of the run when it made this step, which decides its learning rate; it may have grown."""
    return int(next(epoch for epoch in reversed(history) if epoch.from_step <= step).config["steps"])


def locked(path: Path) -> IO[str]:
    """The folder's lock file, locked until it is closed; its text names the process that holds it.

    Raises ValueError when another process holds it.
    """
    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "a process"
        file.close()
        raise ValueError(
            f"RUN_DIR: must not be in use, but {holder} is at work in {path}; wait until it ends, or stop it"
        ) from error
    except OSError as error:  # a filesystem without locks
        log.warning("%s cannot be locked (%s); two processes in it would be noticed by their epochs only", path, error)
    with suppress(OSError):
        file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
    file.flush()
    return file
