"""Commits: the whole state of a run after a step, all of it or nothing.

    checkpoints/step=00000020-epoch=0001/
        policy/rank-0.safetensors ...      each rank writes its own, flushed and checksummed
        critic/rank-0.safetensors ...
        commit.json                        last: the driver's state, and size and checksum of every file

A folder without a whole `commit.json` is no commit. What is read back is verified first, all of it; a damaged commit is said aloud and
the one before it is used. Only commits that belong to the run's history count: see run_folder.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Self

import xxhash
from pydantic import Field

from cluster.config import Config
from cluster.storage import Folder, StoredFile
from pipeline.ledger import LedgerState
from pipeline.run_folder import Epoch, RunFolder, counts

log = logging.getLogger(__name__)

_MANIFEST = "commit.json"
_NAME = re.compile(r"step=(\d{8})-epoch=(\d{4})")


class DriverState(Config):
    """What the driver knows after `step` steps. The prompts' cursor is the ledger's; everything random is a function of the seed and these numbers."""

    step: int = 0
    version: int = 0
    weights: str = ""
    """Checksum of that version, by which a restored policy proves that it is the committed one."""
    kl_coef: float
    ledger: LedgerState = LedgerState()
    models: dict[str, str] = Field(default_factory=dict)
    """Role -> checksum of the model it began with, which is not in the commit and must still be the same."""


class Commit(Config):
    """A manifest. shards: role -> its ranks' files."""

    epoch: int
    state: DriverState
    shards: dict[str, tuple[StoredFile, ...]]

    @property
    def name(self) -> str:
        return _name(self.state.step, self.epoch)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(file.size for files in self.shards.values() for file in files)

    def to_text(self) -> str:
        """JSON with a checksum over itself: a manifest, too, can be torn."""
        body = self.model_dump(mode="json")
        return json.dumps({"checksum": _checksum(body), "commit": body}, indent=1)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Raises ValueError when the text is not what `to_text` gave."""
        whole = json.loads(text)
        if not isinstance(whole, dict) or whole.get("checksum") != _checksum(whole.get("commit")):
            raise ValueError("its checksum does not match")
        return cls.model_validate(whole["commit"])


class Checkpoints:
    """The commits of a run."""

    def __init__(self, run: RunFolder, keep: int) -> None:
        self.folder = Folder(run.path / "checkpoints")
        self._run = run
        self._keep = keep

    def prepare(self, step: int) -> Callable[[str], str]:
        """Make room for a commit of that step; returns role -> where its ranks are to write."""
        name = _name(step, self._run.epoch)
        self._remove(name)
        return lambda role: shard_url(self.folder, name, role)

    def write(self, state: DriverState, shards: Mapping[str, tuple[StoredFile, ...]]) -> Commit:
        """Seal a commit whose shards are written, then remove what is no longer needed. Raises RunError when the folder is another process's by now."""
        self._run.check_epoch()
        commit = Commit(epoch=self._run.epoch, state=state, shards=dict(shards))
        self.folder.folder(commit.name).write_text(_MANIFEST, commit.to_text())
        self._prune()
        return commit

    def latest(self, say: Callable[[str], None]) -> Commit | None:
        """The newest commit that is whole, or None where none was ever made; `say` is told of each that is damaged.

        Raises ValueError when there are commits, and every one of them is damaged.
        """
        damaged = 0
        for name in self._names(sealed=False):
            if not self.folder.exists(f"{name}/{_MANIFEST}"):
                say(f"commit {name} has no {_MANIFEST}: it was broken off, or has lost it; looking for the one before it")
                continue
            commit, problem = _read(self.folder, name)
            if commit is not None:
                return commit
            damaged += 1
            say(f"commit {name} is damaged: {problem}; looking for the one before it")
        if damaged:
            raise ValueError(
                f"RUN_DIR: must hold a commit that is whole, got {damaged} damaged in {self.folder.url}; "
                f"start anew: raylign run {self._run.path}/config.toml --run-dir NEW"
            )
        return None

    def _names(self, *, sealed: bool = True) -> list[str]:
        return _names(self.folder, self._run.history, sealed=sealed)

    def _prune(self) -> None:
        """Keep the newest commits; remove older ones, and folders that are no commits of this history."""
        kept = self._names()[: self._keep]
        for name in self.folder.folders():
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """The manifest first: a removal that breaks off must not leave something that looks like a commit."""
        folder = self.folder.folder(name)
        folder.remove_file(_MANIFEST)
        folder.remove()


def newest_commit(folder: Folder, history: Sequence[Epoch]) -> Commit | None:
    """The newest commit whose manifest can be read, its shards unverified: for looking at, not for resuming."""
    for name in _names(folder, history):
        with suppress(OSError, ValueError):
            return Commit.from_text(folder.folder(name).read_text(_MANIFEST))
    return None


def commit_at_or_before(folder: Folder, history: Sequence[Epoch], step: int) -> Commit | None:
    """The newest whole commit of at most `step` steps, every file verified, if there is one."""
    for name in _names(folder, history):
        commit, _ = _read(folder, name)
        if commit is not None and commit.state.step <= step:
            return commit
    return None


def shard_url(folder: Folder, commit: str, role: str) -> str:
    """Where a role's shards of a commit lie; folder: of the commits."""
    return f"{folder.url}/{commit}/{role}"


def _read(folder: Folder, name: str) -> tuple[Commit | None, str]:
    """The commit, every file verified; or None and what is wrong with it."""
    own = folder.folder(name)
    try:
        commit = Commit.from_text(own.read_text(_MANIFEST))
    except (OSError, ValueError) as error:
        return None, f"{_MANIFEST} is not whole ({str(error).splitlines()[0]})"
    problems = [f"{role}/{wrong}" for role, files in commit.shards.items() for file in files if (wrong := own.folder(role).damage(file))]
    return (None, problems[0]) if problems else (commit, "")


def _names(folder: Folder, history: Sequence[Epoch], *, sealed: bool = True) -> list[str]:
    """Commits of the run's history, newest first; `sealed`: those with a manifest only."""
    parsed = [(match, name) for name in folder.folders() if (match := _NAME.fullmatch(name))]
    counted = [name for match, name in parsed if counts(history, int(match[2]), int(match[1]))]
    return sorted((name for name in counted if not sealed or folder.exists(f"{name}/{_MANIFEST}")), reverse=True)


def _name(step: int, epoch: int) -> str:
    return f"step={step:08d}-epoch={epoch:04d}"


def _checksum(body: object) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
