"""Sessions in processes of their own: a local Ray that is silent and leaves nothing but its logs, and a cluster that is
joined.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.faults import RunError
from cluster.placement import Bundle, Placement, Slot
from cluster.session import Session, _await_listener, _deadline

RUN = """
import os, signal, sys, tempfile
from pathlib import Path
import ray
from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.placement import RoleDemand, plan_placement
from cluster.pool import Pool
from cluster.work import Work
from cluster.session import Session

class Worker:
    def work(self, attempt):
        print("chatter of a worker")
        if attempt == 1:
            os._exit(5)
        return os.getpid()
    def fail(self):
        raise ValueError("an error that nobody waits for")

signal.signal(signal.SIGTERM, signal.SIG_IGN)
config = ClusterConfig(start_timeout_s=300)
with Session(config, Path(sys.argv[1]), packages=("cluster",), local_cpus=3) as session:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    nodes = session.nodes()
    asked = [RoleDemand("worker", 2, 0)]
    placed = session.place(plan_placement(asked, share_devices=True, cpus_per_bundle=1, local_cpus=1))
    pump, pids = Pump(), []
    pool = Pool("worker", lambda index: placed.spawn(Worker, "worker", index), 1, pump, config, session.fingerprint)
    pool.start()
    send = lambda handle, attempt: (handle.work.remote(attempt),)
    pool.submit(Work(phase="work", send=send, on_done=lambda pid, data, attempt: pids.append(pid)))
    pump.run_until(lambda: bool(pids), timeout_s=300, waiting_for="the work")
    stray = placed.spawn(Worker, "worker", 1)
    failed = stray.fail.remote()
    assert ray.wait([failed], timeout=300)[0]
    del failed
    placed.remove()
    temp_dir = ray._private.worker._global_node.get_temp_dir_path()
    token, gcs = os.environ.get("RAY_AUTH_TOKEN", ""), ray.get_runtime_context().gcs_address
    seen = [str(nodes[0].cpus), temp_dir, token, str(pool.replaced), gcs]
    Path(sys.argv[1], "seen").write_text("\\n".join(seen))
    sys.stdin.readline()
assert not ray.is_initialized()
print("end of the run")
"""


INTRUDER = "import ray, sys; ray.init(address=sys.argv[1])"


@contextlib.contextmanager
def running(log_dir: Path, **environment: str) -> Iterator[list[str]]:
    """RUN in a process of its own, held at its end inside the session; afterwards it must have ended well and in
    silence.
    """
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", RUN, str(log_dir)]
    with subprocess.Popen(
        command, env=_without_ray() | environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and not (log_dir / "seen").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            assert (log_dir / "seen").exists(), process.communicate(timeout=30)
            yield (log_dir / "seen").read_text().split("\n")
            stdout, stderr = process.communicate(input="\n", timeout=250)
        finally:
            process.kill()
    assert (stdout, stderr, process.returncode) == ("end of the run\n", "", 0)


def refused(address: str) -> bool:
    """Whether a client that knows another token is turned away; Ray tries for 20 s, its first complaint is enough."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with subprocess.Popen(
        [sys.executable, "-c", INTRUDER, address], env=_without_ray() | access, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        complained = any("InvalidAuthToken" in line for line in process.stderr)
        process.kill()
    return complained


def _without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.mark.slow
def test_a_local_ray_is_silent_has_a_token_and_leaves_only_its_logs(tmp_path: Path) -> None:
    with running(tmp_path / "log") as (cpus, temp_dir, token, replaced, address):
        assert Path(temp_dir).name.startswith("raylign-")
        assert Path(temp_dir).exists()
        assert refused(address)
    assert not Path(temp_dir).exists()
    assert float(cpus) >= 3
    assert len(token) == 64
    assert replaced == "1"
    assert (tmp_path / "log" / "worker-0.log").read_text() == "chatter of a worker\n" * 2
    assert (tmp_path / "log" / "ray" / "raylet.out").exists()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment with which a cluster of one node can be joined: started by hand, with a token, in a process group
    of its own.
    """
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        port, client_port = one.getsockname()[1], two.getsockname()[1]
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray_command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--include-dashboard=false",
        "--num-cpus=2",
    ]
    temp_dir = tmp_path_factory.mktemp("r")
    with open(temp_dir / "head.log", "w") as output:
        process = subprocess.Popen(
            [*ray_command, f"--port={port}", f"--ray-client-server-port={client_port}", f"--temp-dir={temp_dir}"],
            env=os.environ | access | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    yield access | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


@pytest.mark.slow
def test_a_cluster_named_by_ray_address_is_joined_and_left_running(head: dict[str, str], tmp_path: Path) -> None:
    with running(tmp_path / "log", **head) as (cpus, temp_dir, token, replaced, _):
        assert (float(cpus), token, replaced) == (2, head["RAY_AUTH_TOKEN"], "1")
    assert Path(temp_dir).exists()
    assert not (tmp_path / "log" / "ray").exists()
    _await_listener(head["RAY_ADDRESS"], 1.0)


def test_a_process_that_is_connected_already_stays_connected(ray_session: Session, tmp_path: Path) -> None:
    import ray

    with Session(ClusterConfig(address="10.255.255.1:1"), tmp_path, packages=()) as session:
        assert session.nodes() == ray_session.nodes()
    assert ray.is_initialized()


def test_nobody_at_the_address_is_an_error_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        _await_listener(address, 0.7)
    assert time.monotonic() - started < 30
    assert str(caught.value).startswith(
        f"driver failed during 'connecting to the Ray cluster at {address}': nobody answers within 0.7 s ("
    )
    assert caught.value.remedy == "Check cluster.address or RAY_ADDRESS, and that the head node is up."


def test_a_deadline_interrupts_and_gives_other_alarms_their_time_back() -> None:
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with (
            pytest.raises(RunError, match=r"driver failed during 'a start': no answer within 0 s"),
            _deadline(0.2, "a start"),
        ):
            time.sleep(20)
        assert 30 < signal.getitimer(signal.ITIMER_REAL)[0] < 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port"])
def test_an_unusable_address_is_refused(address: str, tmp_path: Path) -> None:
    with (
        contextlib.ExitStack() as undo,
        pytest.raises(ValueError, match=r"cluster.address: must be auto or host:port, got '"),
    ):
        Session(ClusterConfig(address=address), tmp_path, packages=())._join(address, undo)


def bundles(count: int, cpus: int, gpus: float = 0) -> Placement:
    slots = tuple(Slot(role="w", index=i, bundle=i, cpus=cpus, gpus=gpus, threads=cpus) for i in range(count))
    return Placement(bundles=(Bundle(cpus=cpus, gpus=gpus),) * count, slots=slots, core=tuple(range(count)))


def test_what_a_local_ray_lacks_is_said_at_once(ray_session: Session) -> None:
    started = time.monotonic()
    with pytest.raises(
        RunError,
        match=r"cluster failed during 'placement': 2 of 2 bundles of 1 CPU and 1 GPU fit no node; there is .* with 16 "
        r"CPUs. Add nodes",
    ):
        ray_session.place(bundles(2, cpus=1, gpus=1))
    assert time.monotonic() - started < 25  # cluster.place_timeout_s is 30


def test_what_fits_a_cluster_is_not_reserved_to_be_looked_at_and_what_does_not_is_asked_for(
    ray_session: Session, tmp_path: Path
) -> None:
    """Others may be at work where a later stage will go; only a cluster that is too small is asked to grow."""
    with Session(ClusterConfig(place_timeout_s=0.5), tmp_path, packages=()) as joined:
        most = ray_session.place(bundles(1, cpus=15))
        joined.preflight(bundles(1, cpus=16))
        most.remove()
        with pytest.raises(RunError, match=r"1 of 1 bundles of 99 CPUs fit no node; .* raise cluster.place_timeout_s"):
            joined.preflight(bundles(1, cpus=99))


@pytest.mark.slow
def test_a_cluster_is_given_its_time_to_grow_or_to_get_free(ray_session: Session, tmp_path: Path) -> None:
    with Session(ClusterConfig(place_timeout_s=2.0), tmp_path, packages=()) as joined:
        with pytest.raises(RunError, match=r"1 of 1 bundles of 99 CPUs fit no node; .* raise cluster.place_timeout_s"):
            joined.place(bundles(1, cpus=99))
        most = ray_session.place(bundles(1, cpus=15))
        with pytest.raises(RunError, match=r"the nodes are large enough, but others use them; free are 1 CPUs"):
            joined.place(bundles(1, cpus=2))
        most.remove()
        joined.place(bundles(1, cpus=16)).remove()  # the refused ones hold nothing back
