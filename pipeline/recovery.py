"""What to do when a call of the driver fails: rebuild, roll back, or stop. Decides only; the driver carries it out.

The pools deal with their own losses. What reaches the driver is a gang that lost a rank, an object that went down with its node and that
nobody but an earlier state can make anew, or an error that a second attempt would only repeat.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.faults import Fault, RunError, role_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """rebuild: gangs to start anew. stop: why the run cannot go on; "" when it can, from the last commit."""

    rebuild: frozenset[str] = frozenset()
    stop: str = ""


def decide(error: RunError, *, gangs: Collection[str], in_a_row: int, config: ClusterConfig) -> Recovery:
    """gangs: names of the learners. in_a_row: how often the run was taken back since its last new commit."""
    role = role_of(error.who)
    lost_gang = role in gangs and error.fault is not None and error.fault.of_a_process
    if not lost_gang and error.fault is not Fault.INPUT_LOST:
        return Recovery(stop="an error that would only repeat")
    if in_a_row >= config.max_rebuilds:
        return Recovery(stop=f"taken back {in_a_row} times in a row without a new commit (cluster.max_rebuilds = {config.max_rebuilds})")
    return Recovery(rebuild=frozenset({role}) if lost_gang else frozenset())
