"""Starts a plain class as a Ray actor, in its seat of the placement. The only use of `ray.remote`.

Left out: restarts. Pools and gangs replace lost workers, because only they know what these were doing.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.handshake import Fingerprint, fingerprint, processor
from cluster.imports import roots, use_roots
from cluster.pulse import start_pulse
from cluster.seats import Seats
from cluster.shared import FolderMark


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """The process of a worker, the kind of its processor, and the fingerprint of its code."""

    pid: int
    node_ip: str
    fingerprint: Fingerprint
    processor: str
    log_file: str  # "" where the driver's log folder cannot be written: the output is in Ray's own logs


class Spawner:
    """Starts actors in the reserved seats of a run."""

    def __init__(
        self,
        seats: Seats,
        *,
        log_dir: Path,
        packages: Sequence[str],
        pulse_timeout_s: float,
        mark: FolderMark | None = None,
    ) -> None:
        """mark: every process that reads or writes in the run folder must find it."""
        self.seats = seats
        self._log_dir = log_dir.absolute()
        self._packages = tuple(packages)
        self._pulse_timeout_s = pulse_timeout_s
        self._mark = mark

    def reading(self, *paths: str) -> Spawner:
        """The same seats for processes that read only these paths; the mark is needed if one is in the run folder."""
        if self._mark is None or any(map(self._mark.covers, paths)):
            return self
        apart = copy.copy(self)
        apart._mark = None
        return apart

    def spawn(self, cls: type, role: str, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Start `cls(*args, **kwargs)` as worker `index` of `role`; returns its Ray handle at once.

        None while its seat has no node. Errors of the constructor arrive with the first call.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        slot, reserved = self.seats.placement.slot(role, index), self.seats.reservation(role, index)
        if reserved is None:
            return None
        group, number = reserved
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        return self._start(
            cls,
            f"{role}-{index}",
            slot.threads,
            {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "scheduling_strategy": strategy},
            args,
            kwargs,
        )

    def spawn_beside(self, cls: type, role: str, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Start an actor without a seat, on the driver's own node, for work between the turns of the others."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return self._start(cls, f"{role}-{index}", 1, {"num_cpus": 0, "scheduling_strategy": here}, args, kwargs)

    def _start(
        self, cls: type, name: str, threads: int, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        import ray

        gpus, folders = options.get("num_gpus", 0), roots()
        hosted = _hosted(
            cls,
            self._log_dir / f"{name}.log",
            threads,
            gpus,
            self._packages,
            self._pulse_timeout_s,
            self._mark,
            folders,
        )
        return ray.remote(hosted).options(**options).remote(ray.cloudpickle.dumps((args, kwargs)))

    def remove(self) -> None:
        """Release the seats; processes that are still in them are killed."""
        self.seats.remove()


def _hosted(
    cls: type,
    log_file: Path,
    threads: int,
    gpus: float,
    packages: tuple[str, ...],
    pulse_timeout_s: float,
    mark: FolderMark | None,
    folders: tuple[str, ...],
) -> type:
    """A subclass of `cls` that first prepares its process, and adds `describe` and `free_port`.

    Its arguments come pickled, because they may hold objects of the user's classes, which are found only after that.
    """

    class Hosted(cls):
        def __init__(self, pickled: bytes) -> None:
            self.__log_file = settle(log_file, threads, gpus)
            use_roots(folders)
            start_pulse(pulse_timeout_s)
            args, kwargs = pickle.loads(pickled)
            super().__init__(*args, **kwargs)

        def describe(self) -> WorkerInfo:
            """The worker's process and code; the answer shows that the constructor is through."""
            import ray

            return WorkerInfo(
                pid=os.getpid(),
                node_ip=ray.util.get_node_ip_address(),
                fingerprint=fingerprint(packages, mark),
                processor=processor(),
                log_file=self.__log_file,
            )

        def free_port(self) -> int:
            """A TCP port on which nothing listens at the moment."""
            with socket.socket() as listener:
                listener.bind(("", 0))
                return int(listener.getsockname()[1])

    Hosted.__name__, Hosted.__qualname__, Hosted.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Hosted


def settle(log_file: Path, threads: int, gpus: float) -> str:
    """Prepare this process: send its output to `log_file`, and limit it to its own cores and GPUs.

    Returns the log file, or "" if it cannot be written. To be called before torch is imported, or at least used.
    """
    name = _redirect_output(log_file)
    _limit_devices(threads, gpus)
    return name


def _redirect_output(log_file: Path) -> str:
    """Send file descriptors 1 and 2, and so also the output of C++ libraries, to `log_file`.

    The folder is not created: if it does not exist, this is a machine without the driver's filesystem.
    """
    try:
        target = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        return ""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        # a user's code must be able to print any character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return str(log_file)


def _limit_devices(threads: int, gpus: float) -> None:
    """Limit the process to its own cores, and hide GPUs that it did not ask for."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what torch reads when it is imported
    if "torch" in sys.modules:  # imported already, with the worker's class
        sys.modules["torch"].set_num_threads(threads)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
