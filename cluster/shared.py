"""The check that a process sees the driver's run folder, and not another folder of the same name.

A node without the shared filesystem accepts every file that it is told to write, and the run would notice only when it
reads: after all the work. So the driver leaves a mark, a small file, in the folder before anything starts, and every
process that reads or writes there must find it first. And the driver looks for every file that another process says it
wrote, before it relies on it (`check_seen`).
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cluster.faults import RunError
from cluster.storage import Folder, StoredFile

PATIENCE_S = 10.0  # a network filesystem may show a new file late
_LOOK_S = 0.2

REMEDY = "Put --run-dir on a filesystem that all nodes share, mounted at the same place."


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderMark:
    """The driver's mark in a run folder.

    file: its path; text: its contents, random. patience_s: how long another process looks for it.
    """

    folder: str
    file: str
    text: str
    patience_s: float = PATIENCE_S

    @classmethod
    def leave(cls, folder: Path, within: Path) -> Self:
        """Write a mark. folder: the one to be shared. within: a folder in it, in which the mark is written."""
        text = secrets.token_hex(16)
        file = within.absolute() / f".shared-{text[:8]}"
        file.write_text(text, encoding="utf-8")
        return cls(folder=str(folder.absolute()), file=str(file), text=text)

    def remove(self) -> None:
        Path(self.file).unlink(missing_ok=True)

    def covers(self, path: str) -> bool:
        """Whether this is a path within the marked folder; a model's hub name is not."""
        return bool(path) and Path(path).exists() and Path(path).absolute().is_relative_to(self.folder)

    def problem(self) -> str:
        """In another process: the reason why it does not see the driver's folder; "" if it does."""
        deadline = time.monotonic() + self.patience_s
        while problem := self._look():
            if time.monotonic() > deadline:
                return (
                    f"on its node, {socket.gethostname()}, {self.folder} is not the folder that the driver writes into "
                    f"({problem})"
                )
            time.sleep(_LOOK_S)
        return ""

    def _look(self) -> str:
        try:
            found = Path(self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return f"{self.file}: {error.strerror if isinstance(error, OSError) else 'no text'}"
        return "" if found == self.text else f"{self.file} says something else"


def check_seen(who: str, phase: str, folder: Folder, files: Sequence[StoredFile]) -> None:
    """Raises RunError unless this process sees every file that `who` says it wrote into `folder`, with its size."""
    if problem := folder.unseen(files, PATIENCE_S):
        raise RunError(
            who,
            phase,
            f"it wrote into {folder.url} on its node, and the driver does not find the same there ({problem})",
            REMEDY,
        )
