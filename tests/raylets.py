"""Nodes of one cluster on this machine: a raylet each, with a loopback address of its own.

A node is a process group, so that it can be killed as a whole, like a machine whose power fails. SIGTERM drains it
first, as a deleted pod or a spot machine that is taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ports import free_port

RAY = (sys.executable, str(Path(__file__).with_name("forked_workers.py")), "ray")
_HEAD = "f" * 51 + "00000"  # id of an autoscaling head
_START_S = 180.0


@dataclass(slots=True)
class Node:
    """One raylet. number: the last part of its address."""

    number: int
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def ip(self) -> str:
        return f"127.0.0.{self.number}"

    def kill(self) -> None:
        """End it at once, with everything that runs there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group, hence this node and its workers only
        self.process.wait(timeout=30)

    def drain(self) -> None:
        """Give it notice: it leaves when it is empty, or when its notice is over."""
        self.process.terminate()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


@dataclass(slots=True)
class Cluster:
    """A head and its nodes. environment: of a client, with the address and the token."""

    environment: dict[str, str]
    port: int
    of_nodes: dict[str, str]  # what the nodes have in their environment besides
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def add(self, cpus: int, *options: str) -> Node:
        """Start one more node, and wait until it has joined."""
        number = max(node.number for node in self.nodes) + 1
        joining = (f"--address=127.0.0.1:{self.port}", f"--num-cpus={cpus}", *options)
        node = _start(number, self.environment | self.of_nodes, *joining)
        self.nodes.append(node)
        _await(lambda: "Ray runtime started" in _log(node), node)
        return node

    def alive(self) -> int:
        """The number of nodes that Ray knows and believes alive, the head among them."""
        code = (
            "import ray; ray.init(logging_level=40, log_to_driver=False);"
            "print('alive:', sum(node['Alive'] for node in ray.nodes()))"
        )
        asked = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, timeout=120, check=True
        )
        return int(re.findall(r"alive: (\d+)", asked.stdout)[-1])  # the autoscaler may speak on this channel, too

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
            shutil.rmtree(node.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(head_cpus: int, *, notice_s: float = 30.0) -> Iterator[Cluster]:
    """A cluster that has only its head. notice_s: how long a node drains at SIGTERM."""
    yield from _from_head(head_cpus, free_port(), {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s)})


@contextlib.contextmanager
def autoscaling_cluster(head_cpus: int, worker_cpus: int, most: int, idle_s: float) -> Iterator[Cluster]:
    """A head with Ray's own autoscaler, whose nodes are processes of this machine.

    most: worker nodes. idle_s: after so long without work a node is taken away.
    """
    port = free_port()
    nodes = {
        "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": worker_cpus, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        },
    }
    fake = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": fake, "head_node_id": _HEAD, "gcs_address": f"127.0.0.1:{port}"}
    switches = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check", "launch_multiple")
    settings = {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": provider | dict.fromkeys(switches, True),
        "available_node_types": nodes,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": idle_s / 60,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
        **{f"{kind}_{what}": [] for kind in ("head", "worker") for what in ("setup_commands", "start_ray_commands")},
    }
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(json.dumps(settings))
        file.flush()
        yield from _from_head(head_cpus, port, environment, f"--autoscaling-config={file.name}")


def _from_head(head_cpus: int, port: int, more: dict[str, str], *options: str) -> Iterator[Cluster]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"
    }
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    head = _start(
        1,
        environment | more,
        "--head",
        f"--port={port}",
        "--include-dashboard=false",
        f"--num-cpus={head_cpus}",
        f"--ray-client-server-port={free_port()}",
        *options,
    )
    found = Cluster(environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, port, more, [head])
    try:
        _await(lambda: "Ray runtime started" in _log(head), head)
        yield found
    finally:
        found.close()


def _start(number: int, environment: dict[str, str], *options: str) -> Node:
    folder = Path(tempfile.mkdtemp(prefix="rn-", dir="/tmp"))
    command = [
        *RAY,
        "start",
        "--block",
        f"--node-ip-address=127.0.0.{number}",
        f"--temp-dir={folder}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}",
        "--object-store-memory=100000000",
        *options,
    ]
    inherited = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    with (folder / "node.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=inherited,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Node(number, process, folder)


def _log(node: Node) -> str:
    return (node.folder / "node.log").read_text(errors="replace")


def _await(condition: Callable[[], bool], node: Node) -> None:
    until = time.monotonic() + _START_S
    while not condition():
        assert node.is_alive and time.monotonic() < until, _log(node)[-3000:]
        time.sleep(0.1)
