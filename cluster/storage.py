"""A folder whose files survive: each is written whole, flushed to the disk and checksummed.

Local folders and, through fsspec, any filesystem that it knows (`s3://`, `gs://`, `memory://`). Locally a file appears
by an atomic rename; on an object store an upload is atomic in itself. Left out: the meaning of the files, and retries
(`remote.py`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.filesystems import filesystem_of, has_folders, sizes_below

_BLOCK = 1 << 24  # bytes read at once for a checksum
_LOOK_S = 0.2  # between two looks for a file that another machine has written


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as it was written. checksum: xxh3-128 of its bytes, in hexadecimal."""

    name: str
    size: int
    checksum: str


def draft_of(target: Path) -> Path:
    """The path under which a file is written before it gets its name; different for any two processes."""
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


class Folder:
    """A folder by path or URL, created when the first file is written into it."""

    def __init__(self, url: str | Path) -> None:
        from fsspec.implementations.local import LocalFileSystem

        self.url = str(url)
        self._fs: Any
        self._fs, self._root = filesystem_of(self.url)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def folder(self, name: str) -> Folder:
        """A folder in this one, which need not exist."""
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted; empty if it does not exist."""
        if not self._fs.isdir(self._root):
            return []
        return sorted(
            entry["name"].rstrip("/").rpartition("/")[2]
            for entry in self._fs.ls(self._root, detail=True)
            if entry["type"] == "directory"
        )

    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(self._path(name)))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, as `write_file` does."""
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def read_text(self, name: str) -> str:
        """The text of a file. Raises OSError if there is none, UnicodeDecodeError if it is not UTF-8."""
        return str(self._fs.cat_file(self._path(name)).decode("utf-8"))

    def write_file(self, name: str, write: Callable[[Path], object]) -> StoredFile:
        """Write a file whole: `write(path)` makes it under a local path, then it replaces the old one.

        Afterwards it is on the disk. Raises OSError and whatever `write` raises; then the old file is still there, and
        nothing is left of the attempt.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="raylign-upload-") as folder:
                draft = Path(folder) / "file"
                write(draft)
                stored = _flushed(draft, name)
                self.copy_in(draft, name)
            return stored
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(target)
        try:
            write(draft)
            stored = _flushed(draft, name)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _flush_folder(target.parent)
        return stored

    def copy_in(self, path: Path, name: str) -> StoredFile:
        """Copy a local file to here; returns what was copied, which a file that grows meanwhile exceeds."""
        if self.is_local:
            return self.write_file(name, lambda draft: shutil.copyfile(path, draft))
        with path.open("rb") as source:
            self._make_folder_of(name)
            with self._fs.open(self._path(name), "wb") as target:
                size, checksum = _copy(source, target, os.fstat(source.fileno()).st_size)
        return StoredFile(name=name, size=size, checksum=checksum)

    def copy_out(self, name: str, path: Path) -> StoredFile:
        """Copy a file to a local path, where it appears whole or not at all; returns what was copied."""

        def fetch(draft: Path) -> None:
            with self._fs.open(self._path(name), "rb") as source, draft.open("wb") as target:
                _copy(source, target)

        return Folder(path.parent).write_file(path.name, fetch)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of every file in a folder in this one and below it; empty if there is none."""
        root = self._root.strip("/")
        found = sizes_below(self._fs, self._path(below).rstrip("/"))
        return {path.strip("/")[len(root) + 1 :]: size for path, size in found.items()}

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """Inside, a local path of the file; a remote file is fetched first."""
        if self.is_local:
            yield Path(self._path(name))
            return
        with tempfile.TemporaryDirectory(prefix="raylign-fetch-") as folder:
            self._fs.get_file(self._path(name), str(Path(folder) / "file"))
            yield Path(folder) / "file"

    def stored(self, name: str) -> StoredFile:
        """A file as it is now, with its checksum. Raises OSError if there is none."""
        path = self._path(name)
        with self._fs.open(path, "rb") as file:
            return StoredFile(name=name, size=int(self._fs.size(path)), checksum=_checksum(file))

    def damage(self, stored: StoredFile) -> str:
        """The damage to a file that was written as `stored`, in words; "" if it is unchanged."""
        if problem := self._missing(stored):
            return problem
        with self._fs.open(self._path(stored.name), "rb") as file:
            found = _checksum(file)
        return (
            ""
            if found == stored.checksum
            else f"{stored.name} has other bytes than were written (checksum {found}, must be {stored.checksum})"
        )

    def unseen(self, files: Sequence[StoredFile], within_s: float) -> str:
        """The first problem with files that another process says it wrote here; "" if each is there with its size.

        It looks for up to `within_s` seconds, because a network filesystem may show a new file late. Contents are not
        read; `damage` does that.
        """
        deadline = time.monotonic() + within_s
        while problem := next(filter(None, map(self._missing, files)), ""):
            if time.monotonic() > deadline:
                return problem
            time.sleep(_LOOK_S)
            self._fs.invalidate_cache()
        return ""

    def remove(self) -> None:
        """Delete the folder and all in it, if it is there."""
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    def remove_file(self, name: str) -> None:
        """Delete one file, if it is there."""
        if self.exists(name):
            self._fs.rm_file(self._path(name))

    def _make_folder_of(self, name: str) -> None:
        if has_folders(self.url):
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _missing(self, stored: StoredFile) -> str:
        path = self._path(stored.name)
        if not self._fs.isfile(path):
            return f"{stored.name} is missing"
        size = self._fs.size(path)
        return "" if size == stored.size else f"{stored.name} has {size} bytes, must have {stored.size}"

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def files_in(folder: Path) -> tuple[StoredFile, ...]:
    """Every file in a local folder and below it, with its present size and without a checksum."""
    return tuple(
        StoredFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size, checksum="")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


def _flushed(path: Path, name: str) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return StoredFile(name=name, checksum=_checksum(file), size=os.fstat(file.fileno()).st_size)


def _flush_folder(folder: Path) -> None:
    """Flush a folder: only then is a new name in it on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(source: Any, target: Any, most: int | None = None) -> tuple[int, str]:
    """Copy a stream, at most so many bytes; returns their number and checksum."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    while block := source.read(_BLOCK if most is None else min(_BLOCK, most - size)):
        target.write(block)
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def _checksum(file: Any) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
