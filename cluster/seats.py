"""The seats of a run: which bundles have a node at this moment, asked for, moved and given back one by one.

    core      bundles of gangs and of the workers without which nothing begins: one reservation, all or nothing
    the rest  one reservation a bundle; while it waits, it is the request that an autoscaler sees

A bundle whose node is gone is asked for anew. One whose node is about to leave gets a second reservation elsewhere, and
its workers stay until their work is done (`settle`) or the node's deadline is near. The core moves only when its owner
says so, since gangs must be rebuilt. Pools hear of all this through `Tenant`. A run never waits for the rest.

Left out: how many bundles are worth having, which `scaling.py` decides, and what a gang does about a lost node.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.faults import RunError
from cluster.nodes import Nodes
from cluster.placement import Placement

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the cluster
_LEAVE_S = 5.0  # before the deadline of a draining node, by which time its seats must be empty
_NODE_LABEL = "ray.io/node-id"


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
class _Seat:
    """Bundles that are reserved together. nodes: bundle -> node id, of those that have one.

    group: their reservation; None if they were given back. avoids: nodes that it must not be on. next: the reservation
    to which it moves. leaves_by: when it moves at the latest, in time.monotonic().
    """

    bundles: tuple[int, ...]
    group: Any = None
    avoids: frozenset[str] = frozenset()
    nodes: dict[int, str] = field(default_factory=dict)
    next: Any = None
    leaves_by: float = math.inf
    is_aside: bool = False  # given back to make room for the core, and to be asked for again

    @property
    def is_whole(self) -> bool:
        return self.group is not None and len(self.nodes) == len(self.bundles)


class Seats:
    """The reservations of a placement, and who sits there."""

    def __init__(self, placement: Placement, labels: Mapping[int, Mapping[str, str]] | None = None) -> None:
        """Nothing is reserved yet. labels: bundle -> labels that its node must have."""
        self.placement = placement
        self.nodes = Nodes()
        self._labels = labels or {}
        self._tenants: dict[str, Tenant] = {}
        self._core = _Seat(bundles=placement.core)
        rest = [number for number in range(len(placement.bundles)) if number not in placement.core]
        # those with GPUs first, so that the others do not take their nodes
        rest.sort(key=lambda number: (-placement.bundles[number].gpus, number))
        self._rest = [_Seat(bundles=(number,)) for number in rest]
        self._seat_of = {bundle: seat for seat in (self._core, *self._rest) for bundle in seat.bundles}

    # ---- asking ----

    def ask_core(self) -> None:
        """Reserve the core, all or nothing; returns at once."""
        if self._core.bundles:
            self._ask(self._core)

    def ask_rest(self) -> None:
        """Ask for every other bundle; returns at once. To be called when the core is there, so that it has its room."""
        for seat in self._rest:
            if seat.group is None:
                self._ask(seat)

    @property
    def core_is_there(self) -> bool:
        """Whether every bundle of the core has a node, as far as was seen."""
        return self._core.is_whole or not self._core.bundles

    @property
    def waiting(self) -> int:
        """Bundles that are asked for and have no node."""
        return sum(len(seat.bundles) - len(seat.nodes) for seat in self._all() if seat.group is not None)

    @property
    def unplaced(self) -> int:
        """Workers whose bundles are asked for and have no node."""
        missing = [
            bundle
            for seat in self._all()
            if seat.group is not None
            for bundle in seat.bundles
            if bundle not in seat.nodes
        ]
        return sum(len(self.placement.in_bundle(bundle)) for bundle in missing)

    def wait(self, *, core: bool, timeout_s: float, check: Callable[[], None]) -> bool:
        """Wait until the core is there, or with core=False every bundle; returns whether it is."""
        deadline, pause_s = time.monotonic() + timeout_s, 0.01
        while True:
            for seat in [self._core] if core else self._all():
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
        if node is None or node in self.nodes.gone:
            return None
        if seat is not self._core and seat.next is not None:  # Ray starts nothing on a node that will leave
            seat.leaves_by = -math.inf
            return None
        return seat.group, seat.bundles.index(bundle)

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
            if seat.group is None:
                continue
            for bundle, node in list(seat.nodes.items()):
                if node in self.nodes.gone:
                    self._lose(seat, bundle, node)
            if not seat.is_whole:
                self._find(seat)
            self._consider_leaving(seat)

    def settle(self) -> None:
        """Empty the seats whose nodes are about to leave; to be called when none of their workers has work or data."""
        for seat in self._rest:
            if seat.next is not None and (self._is_ready(seat.next) or not self._is_last(seat)):
                self._move(seat)

    # ---- the core ----

    @property
    def core_is_lost(self) -> bool:
        """Whether the node of a part of the core is gone; asks the nodes now."""
        return bool(self._core.bundles) and (
            not self._core.is_whole or any(self.nodes.ask(node) for node in set(self._core.nodes.values()))
        )

    @property
    def core_can_move(self) -> bool:
        """Whether a node of the core is about to leave, and the core has a place elsewhere."""
        return self._core.next is not None and self._is_ready(self._core.next)

    def move_core(self) -> None:
        """Give up the place of the core and ask for another; whoever sits there is ended. Returns at once."""
        self._move(self._core)

    def make_room(self) -> None:
        """Give back every other bundle until `ask_again`, because the core found no place beside them."""
        for seat in self._rest:
            if seat.group is not None:
                seat.is_aside = True
                self._empty(seat, lost=False)
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
        return sum(seat.group is not None for seat in self._with(role))

    def most(self, role: str) -> int:
        """Bundles besides the core with a worker of this role."""
        return len(self._with(role))

    def resize(self, role: str, wanted: int) -> None:
        """Hold so many bundles with workers of this role, besides the core: ask for more, or give some back.

        Those without a node go first. To be called when nobody who sits there has work or data.
        """
        held = [seat for seat in self._with(role) if seat.group is not None]
        for seat in [seat for seat in self._with(role) if seat.group is None][: max(0, wanted - len(held))]:
            self._ask(seat)
        surplus = len(held) - max(0, wanted)
        for seat in sorted(held, key=lambda seat: (bool(seat.nodes), -seat.bundles[0]))[: max(0, surplus)]:
            log.info("the place of %s is given back", self._names(seat.bundles[0]))
            self._empty(seat, lost=False)
            self._give_back(seat)

    def remove(self) -> None:
        """Give back everything; processes that are still there are killed."""
        self._tenants = {}
        for seat in self._all():
            self._give_back(seat)

    # ---- inside ----

    def _with(self, role: str) -> list[_Seat]:
        return [
            seat for seat in self._rest if any(slot.role == role for slot in self.placement.in_bundle(seat.bundles[0]))
        ]

    def _all(self) -> list[_Seat]:
        return [self._core, *self._rest] if self._core.bundles else self._rest

    def _ask(self, seat: _Seat) -> None:
        seat.group, seat.avoids = self._reserve(seat.bundles)
        seat.nodes = {}

    def _reserve(self, bundles: tuple[int, ...]) -> tuple[Any, frozenset[str]]:
        from ray.util.placement_group import placement_group

        avoided = frozenset(self.nodes.haunted)  # Ray places nothing new on a draining node by itself
        selectors = [dict(self._labels.get(number, {})) for number in bundles]
        if avoided:
            for selector in selectors:
                selector[_NODE_LABEL] = f"!in({','.join(sorted(avoided))})"
        demanded = [self.placement.bundles[number] for number in bundles]
        group = placement_group(
            [{"CPU": bundle.cpus, "GPU": bundle.gpus} for bundle in demanded],
            strategy="PACK",
            bundle_label_selector=selectors if any(selectors) else None,
        )
        return group, avoided

    def _find(self, seat: _Seat) -> None:
        """See whether the bundles that wait have a node by now, and tell who sits there."""
        places = self._places(seat.group)
        found = {
            bundle: places[at] for at, bundle in enumerate(seat.bundles) if at in places and bundle not in seat.nodes
        }
        # once Ray knows of those deaths, nothing may keep new nodes away
        is_narrow = bool(seat.avoids) and not seat.avoids & self.nodes.haunted
        if not seat.nodes and (self.nodes.gone & set(found.values()) or (is_narrow and not found)):
            self._give_back(seat)
            self._ask(seat)
            return
        for bundle, node in found.items():
            if node not in self.nodes.gone:
                seat.nodes[bundle] = node
                self._tell(bundle, lambda tenant, index: tenant.occupy(index))

    def _places(self, group: Any) -> dict[int, str]:
        """Position -> node id, of the bundles of a reservation that is whole."""
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group_table

        try:
            table = placement_group_table(group)
        except (RayError, RuntimeError, OSError) as error:  # as in Nodes.look
            log.info("a reservation cannot be looked at: %s", error)
            return {}
        return dict(table["bundles_to_node_id"]) if table.get("state") == "CREATED" else {}

    def _is_ready(self, group: Any) -> bool:
        found = self._places(group)
        return bool(found) and not self.nodes.gone & set(found.values())

    def _lose(self, seat: _Seat, bundle: int, node: str) -> None:
        """A node is gone: whoever sat there is lost. Outside the core the bundle is asked for anew at once."""
        log.warning("node %s is gone, and with it %s", self.nodes.name(node), self._names(bundle))
        seat.nodes.pop(bundle)
        try:
            self._tell(bundle, lambda tenant, index: tenant.vacate(index, lost=True))
        finally:
            if seat is not self._core:
                self._move(seat)

    def _consider_leaving(self, seat: _Seat) -> None:
        leaving = [node for node in seat.nodes.values() if node in self.nodes.draining]
        if leaving and seat.next is None:
            seat.leaves_by = min(self.nodes.draining[node] for node in leaving) - _LEAVE_S
            seat.next, _ = self._reserve(seat.bundles)
            for bundle, node in seat.nodes.items():
                if node in leaving:
                    log.warning("node %s is about to leave, and with it %s", self.nodes.name(node), self._names(bundle))
                    self._tell(bundle, lambda tenant, index: tenant.retire(index))
        if seat is not self._core and seat.next is not None and time.monotonic() > seat.leaves_by:
            self._empty(seat, lost=False)
            self._move(seat)

    def _is_last(self, seat: _Seat) -> bool:
        """Whether no other bundle besides this one has a node."""
        return not any(other.nodes for other in self._all() if other is not seat)

    def _move(self, seat: _Seat) -> None:
        """Take the reservation that the seat has elsewhere, or ask for one."""
        following, avoids = (seat.next, frozenset[str]()) if seat.next is not None else self._reserve(seat.bundles)
        if seat.nodes:
            self._empty(seat, lost=False)
        seat.next = None
        self._give_back(seat)
        seat.group, seat.avoids = following, avoids
        self._find(seat)

    def _empty(self, seat: _Seat, *, lost: bool) -> None:
        nodes, seat.nodes = seat.nodes, {}  # first, so that nobody sits down there again
        for bundle in nodes:
            self._tell(bundle, lambda tenant, index: tenant.vacate(index, lost=lost))

    def _give_back(self, seat: _Seat) -> None:
        for group in filter(None, (seat.group, seat.next)):
            self._remove(group)
        seat.group, seat.next, seat.nodes, seat.leaves_by = None, None, {}, math.inf

    def _remove(self, group: Any) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(group)

    def _tell(self, bundle: int, what: Callable[[Tenant, int], None]) -> None:
        """Tell everybody who sits there, then raise what the first of them has raised."""
        errors = []
        for slot in self.placement.in_bundle(bundle):
            try:
                if slot.role in self._tenants:
                    what(self._tenants[slot.role], slot.index)
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _names(self, bundle: int) -> str:
        return ", ".join(f"{slot.role}[{slot.index}]" for slot in self.placement.in_bundle(bundle)) or "an empty seat"
