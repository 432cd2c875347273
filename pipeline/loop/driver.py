"""The driver runs the loop of reinforcement learning: one thread, one event pump.

    buffer --take--> Batch --evaluate--> EvaluatedBatch --assemble--> StepExperience --learn--> Update --publish-->

The driver tells the actors what to do. It computes nothing itself and never sees a token. The loop asks an algorithm
for its needs, never for its name. With max_staleness = k the pools work up to k steps ahead, in logical time: step t is
sampled by version max(0, t - k), whoever is fast or slow. After a step, one small `DriverState` holds everything that
the driver knows. A `DriverState`, the learners' shards and the older weights that samples in flight need make a commit;
`restore` takes the whole run back to a commit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.faults import RunError
from cluster.runtime import Runtime
from cluster.stopping import StopNow, Stopped, StopRequest
from pipeline.algorithms.kl_controller import KLController
from pipeline.config.loop_config import LoopConfig
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.commits import Checkpoints, Commit, DriverState
from pipeline.loop.elastic import Elastic
from pipeline.loop.inference import Inference
from pipeline.loop.learners import Learners
from pipeline.loop.metrics import Incidents, StepCounts, step_metrics
from pipeline.loop.phases import Clock, EvaluatedBatch, StepExperience, Update
from pipeline.loop.recovery import decide
from pipeline.loop.step_assembler import StepAssembler
from pipeline.loop.wiring import Roles
from pipeline.observe.observer import Observer
from pipeline.samples.buffer import Batch, Buffer
from pipeline.samples.collector import CollectionCounts, Collector
from pipeline.samples.ledger import Ledger
from pipeline.samples.published import Versions

if TYPE_CHECKING:
    from pipeline.encoding.prompt_stream import PromptStream

log = logging.getLogger(__name__)


class Driver:
    """Reinforcement learning, from the first weights to the last version."""

    state: DriverState  # after the last whole step
    committed: int  # steps of the newest commit
    kl: KLController
    ledger: Ledger
    buffer: Buffer
    collector: Collector
    versions: Versions

    def __init__(
        self,
        config: LoopConfig,
        folder: RunFolder,
        roles: Roles,
        runtime: Runtime,
        prompts: PromptStream,
        observer: Observer,
        stop: StopRequest | None = None,
    ) -> None:
        """Needs the processes of `roles` to be started; call `begin` before anything else.

        stop: the stop request of the whole run; None: the driver makes its own.
        """
        self.config = config
        self.folder = folder
        self.roles = roles
        self.runtime = runtime
        self.pump = runtime.pump
        self.prompts = prompts
        self.observer = observer
        self.checkpoints = Checkpoints(folder, config.keep_commits)
        self.stop = StopRequest() if stop is None else stop
        self.pump.add_tick(self.stop.check, every_s=0.2)
        self.rolled_back = 0  # recoveries since the last commit
        self.incidents = Incidents(roles.pools, observer.say)
        self.clock = Clock()
        self.learners = Learners(config, roles, runtime)
        self.elastic = Elastic(runtime, roles, observer.say)
        self.inference = Inference(config, roles, runtime, self.learners, observer.say)
        self.assembler = StepAssembler(config, folder, roles.assembler, runtime)
        self.start = DriverState(kl_coef=config.algorithm.kl_coef)

    def begin(self, commit: Commit | None) -> None:
        """Wait until every process is ready, then take up the run at `commit`; None: at the start, version 0.

        Learners that are lost meanwhile are rebuilt, as in `run`. Raises RunError for a failure that cannot be
        recovered from.
        """
        try:
            self.learners.connect()
            self.restore(commit)
        except RunError as error:
            self.recover(error)
        while True:
            try:
                for pool in self.roles.pools:
                    pool.wait_ready()
                return
            except RunError as error:  # learners that are lost meanwhile; for a pool there is no recovery
                self.recover(error)

    def run(self, export_to: Path) -> None:
        """Do every remaining step, then export the policy.

        When learners are lost, they are rebuilt, and the run goes on from the last commit.

        Raises Stopped, with everything committed, when a signal asked for it; RunError for a failure that cannot be
        recovered from.
        """
        with self.stop, self.stop.at_once(False):
            while not self.stop:
                try:
                    self._train()
                    self.learners.export(export_to)
                    return
                except StopNow:
                    break
                except RunError as error:
                    try:
                        self.recover(error)
                    except StopNow:  # while it waited for a node; what it goes back to is committed
                        raise Stopped(self.stop.number, self._standing(), self.committed) from error
            self.commit()
        raise Stopped(self.stop.number, self._standing(), self.committed)

    def _train(self) -> None:
        for step in self.remaining_steps():
            self.settle()
            if self.state.step != step:  # the newest commit could not be read
                continue
            self.keep_generating()
            self.commit()
            batch = self.take(step)
            evaluated = self.evaluate(batch)
            assembled = self.assemble(evaluated)
            with self.stop.held():  # once learning begins, the step is finished before a stop
                update = self.learn(assembled)
                self.publish()
                self.record(update)
        self.commit()
        self.stop.check()

    def _standing(self) -> str:
        done = f"after step {self.committed} of {self.config.steps}"
        return f"{done}, which is committed" if self.committed else f"before step 1 of {self.config.steps} was done"

    def remaining_steps(self) -> Iterator[int]:
        while self.state.step < self.config.steps and not self.stop:
            self.clock = Clock()
            yield self.state.step

    def settle(self) -> None:
        """Between two steps nothing is under way, so this is when workers and learners change their nodes.

        Learners whose node is about to leave commit first. Samples of later steps that wait are made again if a node
        that may hold them is about to leave.
        """
        if self.elastic.settle():
            self.collector.renew()
        if self.elastic.core_can_move:
            self.commit(now=True)
            self.observer.phase("move")
            self._go_back(frozenset(), "the learners' node is about to leave")
            self.clock = Clock()

    def keep_generating(self) -> None:
        """Fill the pools' queues and return at once. Consumes: the current weights."""
        self.observer.phase("rollout")
        self.collector.keep_generating(self.state.step, self.versions)

    def commit(self, now: bool = False) -> None:
        """Commit the state after the last step, if a commit is due, or if it must be done now.

        Each rank writes its shard; then the manifest is written, which makes the commit whole. The pools go on working
        meanwhile.
        """
        new = self.state.step - self.committed
        is_last = now or bool(self.stop) or self.state.step == self.config.steps
        if new < self.config.commit_every and not (new and is_last):
            return
        self.observer.phase("commit")
        with self.stop.held():
            self.observer.sync()
            shards = self.learners.save(self.checkpoints.prepare(self.state.step), self.versions.older)
            commit = self.checkpoints.write(self.state, shards)
        self.committed, self.incidents.committed_bytes, self.rolled_back = self.state.step, commit.size, 0
        log.info("committed %s: %.1f MB in %.2f s", commit.name, commit.size / 1e6, self.clock.lap("commit"))

    def take(self, step: int) -> Batch:
        """Take the batch of a step from the buffer. Waits for: a full step of scored groups."""
        self.observer.phase("rollout")
        self.runtime.wait(lambda: self.buffer.is_ready(step), f"rollouts and scores of step {step}")
        batch = self.buffer.take(step, self.versions.newest.version)
        self.clock.lap("rollout")
        return batch

    def evaluate(self, batch: Batch) -> EvaluatedBatch:
        """Compute the reference's log-probs, the critic's values and the policy's log-probs of a batch, in parallel.

        Each is computed only if the algorithm needs it. A sample that kills or hangs the reference is quarantined; then
        its whole group is left out of the batch, and the step is filled up with a fresh group.
        """
        self.observer.phase("evaluate")
        evaluated = self.inference.evaluate(batch, self.collector)
        self.clock.lap("evaluate")
        if self.collector.quarantine(batch.chunks):
            return self.evaluate(self.take(batch.step))
        return self.inference.advise(evaluated, self.assembler)

    def assemble(self, evaluated: EvaluatedBatch) -> StepExperience:
        """Make the experience of the whole step in one call.

        The table goes to the learners and into a Parquet file; `record` waits for the file.
        """
        assembled = self.assembler.assemble(evaluated, self.kl.coef)
        self.clock.lap("assemble")
        return assembled

    def learn(self, assembled: StepExperience) -> Update:
        """Train the policy and the critic on the step, in parallel; then its samples are closed in the ledger."""
        self.observer.phase("learn")
        found = self.learners.update(assembled.experience, assembled.batch.step, self.kl.coef, assembled.turns)
        update = Update(batch=assembled.batch, summary=assembled.report, **found.by_role)
        update.check(self.config.policy, self.config.rollout)
        self.buffer.close(assembled.batch, trained=update.policy.samples)
        self.clock.lap("learn")
        return update

    def publish(self) -> None:
        """Publish the policy's weights as version + 1; workers pull them when they need them."""
        self.observer.phase("publish")
        weights = self.learners.publish(self.versions.newest.version + 1)
        self.versions = self.versions.with_next(weights, self.config.max_staleness if self.config.repeats else 0)
        self.clock.lap("publish")

    def record(self, update: Update) -> None:
        """Finish the step: check the ledger, update the KL coefficient and the state, report the metrics.

        Waits for: the step's Parquet file.
        """
        self.runtime.wait(lambda: self.assembler.logged > update.batch.step, "the experience log")
        self.folder.check_epoch()
        account = self.ledger.check()
        kl_coef, self.kl = self.kl.coef, self.kl.update(update.summary.kl_per_rollout, update.summary.samples)
        collected, self.collector.collected = self.collector.collected, CollectionCounts()
        self.state = self._state_after(update.batch.step + 1)
        self.clock.lap("record")
        incidents, seconds = self.incidents.of_step(collected, self.elastic.unplaced), dict(self.clock.seconds)
        self.elastic.step(seconds, chunks=len(update.batch.chunks) + len(update.batch.emptied))
        counts = StepCounts(account=account, collected=collected, seconds=seconds, incidents=incidents)
        self.observer.step(step_metrics(update, counts, version=self.versions.newest.version, kl_coef=kl_coef))

    # ---- back to a commit ----

    def recover(self, error: RunError) -> None:
        """Rebuild the learners that were lost and take the run back to the last commit; pool workers live on.

        Raises RunError for a failure that cannot be recovered from this way.
        """
        decision = decide(error, gangs=self.roles.gangs.keys(), in_a_row=self.rolled_back, config=self.config.cluster)
        decision.stop_if_hopeless(error, in_a_row=self.rolled_back)
        # nodes come and go; only what fails on living ones is counted against the run
        self.rolled_back += not self.elastic.has_lost_nodes()
        self.incidents.rolled_back += 1
        log.warning("recovering from: %s", error)
        self.observer.phase("recover")
        self._go_back(
            decision.rebuild,
            f"{error.who} failed during '{error.phase}' ({error.fault.value if error.fault else 'error'})",
        )

    def _go_back(self, rebuild: frozenset[str], why: str) -> None:
        """Take the run back to the last commit, with these gangs rebuilt; all of them if they need other nodes.

        A stop ends the wait for a node (StopNow), but nothing after it.
        """
        started = time.monotonic()
        for pool in self.roles.pools:  # first: it may need what is lost
            pool.drop_work()
        try:
            if self.elastic.find_places(rebuilds=bool(rebuild)):
                rebuild = frozenset(self.roles.gangs)
            with self.stop.held():
                commit = self.checkpoints.latest(self.observer.remark)
                to_start = commit is None and self.learners.has_moved  # only fresh learners hold the starting weights
                self.learners.connect(anew=self.roles.gangs if to_start else rebuild)
                self.restore(commit)
        except RunError as again:  # another gang was lost meanwhile
            self.recover(again)
            return
        self.observer.progress.rewind(self.state.step)
        self.observer.remark(f"{why}; back to step {self.state.step}, recovered in {time.monotonic() - started:.1f} s")

    def restore(self, commit: Commit | None) -> None:
        """Take ledger, buffer, prompt cursor, version, metrics and learners back to a commit; None: to the start.

        For None the learners must hold their starting weights already. Raises RunError when a learner cannot read its
        shards, when it began with another model than the commit's, or when the restored weights are not the committed
        ones.
        """
        for pool in self.roles.pools:
            pool.drop_work()
        if commit is not None:
            self.learners.restore(commit, self.checkpoints.folder)
        self._take_up(commit.state if commit else self.start)
        older = self.learners.older(commit, self.checkpoints.folder) if commit else ()
        self.versions = Versions(self.learners.publish(self.state.version), older)
        if commit is not None:
            commit.check_weights(self.versions)
        self.observer.rewind(self.state.step)
        self.collector.reissue(self.versions)

    def _take_up(self, state: DriverState) -> None:
        """Make `state` the current state; the learners must hold its weights already."""
        self.state = state
        self.committed = self.assembler.logged = state.step
        self.kl = KLController.of(self.config.algorithm, coef=state.kl_coef)
        self.ledger = Ledger.of(self.config.batch.group_size, state.ledger)
        self.buffer = Buffer(self.ledger, self.config.batch.samples, self.config.max_staleness)
        self.collector = Collector(
            self.config, self.prompts, self.roles.rollout, self.roles.reward, self.buffer, self.observer.say
        )

    def _state_after(self, step: int) -> DriverState:
        return DriverState(
            step=step,
            version=self.versions.newest.version,
            weights=self.versions.newest.checksum,
            older={one.version: one.checksum for one in self.versions.older},
            kl_coef=self.kl.coef,
            ledger=self.ledger.state(),
            models=self.roles.models,
        )
