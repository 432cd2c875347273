"""The KL divergence of the policy from its starting weights, measured for the metrics of runs without a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from actors.rollout.worker import StartKL
from cluster.faults import Fault
from cluster.pool import Pool
from cluster.runtime import Runtime
from cluster.work import Work

if TYPE_CHECKING:
    from ray import ObjectRef


def measure_start_kl(
    pool: Pool, rollouts: ObjectRef, runtime: Runtime, say: Callable[[str, str], None]
) -> StartKL | None:
    """Let a free rollout worker estimate the KL from a chunk's rollouts; returns None if it cannot be measured.

    The estimate is only shown, so a failure is not tried again. say(kind, text): tells the user, once for each kind.
    """
    found: list[StartKL | None] = []

    def without(fault: Fault) -> bool:
        found.append(None)
        return True

    pool.submit(
        Work(
            phase="KL to the start",
            send=lambda worker, attempt: (worker.start_kl.remote(rollouts),),
            on_done=lambda report, data, attempt: found.append(report),
            on_spent=without,
            attempts=1,
            timeout_s=runtime.timeout_s,
        )
    )
    runtime.wait(lambda: bool(found), "the KL to the start")
    [report] = found
    if report is not None and report.rollouts:
        return report
    why = report.problem if report else "the worker was lost over it, so its memory may not hold a second model"
    say(
        "start kl",
        f"the KL to the start could not be measured: {why}; training goes on without it (algorithm.kl_every = 0 leaves "
        "it out)",
    )
    return None
