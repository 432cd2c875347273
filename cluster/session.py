"""The connection to Ray: joins the cluster there is, or starts a small local Ray for this run alone and removes it afterwards.

Left out: starting clusters of several machines (see clusters/ and kuberay/) and submitting jobs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.handshake import Fingerprint, fingerprint
from cluster.placement import NodeResources, Placement, shortages, usable_cores
from cluster.spawn import Placed

log = logging.getLogger(__name__)

_TOKEN = secrets.token_hex(32)  # one per process, since Ray remembers the first it sees

_ENVIRONMENT = {
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of calls that nobody waits for any more; the pump reports all others
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # inherited by a local Ray: processes that share cores must not spin while they wait for each other
}


class Session:
    """A context manager: inside it Ray is connected, after it whatever this session started is gone.

    Where the process is connected to Ray already, that connection is used and left alone.
    """

    def __init__(self, config: ClusterConfig, log_dir: Path, *, packages: Sequence[str], local_cpus: int = 0) -> None:
        """packages: those whose sources every worker must have in common with the driver.
        local_cpus: CPUs that a local Ray is to count, if the machine has fewer, so that more workers than cores can be placed there."""
        self.fingerprint: Fingerprint = fingerprint(packages)
        self.packages = tuple(packages)
        self.log_dir = log_dir
        self._config = config
        self._local_cpus = local_cpus
        self._exit = contextlib.ExitStack()
        self._is_local = False

    def __enter__(self) -> Self:
        """Raises RunError when Ray does not answer within cluster.start_timeout_s; ValueError for an address of an unusable kind."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        logging.getLogger("ray").setLevel(logging.ERROR)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            return self
        address = self._config.address or os.environ.get("RAY_ADDRESS", "")
        with contextlib.ExitStack() as undo:  # a start that fails half-way is undone at once, a good one at the end
            if address and address != "local":
                self._join(address, undo)
            else:
                self._start_local(undo)
            self._exit = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._exit.close()

    def nodes(self) -> list[NodeResources]:
        """The living nodes and all that they have, whoever uses it at the moment."""
        import ray

        resources = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
        return [NodeResources(name=name, cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0)) for name, has in resources]

    def place(self, placement: Placement) -> Placed:
        """Reserve the bundles, close together where there is a choice.

        Raises RunError: at once when they cannot fit a local Ray, on a cluster (which may be about to grow) after cluster.place_timeout_s.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        self.preflight(placement)
        group = placement_group([{"CPU": bundle.cpus, "GPU": bundle.gpus} for bundle in placement.bundles], strategy="PACK")
        deadline = time.monotonic() + self._config.place_timeout_s
        while not group.wait(timeout_seconds=min(1.0, self._config.place_timeout_s)):  # short waits, so that signals are served
            if time.monotonic() > deadline:
                remove_placement_group(group)
                self._refuse(shortages(placement, self.nodes()) or [f"the nodes are large enough, but others use them; free are {_free_resources()}."])
        return Placed(placement, group, log_dir=self.log_dir, packages=self.packages, pulse_timeout_s=self._config.pulse_timeout_s)

    def preflight(self, placement: Placement) -> None:
        """Raises RunError when the bundles cannot fit a local Ray, which cannot grow; a cluster may, so there `place` waits and then tells."""
        if self._is_local:
            self._refuse(shortages(placement, self.nodes()))

    def _refuse(self, reasons: Sequence[str]) -> None:
        if reasons:
            remedy = "" if self._is_local else "Where an autoscaler has yet to add nodes, raise cluster.place_timeout_s."
            raise RunError("cluster", "placement", " ".join(reasons), remedy)

    def _join(self, address: str, undo: contextlib.ExitStack) -> None:
        if "://" in address:
            raise ValueError(f"cluster.address: must be auto or host:port, got {address!r}; to run from outside a cluster, use the submit command")
        started = time.monotonic()
        if address != "auto":
            _await_listener(address, self._config.start_timeout_s)
        self._connect(undo, max(1.0, self._config.start_timeout_s - (time.monotonic() - started)), address=address)

    def _start_local(self, undo: contextlib.ExitStack) -> None:
        """A Ray of this run alone, in a folder of its own, that only the holder of the token can talk to."""
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = _TOKEN
        # A short path: sockets lie in it, and the name of a socket has at most 107 characters.
        temp_dir = Path(tempfile.mkdtemp(prefix="raylign-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        undo.callback(_keep_logs_only, temp_dir, self.log_dir)
        cpus = max(usable_cores(), self._local_cpus)
        self._connect(undo, self._config.start_timeout_s, address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(temp_dir))
        self._is_local = True

    def _connect(self, undo: contextlib.ExitStack, timeout_s: float, **options: Any) -> None:
        """`ray.init` with a deadline, without a word on the terminal, and without its SIGTERM handler."""
        import ray

        target = "a local Ray" if options["address"] == "local" else f"the Ray cluster at {options['address']}"
        phase = f"connecting to {target}"
        _log_cluster_messages(undo)
        undo.callback(ray.shutdown)
        try:
            with _signals_kept(), _deadline(timeout_s, phase):
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except (ConnectionError, ValueError, OSError, ray.exceptions.RayError) as error:
            remedy = "" if options["address"] == "local" else "If the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
            raise RunError("driver", phase, str(error), remedy) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the SIGTERM handler back, which `ray.init` replaces: how to stop is the run's own affair."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _deadline(timeout_s: float, phase: str) -> Iterator[None]:
    """Raise RunError out of the block after `timeout_s`. By an alarm, since what Ray starts dies with the thread that started it;
    hence without effect outside the main thread, where Ray's own limits of about a minute remain."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise RunError("driver", phase, f"no answer within {timeout_s:.0f} s (cluster.start_timeout_s)")

    handler, started = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        rest_s = max(0.001, left_s - (time.monotonic() - started)) if left_s else 0.0  # of an alarm that somebody else had set
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest_s, interval_s)


def _await_listener(address: str, timeout_s: float) -> None:
    """Until something listens at host:port; Ray itself would try for longer than anybody wants to wait."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"cluster.address: must be auto or host:port, got {address!r}")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                remedy = "Check cluster.address or RAY_ADDRESS, and that the head node is up."
                raise RunError("driver", f"connecting to the Ray cluster at {address}", f"nobody answers within {timeout_s:g} s ({error})", remedy) from error
        time.sleep(0.5)


def _log_cluster_messages(undo: contextlib.ExitStack) -> None:
    """Ray prints what the cluster tells all drivers (a worker died, an autoscaler event) on standard output, whatever log_to_driver says.
    What matters of it reaches the run as an error of a call, so it goes to the log. A private hook of Ray 2.60, held by a test."""
    import ray._private.worker as ray_worker

    def to_log(data: dict[str, Any], ignore_prefix: bool) -> None:
        log.info("%s: %s", data.get("pid"), "\n".join(data["lines"]))

    undo.callback(setattr, ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    ray_worker.print_to_stdstream = to_log


def _keep_logs_only(temp_dir: Path, log_dir: Path) -> None:
    """Move the logs of a local Ray that has ended to log_dir/ray (ray-2, ... for later starts of the run), then remove its folder."""
    target, count = log_dir / "ray", 1
    while target.exists():
        count += 1
        target = log_dir / f"ray-{count}"
    for session in temp_dir.glob("session_[0-9]*"):
        if (session / "logs").is_dir() and not target.exists():
            with contextlib.suppress(OSError):  # the disk may be what is full, which must not hide what the run ended with
                shutil.move(session / "logs", target)
    shutil.rmtree(temp_dir, ignore_errors=True)  # a process of Ray may write its last line this very moment
    if temp_dir.exists():
        time.sleep(0.5)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _free_resources() -> str:
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
