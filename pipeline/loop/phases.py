"""The data of a step of the loop, one type for each phase, and the clock that times the phases.

Batch --evaluate--> EvaluatedBatch --assemble--> StepExperience --learn--> Update
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.config import LearnerConfig, RolloutConfig
from actors.learner.learner import UpdateReport
from actors.rollout.worker import StartKL
from cluster.faults import RunError
from pipeline.assembly.report import AssemblyReport
from pipeline.samples.buffer import Batch

if TYPE_CHECKING:
    from ray import ObjectRef

    from actors.manager.reports import ManagerReport

MAX_RATIO_DEVIATION = 0.01  # in float32, where rounding alone gives about 1e-5; Huang et al. 2023, detail 11


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedBatch:
    """A batch with the log-probs and values of its tokens, computed before the first update of the step.

    reference: log-probs under the frozen reference. values: the critic's values. proximal: log-probs under the policy.
    Each is empty if the algorithm does not need it. start_kl: the KL to the starting policy, measured every few steps
    if there is no reference.
    """

    batch: Batch
    reference: tuple[ObjectRef, ...]
    values: tuple[ObjectRef, ...]
    proximal: tuple[ObjectRef, ...]
    start_kl: StartKL | None = None
    turns: ObjectRef | None = None  # what the manager learns from, if there is one
    turn_advantages: tuple[ObjectRef, ...] = ()  # what it thinks of them


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExperience:
    """The step's experience, as an object reference, and its summary."""

    batch: Batch
    experience: ObjectRef
    report: AssemblyReport
    turns: ObjectRef | None = None  # what the manager learns from, if there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the learners did with the step's experience."""

    batch: Batch
    summary: AssemblyReport
    policy: UpdateReport
    critic: UpdateReport | None
    manager: ManagerReport | None = None

    def check(self, policy: LearnerConfig, rollout: RolloutConfig) -> None:
        """Raises RunError when a learner made no update, or when its log-probs differ from the sampled ones.

        After either failure, the numbers of the run would mean nothing.
        """
        phase = f"learning from step {self.batch.step}"
        for role, report in (("policy", self.policy), ("critic", self.critic)):
            if report is not None and report.updates == 0:
                raise RunError(
                    role,
                    phase,
                    f"every gradient of the step was not finite ({report.skipped} updates skipped)",
                    "Lower its learning rate.",
                )
        manager = self.manager if not self.batch.staleness else None
        if manager is not None and manager.ratio_deviation > MAX_RATIO_DEVIATION:
            raise RunError(
                "manager",
                phase,
                "before any update its ratio to the recorded probabilities of options must be 1, it is off by "
                f"{manager.ratio_deviation:.2g}",
                "The rollout workers and the manager compute different probabilities; it cannot be trained as it is.",
            )
        # older samples have other log-probs by right; how far they are off is in the metrics, staleness/*
        exact = policy.dtype == rollout.dtype == "float32" and not self.batch.staleness
        # with proximal log-probs this ratio is about 1 in any case, and only the gap shows a difference
        off = max(self.policy.ratio_deviation, self.policy.logprob_gap_max)
        if exact and off > MAX_RATIO_DEVIATION:
            raise RunError(
                "policy",
                phase,
                f"before any update its ratio to the sampled log-probs must be 1, it is off by {off:.2g}",
                "The engine and the learner compute different log-probs for this model; it cannot be trained as it is.",
            )


@dataclass(slots=True)
class Clock:
    """Wall-clock seconds of each phase of the current step; if a phase comes twice, its times are added up."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> float:
        """End a phase; returns the seconds since the phase before it ended."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return seconds
