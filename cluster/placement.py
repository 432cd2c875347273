"""The placement of a run: bundles of CPUs and GPUs, and each worker's share of a bundle.

Pure arithmetic, no Ray: `plan` prints a placement without a cluster. Left out: the node of a bundle, which Ray decides.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import ClusterConfig

_UNITS = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True, slots=True)
class RoleDemand:
    """The workers and devices that a role needs."""

    role: str
    workers: int
    gpus: float  # of each worker
    turn: str = ""
    """Roles with the same turn compute at the same time and share the cores of their bundle; "": this role alone."""
    fewest: int = 0
    """Workers without which the role cannot begin; the others may come later. 0: all, as of a gang."""

    @property
    def at_once(self) -> int:
        """The number of workers that must have their place before the role begins."""
        return self.fewest or self.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Resources reserved together on one node."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        return _resources(self.cpus, self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A worker's seat: worker `index` of `role` takes `cpus` and `gpus` of bundle number `bundle`.

    cpus: as Ray counts them. threads: with which the process computes when it is its turn. gang: whether it is a rank.
    """

    role: str
    index: int
    bundle: int
    cpus: float
    gpus: float
    threads: int
    gang: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The seats of a run. core: numbers of the bundles that must be there together before the run begins."""

    bundles: tuple[Bundle, ...]
    slots: tuple[Slot, ...]
    core: tuple[int, ...] = ()

    @property
    def cpus(self) -> int:
        """CPUs of all bundles together."""
        return sum(bundle.cpus for bundle in self.bundles)

    @property
    def least(self) -> Placement:
        """The core alone, with which the run begins and goes on."""
        numbers = {bundle: number for number, bundle in enumerate(self.core)}
        return Placement(
            bundles=tuple(self.bundles[number] for number in self.core),
            slots=tuple(replace(slot, bundle=numbers[slot.bundle]) for slot in self.slots if slot.bundle in numbers),
            core=tuple(range(len(self.core))),
        )

    def in_bundle(self, bundle: int) -> list[Slot]:
        """The seats of a bundle."""
        return [slot for slot in self.slots if slot.bundle == bundle]

    def slot(self, role: str, index: int) -> Slot:
        """The seat of worker `index` of `role`."""
        for slot in self.slots:
            if (slot.role, slot.index) == (role, index):
                return slot
        raise AssertionError(f"no slot was planned for {role}[{index}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """The total resources of one node of a cluster."""

    name: str
    cpus: float
    gpus: float


def plan_placement(
    demands: Sequence[RoleDemand], *, share_devices: bool, cpus_per_bundle: int, local_cpus: int
) -> Placement:
    """Bundles and seats for the demanded workers.

    share_devices: worker i of every role sits in bundle i, because the roles take turns in synchronous training. The
    bundle has the GPUs of its most demanding worker; each worker gets an equal part, or Ray would not seat them
    together. cpus_per_bundle: 0 means `local_cpus` divided by the number of bundles, at least 1. Raises ValueError for
    numbers of GPUs that Ray cannot assign.
    """
    assert len({demand.role for demand in demands}) == len(demands), "one demand per role"
    for demand in demands:
        _check_gpus(demand, share_devices)
    if share_devices:
        residents = [[d for d in demands if d.workers > i] for i in range(max((d.workers for d in demands), default=0))]
        seats = [(d.role, i, i) for d in demands for i in range(d.workers)]
    else:
        residents = [[d] for d in demands for _ in range(d.workers)]
        seats = [(d.role, i, 0) for d in demands for i in range(d.workers)]
        seats = [(role, i, bundle) for bundle, (role, i, _) in enumerate(seats)]
    cpus = cpus_per_bundle or max(1, local_cpus // max(1, len(residents)))
    bundles = tuple(Bundle(cpus=cpus, gpus=max(d.gpus for d in group)) for group in residents)
    by_role = {d.role: d for d in demands}
    slots = tuple(_seat(by_role[role], i, b, bundles[b], residents[b]) for role, i, b in seats)
    core = sorted({slot.bundle for slot in slots if slot.index < by_role[slot.role].at_once})
    return Placement(bundles=bundles, slots=slots, core=tuple(core))


def place(config: ClusterConfig, asked: Sequence[RoleDemand]) -> Placement:
    """The placement of these roles under a configuration; cpus_per_bundle 0 means this machine's cores."""
    return plan_placement(
        asked, share_devices=config.share_devices, cpus_per_bundle=config.cpus_per_bundle, local_cpus=usable_cores()
    )


def cpus_that_fit(demands: Sequence[RoleDemand], *, share_devices: bool, nodes: Sequence[NodeResources]) -> int:
    """The most CPUs a bundle can have so that all bundles fit these nodes; 0 if they do not fit with one each."""

    def fits(cpus: int) -> bool:
        return not shortages(
            plan_placement(demands, share_devices=share_devices, cpus_per_bundle=cpus, local_cpus=1), nodes
        )

    largest = int(max((node.cpus for node in nodes), default=0))
    return next(filter(fits, range(largest, 0, -1)), 0)


def shortages(placement: Placement, nodes: Sequence[NodeResources]) -> list[str]:
    """One line for each kind of bundle that fits no node: what is asked, what there is, what to change.

    The largest bundle is packed first, onto the first node with room, nodes with the fewest GPUs first, so that bundles
    without GPUs leave those free. Exact when all bundles are equal; otherwise a heuristic that may, like Ray's own
    packing, miss a tight fit.
    """
    free = [
        [round(node.gpus * _UNITS), round(node.cpus * _UNITS)]
        for node in sorted(nodes, key=lambda node: (node.gpus, node.cpus))
    ]
    homeless: Counter[Bundle] = Counter()
    for bundle in sorted(placement.bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True):
        gpus, cpus = round(bundle.gpus * _UNITS), bundle.cpus * _UNITS
        home = next((room for room in free if room[0] >= gpus and room[1] >= cpus), None)
        if home is None:
            homeless[bundle] += 1
        else:
            home[0] -= gpus
            home[1] -= cpus
    there = "; ".join(f"{node.name} with {_resources(node.cpus, node.gpus)}" for node in nodes) or "no node"
    asked = Counter(placement.bundles)
    return [
        f"{missing} of {asked[bundle]} bundles of {bundle} fit no node; there is {there}. "
        "Add nodes, or lower the workers, ranks or gpus of the roles or cluster.cpus_per_bundle."
        for bundle, missing in homeless.items()
    ]


def described(placement: Placement) -> str:
    """The bundles of a placement, in a few words: `2 bundles of 4 CPUs`."""
    counted = Counter(placement.bundles)
    return ", ".join(f"{count} bundle{'' if count == 1 else 's'} of {bundle}" for bundle, count in counted.items())


def labels_of_bundles(placement: Placement, config: ClusterConfig) -> dict[int, dict[str, str]]:
    """Bundle -> labels that its node must have: those of learners where a learner sits there, else those of workers."""
    learners, workers = (labels_of(words) for words in (config.learner_labels, config.worker_labels))
    gangs = {slot.bundle for slot in placement.slots if slot.gang}
    found = {number: learners if number in gangs else workers for number in range(len(placement.bundles))}
    return {number: labels for number, labels in found.items() if labels}


def labels_of(words: Sequence[str]) -> dict[str, str]:
    """Labels from words KEY=VALUE."""
    pairs = (word.partition("=") for word in words)
    return {key: value for key, _, value in pairs}


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use, by its affinity and by its quota of CPU time, rounded up.

    In a container (`docker --cpus 2`) these may be fewer than the machine has. cgroup: the folder in which the kernel
    shows the quota; a container sees its own there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(_cpu_quota(cgroup))))


def _cpu_quota(cgroup: Path) -> float:
    """CPU seconds per second that a control group may use; sys.maxsize without a limit, or without such files."""
    # version 2 of control groups has both numbers in one file
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except OSError:
            continue
        return sys.maxsize if quota in ("max", "-1") else int(quota) / int(period)
    return sys.maxsize


def _check_gpus(demand: RoleDemand, share_devices: bool) -> None:
    if demand.gpus > 1 and share_devices:
        raise ValueError(
            f"{demand.role}.gpus: must be at most 1 while devices are shared (Ray divides one GPU, not several), got "
            f"{demand.gpus:g}; "
            "set cluster.share_devices = false"
        )
    if demand.gpus > 1 and demand.gpus != int(demand.gpus):
        raise ValueError(f"{demand.role}.gpus: must be a whole number when above 1, got {demand.gpus:g}")


def _seat(demand: RoleDemand, index: int, number: int, bundle: Bundle, residents: Sequence[RoleDemand]) -> Slot:
    """A seat with an equal part of the bundle, rounded down to Ray's granularity, so that the parts always fit."""
    users = sum(resident.gpus > 0 for resident in residents)
    gpus = _part(bundle.gpus, users) if demand.gpus else 0.0
    company = sum(resident.turn == demand.turn for resident in residents) if demand.turn else 1
    threads = max(1, bundle.cpus // company)
    return Slot(
        role=demand.role,
        index=index,
        bundle=number,
        cpus=_part(bundle.cpus, len(residents)),
        gpus=gpus,
        threads=threads,
        gang=not demand.fewest,
    )


def _part(whole: float, parts: int) -> float:
    return math.floor(round(whole * _UNITS) / parts) / _UNITS


def _resources(cpus: float, gpus: float) -> str:
    text = f"{cpus:g} CPU" + ("" if cpus == 1 else "s")
    return text + (f" and {gpus:g} GPU" + ("" if gpus == 1 else "s") if gpus else "")
