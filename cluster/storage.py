"""A folder whose files survive: each is written whole, flushed to the disk and checksummed, and is believed again only if it is what was written.

Local folders and, through fsspec, any filesystem it knows (`s3://`, `gs://`, `memory://`). Locally a file appears by an atomic rename; on
an object store an upload is atomic in itself. Left out: what the files mean, and retries, which fsspec's filesystems have of their own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 1 << 24  # bytes read at once for a checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What a file was when it was written. checksum: xxh3-128 of its bytes, hexadecimal."""

    name: str
    size: int
    checksum: str


class Folder:
    """A folder by path or URL. Nothing is created before something is written into it."""

    def __init__(self, url: str | Path) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url = str(url)
        self._fs: Any
        self._fs, self._root = url_to_fs(self.url)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def folder(self, name: str) -> Folder:
        """A folder in this one, existing or not."""
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted; none where it does not exist."""
        if not self._fs.isdir(self._root):
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=True) if entry["type"] == "directory")

    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(self._path(name)))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, as `write_file` does."""
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def read_text(self, name: str) -> str:
        """Raises OSError where there is none, UnicodeDecodeError where it is no text."""
        return str(self._fs.cat_file(self._path(name)).decode("utf-8"))

    def write_file(self, name: str, write: Callable[[Path], object]) -> StoredFile:
        """`write(path)` makes a file of this machine. Afterwards it is in this folder, whole and on the disk; until then, what was there before.

        Raises whatever `write` raises, and OSError; nothing is left of the attempt then.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="raylign-upload-") as folder:
                draft = Path(folder) / "file"
                write(draft)
                stored = _flushed(draft, name)
                self._fs.makedirs(self._root, exist_ok=True)
                self._fs.put_file(str(draft), self._path(name))
            return stored
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write(draft)
            stored = _flushed(draft, name)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _flush_folder(target.parent)
        return stored

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """The file as one of this machine, for as long as the block runs; a remote one is fetched first."""
        if self.is_local:
            yield Path(self._path(name))
            return
        with tempfile.TemporaryDirectory(prefix="raylign-fetch-") as folder:
            self._fs.get_file(self._path(name), str(Path(folder) / "file"))
            yield Path(folder) / "file"

    def stored(self, name: str) -> StoredFile:
        """What a file is now, its checksum included. Raises OSError where there is none."""
        path = self._path(name)
        with self._fs.open(path, "rb") as file:
            return StoredFile(name=name, size=int(self._fs.size(path)), checksum=_checksum(file))

    def damage(self, stored: StoredFile) -> str:
        """What is wrong with a file that was written as `stored`, in words; "" when it is what it was."""
        path = self._path(stored.name)
        if not self._fs.isfile(path):
            return f"{stored.name} is missing"
        size = self._fs.size(path)
        if size != stored.size:
            return f"{stored.name} has {size} bytes, must have {stored.size}"
        with self._fs.open(path, "rb") as file:
            found = _checksum(file)
        return "" if found == stored.checksum else f"{stored.name} has other bytes than were written (checksum {found}, must be {stored.checksum})"

    def remove(self) -> None:
        """Delete the folder and all in it, if it is there."""
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    def remove_file(self, name: str) -> None:
        """Delete one file, if it is there."""
        if self.exists(name):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _flushed(path: Path, name: str) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return StoredFile(name=name, checksum=_checksum(file), size=os.fstat(file.fileno()).st_size)


def _flush_folder(folder: Path) -> None:
    """A new name is on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Any) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
