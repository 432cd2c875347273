"""Placements small enough to check by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    Bundle,
    NodeResources,
    Placement,
    RoleDemand,
    Slot,
    cpus_that_fit,
    plan_placement,
    shortages,
    usable_cores,
)


def seats(placement: Placement) -> list[tuple[str, int, int, float, float]]:
    return [(slot.role, slot.index, slot.bundle, slot.cpus, slot.gpus) for slot in placement.slots]


def test_roles_that_take_turns_share_bundle_i() -> None:
    demands = [RoleDemand("policy", 2, 0), RoleDemand("rollout", 2, 0), RoleDemand("reward", 1, 0)]
    placement = plan_placement(demands, share_devices=True, cpus_per_bundle=0, local_cpus=8)
    assert placement.bundles == (Bundle(cpus=4, gpus=0), Bundle(cpus=4, gpus=0))
    assert {slot.threads for slot in placement.slots} == {4}
    assert seats(placement) == [
        ("policy", 0, 0, 1.3333, 0),
        ("policy", 1, 1, 2, 0),
        ("rollout", 0, 0, 1.3333, 0),
        ("rollout", 1, 1, 2, 0),
        ("reward", 0, 0, 1.3333, 0),
    ]


def test_roles_of_the_same_turn_share_the_cores() -> None:
    demands = [RoleDemand("policy", 2, 0, "learn"), RoleDemand("critic", 1, 0, "learn"), RoleDemand("rollout", 2, 0)]
    placement = plan_placement(demands, share_devices=True, cpus_per_bundle=4, local_cpus=1)
    threads = {(slot.role, slot.index): slot.threads for slot in placement.slots}
    assert threads == {("policy", 0): 2, ("policy", 1): 4, ("critic", 0): 2, ("rollout", 0): 4, ("rollout", 1): 4}


def test_every_worker_has_devices_of_its_own_when_they_are_not_shared() -> None:
    demands = [RoleDemand("policy", 1, 2), RoleDemand("reward", 2, 0)]
    placement = plan_placement(demands, share_devices=False, cpus_per_bundle=3, local_cpus=1)
    assert placement.bundles == (Bundle(cpus=3, gpus=2), Bundle(cpus=3, gpus=0), Bundle(cpus=3, gpus=0))
    assert seats(placement) == [("policy", 0, 0, 3, 2), ("reward", 0, 1, 3, 0), ("reward", 1, 2, 3, 0)]
    assert placement.cpus == 9


def test_a_shared_gpu_is_divided_among_those_who_use_it() -> None:
    demands = [
        RoleDemand("policy", 1, 1),
        RoleDemand("rollout", 1, 1),
        RoleDemand("critic", 1, 0.5),
        RoleDemand("reward", 1, 0),
    ]
    placement = plan_placement(demands, share_devices=True, cpus_per_bundle=8, local_cpus=1)
    assert placement.bundles == (Bundle(cpus=8, gpus=1),)
    assert [slot.gpus for slot in placement.slots] == [0.3333, 0.3333, 0.3333, 0]


def test_more_bundles_than_cores_get_one_cpu_each() -> None:
    placement = plan_placement([RoleDemand("rollout", 5, 0)], share_devices=True, cpus_per_bundle=0, local_cpus=2)
    assert placement.bundles == (Bundle(cpus=1, gpus=0),) * 5
    assert {slot.threads for slot in placement.slots} == {1}


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 9),
)
def test_residents_never_ask_for_more_than_their_bundle(
    wanted: list[tuple[int, float]], share: bool, cpus: int
) -> None:
    demands = [RoleDemand(f"role{number}", workers, gpus) for number, (workers, gpus) in enumerate(wanted)]
    placement = plan_placement(demands, share_devices=share, cpus_per_bundle=cpus, local_cpus=4)
    assert len(placement.slots) == sum(workers for workers, _ in wanted)
    for number, bundle in enumerate(placement.bundles):
        residents = [slot for slot in placement.slots if slot.bundle == number]
        assert residents
        assert sum(round(slot.cpus * 10_000) for slot in residents) <= bundle.cpus * 10_000
        assert sum(round(slot.gpus * 10_000) for slot in residents) <= round(bundle.gpus * 10_000)


@pytest.mark.parametrize(
    ("gpus", "share", "message"),
    [
        (
            2,
            True,
            "policy.gpus: must be at most 1 while devices are shared (Ray divides one GPU, not several), got 2; set "
            "cluster.share_devices = false",
        ),
        (1.5, False, "policy.gpus: must be a whole number when above 1, got 1.5"),
    ],
)
def test_gpus_that_ray_cannot_hand_out_are_refused(gpus: float, share: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_placement([RoleDemand("policy", 1, gpus)], share_devices=share, cpus_per_bundle=1, local_cpus=1)


def placement_of(*bundles: Bundle) -> Placement:
    slots = tuple(Slot(role="w", index=i, bundle=i, cpus=b.cpus, gpus=b.gpus, threads=1) for i, b in enumerate(bundles))
    return Placement(bundles=bundles, slots=slots)


def test_what_fits_is_not_reported() -> None:
    gpu, cpu = Bundle(cpus=2, gpus=1), Bundle(cpus=2, gpus=0)
    nodes = [NodeResources(name="a", cpus=4, gpus=2), NodeResources(name="b", cpus=4, gpus=0)]
    assert shortages(placement_of(cpu, cpu, gpu, gpu), nodes) == []


def test_a_shortage_says_what_is_asked_what_there_is_and_what_to_change() -> None:
    nodes = [NodeResources(name="10.0.0.1", cpus=16, gpus=2), NodeResources(name="10.0.0.2", cpus=1, gpus=0)]
    assert shortages(placement_of(*[Bundle(cpus=4, gpus=1)] * 3), nodes) == [
        "1 of 3 bundles of 4 CPUs and 1 GPU fit no node; there is 10.0.0.1 with 16 CPUs and 2 GPUs; 10.0.0.2 with 1 "
        "CPU. "
        "Add nodes, or lower the workers, ranks or gpus of the roles or cluster.cpus_per_bundle."
    ]


def test_thirds_of_a_gpu_fill_a_node_exactly() -> None:
    third = Bundle(cpus=1, gpus=0.3333)
    node = NodeResources(name="a", cpus=8, gpus=1)
    assert shortages(placement_of(third, third, third), [node]) == []
    assert len(shortages(placement_of(third, third, third, third), [node])) == 1


def test_bundles_cannot_be_spread_over_nodes() -> None:
    nodes = [NodeResources(name="a", cpus=2, gpus=0), NodeResources(name="b", cpus=2, gpus=0)]
    assert shortages(placement_of(Bundle(cpus=3, gpus=0)), nodes)[0].startswith("1 of 1 bundles of 3 CPUs fit no node")
    assert "there is no node" in shortages(placement_of(Bundle(cpus=1, gpus=0)), [])[0]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "75000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "1000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_a_container_s_quota_limits_the_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_planning_needs_neither_ray_nor_torch() -> None:
    modules = (
        "cluster.placement, cluster.faults, cluster.events, cluster.pool, cluster.gang, cluster.spawn, "
        "cluster.session, cluster.handshake"
    )
    code = f"import {modules}, sys; sys.exit(' '.join({{'ray', 'torch'}} & sys.modules.keys()))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
        ).stderr.strip()
        == ""
    )


def nodes(*sizes: tuple[float, float]) -> list[NodeResources]:
    return [NodeResources(name=f"10.0.0.{i}", cpus=cpus, gpus=gpus) for i, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("has", "gpus", "cpus"),
    [
        ([(8, 0)], 0, 2),  # four bundles on one node: its cores over their number
        ([(16, 0), (16, 0)], 0, 8),  # two on each
        ([(2, 0), (32, 0)], 0, 8),  # the head is too small to help
        ([(0, 0), (12, 0), (12, 0), (12, 0), (12, 0)], 0, 12),  # a head that takes no work
        ([(10, 0), (6, 0)], 0, 3),  # three of them on one, one on the other; with 4 each, two and one
        ([(64, 0), (8, 4)], 1, 2),  # only one node has the GPUs
        ([(2, 0)], 0, 0),  # not yet
        ([], 0, 0),
    ],
)
def test_bundles_are_as_large_as_the_nodes_that_do_the_work_allow(
    has: list[tuple[float, float]], gpus: float, cpus: int
) -> None:
    demands = [RoleDemand("policy", 4, gpus), RoleDemand("rollout", 2, 0)]
    assert cpus_that_fit(demands, share_devices=True, nodes=nodes(*has)) == cpus


@given(st.integers(1, 12), st.integers(1, 100))
def test_on_one_node_it_is_what_the_same_machine_would_do_alone(workers: int, cores: int) -> None:
    demands = [RoleDemand("policy", workers, 0)]
    alone = plan_placement(demands, share_devices=True, cpus_per_bundle=0, local_cpus=cores).bundles[0].cpus
    assert cpus_that_fit(demands, share_devices=True, nodes=nodes((cores, 0))) == (alone if cores >= workers else 0)
