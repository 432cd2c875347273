"""Makes a Ray actor of a plain class, in its seat of the placement. The only place where `ray.remote` is applied.

Left out: restarts. A pool or a gang replaces what it lost, since only they know what the lost one was doing.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.handshake import Fingerprint, fingerprint
from cluster.placement import Placement
from cluster.pulse import start_pulse

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """Where a worker runs and what code it has."""

    pid: int
    node_ip: str
    hostname: str
    fingerprint: Fingerprint
    log_file: str  # "" where the driver's log folder cannot be written: the output is in Ray's own logs


class Placed:
    """The seats of a run, reserved on the cluster."""

    def __init__(self, placement: Placement, group: PlacementGroup, *, log_dir: Path, packages: Sequence[str], pulse_timeout_s: float) -> None:
        self.placement = placement
        self._group = group
        self._log_dir = log_dir.absolute()
        self._packages = tuple(packages)
        self._pulse_timeout_s = pulse_timeout_s

    def spawn(self, cls: type, role: str, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Start `cls(*args, **kwargs)` as worker `index` of `role` and return its Ray handle at once; errors arrive with its first call."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        slot = self.placement.slot(role, index)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle)
        return self._start(cls, f"{role}-{index}", slot.threads, {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "scheduling_strategy": strategy}, args, kwargs)

    def spawn_beside(self, cls: type, role: str, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """The same without a seat: on the driver's own node, where its files are, for work that is done between the turns of the others."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return self._start(cls, f"{role}-{index}", 1, {"num_cpus": 0, "scheduling_strategy": here}, args, kwargs)

    def _start(self, cls: type, name: str, threads: int, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import ray

        hosted = _hosted(cls, self._log_dir / f"{name}.log", threads, options.get("num_gpus", 0), self._packages, self._pulse_timeout_s)
        return ray.remote(hosted).options(**options).remote(*args, **kwargs)

    def remove(self) -> None:
        """Give the seats back; what still sits in them is killed."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


def _hosted(cls: type, log_file: Path, threads: int, gpus: float, packages: tuple[str, ...], pulse_timeout_s: float) -> type:
    """A subclass of `cls` that settles its process first and can say where it lives."""

    class Hosted(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.__log_file = settle(log_file, threads, gpus)
            start_pulse(pulse_timeout_s)
            super().__init__(*args, **kwargs)

        def describe(self) -> WorkerInfo:
            """Also the sign that the constructor is through."""
            import ray

            return WorkerInfo(
                pid=os.getpid(),
                node_ip=ray.util.get_node_ip_address(),
                hostname=socket.gethostname(),
                fingerprint=fingerprint(packages),
                log_file=self.__log_file,
            )

        def free_port(self) -> int:
            """A TCP port that nobody listens on at this moment."""
            with socket.socket() as listener:
                listener.bind(("", 0))
                return int(listener.getsockname()[1])

    Hosted.__name__, Hosted.__qualname__, Hosted.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Hosted


def settle(log_file: Path, threads: int, gpus: float) -> str:
    """Make this process one of the run's: its output goes to the log folder, and it keeps to its own cores and GPUs.

    Returns where the output goes, "" where that cannot be written. To be called before torch is imported, or at least used.
    """
    name = _redirect_output(log_file)
    _limit_devices(threads, gpus)
    return name


def _redirect_output(log_file: Path) -> str:
    """Send the process's descriptors 1 and 2, hence also what C++ libraries print, into `log_file`.

    The folder is not created: where it does not exist, this is another machine without the driver's filesystem.
    """
    try:
        target = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        return ""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return str(log_file)


def _limit_devices(threads: int, gpus: float) -> None:
    """Keep the process to its own cores, and off GPUs that it did not ask for."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what torch reads when it is imported
    if "torch" in sys.modules:  # imported already, with the worker's class
        sys.modules["torch"].set_num_threads(threads)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
