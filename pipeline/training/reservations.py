"""The placement groups of a training: all of them are removed when it ends, whatever the order of events.

Ray keeps the placement group of a killed process until the driver's job ends. And Ray Train answers the loss of a
worker with a new group. So the driver removes the groups itself, after the process that makes them is gone. It knows
that from a lock: the process holds it as long as it lives, and without it makes no group. Ray's own word for a dead
actor is not enough, since Ray gives it before the process has ended.

Left out: groups that other threads of the driver make while a training runs. Ray does not tell who made a group.
"""

from __future__ import annotations

import fcntl
import logging
import tempfile
import time
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0  # for the end of a killed process; Ray needs about six seconds for a stopped one
_CHECK_S = 0.02  # seconds between two looks at the lock


class Reservations:
    """The placement groups that one process of this job makes from now on, on the driver's node."""

    def __init__(self) -> None:
        self._before = _groups()
        self._file = tempfile.NamedTemporaryFile(prefix="raylign-")  # noqa: SIM115 - open until `release`

    @property
    def lock(self) -> Path:
        """The file that the process must `hold` before it makes a group."""
        return Path(self._file.name)

    def release(self) -> None:
        """Wait for the end of the process, which is being killed, and remove all groups that it has made.

        A process that has yet to begin makes no group afterwards, since the file is gone.
        """
        import ray
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        deadline = time.monotonic() + _TIMEOUT_S
        while not _taken(self._file):
            if time.monotonic() > deadline:
                log.warning("a process that reserves CPUs or GPUs lives %g s after it was killed", _TIMEOUT_S)
                break
            time.sleep(_CHECK_S)
        self._file.close()
        for name in _groups() - self._before:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def hold(lock: Path) -> IO[bytes]:
    """Take the lock; it is held until the returned file is closed, or the process ends.

    Raises OSError if the groups of this process have been released already.
    """
    file = lock.open("r+b")
    if not _taken(file):
        file.close()
        raise BlockingIOError(f"{lock} is locked")
    return file


def _taken(file: IO[bytes]) -> bool:
    """Take the lock if it is free; returns whether this process holds it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _groups() -> set[str]:
    """The hexadecimal ids of this job's placement groups that are not removed; an id ends in the job's."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {
        name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"
    }
