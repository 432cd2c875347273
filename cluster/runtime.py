"""The runtime of a stage: it starts the stage's actors on their reserved resources, and waits for their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.events import Pump
from cluster.faults import RunError, classify, last_lines
from cluster.gang import Gang, Ticket
from cluster.halving import DivisibleWork, submit_divisible
from cluster.handshake import Fingerprint
from cluster.placement import described
from cluster.pool import Pool
from cluster.seats import LOOK_S
from cluster.session import Session
from cluster.spawn import Spawner
from cluster.work import Work

if TYPE_CHECKING:
    from ray import ObjectRef

    DivisibleSend = Callable[[Any, int, frozenset[int]], tuple[ObjectRef, ...]]


_ROOM_S = 2.0  # for which the core may look for a place beside the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Starts and calls the actors of a stage.

    placed: starts actors in the stage's bundles. pump: the event pump in which all waiting happens. fingerprint: of the
    driver; every worker must match it.
    """

    placed: Spawner
    pump: Pump
    fingerprint: Fingerprint
    config: ClusterConfig
    is_elastic: bool = False
    """Whether nodes may come and go."""

    @property
    def timeout_s(self) -> float:
        """The longest time that one call may take, in seconds."""
        return self.config.call_timeout_s

    @classmethod
    def of(cls, session: Session, placed: Spawner, config: ClusterConfig) -> Runtime:
        """Make a runtime whose waits end when the run is asked to stop."""
        pump = Pump()
        pump.add_tick(session.check, every_s=0.2)
        if not session.is_local:
            pump.add_tick(placed.seats.tick, every_s=LOOK_S)
        return cls(
            placed=placed,
            pump=pump,
            fingerprint=session.fingerprint,
            config=config,
            is_elastic=not session.is_local,
        )

    def wait(self, condition: Callable[[], bool], waiting_for: str) -> None:
        """Serve events until the condition holds, for at most twice the time that one call may take."""
        self.pump.run_until(condition, timeout_s=2 * self.timeout_s, waiting_for=waiting_for)

    def map(
        self, pool: Pool, phase: str, sends: Sequence[Callable[[Any, int], tuple[ObjectRef, ...]]]
    ) -> list[tuple[Any, tuple[ObjectRef, ...]]]:
        """Give each call to a free worker of the pool; returns the (report, data) of all calls, in the order given."""
        found: dict[int, tuple[Any, tuple[ObjectRef, ...]]] = {}
        for number, send in enumerate(sends):

            def done(report: Any, data: tuple[ObjectRef, ...], attempt: int, number: int = number) -> None:
                found[number] = (report, data)

            pool.submit(Work(phase=f"{phase} {number}", send=send, on_done=done, timeout_s=self.timeout_s))
        self.wait(lambda: len(found) == len(sends), phase)
        return [found[number] for number in range(len(sends))]

    def map_divisible(
        self, pool: Pool, phase: str, calls: Sequence[tuple[Sequence[int], DivisibleSend]], say: Callable[[str], None]
    ) -> list[tuple[Any, tuple[ObjectRef, ...], Mapping[int, str]]]:
        """Like `map`, for calls that consist of items; an item that kills or hangs its worker is found and left out.

        calls: (items, send) of each. Returns (report, data, found) of each call, where `found` is item -> why it was
        left out. `say` is told of each such item when it is found.
        """
        done: dict[int, tuple[Any, tuple[ObjectRef, ...], Mapping[int, str]]] = {}
        for number, (items, send) in enumerate(calls):

            def take(report: Any, data: tuple[ObjectRef, ...], found: Mapping[int, str], number: int = number) -> None:
                done[number] = (report, data, found)

            def tell(item: int, why: str, number: int = number, items: Sequence[int] = items) -> None:
                place = list(items).index(item) + 1
                say(f"{phase}, chunk {number}: item {place} of {len(items)} {why}, so it is left out")

            work = DivisibleWork(
                phase=f"{phase} {number}",
                items=items,
                group_of=lambda item: item,
                send=send,
                on_done=take,
                on_found=tell,
                timeout_s=self.timeout_s,
            )
            submit_divisible(pool, work)
        self.wait(lambda: len(done) == len(calls), phase)
        return [done[number] for number in range(len(calls))]

    def fetch(self, refs: Sequence[ObjectRef], phase: str) -> list[Any]:
        """Fetch objects into the driver; only for small ones that must be shown, such as held-out replies.

        Raises RunError when an object is lost.
        """
        import ray

        try:
            values: list[Any] = ray.get(list(refs), timeout=self.timeout_s)
        except ray.exceptions.RayError as error:
            raise RunError(
                "driver", phase, f"its results cannot be fetched: {last_lines(error)}", fault=classify(error)
            ) from error
        return values

    def finish(self, ticket: Ticket, waiting_for: str) -> Any:
        """Serve events until a gang's call is done; returns its first report."""
        self.wait(lambda: ticket.done, waiting_for)
        return ticket.results()[0]

    def pool(self, role: str, size: int, cls: type, /, reads: Sequence[str], **arguments: Any) -> Pool:
        """Make a pool, without starting it. reads: folders or hub names of the models that its workers read.

        If a model lies in the run folder, every worker must see that folder.
        """
        placed = self.placed.reading(*reads)
        pool = Pool(
            role,
            lambda index: placed.spawn(cls, role, index, **arguments),
            size,
            self.pump,
            self.config,
            self.fingerprint,
        )
        pool.is_gone = lambda index: placed.seats.is_gone(role, index)
        placed.seats.attach(pool)
        return pool

    def beside(self, role: str, cls: type) -> Pool:
        """Make a pool of one worker on the driver's own node, outside the placement, without starting it."""
        return Pool(
            role, lambda index: self.placed.spawn_beside(cls, role, index), 1, self.pump, self.config, self.fingerprint
        )

    def gang(self, role: str, ranks: int, cls: type, /, **arguments: Any) -> Gang:
        """Make a gang, without starting it; its ranks write commits, so they must see the run folder."""

        def spawn(rank: int) -> Any:
            return self.placed.spawn(
                cls, role, rank, rank=rank, ranks=ranks, timeout_s=self.config.peer_timeout_s, **arguments
            )

        gang = Gang(role, spawn, ranks, self.pump, self.config, self.fingerprint)
        self.placed.seats.attach(gang)
        return gang

    def await_core(self) -> None:
        """Serve events until the core of the seats has nodes, for at most cluster.node_timeout_s.

        Raises RunError when it has none by then.
        """
        seats, within_s = self.placed.seats, self.config.node_timeout_s

        def too_late() -> None:
            raise RunError(
                "cluster",
                "placement",
                f"the learners have lost a node, and no place for {described(seats.placement.least)} came within "
                f"{within_s:g} s",
                "Raise cluster.node_timeout_s if an autoscaler needs longer, and see what the cluster can provide.",
            )

        limit, room = self.pump.later(within_s, too_late), self.pump.later(_ROOM_S, seats.make_room)
        try:
            self.pump.run_until(
                lambda: seats.core_is_there, timeout_s=within_s + 1, waiting_for="another node for the learners"
            )
        finally:
            self.pump.cancel(limit)
            self.pump.cancel(room)
        seats.ask_again()
