"""Seats that get a node, lose it, move and are given back, on a cluster of a few lines; raylets: test_cluster_nodes."""

from __future__ import annotations

import math
import socket
import time
from typing import Any

import pytest

from cluster.faults import Fault, RunError
from cluster.nodes import Nodes
from cluster.placement import Placement, RoleDemand, plan_placement
from cluster.reserved import Reservations
from cluster.seats import Seats


class Cluster:
    """Nodes with room for some bundles each, and the reservations on them. Ray's view of a killed node is late."""

    def __init__(self, **room: int) -> None:
        self.room = dict(room)
        self.groups: list[Group] = []
        self.killed: set[str] = set()

    def schedule(self) -> None:
        """Give what waits the first nodes with room, all of its bundles or none."""
        for group in self.groups:
            free = [
                node
                for node, room in self.room.items()
                if node not in group.avoided
                for _ in range(room - self.used(node))
            ]
            if not group.nodes and len(free) >= group.size:
                group.nodes = dict(enumerate(free[: group.size]))

    def used(self, node: str) -> int:
        return sum(list(group.nodes.values()).count(node) for group in self.groups)


class Group:
    def __init__(self, size: int, avoided: frozenset[str]) -> None:
        self.size, self.avoided, self.nodes = size, avoided, dict[int, str]()


class View(Nodes):
    """What is said of the nodes, as the test says it."""

    def look(self, used: Any) -> bool:
        return True

    def ask(self, node: str) -> bool:
        return node in self.gone


class Desk(Reservations):
    """Takes requests as Ray would. is_silent: it does not answer."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.is_silent = cluster, False

    def reserve(self, bundles: Any, labels: Any, avoided: Any) -> Any | None:
        if self.is_silent:
            return None
        self.cluster.groups.append(Group(len(bundles), frozenset(avoided)))
        self.cluster.schedule()
        return self.cluster.groups[-1]

    def places(self, group: Any) -> dict[int, str]:
        self.cluster.schedule()
        return dict(group.nodes)

    def remove(self, group: Any) -> None:
        self.cluster.groups.remove(group)
        self.cluster.schedule()


class FakeSeats(Seats):
    def __init__(self, placement: Placement, cluster: Cluster) -> None:
        self.cluster, self.desk = cluster, Desk(cluster)
        super().__init__(placement, reservations=self.desk, nodes=View())


class Tenant:
    """Notes what it is told. raises: an error for the owner of a lost worker."""

    def __init__(self, role: str, raises: bool = False) -> None:
        self.role, self.raises, self.told = role, raises, list[str]()

    def occupy(self, index: int) -> None:
        self.told.append(f"occupy {index}")

    def retire(self, index: int) -> None:
        self.told.append(f"retire {index}")

    def vacate(self, index: int, *, lost: bool) -> None:
        self.told.append(f"{'lose' if lost else 'vacate'} {index}")
        if lost and self.raises:
            raise RunError(f"{self.role}[{index}]", "waiting", "its node is gone", fault=Fault.WORKER_LOST)

    def heard(self) -> list[str]:
        told, self.told = self.told, []
        return told


def seats_of(cluster: Cluster, workers: int = 3, ranks: int = 1) -> tuple[FakeSeats, Tenant, Tenant]:
    """Learners in the core, and workers, of whom the first sits with them."""
    demands = [RoleDemand("policy", ranks, 0), RoleDemand("rollout", workers, 0, fewest=1)]
    seats = FakeSeats(plan_placement(demands, share_devices=True, cpus_per_bundle=1, local_cpus=1), cluster)
    learners, pool = Tenant("policy", raises=True), Tenant("rollout")
    seats.ask_core()
    assert seats.wait(core=True, timeout_s=5, check=lambda: None)
    seats.ask_rest()
    seats.wait(core=False, timeout_s=0, check=lambda: None)
    seats.attach(learners)
    seats.attach(pool)
    return seats, learners, pool


def nodes_of(seats: FakeSeats) -> dict[int, str]:
    return {bundle: node for seat in seats._all() for bundle, node in seat.nodes.items()}


def kill(seats: FakeSeats, node: str) -> None:
    """It is gone, and Ray does not know yet."""
    seats.nodes.gone.add(node)
    seats.nodes.haunted.add(node)


def forget(seats: FakeSeats, node: str) -> None:
    """Ray knows."""
    seats.nodes.haunted.discard(node)
    seats.cluster.room.pop(node)
    for group in seats.cluster.groups:
        group.nodes = {position: at for position, at in group.nodes.items() if at != node}


def test_a_run_begins_with_its_core_and_takes_what_joins() -> None:
    seats, _, pool = seats_of(Cluster(a=1))
    assert (nodes_of(seats), seats.waiting, seats.unplaced) == ({0: "a"}, 2, 2)
    assert seats.reservation("rollout", 1) is None
    assert seats.reservation("rollout", 0) is not None
    seats.cluster.room["b"] = 1
    seats.tick()
    assert pool.heard() == ["occupy 1"]
    seats.cluster.room["c"] = 1
    seats.tick()
    assert pool.heard() == ["occupy 2"]
    assert (nodes_of(seats), seats.waiting) == ({0: "a", 1: "b", 2: "c"}, 0)
    seats.tick()
    assert pool.heard() == []


def test_a_seat_whose_node_is_gone_is_asked_for_anew_and_not_there() -> None:
    seats, learners, pool = seats_of(Cluster(a=1, b=2))
    kill(seats, "b")
    seats.tick()
    assert pool.heard() == ["lose 1", "lose 2"]
    assert learners.heard() == []
    assert seats.waiting == 2, "Ray believes that the node lives, and has room"
    assert seats.is_gone("rollout", 1)
    forget(seats, "b")
    seats.tick()
    assert {group.avoided for group in seats.cluster.groups} == {frozenset()}, "nothing keeps new nodes away any more"
    seats.cluster.room["c"] = 2
    seats.tick()
    assert pool.heard() == ["occupy 1", "occupy 2"]


def test_a_reservation_that_ray_made_on_a_dead_node_is_made_again() -> None:
    seats, _, pool = seats_of(Cluster(a=1))
    seats.cluster.room["b"] = 2
    kill(seats, "b")
    seats.tick()
    seats.tick()
    assert (pool.heard(), seats.waiting) == ([], 2)
    seats.cluster.room["c"] = 2
    seats.tick()
    assert pool.heard() == ["occupy 1", "occupy 2"]


def test_who_sits_on_a_leaving_node_stays_until_the_step_is_over() -> None:
    seats, _, pool = seats_of(Cluster(a=1, b=1, c=1))
    seats.nodes.draining = {"b": math.inf}
    seats.cluster.room.pop("b")  # Ray places nothing new there
    seats.tick()
    seats.tick()
    assert pool.heard() == ["retire 1"]
    assert seats.reservation("rollout", 1) is None, "nothing starts there any more"
    assert seats.reservation("rollout", 2) is not None
    seats._seat_of[1].leaves_by = math.inf
    seats.settle()
    assert pool.heard() == ["vacate 1"]
    seats.cluster.room["d"] = 1
    seats.tick()
    assert pool.heard() == ["occupy 1"]
    assert nodes_of(seats)[1] == "d"


def test_nobody_stays_beyond_the_notice_of_a_node() -> None:
    seats, _, pool = seats_of(Cluster(a=1, b=2))
    seats.nodes.draining = {"b": time.monotonic() + 3600}
    seats.cluster.room["b"] = 0
    seats.tick()
    assert pool.heard() == ["retire 1", "retire 2"]
    seats.nodes.draining = {"b": time.monotonic() + 3600}
    for bundle in (1, 2):
        seats._seat_of[bundle].leaves_by = time.monotonic() - 1
    seats.tick()
    assert pool.heard() == ["vacate 1", "vacate 2"]


def test_learners_hear_of_their_lost_node_after_everybody_else_has() -> None:
    seats, learners, pool = seats_of(Cluster(a=1, b=3))
    kill(seats, nodes_of(seats)[0])
    with pytest.raises(RunError, match=r"^policy\[0\] failed during 'waiting': its node is gone"):
        seats.tick()
    assert learners.heard() == ["lose 0"]
    assert "lose 0" in pool.heard()
    assert seats.core_is_lost
    assert not seats.core_is_there


def test_the_core_takes_the_room_of_others_and_gives_it_back() -> None:
    seats, _, pool = seats_of(Cluster(a=1, b=1), workers=2)
    core, other = nodes_of(seats)[0], nodes_of(seats)[1]
    kill(seats, core)
    with pytest.raises(RunError):
        seats.tick()
    pool.heard()
    seats.move_core()
    seats.tick()
    assert not seats.core_is_there, "the other node is taken"
    seats.make_room()
    seats.tick()
    assert pool.heard() == ["vacate 1", "occupy 0"]
    assert nodes_of(seats) == {0: other}
    seats.ask_again()
    assert seats.waiting == 1
    seats.cluster.room["c"] = 1
    seats.tick()
    assert pool.heard() == ["occupy 1"]


def test_the_core_moves_when_there_is_a_place_elsewhere() -> None:
    seats, learners, pool = seats_of(Cluster(a=2), workers=2, ranks=2)
    seats.nodes.draining = {"a": math.inf}
    seats.cluster.room["a"] = 0
    seats.tick()
    assert (learners.heard(), pool.heard()) == (["retire 0", "retire 1"], ["retire 0", "retire 1"])
    assert not seats.core_can_move
    seats.cluster.room["b"] = 1
    seats.tick()
    assert not seats.core_can_move, "all or nothing"
    seats.cluster.room["c"] = 1
    seats.tick()
    assert seats.core_can_move
    assert nodes_of(seats) == {0: "a", 1: "a"}
    seats.move_core()
    assert nodes_of(seats) == {0: "b", 1: "c"}
    assert learners.heard() == ["vacate 0", "vacate 1", "occupy 0", "occupy 1"]
    assert len(seats.cluster.groups) == 1


def test_what_is_not_worth_its_node_is_given_back_those_without_one_first() -> None:
    seats, _, pool = seats_of(Cluster(a=1, b=1), workers=4)
    assert (seats.held("rollout"), seats.most("rollout"), seats.waiting) == (3, 3, 2)
    seats.resize("rollout", 1)
    assert pool.heard() == []
    assert (seats.held("rollout"), seats.waiting, seats.unplaced) == (1, 0, 0)
    seats.resize("rollout", 0)
    assert pool.heard() == ["vacate 1"]
    assert nodes_of(seats) == {0: "a"}
    assert len(seats.cluster.groups) == 1
    seats.resize("rollout", 2)
    seats.tick()
    assert (pool.heard(), seats.waiting) == (["occupy 1"], 1)
    seats.remove()
    assert seats.cluster.groups == []


def test_places_with_gpus_are_asked_for_first() -> None:
    demands = [RoleDemand("reward", 2, 0, fewest=1), RoleDemand("rollout", 3, 1, fewest=1)]
    seats = FakeSeats(plan_placement(demands, share_devices=False, cpus_per_bundle=1, local_cpus=1), Cluster())
    asked = [seats.placement.bundles[seat.bundles[0]].gpus for seat in seats._rest]
    assert asked == [1, 1, 0]


def test_a_port_that_refuses_says_that_its_node_is_gone() -> None:
    nodes = Nodes()
    with socket.socket() as listener, socket.socket() as closed:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        nodes._ports = {
            "here": listener.getsockname(),
            "gone": closed.getsockname(),
            "nowhere": ("no-such-host.invalid", 1),
        }
        assert nodes._refusing(["here", "gone", "nowhere", "unknown"]) == {"gone"}
        assert nodes.ask("gone")
        assert not nodes.ask("here")
