"""The nodes under a run: what the driver does between two steps when they come, leave or are gone.

It changes where the work is done and by how many, never a bit of the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from cluster.gang import Gang
from cluster.pool import Pool
from cluster.runtime import Runtime
from cluster.scaling import PATIENCE, StepLoad, wanted
from pipeline.loop.wiring import Roles


class Elastic:
    """Moves seats, and asks for as many workers of the rollout pool as are worth their nodes."""

    def __init__(self, runtime: Runtime, roles: Roles, say: Callable[[str, str], None]) -> None:
        """say(kind, text): tells the user, once for each kind."""
        self._runtime = runtime
        self._seats = runtime.placed.seats
        self._roles = roles
        self._rollout = roles.rollout
        self._say = say
        self._departures = 0
        self._loads: deque[StepLoad] = deque(maxlen=PATIENCE)

    def step(self, seconds: Mapping[str, float], chunks: int) -> None:
        """Note how a step went: phase -> seconds, and the chunks that it had at the same time."""
        workers = len(self._rollout.workers)
        self._loads.append(
            StepLoad(seconds=sum(seconds.values()), waited=seconds.get("rollout", 0.0), chunks=chunks, workers=workers)
        )
        if self._runtime.is_elastic:
            self.compare_processors()

    def compare_processors(self) -> None:
        """Tell the user if processes compute on processors of different kinds."""
        found = dict[str, str]()
        groups: list[Gang | Pool] = [*self._roles.gangs.values(), *self._roles.pools]
        for group in groups:
            for worker in group.workers:
                found.setdefault(worker.processor, f"{group.role} on {worker.node_ip}")
        if len(found) > 1:
            told = "; ".join(f"{who}: {kind}" for kind, who in found.items())
            self._say(
                "processors",
                f"the nodes have processors of different kinds ({told}), which round differently, so the results "
                "depend on which of them does what; for a run that repeats to the bit take nodes of one kind "
                "(cluster.worker_labels)",
            )

    def settle(self) -> bool:
        """Let seats go and come, between two steps.

        Returns whether a node was left that is about to leave, so that what it holds should be made again elsewhere.
        """
        if not self._runtime.is_elastic:
            return False
        before = self._seats.departures
        self._seats.settle()
        left = self._seats.departures > before
        self._scale()
        return left

    def _scale(self) -> None:
        self._seats.ask_again()
        role = self._rollout.role
        held, most = self._seats.held(role), self._seats.most(role)
        now = wanted(tuple(self._loads), held=held, core=self._rollout.size - most, most=most)
        if now < held and not (self._rollout.is_ready and not self._rollout.absent):
            return  # who is not ready may be the one that would stay
        if now != held:
            self._say("resized", f"the {role} pool has {self._rollout.size - most + now} workers from now on")
            self._seats.resize(role, now)
            self._loads.clear()

    @property
    def unplaced(self) -> int:
        """Workers that wait for a node."""
        return self._seats.unplaced if self._runtime.is_elastic else 0

    @property
    def core_can_move(self) -> bool:
        """Whether a node of the learners is about to leave, and there is a place for them elsewhere."""
        return self._runtime.is_elastic and self._seats.core_can_move

    def has_lost_nodes(self) -> bool:
        """Whether a node that was in use has gone or was left since the last call."""
        before, self._departures = self._departures, self._seats.departures
        return self._departures > before

    def find_places(self, *, rebuilds: bool) -> bool:
        """Find other nodes for the learners if theirs are gone or about to leave, and wait for them.

        rebuilds: whether learners will be started, which Ray does not do on a node that is about to leave. Returns
        whether it was so: then every gang must be rebuilt. Raises RunError when none came in time.
        """
        if not self._runtime.is_elastic:
            return False
        seats = self._seats
        if not (seats.core_is_lost or seats.core_can_move or (rebuilds and seats.core_is_leaving)):
            return False
        seats.move_core()
        self._runtime.await_core()
        return True
