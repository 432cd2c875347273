"""What is decided when a call of the driver fails."""

from __future__ import annotations

import pytest

from cluster.config import ClusterConfig
from cluster.faults import Fault, RunError
from pipeline.loop.recovery import decide

GANGS = ("policy", "critic")


@pytest.mark.parametrize(
    ("who", "fault", "rebuild", "goes_on"),
    [
        ("policy[1]", Fault.WORKER_LOST, {"policy"}, True),
        ("critic[0]", Fault.PEER_LOST, {"critic"}, True),
        ("policy[0]", Fault.EXPIRED, {"policy"}, True),
        # the step's experience went down with its node; the learners live
        (
            "policy[0]",
            Fault.INPUT_LOST,
            set(),
            True,
        ),
        ("rollout[0]", Fault.INPUT_LOST, set(), True),
        ("policy[0]", Fault.USER_ERROR, set(), False),
        ("reward[0]", Fault.WORKER_LOST, set(), False),  # a pool says this when it cannot replace any more
        ("rollout[2]", Fault.EXPIRED, set(), False),
        ("driver", None, set(), False),
        ("policy", None, set(), False),  # the driver's own checks
    ],
)
def test_what_is_rebuilt_and_what_stops(who: str, fault: Fault | None, rebuild: set[str], goes_on: bool) -> None:
    decision = decide(RunError(who, "update", "x", fault=fault), gangs=GANGS, in_a_row=0, config=ClusterConfig())
    assert decision.rebuild == rebuild
    assert bool(decision.stop) is not goes_on


@pytest.mark.parametrize(
    ("in_a_row", "stop"),
    [(0, ""), (1, ""), (2, "taken back 2 times in a row without a new commit (cluster.max_rebuilds = 2)")],
)
def test_failing_again_and_again_stops(in_a_row: int, stop: str) -> None:
    error = RunError("policy[0]", "update", "x", fault=Fault.WORKER_LOST)
    assert decide(error, gangs=GANGS, in_a_row=in_a_row, config=ClusterConfig(max_rebuilds=2)).stop == stop
