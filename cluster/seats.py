"""The seats of a run: which bundles have a node at this moment, asked for, moved and given back one by one.

    core      bundles of gangs and of the workers without which nothing begins: one reservation, all or nothing
    the rest  one reservation a bundle; while it waits, it is the request that an autoscaler sees

A bundle whose node is gone is asked for anew. One whose node is about to leave gets a second reservation elsewhere, and
its workers stay until their work is done (`settle`) or the node's deadline is near. A core with gangs moves only when
their owner says so, since gangs must be rebuilt. Pools hear of all this through `Tenant`. Nobody waits for the rest.

Left out: how many bundles are worth having, which `scaling.py` decides, and what a gang does about a lost node.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.faults import Fault, RunError
from cluster.nodes import Nodes
from cluster.placement import Placement
from cluster.reserved import Reservations

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the cluster
_LEAVE_S = 5.0  # before the deadline of a draining node, by which time its seats must be empty


class Tenant(Protocol):
    """The workers of a role, as the seats see them: a pool, or what answers for a gang."""

    role: str

    def occupy(self, index: int) -> None:
        """Its seat has a node: start the worker, unless it is there."""

    def retire(self, index: int) -> None:
        """Its node will leave: send it no more work, as long as others are there."""

    def vacate(self, index: int, *, lost: bool) -> None:
        """Its seat has no node any more: end the worker, and do its work again. lost: not by plan.

        Raises RunError when its owner must know at once.
        """


@dataclass(slots=True, eq=False, kw_only=True)
class _Group:
    """A reservation. avoids: nodes that it may not be on, whatever room they have."""

    ref: Any
    avoids: frozenset[str]


@dataclass(slots=True, eq=False, kw_only=True)
class _Seat:
    """Bundles that are reserved together.

    is_wanted: whether they should have a node. group: their reservation. is_fresh: whether none of them had a node
    since it was asked for. nodes: bundle -> node id, of those that have one. next: the reservation to which they move.
    leaves_by: when they move at the latest, in time.monotonic(). is_aside: given back to make room for the core, and to
    be asked for again.
    """

    bundles: tuple[int, ...]
    is_wanted: bool = False
    group: _Group | None = None
    is_fresh: bool = False
    nodes: dict[int, str] = field(default_factory=dict)
    next: _Group | None = None
    leaves_by: float = math.inf
    is_aside: bool = False

    @property
    def is_whole(self) -> bool:
        return len(self.nodes) == len(self.bundles)


class Seats:
    """The reservations of a placement, and who sits there."""

    def __init__(
        self,
        placement: Placement,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        reservations: Reservations | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        """Nothing is reserved yet. labels: bundle -> labels that its node must have."""
        self.placement = placement
        self.nodes = nodes or Nodes()
        self.departures = 0
        """Bundles that have lost their node so far, by plan or not."""
        self._reservations = reservations or Reservations()
        self._labels = labels or {}
        self._tenants: dict[str, Tenant] = {}
        self._core = _Seat(bundles=placement.core)
        rest = [number for number in range(len(placement.bundles)) if number not in placement.core]
        # those with GPUs first, so that the others do not take their nodes
        rest.sort(key=lambda number: (-placement.bundles[number].gpus, number))
        self._rest = [_Seat(bundles=(number,)) for number in rest]
        self._seat_of = {bundle: seat for seat in (self._core, *self._rest) for bundle in seat.bundles}
        self._sitting = {number: placement.in_bundle(number) for number in range(len(placement.bundles))}
        gangs = [slot for number in placement.core for slot in self._sitting[number] if slot.gang]
        self._owner = f"{gangs[0].role}[{gangs[0].index}]" if gangs else ""  # who must hear that the core has to move

    # ---- asking ----

    def ask_core(self) -> None:
        """Reserve the core, all or nothing; returns at once."""
        if self._core.bundles:
            self._ask(self._core)

    def ask_rest(self) -> None:
        """Ask for every other bundle; returns at once. To be called when the core is there, so that it has its room."""
        for seat in self._rest:
            if not seat.is_wanted:
                self._ask(seat)

    @property
    def core_is_there(self) -> bool:
        """Whether every bundle of the core has a node, as far as was seen."""
        return self._core.is_whole

    @property
    def waiting(self) -> int:
        """Bundles that are asked for and have no node."""
        return len(self._missing())

    @property
    def unplaced(self) -> int:
        """Workers whose bundles are asked for and have no node."""
        return sum(len(self._sitting[bundle]) for bundle in self._missing())

    def wait(self, *, core: bool, timeout_s: float, check: Callable[[], None]) -> bool:
        """Wait until the core is there, or with core=False every bundle; returns whether it is."""
        deadline, pause_s = time.monotonic() + timeout_s, 0.01
        while True:
            for seat in [self._core] if core else self._all():
                if not seat.is_whole:
                    self._find(seat)
            if self.core_is_there and (core or not self.waiting):
                return True
            if time.monotonic() > deadline:
                return False
            check()
            time.sleep(pause_s)
            pause_s = min(0.25, 2 * pause_s)

    # ---- who sits where ----

    def attach(self, tenant: Tenant) -> None:
        """Tell the workers of a role of what happens to their seats from now on."""
        self._tenants[tenant.role] = tenant

    def reservation(self, role: str, index: int) -> tuple[Any, int] | None:
        """The placement group of a worker's seat and its number in there; None while it has no node."""
        bundle = self.placement.slot(role, index).bundle
        seat = self._seat_of[bundle]
        node = seat.nodes.get(bundle)
        if node is None or node in self.nodes.gone or seat.group is None:
            return None
        if seat.next is not None:  # Ray starts nothing on a node that will leave, so nobody need stay there
            seat.leaves_by = -math.inf
            return None
        return seat.group.ref, seat.bundles.index(bundle)

    def is_gone(self, role: str, index: int) -> bool:
        """Whether the node of a worker's seat is gone; asks it now. To be called when the worker was lost."""
        bundle = self.placement.slot(role, index).bundle
        node = self._seat_of[bundle].nodes.get(bundle)
        return node is None or self.nodes.ask(node)

    # ---- what happens to nodes ----

    def tick(self) -> None:
        """Look at the cluster, and act on what has changed. Raises what a tenant raises whose node is gone."""
        used = {node for seat in self._all() for node in seat.nodes.values()}
        if not self.nodes.look(used):
            return
        for seat in self._all():
            if not seat.is_wanted:
                continue
            for bundle, node in list(seat.nodes.items()):
                if node in self.nodes.gone:
                    self._lose(seat, bundle, node)
            if not seat.is_whole:
                self._find(seat)
            self._consider_leaving(seat)

    def settle(self) -> None:
        """Empty the seats whose nodes are about to leave; to be called when none of their workers has work or data."""
        for seat in self._all():
            if seat.next is None or not self._moves_itself(seat):
                continue
            if self._can_go(seat.next) or not self._is_last(seat):
                self._move(seat)

    # ---- a core with gangs ----

    @property
    def core_is_lost(self) -> bool:
        """Whether the node of a part of the core is gone; asks the nodes now."""
        return not self._core.is_whole or any(self.nodes.ask(node) for node in set(self._core.nodes.values()))

    @property
    def core_is_leaving(self) -> bool:
        """Whether a node of the core is about to leave."""
        return self._core.next is not None

    @property
    def core_can_move(self) -> bool:
        """Whether a node of the core is about to leave, and the core has a place elsewhere."""
        return self._core.next is not None and self._can_go(self._core.next)

    def move_core(self) -> None:
        """Give up the place of the core and ask for another; whoever sits there is ended. Returns at once.

        What is asked for already, and has no node yet, is waited for further.
        """
        if not self._core.is_fresh:
            self._move(self._core)

    def make_room(self) -> None:
        """Give back every other bundle until `ask_again`, because the core found no place beside them."""
        for seat in self._rest:
            if seat.is_wanted:
                seat.is_aside = True
                self._empty(seat)
                self._give_back(seat)

    def ask_again(self) -> None:
        """Ask for what was given back to make room."""
        for seat in self._rest:
            if seat.is_aside:
                seat.is_aside = False
                self._ask(seat)

    # ---- more and fewer ----

    def held(self, role: str) -> int:
        """Bundles besides the core with a worker of this role that are asked for, whether they have a node or not."""
        return sum(seat.is_wanted for seat in self._with(role))

    def most(self, role: str) -> int:
        """Bundles besides the core with a worker of this role."""
        return len(self._with(role))

    def resize(self, role: str, wanted: int) -> None:
        """Hold so many bundles with workers of this role, besides the core: ask for more, or give some back.

        Those without a node go first. To be called when nobody who sits there has work or data.
        """
        held = [seat for seat in self._with(role) if seat.is_wanted]
        for seat in [seat for seat in self._with(role) if not seat.is_wanted][: max(0, wanted - len(held))]:
            self._ask(seat)
        surplus = max(0, len(held) - max(0, wanted))
        for seat in sorted(held, key=lambda seat: (bool(seat.nodes), -seat.bundles[0]))[:surplus]:
            log.info("the place of %s is given back", self._names(seat.bundles[0]))
            self._empty(seat)
            self._give_back(seat)

    def remove(self) -> None:
        """Give back everything; processes that are still there are killed."""
        self._tenants = {}
        for seat in self._all():
            self._give_back(seat)

    # ---- inside ----

    def _all(self) -> list[_Seat]:
        return [self._core, *self._rest]

    def _with(self, role: str) -> list[_Seat]:
        return [seat for seat in self._rest if any(slot.role == role for slot in self._sitting[seat.bundles[0]])]

    def _missing(self) -> list[int]:
        return [bundle for seat in self._all() if seat.is_wanted for bundle in seat.bundles if bundle not in seat.nodes]

    def _moves_itself(self, seat: _Seat) -> bool:
        return seat is not self._core or not self._owner

    def _ask(self, seat: _Seat) -> None:
        seat.is_wanted, seat.is_fresh, seat.nodes = True, True, {}
        seat.group = self._reserve(seat)

    def _reserve(self, seat: _Seat) -> _Group | None:
        """Ask for the bundles of a seat anew. Ray places nothing new on a draining node by itself."""
        avoids = frozenset(self.nodes.haunted)
        bundles = [self.placement.bundles[number] for number in seat.bundles]
        labels = [self._labels.get(number, {}) for number in seat.bundles]
        group = self._reservations.reserve(bundles, labels, avoids)
        return None if group is None else _Group(ref=group, avoids=avoids)

    def _find(self, seat: _Seat) -> None:
        """See whether the bundles that wait have a node by now, and tell who sits there."""
        if seat.group is None:  # Ray did not answer when it was asked
            if seat.is_wanted:
                self._ask(seat)
            return
        places = self._reservations.places(seat.group.ref)
        found = {
            bundle: places[at] for at, bundle in enumerate(seat.bundles) if at in places and bundle not in seat.nodes
        }
        # once Ray knows of those deaths, nothing may keep new nodes away
        is_narrow = bool(seat.group.avoids) and not seat.group.avoids & self.nodes.haunted
        if seat.is_fresh and (self.nodes.gone & set(found.values()) or (is_narrow and not found)):
            self._reservations.remove(seat.group.ref)
            self._ask(seat)
            return
        for bundle, node in found.items():
            if node not in self.nodes.gone:
                seat.nodes[bundle], seat.is_fresh = node, False
                self._tell(bundle, lambda tenant, index: tenant.occupy(index))

    def _can_go(self, group: _Group) -> bool:
        """Whether a reservation elsewhere has nodes that stay."""
        found = set(self._reservations.places(group.ref).values())
        return bool(found) and not found & (self.nodes.gone | self.nodes.draining.keys())

    def _lose(self, seat: _Seat, bundle: int, node: str) -> None:
        """A node is gone: whoever sat there is lost. What moves by itself is asked for anew at once.

        In a core with gangs Ray finds another place for a bundle without one, for which there must be room.
        """
        log.warning("node %s is gone, and with it %s", self.nodes.name(node), self._names(bundle))
        self.departures += 1
        seat.nodes.pop(bundle)
        try:
            self._tell(bundle, lambda tenant, index: tenant.vacate(index, lost=True))
        finally:
            if self._moves_itself(seat):
                self._move(seat)
            elif seat.next is not None and not any(slot.gang for slot in self._sitting[bundle]):
                self._stay(seat)

    def _consider_leaving(self, seat: _Seat) -> None:
        leaving = [bundle for bundle, node in seat.nodes.items() if node in self.nodes.draining]
        if seat.next is not None and not leaving and seat.is_whole:
            self._stay(seat)  # the node that was about to leave has left, and Ray has found another
        elif seat.next is not None and self._is_stale(seat.next):
            self._reservations.remove(seat.next.ref)
            seat.next = self._reserve(seat)
        elif leaving and seat.next is None:
            seat.next = self._reserve(seat)
            seat.leaves_by = min(self.nodes.draining[seat.nodes[bundle]] for bundle in leaving) - _LEAVE_S
            for bundle in leaving:
                node = self.nodes.name(seat.nodes[bundle])
                log.warning("node %s is about to leave, and with it %s", node, self._names(bundle))
                self._tell(bundle, lambda tenant, index: tenant.retire(index))
        if seat.next is None or time.monotonic() <= seat.leaves_by:
            return
        if self._moves_itself(seat):
            self._move(seat)
        elif self._can_go(seat.next):
            raise RunError(self._owner, "waiting", "its node is about to leave", fault=Fault.WORKER_LOST)

    def _is_stale(self, group: _Group) -> bool:
        """Whether a reservation is on nodes that do not stay, or keeps away from nodes that are no more."""
        found = set(self._reservations.places(group.ref).values())
        is_narrow = bool(group.avoids) and not group.avoids & self.nodes.haunted
        return bool(found & (self.nodes.gone | self.nodes.draining.keys())) or (is_narrow and not found)

    def _is_last(self, seat: _Seat) -> bool:
        """Whether no other bundle besides this seat's has a node."""
        return not any(other.nodes for other in self._all() if other is not seat)

    def _move(self, seat: _Seat) -> None:
        """Take the reservation that the seat has elsewhere, or ask for one."""
        following = seat.next or self._reserve(seat)
        seat.next = None
        self.departures += len(seat.nodes)
        self._empty(seat)
        self._give_back(seat)
        seat.is_wanted, seat.is_fresh, seat.group = True, True, following
        self._find(seat)

    def _stay(self, seat: _Seat) -> None:
        """Give back the reservation elsewhere."""
        if seat.next is not None:
            self._reservations.remove(seat.next.ref)
        seat.next, seat.leaves_by = None, math.inf

    def _empty(self, seat: _Seat) -> None:
        """End who sits there, by plan."""
        nodes, seat.nodes = seat.nodes, {}  # first, so that nobody sits down there again
        for bundle in nodes:
            self._tell(bundle, lambda tenant, index: tenant.vacate(index, lost=False))

    def _give_back(self, seat: _Seat) -> None:
        self._stay(seat)
        if seat.group is not None:
            self._reservations.remove(seat.group.ref)
        seat.group, seat.nodes, seat.is_wanted, seat.is_fresh = None, {}, False, False

    def _tell(self, bundle: int, what: Callable[[Tenant, int], None]) -> None:
        """Tell everybody who sits there, then raise what the first of them has raised."""
        errors = []
        for slot in self._sitting[bundle]:
            try:
                if slot.role in self._tenants:
                    what(self._tenants[slot.role], slot.index)
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _names(self, bundle: int) -> str:
        return ", ".join(f"{slot.role}[{slot.index}]" for slot in self._sitting[bundle]) or "an empty seat"
