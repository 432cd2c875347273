"""The connection to Ray: a session joins a cluster, or starts a local Ray for this run and removes it afterwards.

Left out: starting clusters of several machines, and submitting jobs.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.handshake import Fingerprint, fingerprint
from cluster.imports import job_config
from cluster.placement import NodeResources, Placement, described, labels_of_bundles, shortages, usable_cores
from cluster.seats import Seats
from cluster.shared import FolderMark
from cluster.signals import hang_up_blocked, postponed
from cluster.spawn import Spawner

log = logging.getLogger(__name__)

_MOMENT_S = 5.0  # for bundles that fit the present nodes

_TOKEN = secrets.token_hex(32)  # one per process, because Ray keeps the first it sees

_ENVIRONMENT = {
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # errors of abandoned calls; the pump reports all others
    "RAY_USAGE_STATS_ENABLED": "0",
    # inherited by a local Ray: processes that share cores must not spin while they wait for each other
    "OMP_WAIT_POLICY": "PASSIVE",
}


def cluster_address(config: ClusterConfig) -> str:
    """The address of the cluster that a run joins; "" if it starts a local Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def check_address(address: str) -> None:
    """Raises ValueError for an address that is neither `auto` nor host:port."""
    if "://" in address:
        raise ValueError(
            f"cluster.address: must be auto or host:port, got {address!r}; to run from outside a cluster, use the "
            "submit command"
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"cluster.address: must be auto or host:port, got {address!r}; such as 10.0.0.1:6379")


class Session:
    """Context manager: inside it Ray is connected; at its end everything that it started is removed.

    If the process is connected to Ray already, that connection is used and left alone.
    """

    def __init__(
        self,
        config: ClusterConfig,
        log_dir: Path,
        *,
        packages: Sequence[str],
        local_cpus: int = 0,
        folder: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """A session that is not connected yet.

        packages: workers must have the same sources of these as the driver. local_cpus: CPUs that a local Ray counts at
        least, so that more workers than cores can be placed. folder: the run folder, which every worker that is given
        files in it must see; None: the parent of log_dir. check: called repeatedly during every wait; it ends the wait
        by raising.
        """
        self.fingerprint: Fingerprint = fingerprint(packages)
        self.packages = tuple(packages)
        self.log_dir = log_dir
        self.check = check
        self.scratch: Path | None = None  # removed at the end of the session; None on a joined cluster
        self._config = config
        self._local_cpus = local_cpus
        self._exit = contextlib.ExitStack()
        self._is_local = False
        self._folder = folder or log_dir.parent
        self.mark: FolderMark | None = None

    def __enter__(self) -> Self:
        """Raises RunError when Ray does not answer within cluster.start_timeout_s, ValueError for a bad address."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        logging.getLogger("ray").setLevel(logging.ERROR)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        try:
            with postponed():
                self.mark = FolderMark.leave(self._folder, self.log_dir)
                self._exit.callback(self.mark.remove)
            if not ray.is_initialized():
                address = cluster_address(self._config)
                if address:
                    self._join(address, self._exit)
                else:
                    with postponed():
                        self._start_local(self._exit)
        except BaseException:  # a failed start is undone at once, a good one at the end
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with postponed():  # it takes bounded time, and half of it would leave processes and folders behind
            self._exit.close()

    def nodes(self) -> list[NodeResources]:
        """The living nodes with their total resources, in use or not."""
        import ray

        resources = [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
        return [NodeResources(name=name, cpus=has.get("CPU", 0.0), gpus=has.get("GPU", 0.0)) for name, has in resources]

    def place(self, placement: Placement, say: Callable[[str], None] = lambda line: None) -> Spawner:
        """Reserve the bundles, close together where there is a choice.

        On a cluster only the core is waited for; the other bundles are asked for, and come when there is room. say: is
        told of what is waited for. Raises RunError: at once when the bundles cannot fit a local Ray, on a cluster
        (which may be about to grow) when the core has no place after cluster.place_timeout_s.
        """
        if self._is_local:
            self._refuse(shortages(placement, self.nodes()))
        seats = Seats(placement, labels_of_bundles(placement, self._config))
        try:
            seats.ask_core()
            if not seats.wait(core=True, timeout_s=0.5, check=self.check):
                say(f"waiting for {described(placement.least)}; free are {_free_resources()}")
                if not seats.wait(core=True, timeout_s=self._config.place_timeout_s, check=self.check):
                    self._refuse(self._missing(placement))
            seats.ask_rest()
            # what fits is there in a moment; nobody waits for what does not
            room = self._is_local or not shortages(placement, self.nodes())
            moment_s = self._config.place_timeout_s if self._is_local else _MOMENT_S if room else 0.5
            seats.wait(core=False, timeout_s=moment_s, check=self.check)
            if seats.waiting and self._is_local:  # nothing will come there
                self._refuse([f"a local Ray gave no place to {seats.waiting} bundles within {moment_s:g} s."])
            if seats.waiting:
                told = f"{seats.waiting} of {len(placement.bundles)} bundles have no place yet"
                say(f"{told}; the run begins without them")
        except BaseException:
            seats.remove()
            raise
        return self._spawner(seats)

    def beside(self) -> Spawner:
        """A spawner for processes on the driver's own node, without seats (`spawn_beside`)."""
        return self._spawner(Seats(Placement(bundles=(), slots=())))

    def preflight(self, placement: Placement) -> None:
        """Raises RunError as `place` does when the core does not fit the nodes, whether these are in use or not.

        A cluster that is too small is asked for the bundles, because it may grow; they are then released.
        """
        if shortages(placement.least, self.nodes()):
            self.place(placement.least).remove()

    @property
    def is_local(self) -> bool:
        """Whether this is a Ray of the run alone, whose one node neither comes nor goes."""
        return self._is_local

    def _missing(self, placement: Placement) -> list[str]:
        """Why the core has no place."""
        reasons = shortages(placement.least, self.nodes())
        return reasons or [f"the nodes are large enough, but others use them; free are {_free_resources()}."]

    def _spawner(self, seats: Seats) -> Spawner:
        return Spawner(
            seats,
            log_dir=self.log_dir,
            packages=self.packages,
            pulse_timeout_s=self._config.pulse_timeout_s,
            mark=self.mark,
        )

    def _refuse(self, reasons: Sequence[str]) -> None:
        if reasons:
            remedy = (
                "" if self._is_local else "Where an autoscaler has yet to add nodes, raise cluster.place_timeout_s."
            )
            raise RunError("cluster", "placement", " ".join(reasons), remedy)

    def _join(self, address: str, undo: contextlib.ExitStack) -> None:
        check_address(address)
        started = time.monotonic()
        if address != "auto":
            _await_listener(address, self._config.start_timeout_s, self.check)
        self._connect(undo, max(1.0, self._config.start_timeout_s - (time.monotonic() - started)), address=address)

    def _start_local(self, undo: contextlib.ExitStack) -> None:
        """Start a Ray for this run alone, in a folder of its own, protected by a token."""
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = _TOKEN
        # A short path, because sockets lie in it, and a socket's path has at most 107 characters.
        temp_dir = Path(tempfile.mkdtemp(prefix="raylign-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        undo.callback(_keep_logs_only, temp_dir, self.log_dir)
        self.scratch = temp_dir
        cpus = max(usable_cores(), self._local_cpus)
        self._connect(
            undo,
            self._config.start_timeout_s,
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            _temp_dir=str(temp_dir),
        )
        self._is_local = True

    def _connect(self, undo: contextlib.ExitStack, timeout_s: float, **options: Any) -> None:
        """`ray.init` with a deadline, without output on the terminal, and without its SIGTERM handler.

        A signal waits for its end: an interrupted start would leave processes behind, or crash the interpreter.
        """
        import ray

        target = "a local Ray" if options["address"] == "local" else f"the Ray cluster at {options['address']}"
        phase = f"connecting to {target}"
        _log_cluster_messages(undo)
        undo.callback(ray.shutdown)
        try:
            with postponed(), hang_up_blocked(), _signals_kept(), _deadline(timeout_s, phase):
                ray.init(logging_level=logging.ERROR, log_to_driver=False, job_config=job_config(), **options)
        except RunError:
            raise
        except Exception as error:  # a node that is slow to start is a plain Exception of Ray's
            remedy = (
                ""
                if options["address"] == "local"
                else "If the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
            )
            raise RunError("driver", phase, str(error), remedy) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the SIGTERM handler, which `ray.init` replaces; the run handles SIGTERM itself."""
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
    """Raise RunError out of the block after `timeout_s`.

    It uses an alarm, because Ray's processes die with the thread that started them. So it has no effect outside the
    main thread, where Ray's own limits of about a minute remain.
    """
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
        # the rest of an alarm that somebody else had set
        rest_s = max(0.001, left_s - (time.monotonic() - started)) if left_s else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest_s, interval_s)


def _await_listener(address: str, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
    """Wait until something listens at host:port; Ray itself would try for too long."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(0.1, deadline - time.monotonic())
            ).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                remedy = "Check cluster.address or RAY_ADDRESS, and that the head node is up."
                raise RunError(
                    "driver",
                    f"connecting to the Ray cluster at {address}",
                    f"nobody answers within {timeout_s:g} s ({error})",
                    remedy,
                ) from error
        check()
        time.sleep(0.5)


def _log_cluster_messages(undo: contextlib.ExitStack) -> None:
    """Send Ray's messages to all drivers (a worker died, an autoscaler event) to the log.

    Ray prints them on standard output, whatever log_to_driver says; what matters reaches the run as an error of a call.
    This uses a private hook of Ray 2.60, which a test checks.
    """
    import ray._private.worker as ray_worker

    def to_log(data: dict[str, Any], ignore_prefix: bool) -> None:
        log.info("%s: %s", data.get("pid"), "\n".join(data["lines"]))

    undo.callback(setattr, ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    ray_worker.print_to_stdstream = to_log


def _keep_logs_only(temp_dir: Path, log_dir: Path) -> None:
    """Move the logs of an ended local Ray to log_dir/ray (ray-2, ... for later starts), then remove its folder."""
    target, count = log_dir / "ray", 1
    while target.exists():
        count += 1
        target = log_dir / f"ray-{count}"
    for session in temp_dir.glob("session_[0-9]*"):
        if (session / "logs").is_dir() and not target.exists():
            with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
                shutil.move(session / "logs", target)
    shutil.rmtree(temp_dir, ignore_errors=True)  # a process of Ray may write its last line this very moment
    if temp_dir.exists():
        time.sleep(0.5)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _free_resources() -> str:
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
