"""The copy of a run folder on a storage, from which a run can go on elsewhere: `cluster.storage`.

    history.json                   first: who writes there, and the settings
    all other files                some at once; then files.json, the list of them with size and checksum
    */commit.json                  then: a commit counts there once its manifest is there
    (commits that the run folder no longer has are removed there)
    stages/*.json                  last: a stage counts there once its manifest is there

So whatever a manifest relies on is there before it. An upload is done before the run goes on, and one that does not
succeed ends the run: nothing is removed, here or there, before the newer commit is there whole. The writer is known by
the history: one that finds another's start in it stops. Between this look and a write another may still begin; object
stores have no locks. Then both write the same names, and what is mixed fails its checksum.

Left out: `log/`, and whatever else resuming and reading a run do not need. The way back is `pipeline/run/fetch.py`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.manifest import MANIFEST
from cluster.remote import RemoteFolder
from cluster.storage import Folder, StoredFile
from pipeline.folder.run_folder import HISTORY, RunFolder, RunStart, history_of

log = logging.getLogger(__name__)

FIELD = "cluster.storage"
INDEX = "files.json"
CHECKPOINTS = ("checkpoints", "sft/checkpoints", "reward/checkpoints")
STAGES = "stages"
_NOT_COPIED = ("log",)

T = TypeVar("T")


class Mirror:
    """Copies a run folder to a storage. `copy` is called after each commit and each stage."""

    def __init__(self, remote: RemoteFolder) -> None:
        self.remote = remote
        self._begun = ""  # the history as this process wrote it
        self._listed = ""  # the list of files there
        self._copied: dict[str, StoredFile] = {}  # what the storage holds
        self._known: dict[str, tuple[tuple[int, int], str]] = {}  # name -> ((size, time of change), checksum) here

    @classmethod
    def of(cls, config: ClusterConfig) -> Mirror | None:
        """The mirror of a run; None without a storage. Raises ValueError for one that cannot be written to."""
        if not config.storage:
            return None
        return cls(RemoteFolder.checked(FIELD, config.storage, config.storage_timeout_s))

    def holds_run(self) -> bool:
        """Whether there is a run on the storage."""
        return self.remote.text(HISTORY) is not None

    def follow(self, folder: RunFolder) -> None:
        """Let `folder.copy` copy the folder to here.

        Raises ValueError unless the storage is empty or holds this run, and no later start of it.
        """
        self._check_history(folder)
        folder.copy = lambda: self.copy(folder)

    def _check_history(self, folder: RunFolder) -> None:
        text = self.remote.text(HISTORY)
        there = () if text is None else history_of(text, f"{self.remote.url}/{HISTORY}", FIELD)
        for number, start in enumerate(there):
            if number == len(folder.history):
                raise ValueError(
                    f"{FIELD}: must not hold a later start of this run, but process {start.pid} on {start.host} has "
                    f"gone on with it in {self.remote.url}; go on from there: raylign resume {self.remote.url} "
                    "--run-dir NEW"
                )
            if not _is_same(start, folder.history[number]):
                raise ValueError(
                    f"{FIELD}: must be empty or hold this run, got {self.remote.url}, which holds another one (start "
                    f"{start.number} by process {start.pid} on {start.host}); name another folder there"
                )

    def copy(self, folder: RunFolder) -> None:
        """Copy everything that is new. Raises RunError when it does not succeed, or another process writes there."""
        started = time.monotonic()
        count, size = self._doing(lambda: self._copy(folder))
        if count:
            log.info(
                "copied %d files, %.1f MB, to %s in %.2f s",
                count,
                size / 1e6,
                self.remote.url,
                time.monotonic() - started,
            )

    def _copy(self, folder: RunFolder) -> tuple[int, int]:
        """Returns the number of files and bytes that were copied."""
        if self._begun:
            self._check_writer()
        else:
            self._begin(folder)
        if (history := Folder(folder.path).read_text(HISTORY)) != self._begun:
            self.remote.put_text(HISTORY, history)
            self._begun = history
        files = {*_files_in(folder.path)} - {HISTORY}
        manifests = [name for name in files if name.endswith(f"/{MANIFEST}") and _is_checkpoint(name)]
        stages = [name for name in files if name.startswith(f"{STAGES}/")]
        others = sorted(files.difference(manifests, stages))
        copied = self._put(folder.path, others)
        if (index := _index(self._copied[name] for name in others if name in self._copied)) != self._listed:
            self.remote.put_text(INDEX, index)
            self._listed = index
        self._check_writer()
        copied += self._put(folder.path, manifests)
        self._prune(files)
        copied += self._put(folder.path, stages)
        return len(copied), sum(file.size for file in copied)

    def _begin(self, folder: RunFolder) -> None:
        """Learn what the storage holds; another process may have begun there meanwhile."""
        self._check_history(folder)
        there, self._listed = self.remote.sizes(), self.remote.text(INDEX) or ""
        self._copied = {file.name: file for file in index_of(self._listed) if there.get(file.name) == file.size}

    def _put(self, path: Path, names: Sequence[str]) -> list[StoredFile]:
        """Copy those of the files that the storage does not hold as they are; returns them."""
        new = [name for name in names if self._is_new(path, name)]
        found = [stored for stored in self.remote.at_once(lambda name: self._put_file(path, name), new) if stored]
        self._copied |= {file.name: file for file in found}
        return found

    def _put_file(self, path: Path, name: str) -> StoredFile | None:
        try:
            stamp = _stamp(path / name)
            stored = self.remote.put(path / name, name)
        except FileNotFoundError:
            if (path / name).exists():
                raise
            return None  # removed meanwhile: an older checkpoint of a training
        if stored.size == stamp[0]:
            self._known[name] = (stamp, stored.checksum)
        return stored

    def _is_new(self, path: Path, name: str) -> bool:
        if name not in self._copied:
            return True
        try:
            stamp = _stamp(path / name)
            if name not in self._known or self._known[name][0] != stamp:
                self._known[name] = (stamp, Folder(path).stored(name).checksum)
        except FileNotFoundError:
            return False
        return self._known[name][1] != self._copied[name].checksum

    def _check_writer(self) -> None:
        """Raises RunError when another process has begun to write there."""
        text = self.remote.text(HISTORY)
        if text == self._begun:
            return
        try:
            newest = history_of(text or "", f"{self.remote.url}/{HISTORY}", FIELD)[-1]
            who = f"process {newest.pid} on {newest.host} has taken over {self.remote.url} (epoch {newest.number})"
        except ValueError:
            who = f"the {HISTORY} that this run wrote in {self.remote.url} is gone or is no longer the same"
        raise RunError("driver", "upload", who, "Two processes must not write to one storage; this one stops.")

    def _prune(self, files: set[str]) -> None:
        """Remove the commits and manifests that the run folder has removed or moved aside, manifests first.

        Where it has no commit at all, somebody may have made room by hand; then those of the storage are kept.
        """
        there = {name for below in (*CHECKPOINTS, STAGES) for name in self.remote.sizes(below)}
        aside = {name.split("/", 2)[2] for name in files if name.startswith("superseded/")}
        has_commits = tuple(
            f"{below}/"
            for below in CHECKPOINTS
            if any(name.startswith(f"{below}/") and name.endswith(f"/{MANIFEST}") for name in files)
        )
        gone = [name for name in there - files if name in aside or name.startswith((*has_commits, f"{STAGES}/"))]
        for name in sorted(gone, key=lambda name: not name.endswith(".json")):
            self.remote.remove(name)
            self._copied.pop(name, None)

    def _doing(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as error:
            raise RunError(
                "storage",
                "upload",
                str(error),
                "Nothing is lost: the run folder has everything, and the storage what it had. Once it answers, resume.",
            ) from error


def _is_same(one: RunStart, other: RunStart) -> bool:
    """Whether two histories name the same start, whose settings the cluster may have settled meanwhile."""
    return (one.number, one.pid, one.host, one.started) == (other.number, other.pid, other.host, other.started)


def _is_checkpoint(name: str) -> bool:
    return name.startswith(tuple(f"{folder}/" for folder in CHECKPOINTS))


def _files_in(path: Path) -> Iterable[str]:
    """The files of a run folder that are copied: no logs, no hidden files and no drafts."""
    for folder, folders, files in os.walk(path):
        below = Path(folder).relative_to(path)
        left_out = _NOT_COPIED if Path(folder) == path else ()
        folders[:] = [name for name in folders if name not in left_out and not _is_draft(name)]
        yield from ((below / name).as_posix() for name in files if not _is_draft(name))


def _is_draft(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part")


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written: its size, and the time of its last change."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _index(files: Iterable[StoredFile]) -> str:
    return json.dumps([asdict(file) for file in files], indent=0)


def index_of(text: str | None) -> tuple[StoredFile, ...]:
    """The files of an index; none if it is not there, or cannot be read."""
    try:
        return tuple(StoredFile(**entry) for entry in json.loads(text or "[]"))
    except (ValueError, TypeError):
        return ()
