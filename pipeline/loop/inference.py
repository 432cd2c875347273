"""Inference: the log-probs and values of a batch, computed by the reference, the critic and the policy in parallel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.rollout.worker import StartKL
from cluster.runtime import Runtime
from pipeline.config.loop_config import LoopConfig
from pipeline.loop.learners import Learners
from pipeline.loop.phases import EvaluatedBatch
from pipeline.loop.start_kl import measure_start_kl
from pipeline.loop.step_assembler import StepAssembler
from pipeline.loop.wiring import Roles
from pipeline.samples.buffer import Batch
from pipeline.samples.collector import Collector

if TYPE_CHECKING:
    from ray import ObjectRef


class Inference:
    """Asks each model for what the algorithm needs of it, before the first update of the step."""

    def __init__(
        self,
        config: LoopConfig,
        roles: Roles,
        runtime: Runtime,
        learners: Learners,
        say: Callable[[str, str], None],
    ) -> None:
        """say(kind, text): tells the user, once for each kind."""
        self.config = config
        self.roles = roles
        self.runtime = runtime
        self.learners = learners
        self.say = say

    def evaluate(self, batch: Batch, collector: Collector) -> EvaluatedBatch:
        """Waits for: every log-prob and value of the batch.

        Ask `collector` afterwards whether a sample killed or hung the reference; then the batch must not be used.
        """
        begun = self.learners.infer(batch.rollouts)
        reference, start_kl = self._reference_logprobs(batch, collector), self._start_kl(batch)
        values, proximal = (self.learners.inferred(begun, role) for role in ("critic", "policy"))
        return EvaluatedBatch(batch=batch, reference=reference, values=values, proximal=proximal, start_kl=start_kl)

    def advise(self, evaluated: EvaluatedBatch, assembler: StepAssembler) -> EvaluatedBatch:
        """The batch with the manager's advantages of its turns; the same batch where there is no manager."""
        if self.roles.manager is None:
            return evaluated
        turns = assembler.turns(evaluated.batch)
        return replace(evaluated, turns=turns, turn_advantages=(self.learners.advise(turns),))

    def _reference_logprobs(self, batch: Batch, collector: Collector) -> tuple[ObjectRef, ...]:
        if self.roles.reference is None:
            return ()
        found: dict[int, ObjectRef] = {}
        for number in batch.chunks:
            collector.refer(self.roles.reference, number, found)
        self.runtime.wait(lambda: len(found) == len(batch.chunks), "reference log-probs")
        return tuple(found[number] for number in batch.chunks)

    def _start_kl(self, batch: Batch) -> StartKL | None:
        every = self.config.algorithm.kl_every
        if self.roles.reference is not None or not every or batch.step % every:
            return None
        return measure_start_kl(self.roles.rollout, batch.rollouts[0], self.runtime, self.say)
