"""Commits: the whole state of a run after a step, written so that a commit is either whole or none.

    checkpoints/step=00000020-epoch=0001/
        policy/rank-0.safetensors ...      each rank writes its own shard, flushed and checksummed
        critic/rank-0.safetensors ...
        versions/version-19.safetensors    weights that samples in flight are generated with, if max_staleness is not 0
        commit.json                        written last: the driver's state, and size and checksum of every file

A folder without a whole `commit.json` is no commit. Every file of a commit is verified before any is used. If a commit
is damaged, the user is told, and the commit before it is used. Only commits of the run's history count: see
run_folder.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from pydantic import Field

from cluster.config import Config
from cluster.faults import RunError
from cluster.manifest import MANIFEST, Manifest, remove_commit
from cluster.shared import check_seen
from cluster.storage import Folder, StoredFile
from pipeline.folder.run_folder import RunFolder, RunStart, counts
from pipeline.samples.ledger import LedgerState
from pipeline.samples.published import Versions

log = logging.getLogger(__name__)

VERSIONS = "versions"  # the folder of older weights, in a commit's
COMMITS = "checkpoints"  # the folder of all commits, in the run folder
_INEXACT = "The commit's files are as they were written, so this is a defect of the program, not of the files."
_NAME = re.compile(r"step=(\d{8})-epoch=(\d{4})")


class DriverState(Config):
    """Everything that the driver knows after `step` steps.

    The ledger holds the position in the prompts. Everything random is a function of the seed and these numbers.
    """

    step: int = 0
    version: int = 0
    weights: str = ""
    """Checksum of the policy's weights at `version`; a restored policy must have the same."""
    older: dict[int, str] = Field(default_factory=dict)
    """Version -> checksum of the weights before it that samples in flight are generated with."""
    kl_coef: float
    ledger: LedgerState = LedgerState()
    models: dict[str, str] = Field(default_factory=dict)
    """Role -> checksum of its starting model, which is not in the commit and must not have changed on a restore."""


class Commit(Manifest):
    """The manifest of a commit.

    shards: role -> the files of its ranks, in the order of the ranks; and VERSIONS -> the files of older weights, in
    the order of their versions.
    """

    epoch: int
    state: DriverState
    shards: dict[str, tuple[StoredFile, ...]]

    @property
    def name(self) -> str:
        return _name(self.state.step, self.epoch)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(file.size for file in self.files())

    def check_weights(self, versions: Versions) -> None:
        """Raises RunError when what was restored from this commit has other weights than it was made of."""
        older = {one.version: one.checksum for one in versions.older}
        if versions.newest.checksum != self.state.weights or older != self.state.older:
            cause = f"its weights are not those that commit {self.name} was made of"
            raise RunError("policy[0]", "restore", cause, _INEXACT)

    def files(self) -> Iterator[StoredFile]:
        for role, files in self.shards.items():
            yield from (replace(file, name=f"{role}/{file.name}") for file in files)


class Checkpoints:
    """The commits of a run."""

    def __init__(self, run: RunFolder, keep: int) -> None:
        self.folder = Folder(run.path / COMMITS)
        self._run = run
        self._keep = keep

    def prepare(self, step: int) -> Callable[[str], str]:
        """Remove any earlier commit of that step; returns a function: role -> URL where its ranks write."""
        name = _name(step, self._run.epoch)
        remove_commit(self.folder.folder(name))
        return lambda role: shard_url(self.folder, name, role)

    def write(self, state: DriverState, shards: Mapping[str, tuple[StoredFile, ...]]) -> Commit:
        """Write the manifest of a commit whose shards are written, copy it to the run's storage, remove old commits.

        Raises RunError when another process has taken the run folder, when the driver does not see a shard that a rank
        wrote, or when the storage does not take it; then no commit is removed.
        """
        self._run.check_epoch()
        commit = Commit(epoch=self._run.epoch, state=state, shards=dict(shards))
        for role, files in commit.shards.items():
            for rank, file in enumerate(files):
                check_seen(f"{role}[{rank}]", "commit", self.folder.folder(commit.name).folder(role), [file])
        commit.seal(self.folder.folder(commit.name))
        self._run.copy()
        self._prune()
        return commit

    def latest(self, say: Callable[[str], None]) -> Commit | None:
        """The newest whole commit, or None if there is no commit; `say` is told of every unusable one.

        Raises ValueError when no commit is whole, but at least one is damaged.
        """
        damaged = 0
        for name in self._names(sealed=False):
            if not self.folder.exists(f"{name}/{MANIFEST}"):
                say(
                    f"commit {name} has no {MANIFEST}: it was broken off, or has lost it; looking for the one before it"
                )
                continue
            commit, problem = Commit.verified(self.folder.folder(name))
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
        """Keep the newest commits; remove older ones, and every folder that is no commit of the run's history."""
        kept = self._names()[: self._keep]
        for name in self.folder.folders():
            if name not in kept:
                remove_commit(self.folder.folder(name))


def newest_commit(folder: Folder, history: Sequence[RunStart]) -> Commit | None:
    """The newest commit whose manifest can be read; its shards are not verified, so it must not be resumed from."""
    for name in _names(folder, history):
        with suppress(OSError, ValueError):
            return Commit.from_text(folder.folder(name).read_text(MANIFEST))
    return None


def commit_at_or_before(folder: Folder, history: Sequence[RunStart], step: int) -> Commit | None:
    """The newest commit of at most `step` steps whose every file passes verification, or None."""
    for name in _names(folder, history):
        commit, _ = Commit.verified(folder.folder(name))
        if commit is not None and commit.state.step <= step:
            return commit
    return None


def shard_url(folder: Folder, commit: str, role: str) -> str:
    """The URL of a role's shards of a commit. folder: the one that holds all commits; commit: its name."""
    return f"{folder.url}/{commit}/{role}"


def _names(folder: Folder, history: Sequence[RunStart], *, sealed: bool = True) -> list[str]:
    """Names of the commits of the run's history, newest first; sealed: only commits that have a manifest."""
    counted = names_of(folder.folders(), history)
    return [name for name in counted if not sealed or folder.exists(f"{name}/{MANIFEST}")]


def names_of(names: Iterable[str], history: Sequence[RunStart]) -> list[str]:
    """Those of the names that are commits of the run's history, newest first."""
    parsed = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
    return sorted((name for match, name in parsed if counts(history, int(match[2]), int(match[1]))), reverse=True)


def _name(step: int, epoch: int) -> str:
    return f"step={step:08d}-epoch={epoch:04d}"
