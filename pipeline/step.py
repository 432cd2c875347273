"""What a step of the loop is made of, one type a phase: Batch -> Evaluated -> Assembled -> Update, and the clock that times the phases."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.learner import UpdateReport
from cluster.faults import RunError
from pipeline.assemble import AssemblyReport
from pipeline.buffer import Batch
from pipeline.config import RunConfig

if TYPE_CHECKING:
    from ray import ObjectRef

MAX_RATIO_DEVIATION = 0.01  # in float32, where rounding alone gives about 1e-5; Huang et al. 2023, detail 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A batch with what the frozen models, and the learners before their first update, say of it; empty where the algorithm needs none."""

    batch: Batch
    reference: tuple[ObjectRef, ...]
    values: tuple[ObjectRef, ...]
    proximal: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """The step's experience, by reference, and its summary."""

    batch: Batch
    experience: ObjectRef
    report: AssemblyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the learners did with the step's experience."""

    batch: Batch
    summary: AssemblyReport
    policy: UpdateReport
    critic: UpdateReport | None

    def check(self, config: RunConfig) -> None:
        """What must hold of every update, or the numbers that follow mean nothing. Raises RunError."""
        phase = f"learning from step {self.batch.step}"
        for role, report in (("policy", self.policy), ("critic", self.critic)):
            if report is not None and report.updates == 0:
                raise RunError(role, phase, f"every gradient of the step was not finite ({report.skipped} updates skipped)", "Lower its learning rate.")
        exact = config.policy.dtype == config.rollout.dtype == "float32"
        off = max(self.policy.ratio_deviation, self.policy.logprob_gap_max)  # the gap speaks where the ratio is to the learner's own log-probs
        if exact and off > MAX_RATIO_DEVIATION:
            raise RunError(
                "policy",
                phase,
                f"before any update its ratio to the sampled log-probs must be 1, it is off by {off:.2g}",
                "The engine and the learner compute different log-probs for this model; it cannot be trained as it is.",
            )


@dataclass(slots=True)
class Clock:
    """Wall seconds of each phase of the step at hand."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.started
        self.started = now
