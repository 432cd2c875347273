"""Signs of life: a thread in every process counts up a number in the cluster's store, whatever the process computes.

A process that is stopped, starved or stuck in foreign code stops counting, and is noticed long before the deadline of a
call, which must leave room for the longest call. Left out: a living process whose work makes no progress; deadlines are
for that. The store is Ray's own key-value store (`ray.experimental.internal_kv`, of Ray 2.60), which works on every
node and in every thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.events import Pump

log = logging.getLogger(__name__)

_NAMESPACE = b"raylign-pulse"
_BEATS = 10  # signs of life in the longest silence

_silent_from = math.inf  # time.monotonic() from which this process gives no sign of life


def silent_from(moment: float) -> None:
    """Give no sign of life after this moment of time.monotonic(); math.inf cancels that.

    For code that may never return and that nothing can interrupt: a process that hangs in it is then replaced like one
    that was stopped.
    """
    global _silent_from
    _silent_from = moment


def start_pulse(timeout_s: float) -> None:
    """In a worker: give ten signs of life in every `timeout_s` seconds from now on."""
    import ray

    key = ray.get_runtime_context().get_actor_id().encode()

    def beat() -> None:
        from ray.experimental import internal_kv

        count = 0
        while True:
            count += time.monotonic() < _silent_from
            with suppress(Exception):  # a sign that cannot be given is one that is missing
                internal_kv._internal_kv_put(key, str(count).encode(), overwrite=True, namespace=_NAMESPACE)
            time.sleep(timeout_s / _BEATS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


@dataclass(slots=True)
class _Heard:
    key: bytes
    count: bytes = b""  # empty while it starts, for which there is another deadline
    at: float = 0.0
    is_silent: bool = False


class Pulse:
    """In the driver: listens to the workers of a pool or gang while the pump waits."""

    def __init__(self, pump: Pump, timeout_s: float) -> None:
        self._pump = pump
        self._timeout_s = timeout_s
        self._heard: dict[str, _Heard] = {}
        pump.add_tick(self.check, every_s=timeout_s / _BEATS)

    def follow(self, who: str, handle: Any) -> None:
        """Listen to this actor under this name from now on, instead of the actor before it."""
        self.leave(who)
        self._heard[who] = _Heard(handle._actor_id.hex().encode())

    def leave(self, who: str) -> None:
        """Stop listening to an actor that is gone, or about to be."""
        from ray.experimental import internal_kv

        heard = self._heard.pop(who, None)
        if heard is not None:
            with suppress(Exception):  # at the end of a run the store may be gone already
                internal_kv._internal_kv_del(heard.key, namespace=_NAMESPACE)

    def check(self) -> None:
        """Expire the calls of every process that has been silent for too long."""
        from ray.exceptions import RpcError
        from ray.experimental import internal_kv

        for who, heard in list(self._heard.items()):
            try:
                count = internal_kv._internal_kv_get(heard.key, namespace=_NAMESPACE) or b""
            except RpcError as error:  # the store itself is silent, so no process can be judged
                log.warning("signs of life cannot be read: %s", error)
                count = b""
            now = time.monotonic()
            if count != heard.count or not count:
                heard.count, heard.at, heard.is_silent = count, now, False
            elif now - heard.at > self._timeout_s:
                if not heard.is_silent:
                    log.warning("%s has given no sign of life for %.0f s", who, now - heard.at)
                heard.is_silent = True
                self._pump.give_up(who, self._timeout_s)  # also calls that were sent since
