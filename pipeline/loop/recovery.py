"""The decision after a failed call of the driver: rebuild, roll back, or stop. Pure: the driver carries it out.

Pools deal with their own losses. Three kinds of failures reach the driver: a gang that lost a rank, an object that was
lost with its node and can only be made from an earlier state, and an error that a second attempt would repeat.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.faults import Fault, RunError, role_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """rebuild: gangs to start again. stop: reason why the run cannot go on from the last commit; "" if it can."""

    rebuild: frozenset[str] = frozenset()
    stop: str = ""

    def stop_if_hopeless(self, error: RunError, in_a_row: int) -> None:
        """Raises the error when the run cannot go on; after rollbacks since the last new commit, it also says why."""
        if not self.stop:
            return
        if in_a_row:
            raise RunError(error.who, error.phase, f"{self.stop}:\n{error.cause}", error.remedy, error.fault) from error
        raise error


def decide(error: RunError, *, gangs: Collection[str], in_a_row: int, config: ClusterConfig) -> Recovery:
    """Decide about an error. gangs: names of the learners. in_a_row: rollbacks since the last new commit."""
    role = role_of(error.who)
    lost_gang = role in gangs and error.fault is not None and error.fault.of_a_process
    if not lost_gang and error.fault is not Fault.INPUT_LOST:
        return Recovery(stop="the same error would happen again")
    if in_a_row >= config.max_rebuilds:
        return Recovery(
            stop=f"taken back {in_a_row} times in a row without a new commit (cluster.max_rebuilds = "
            f"{config.max_rebuilds})"
        )
    return Recovery(rebuild=frozenset({role}) if lost_gang else frozenset())
