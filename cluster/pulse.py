"""Signs of life: every process counts up a number in the cluster's store from a thread of its own, whatever it is computing.

A process that is stopped, starved or stuck inside foreign code does not count any further, and is noticed long before a call's deadline, which
must leave room for the longest call. Left out: work that makes no progress in a process that lives; deadlines are for that.
The store is Ray's own key-value store (`ray.experimental.internal_kv`, of Ray 2.60), so that it works on every node and in every thread.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.events import Pump

log = logging.getLogger(__name__)

_NAMESPACE = b"raylign-pulse"
_BEATS = 10  # in the longest silence


def start_pulse(timeout_s: float) -> None:
    """In a worker: begin to give signs of life, ten in every `timeout_s` seconds."""
    import ray

    key = ray.get_runtime_context().get_actor_id().encode()

    def beat() -> None:
        from ray.experimental import internal_kv

        count = 0
        while True:
            count += 1
            with suppress(Exception):  # a sign that cannot be given is one that is missing
                internal_kv._internal_kv_put(key, str(count).encode(), overwrite=True, namespace=_NAMESPACE)
            time.sleep(timeout_s / _BEATS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


@dataclass(slots=True)
class _Heard:
    key: bytes
    count: bytes = b""  # none yet: still starting, for which there is another deadline
    at: float = 0.0
    is_silent: bool = False


class Pulse:
    """In the driver: listens to the workers of a pool or gang, for as long as anything is waited for."""

    def __init__(self, pump: Pump, timeout_s: float) -> None:
        self._pump = pump
        self._timeout_s = timeout_s
        self._heard: dict[str, _Heard] = {}
        pump.add_tick(self.check, every_s=timeout_s / _BEATS)

    def follow(self, who: str, handle: Any) -> None:
        """Listen to this actor under that name from now on, instead of to whoever had it."""
        self.leave(who)
        self._heard[who] = _Heard(handle._actor_id.hex().encode())

    def leave(self, who: str) -> None:
        """It is gone, or about to be."""
        from ray.experimental import internal_kv

        heard = self._heard.pop(who, None)
        if heard is not None:
            with suppress(Exception):  # at the end of a run the store may be gone already
                internal_kv._internal_kv_del(heard.key, namespace=_NAMESPACE)

    def check(self) -> None:
        """Give up the calls of whoever has been silent for too long, as if their deadline had passed."""
        from ray.exceptions import RpcError
        from ray.experimental import internal_kv

        for who, heard in list(self._heard.items()):
            try:
                count = internal_kv._internal_kv_get(heard.key, namespace=_NAMESPACE) or b""
            except RpcError as error:  # the store is what is silent, so nobody can be judged by it
                log.warning("signs of life cannot be read: %s", error)
                count = b""
            now = time.monotonic()
            if count != heard.count or not count:
                heard.count, heard.at, heard.is_silent = count, now, False
            elif now - heard.at > self._timeout_s:
                if not heard.is_silent:
                    log.warning("%s has given no sign of life for %.0f s", who, now - heard.at)
                heard.is_silent = True
                self._pump.give_up(who, self._timeout_s)  # also of what it was given since
