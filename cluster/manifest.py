"""A commit: a folder of files that is valid once its manifest is written; the manifest lists the files.

A folder without a whole manifest, or with files that differ from what was written, is not a commit. Left out: what the
files mean.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import Self

import xxhash

from cluster.config import Config
from cluster.storage import Folder, StoredFile

MANIFEST = "commit.json"


class Manifest(Config):
    """The manifest of a commit, as JSON with a checksum over itself, because a manifest can be half-written, too."""

    @abstractmethod
    def files(self) -> Iterator[StoredFile]:
        """The files of the commit, by their paths in its folder."""

    def seal(self, folder: Folder) -> None:
        """Write the manifest, which makes the folder a commit; call it once all files are written."""
        folder.write_text(MANIFEST, self.to_text())

    @classmethod
    def verified(cls, folder: Folder) -> tuple[Self | None, str]:
        """Read a commit and verify all its files: (manifest, "") if it is whole, else (None, what is wrong with it)."""
        try:
            found = cls.from_text(folder.read_text(MANIFEST))
        except (OSError, ValueError) as error:
            return None, f"{MANIFEST} is not whole ({str(error).splitlines()[0]})"
        problem = next(filter(None, map(folder.damage, found.files())), "")
        return (None, problem) if problem else (found, "")

    def to_text(self) -> str:
        """The manifest as text, which `from_text` reads."""
        body = self.model_dump(mode="json")
        return json.dumps({"checksum": _checksum(body), "commit": body}, indent=1)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` returned. Raises ValueError for any other text."""
        whole = json.loads(text)
        if not isinstance(whole, dict) or whole.get("checksum") != _checksum(whole.get("commit")):
            raise ValueError("its checksum does not match")
        return cls.model_validate(whole["commit"])


def remove_commit(folder: Folder) -> None:
    """Remove a commit, manifest first, so that an interrupted removal leaves nothing that looks like a commit."""
    folder.remove_file(MANIFEST)
    folder.remove()


def _checksum(body: object) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
