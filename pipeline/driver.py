"""The driver: one loop, one thread, one event pump. It orchestrates; it computes nothing and sees no token.

    buffer --take--> Batch --evaluate--> Evaluated --assemble--> experience --learn--> Update --publish--> version + 1

The loop never asks an algorithm for its name, only for its needs. Synchronous training is max_staleness = 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.learner import UpdatePlan, UpdateReport
from cluster.faults import RunError
from cluster.gang import Gang, Ticket
from cluster.pool import Work
from pipeline.algorithms.kl_controller import KLController
from pipeline.assemble import AssemblyReport
from pipeline.buffer import Batch, Buffer
from pipeline.collector import Collected, Collector
from pipeline.config import RunConfig
from pipeline.ledger import Ledger
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.observer import Observer
from pipeline.published import PublishedWeights
from pipeline.roles import Roles, Stage

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipeline.tasks.task import PromptStream

MAX_STALENESS = 0
MAX_RATIO_DEVIATION = 0.01  # in float32, where rounding alone gives about 1e-5; Huang et al. 2023, detail 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A batch with what the frozen models say of it; empty where the algorithm needs none."""

    batch: Batch
    reference: tuple[ObjectRef, ...]
    values: tuple[ObjectRef, ...]


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


@dataclass(slots=True)
class Clock:
    """Wall seconds of each phase of the step at hand."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self.started
        self.started = now


class Driver:
    """Reinforcement learning, from the first weights to the last version."""

    def __init__(self, config: RunConfig, run_dir: Path, roles: Roles, stage: Stage, prompts: PromptStream, observer: Observer) -> None:
        self.config = config
        self.run_dir = run_dir
        self.roles = roles
        self.stage = stage
        self.pump = stage.pump
        self.observer = observer
        self.ledger = Ledger(config.batch.group_size)
        self.buffer = Buffer(self.ledger, config.batch.samples, MAX_STALENESS)
        self.collector = Collector(config, prompts, roles.rollout, roles.reward, self.ledger, self.buffer)
        self.kl = KLController.of(config.algorithm)
        self.step = 0
        self.logged = 0  # steps whose experience is on disk
        self.weights = self._publish(version=0)
        self.clock = Clock()

    def run(self) -> None:
        """Every remaining step."""
        for step in self.remaining_steps():
            self.keep_generating()
            batch = self.take(step)
            evaluated = self.evaluate(batch)
            assembled = self.assemble(evaluated)
            update = self.learn(assembled)
            self.publish()
            self.record(update)

    def remaining_steps(self) -> Iterator[int]:
        while self.step < self.config.steps:
            self.clock = Clock()
            yield self.step
            self.step += 1

    def keep_generating(self) -> None:
        """Consumes: the current weights. Fills the pools' queues; returns at once."""
        self.observer.phase("rollout")
        self.collector.keep_generating(self.weights)

    def take(self, step: int) -> Batch:
        """Waits for: a full step of scored groups."""
        self._wait(lambda: bool(self.buffer.ready()), f"rollouts and scores of step {step}")
        batch = self.buffer.take(step, self.weights.version)
        self.clock.lap("rollout")
        return batch

    def evaluate(self, batch: Batch) -> Evaluated:
        """Reference log-probs and critic values, side by side, each only if the algorithm needs it."""
        self.observer.phase("evaluate")
        critic = self.roles.critic
        values = critic.begin("values", lambda rank, _: rank.infer.options(num_returns=2).remote(*batch.rollouts)) if critic else None
        reference = self._reference_logprobs(batch)
        if values is not None:
            self.stage.finish(values, "critic values")
        found = tuple(values.refs(rank)[0] for rank in range(self.config.critic.ranks)) if values is not None else ()
        evaluated = Evaluated(batch=batch, reference=reference, values=found)
        self.clock.lap("evaluate")
        return evaluated

    def assemble(self, evaluated: Evaluated) -> Assembled:
        """One call over the whole step; its table goes to the learners and, at the same time, to Parquet."""
        batch = evaluated.batch
        tables = (*batch.rollouts, *batch.scores, *evaluated.reference, *evaluated.values)
        counts = (len(batch.rollouts), len(batch.scores), len(evaluated.reference), len(evaluated.values), 0)
        algorithm, coef = self.config.algorithm, self.kl.coef

        def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
            return tuple(worker.assemble.options(num_returns=2).remote(algorithm, coef, batch.sample_ids, counts, *tables))

        [(summary, (experience,))] = self.stage.map(self.roles.assembler, "assembling", [send])
        self._log(batch.step, experience)
        self.clock.lap("assemble")
        return Assembled(batch=batch, experience=experience, report=summary)

    def learn(self, assembled: Assembled) -> Update:
        """Critic and policy gangs train on the step, side by side; afterwards every sample of it counts as trained."""
        self.observer.phase("learn")
        plan = UpdatePlan(
            step=assembled.batch.step,
            epochs=self.config.batch.epochs,
            minibatches=self.config.batch.minibatches,
            seed=self.config.seed,
            aggregation=self.config.algorithm.aggregation,
        )

        def begin(gang: Gang) -> Ticket:
            return gang.begin("update", lambda rank, _: rank.update.remote(assembled.experience, plan))

        policy, critic = begin(self.roles.policy), begin(self.roles.critic) if self.roles.critic else None
        self._wait(lambda: policy.done and (critic is None or critic.done), "the learners")
        update = Update(
            batch=assembled.batch,
            summary=assembled.report,
            policy=policy.results()[0],
            critic=critic.results()[0] if critic else None,
        )
        self._check(update)
        self.ledger.close(assembled.batch.chunks, trained=update.policy.samples)
        for chunk in assembled.batch.chunks:
            self.buffer.forget(chunk)
        self.clock.lap("learn")
        return update

    def publish(self) -> None:
        """version + 1: the policy's weights leave the learner and are pulled by whoever needs them."""
        self.observer.phase("publish")
        self.weights = self._publish(self.weights.version + 1)
        self.clock.lap("publish")

    def record(self, update: Update) -> None:
        """Metrics, KL controller, the ledger's invariant; waits for the step's Parquet file."""
        self._wait(lambda: self.logged > update.batch.step, "the experience log")
        account = self.ledger.check()
        kl_coef, self.kl = self.kl.coef, self.kl.update(update.summary.kl_per_rollout, update.summary.samples)
        collected, self.collector.collected = self.collector.collected, Collected()
        self.clock.lap("record")
        self.observer.step(
            StepMetrics.of(
                step=update.batch.step,
                version=self.weights.version,
                kl_coef=kl_coef,
                summary=update.summary,
                policy=update.policy,
                critic=update.critic,
                account=account,
                collected=collected,
                seconds=dict(self.clock.seconds),
            )
        )

    def export(self, folder: Path) -> None:
        """The policy as it is now, in Hugging Face format. Raises RunError when it is not to be found here afterwards."""
        self.roles.policy.call("export", lambda rank, _: rank.export.remote(str(folder)))
        if not (folder / "config.json").is_file():
            cause = f"it wrote {folder} on its own node, and the driver cannot see it"
            raise RunError("policy[0]", "export", cause, "Put --run-dir on a shared filesystem.")

    def _check(self, update: Update) -> None:
        """What must hold of every update, or the numbers that follow mean nothing."""
        step, policy = update.batch.step, update.policy
        for role, report in (("policy", policy), ("critic", update.critic)):
            if report is not None and report.updates == 0:
                raise RunError(
                    role,
                    f"learning from step {step}",
                    f"every gradient of the step was not finite ({report.skipped} updates skipped)",
                    "Lower its learning rate.",
                )
        exact = self.config.policy.dtype == self.config.rollout.dtype == "float32"
        if exact and policy.ratio_deviation > MAX_RATIO_DEVIATION:
            raise RunError(
                "policy",
                f"learning from step {step}",
                f"before any update its ratio to the sampled log-probs must be 1, it is off by {policy.ratio_deviation:.2g}",
                "The engine and the learner compute different log-probs for this model; it cannot be trained as it is.",
            )

    def _reference_logprobs(self, batch: Batch) -> tuple[ObjectRef, ...]:
        if self.roles.reference is None:
            return ()

        def logprobs(rollouts: ObjectRef, number: int) -> Callable[[Any, int], tuple[ObjectRef, ...]]:
            return lambda worker, attempt: tuple(worker.logprobs.options(num_returns=2).remote(rollouts, number, attempt))

        calls = [logprobs(rollouts, number) for rollouts, number in zip(batch.rollouts, batch.chunks, strict=True)]
        return tuple(data[0] for _, data in self.stage.map(self.roles.reference, "reference log-probs", calls))

    def _log(self, step: int, experience: ObjectRef) -> None:
        """Write the step's experience while the learners learn from it."""
        path = str(self.run_dir / "experience" / f"step={step}" / "experience.parquet")

        def done(rows: int, data: tuple[ObjectRef, ...], attempt: int) -> None:
            self.logged = step + 1

        self.roles.assembler.submit(
            Work(
                phase=f"writing the experience of step {step}",
                send=lambda worker, attempt: (worker.write.remote(path, experience),),
                on_done=done,
                timeout_s=self.config.cluster.call_timeout_s,
            )
        )

    def _publish(self, version: int) -> PublishedWeights:
        dtype = self.config.rollout.dtype
        ticket = self.roles.policy.begin("publish", lambda rank, _: rank.publish.options(num_returns=2).remote(version, dtype))
        manifest = self.stage.finish(ticket, f"weights of version {version}")
        return PublishedWeights(version=version, checksum=manifest.checksum, holder=(ticket.refs(0)[0],), timeout_s=self.config.cluster.call_timeout_s)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.pump.run_until(condition, timeout_s=2 * self.config.cluster.call_timeout_s, waiting_for=what)
