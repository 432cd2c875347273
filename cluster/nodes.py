"""The nodes of a cluster, as far as they leave it: which are draining, and which are gone.

Ray's own word for a dead node comes 12 to 15 seconds late, because it waits for missed signs of life. But a node whose
port refuses connections is gone now. Left out: nodes that join, since a place that is asked for finds them by itself.
It uses private functions of Ray 2.60, which a test checks.
"""

from __future__ import annotations

import errno
import logging
import math
import selectors
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

_PROBE_S = 0.5  # longest wait for the answers of all ports together
_SILENT_S = 3.0  # silence of a port, of a node on which a process was lost, that means that the machine is gone


class Nodes:
    """What is known of the nodes since the last look.

    draining: node id -> time.monotonic() at which it leaves, inf where it does not say. gone: ids of nodes that are no
    more. haunted: those of them that Ray still believes alive, so that it may place new work there.
    """

    def __init__(self) -> None:
        self.draining: dict[str, float] = {}
        self.gone: set[str] = set()
        self.haunted: set[str] = set()
        self._ports: dict[str, tuple[str, int]] = {}
        self._names: dict[str, str] = {}
        self._was_blind = False

    def name(self, node: str) -> str:
        """A node for people: the start of its id, and its address."""
        return f"{node[:8]} ({self._names[node]})" if node in self._names else node[:8]

    def look(self, used: Collection[str]) -> bool:
        """Ask Ray for all nodes, and the ports of the nodes in `used`; returns whether Ray answered."""
        from ray.exceptions import RayError

        try:
            nodes, draining = _all(), _draining()
        except (RayError, RuntimeError, OSError) as error:  # a head that is busy or restarts: look again later
            if not self._was_blind:
                log.warning("the nodes of the cluster cannot be looked at: %s", error)
            self._was_blind = True
            return False
        self._was_blind = False
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        self._ports = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes}
        self._names = {node: address for node, (address, _) in self._ports.items()}
        self.gone |= (self._ports.keys() - alive) | self._refusing([node for node in used if node in alive])
        self.haunted = self.gone & alive
        now, clock = time.monotonic(), time.time()
        self.draining = {
            node: now + until / 1000 - clock if until else math.inf
            for node, until in draining.items()
            if node in alive and node not in self.gone
        }
        return True

    def ask(self, node: str) -> bool:
        """Whether a node is gone; asks its port now.

        To be called when a process there was lost: then silence means that the machine is gone, too.
        """
        if node not in self.gone:
            self.gone |= self._refusing([node], with_silent=True)
        return node in self.gone

    def _refusing(self, nodes: Collection[str], with_silent: bool = False) -> set[str]:
        """Those of these nodes whose port refuses a connection. All are asked at once; silence alone proves nothing."""
        found, asked = set(), dict[socket.socket, str]()
        for node in nodes:
            if node not in self._ports:
                continue
            host, port = self._ports[node]
            try:
                asked[_connecting(host, port)] = node
            except ConnectionRefusedError:
                found.add(node)
            except OSError:  # no route, no such name: not a word of the node itself
                continue
        with selectors.DefaultSelector() as waiting:
            for connection in asked:
                waiting.register(connection, selectors.EVENT_WRITE)
            deadline = time.monotonic() + (_SILENT_S if with_silent else _PROBE_S)
            while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(left):
                    waiting.unregister(key.fileobj)
                    assert isinstance(key.fileobj, socket.socket)
                    error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if error == errno.ECONNREFUSED or (error and with_silent):
                        found.add(asked[key.fileobj])
            silent = [key.fileobj for key in waiting.get_map().values()] if with_silent else []
            found |= {asked[connection] for connection in silent if isinstance(connection, socket.socket)}
        for connection in asked:
            with suppress(OSError):
                connection.close()
        return found


def _connecting(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    connection = socket.socket(family, kind, protocol)
    connection.setblocking(False)
    try:
        connection.connect(address)
    except BlockingIOError:
        pass
    except OSError:
        connection.close()
        raise
    return connection


def _all() -> list[dict[str, Any]]:
    import ray

    found: list[dict[str, Any]] = ray.nodes()
    return found


def _draining() -> dict[str, int]:
    """Node id -> deadline in ms since 1970, 0 where there is none."""
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes()
    return found
