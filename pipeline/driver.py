"""The driver: one loop, one thread, one event pump. It orchestrates; it computes nothing and sees no token.

    buffer --take--> Batch --evaluate--> Evaluated --assemble--> experience --learn--> Update --publish--> version + 1

The loop never asks an algorithm for its name, only for its needs. Synchronous training is max_staleness = 0. Everything the driver knows
after a step is one small `DriverState`; with the learners' shards it is a commit, and `restore` takes the whole run back to one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.faults import RunError
from cluster.pool import Work
from pipeline.algorithms.kl_controller import KLController
from pipeline.assemble import Assembly
from pipeline.buffer import Batch, Buffer
from pipeline.checkpoint import Checkpoints, Commit, DriverState
from pipeline.collector import Collected, Collector
from pipeline.config import RunConfig
from pipeline.learners import Learners
from pipeline.ledger import Ledger
from pipeline.observe.metrics import StepMetrics
from pipeline.observe.observer import Observer
from pipeline.published import PublishedWeights
from pipeline.recovery import decide
from pipeline.roles import Roles, Stage
from pipeline.run_folder import RunFolder
from pipeline.step import Assembled, Clock, Evaluated, Update
from pipeline.stopping import StopNow, Stopped, StopRequest

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipeline.tasks.task import PromptStream

log = logging.getLogger(__name__)

MAX_STALENESS = 0
_INEXACT = "The commit's files are as they were written, so this is a defect of the program, not of the files."


class Driver:
    """Reinforcement learning, from the first weights to the last version."""

    state: DriverState  # after the last whole step
    committed: int  # steps of the newest commit
    logged: int  # steps whose experience is on disk
    kl: KLController
    ledger: Ledger
    buffer: Buffer
    collector: Collector
    weights: PublishedWeights

    def __init__(self, config: RunConfig, folder: RunFolder, roles: Roles, stage: Stage, prompts: PromptStream, observer: Observer) -> None:
        """It stands at the start, version 0; `restore` a commit to go on from there."""
        self.config = config
        self.folder = folder
        self.roles = roles
        self.stage = stage
        self.pump = stage.pump
        self.prompts = prompts
        self.observer = observer
        self.checkpoints = Checkpoints(folder, config.keep_commits)
        self.stop = StopRequest()
        self.pump.add_tick(self.stop.check, every_s=0.2)
        self.rolled_back = 0  # in a row, without a commit in between
        self.rolled_back_in_all = 0
        self.committed_bytes = 0  # since the last step's metrics
        self.clock = Clock()
        self.learners = Learners(config, roles, stage)
        self.start = DriverState(kl_coef=config.algorithm.kl_coef)
        self._take_up(self.start)

    def run(self, export_to: Path) -> None:
        """Every remaining step, then the export. Learners that are lost on the way are rebuilt, and the run goes on from the last commit.

        Raises Stopped when a signal asked for it, everything committed; RunError for what cannot be mended.
        """
        with self.stop:
            while not self.stop:
                try:
                    self._train()
                    self.learners.export(export_to)
                    return
                except StopNow:
                    break
                except RunError as error:
                    self.recover(error)
            self.commit()
        raise Stopped(self.stop.number, self.committed, self.config.steps)

    def _train(self) -> None:
        for step in self.remaining_steps():
            self.keep_generating()
            self.commit()
            batch = self.take(step)
            evaluated = self.evaluate(batch)
            assembled = self.assemble(evaluated)
            with self.stop.held():  # from here on the step becomes whole
                update = self.learn(assembled)
                self.publish()
                self.record(update)
        self.commit()
        self.stop.check()

    def remaining_steps(self) -> Iterator[int]:
        while self.state.step < self.config.steps and not self.stop:
            self.clock = Clock()
            yield self.state.step

    def keep_generating(self) -> None:
        """Consumes: the current weights. Fills the pools' queues; returns at once."""
        self.observer.phase("rollout")
        self.collector.keep_generating(self.weights)

    def commit(self) -> None:
        """The state that the last step left, if a commit is due: each rank writes its shard, then the manifest makes it one. The pools work meanwhile."""
        new = self.state.step - self.committed
        if new < self.config.commit_every and not (new and (self.stop or self.state.step == self.config.steps)):
            return
        self.observer.phase("commit")
        with self.stop.held():
            self.observer.sync()
            shards = self.learners.save(self.checkpoints.prepare(self.state.step))
            commit = self.checkpoints.write(self.state, shards)
        self.committed, self.committed_bytes, self.rolled_back = self.state.step, commit.size, 0
        self.clock.lap("commit")
        log.info("committed %s: %.1f MB in %.2f s", commit.name, commit.size / 1e6, self.clock.seconds["commit"])

    def take(self, step: int) -> Batch:
        """Waits for: a full step of scored groups."""
        self.observer.phase("rollout")
        self._wait(lambda: bool(self.buffer.ready()), f"rollouts and scores of step {step}")
        batch = self.buffer.take(step, self.weights.version)
        self.clock.lap("rollout")
        return batch

    def evaluate(self, batch: Batch) -> Evaluated:
        """Reference log-probs, critic values and the policy's own log-probs, side by side, each only if the algorithm needs it."""
        self.observer.phase("evaluate")
        begun = self.learners.infer(batch.rollouts)
        reference = self._reference_logprobs(batch)
        values, proximal = (self.learners.inferred(begun, role) for role in ("critic", "policy"))
        evaluated = Evaluated(batch=batch, reference=reference, values=values, proximal=proximal)
        self.clock.lap("evaluate")
        return evaluated

    def assemble(self, evaluated: Evaluated) -> Assembled:
        """One call over the whole step; its table goes to the learners and, at the same time, to Parquet."""
        batch = evaluated.batch
        parts = (batch.rollouts, batch.scores, evaluated.reference, evaluated.values, evaluated.proximal)
        counts, tables = tuple(map(len, parts)), [table for part in parts for table in part]
        how = Assembly.of(self.config, self.kl.coef)

        def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
            return tuple(worker.assemble.options(num_returns=2).remote(how, batch.sample_ids, counts, *tables))

        [(summary, (experience,))] = self.stage.map(self.roles.assembler, "assembling", [send])
        self._log(batch.step, experience)
        self.clock.lap("assemble")
        return Assembled(batch=batch, experience=experience, report=summary)

    def learn(self, assembled: Assembled) -> Update:
        """Critic and policy gangs train on the step, side by side; afterwards every sample of it counts as trained."""
        self.observer.phase("learn")
        policy, critic = self.learners.update(assembled.experience, assembled.batch.step, self.kl.coef)
        update = Update(batch=assembled.batch, summary=assembled.report, policy=policy, critic=critic)
        update.check(self.config)
        ended = (*assembled.batch.chunks, *assembled.batch.emptied)
        self.ledger.close(ended, trained=update.policy.samples)
        for chunk in ended:
            self.buffer.forget(chunk)
        self.clock.lap("learn")
        return update

    def publish(self) -> None:
        """version + 1: the policy's weights leave the learner and are pulled by whoever needs them."""
        self.observer.phase("publish")
        self.weights = self.learners.publish(self.weights.version + 1)
        self.clock.lap("publish")

    def record(self, update: Update) -> None:
        """Metrics, KL controller, the ledger's invariant, the state to commit; waits for the step's Parquet file."""
        self._wait(lambda: self.logged > update.batch.step, "the experience log")
        self.folder.check_epoch()
        account = self.ledger.check()
        kl_coef, self.kl = self.kl.coef, self.kl.update(update.summary.kl_per_rollout, update.summary.samples)
        collected, self.collector.collected = self.collector.collected, Collected()
        self.state = self._state_after(update.batch.step + 1)
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
                incidents=self._incidents(),
            )
        )

    # ---- back to a commit ----

    def recover(self, error: RunError) -> None:
        """Rebuild the learners that were lost and take everything back to the last commit; pool workers live on. Raises what that cannot mend."""
        decision = decide(error, gangs=self.roles.gangs.keys(), in_a_row=self.rolled_back, config=self.config.cluster)
        if decision.stop:
            if self.rolled_back:
                raise RunError(error.who, error.phase, f"{decision.stop}:\n{error.cause}", error.remedy, error.fault) from error
            raise error
        self.rolled_back += 1
        self.rolled_back_in_all += 1
        started = time.monotonic()
        log.warning("recovering from: %s", error)
        self.observer.phase("recover")
        try:
            with self.stop.held():
                commit = self.checkpoints.latest(self.observer.remark)
                self.learners.rebuild(decision.rebuild if commit else self.roles.gangs)  # without a commit, the start is a fresh learner's
                self.restore(commit)
        except RunError as again:  # another gang was lost, too
            self.recover(again)
            return
        told = f"{error.who} failed during '{error.phase}' ({error.fault.value if error.fault else 'error'})"
        self.observer.remark(f"{told}; back to step {self.state.step}, recovered in {time.monotonic() - started:.1f} s")

    def restore(self, commit: Commit | None) -> None:
        """Take ledger, buffer, cursor, version, metrics and the learners back together; None: to the start, where the learners must be already.

        Raises RunError when a learner cannot read its shards, or began with another model than the commit did.
        """
        for pool in self.roles.pools:
            pool.drop_work()
        if commit is not None:
            self.learners.restore(commit, self.checkpoints.folder)
        self._take_up(commit.state if commit else self.start)
        if commit is not None and self.weights.checksum != commit.state.weights:
            raise RunError("policy[0]", "restore", f"its weights are not those that commit {commit.name} was made of", _INEXACT)
        self.observer.rewind(self.state.step)
        self.collector.reissue(self.weights)

    def _take_up(self, state: DriverState) -> None:
        """Stand where `state` says; the learners hold the weights that belong to it."""
        self.state = state
        self.committed = self.logged = state.step
        self.kl = KLController.of(self.config.algorithm, coef=state.kl_coef)
        self.ledger = Ledger.of(self.config.batch.group_size, state.ledger, state.version)
        self.buffer = Buffer(self.ledger, self.config.batch.samples, MAX_STALENESS)
        self.collector = Collector(self.config, self.prompts, self.roles.rollout, self.roles.reward, self.ledger, self.buffer)
        self.weights = self.learners.publish(state.version)

    def _state_after(self, step: int) -> DriverState:
        return DriverState(
            step=step,
            version=self.weights.version,
            weights=self.weights.checksum,
            kl_coef=self.kl.coef,
            ledger=self.ledger.state(),
            models=self.roles.models,
        )

    # ---- calls ----

    def _incidents(self) -> dict[str, float]:
        """What happened since the step before: bytes committed (their time is among the seconds); since this process began: what was lost."""
        committed, self.committed_bytes = self.committed_bytes, 0
        replaced = sum(pool.replaced for pool in self.roles.pools)
        return {"committed_bytes": committed, "replaced_workers": replaced, "rolled_back": self.rolled_back_in_all}

    def _reference_logprobs(self, batch: Batch) -> tuple[ObjectRef, ...]:
        if self.roles.reference is None:
            return ()

        def logprobs(rollouts: ObjectRef, number: int) -> Callable[[Any, int], tuple[ObjectRef, ...]]:
            return lambda worker, attempt: tuple(worker.logprobs.options(num_returns=2).remote(rollouts, number, attempt))

        calls = [logprobs(rollouts, number) for rollouts, number in zip(batch.rollouts, batch.chunks, strict=True)]
        return tuple(data[0] for _, data in self.stage.map(self.roles.reference, "reference log-probs", calls))

    def _log(self, step: int, experience: ObjectRef) -> None:
        """Write the step's experience while the learners learn from it."""
        path = str(self.folder.path / "experience" / f"step={step}" / "experience.parquet")

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

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.pump.run_until(condition, timeout_s=2 * self.config.cluster.call_timeout_s, waiting_for=what)
