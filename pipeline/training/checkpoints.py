"""The checkpoints of a supervised training; each one is a commit, which counts only when all of it is written.

    checkpoints/updates-00000016/
        rank-0.safetensors ...     each rank writes its own shard, flushed and checksummed
        commit.json                rank 0 writes it last: the training state, and size and checksum of every file

A damaged checkpoint is reported to the user, and the one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.manifest import Manifest, remove_commit
from cluster.shared import check_seen
from cluster.storage import Folder, StoredFile
from pipeline.training.job import TrainingState

if TYPE_CHECKING:
    from actors.learner.learner import Learner


class TrainingCheckpoint(Manifest):
    """What a checkpoint holds: the training state and the shard of every rank, in the order of ranks."""

    state: TrainingState
    shards: tuple[StoredFile, ...]

    def files(self) -> Iterator[StoredFile]:
        yield from self.shards


class TrainingCheckpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, who: str, keep: int = 2) -> None:
        """folder: the training's folder. who: the training's name in messages. keep: number of checkpoints kept."""
        self._folder = Folder(folder / "checkpoints")
        self._who = who
        self._keep = keep

    def names(self) -> list[str]:
        """The names of all checkpoint folders, newest first, whole or not."""
        return sorted((name for name in self._folder.folders() if name.startswith("updates-")), reverse=True)

    def latest(self, say: Callable[[str], object]) -> TrainingCheckpoint | None:
        """The newest checkpoint whose files all verify, or None; `say` is told of each damaged one before it."""
        for name in self.names():
            found, problem = TrainingCheckpoint.verified(self._folder.folder(name))
            if found is not None:
                return found
            say(f"{self._who}: checkpoint {name} is damaged: {problem}; looking for the one before it")
        return None

    def restore(self, learner: Learner, found: TrainingCheckpoint) -> TrainingState:
        """Load a checkpoint's weights, moments and counters into a learner; returns the training state."""
        learner.restore(self._of(found.state).url, [shard.name for shard in found.shards])
        return found.state

    def write_shard(self, learner: Learner, state: TrainingState) -> StoredFile:
        """Write this rank's shard of the checkpoint after `state.saved` updates; called on every rank."""
        return learner.save(self._of(state).url).file

    def seal(self, state: TrainingState, shards: list[StoredFile]) -> None:
        """Commit the checkpoint and remove older ones; called on rank 0 once all ranks have written their shards.

        Raises RunError when rank 0 does not see a shard that another rank wrote.
        """
        folder = self._of(state)
        for rank, shard in enumerate(shards):
            check_seen(f"{self._who}[{rank}]", "checkpoint", folder, [shard])
        TrainingCheckpoint(state=state, shards=tuple(shards)).seal(folder)
        for name in self.names()[self._keep :]:
            remove_commit(self._folder.folder(name))

    def _of(self, state: TrainingState) -> Folder:
        return self._folder.folder(f"updates-{state.saved:08d}")
