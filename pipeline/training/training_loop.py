"""The training loop of every rank, from the tables to the exported weights; each rank has its own learner.

    restore, or measure and export -> (update -> [measure -> export the best] -> [checkpoint]) ... -> done

An update depends only on the weights, the table and the update's number. So a training that resumes from a checkpoint
is the same to the bit, and a lost worker costs only the updates since the last checkpoint. Left out: Ray Train, and how
ranks reach each other and the driver; the loop sees only `Peers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from cluster.faults import RunError
from pipeline.training.checkpoints import TrainingCheckpoints
from pipeline.training.events import Event, Message, Phase, Progressed, Restored
from pipeline.training.job import HeldoutLoss, TrainingJob, TrainingState

if TYPE_CHECKING:
    from actors.learner.learner import Learner, UpdateReport

MAX_LOSS = 700.0  # nats: exp of more overflows float64; a uniform guess among a million words has a loss of 14


class Peers(Protocol):
    """The other ranks and the driver."""

    def tell(self, event: Event) -> bool:
        """Send an event to the driver, from rank 0 alone; called on all ranks.

        Returns whether the training is asked to stop, on rank 0; false on the others.
        """
        ...

    def is_stopping(self) -> bool:
        """Whether the training is asked to stop; called on all ranks together, with the same answer."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values that all ranks passed, in the order of ranks; called on all ranks together."""
        ...


@dataclass(slots=True, kw_only=True)
class TrainingLoop:
    """The training loop of one rank.

    learner: connected, with the weights to begin from. train, heldout: the job's tables.
    """

    job: TrainingJob
    learner: Learner
    train: pa.Table
    heldout: pa.Table
    checkpoints: TrainingCheckpoints
    peers: Peers
    stops: bool = False  # asked to stop: the loop ends after the current updates

    def run(self) -> TrainingState | None:
        """Train to the end, from the last checkpoint if there is one; then the best weights are in `job.best`.

        If asked to stop, it returns the state reached, in which `over` is False, or None if nothing was begun. Raises
        RunError when the training diverges.
        """
        self.stops = self.peers.is_stopping()
        state = self._restored()
        if state is None and not self.stops:
            state = self._initial()
        while state is not None and not state.over and not self.stops:
            state = self._train(state)
        return state

    def _restored(self) -> TrainingState | None:
        is_first = self.learner.rank == 0
        mine = self.checkpoints.latest(lambda text: self.peers.tell(Message(text=text))) if is_first else None
        self.learner.await_peers()  # rank 0 reads all files to verify them, which may take long
        found = self.peers.gather(mine)[0]
        if found is None:
            self.peers.tell(Restored(history=()))
            return None
        self._enter("restore")
        state = self.checkpoints.restore(self.learner, found)
        self.peers.tell(Restored(history=state.history))
        return state

    def _initial(self) -> TrainingState:
        before = self._measure("measure", "Check the weights it begins from.")
        scale, values = self._export()  # a model that training cannot improve is kept as it is
        self.stops = self.peers.is_stopping()
        best = before.model_copy(update={"loss": MAX_LOSS}) if self.job.new_head else before
        return TrainingState(before=before, best=best, scale=scale, probe_values=values)

    def _train(self, state: TrainingState) -> TrainingState:
        """Do `checkpoint_every` updates, or those left in the epoch; at its end the held-out loss is measured."""
        job, done = self.job, state.done
        count = min(job.checkpoint_every, job.minibatches - done)
        phase = f"epoch {state.epoch + 1}, updates {done + 1}-{done + count} of {job.minibatches}"
        report = self._update(phase, state, count)
        record: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "updates": state.epoch * job.minibatches + done + count,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "skipped": report.skipped,
            "learning_rate": report.learning_rate,
            "seconds": report.seconds,
            "text": f"loss {report.loss:.3f}",
        }
        if done + count < job.minibatches:
            return self._advance(state, record, done=done + count)
        epoch = state.epoch + 1
        measured = self._measure(f"measure after epoch {epoch}", self._lower_rate())
        record |= measured.values | {"text": f"{record['text']}  {measured.text}"}
        is_worse, is_last = job.early_stop and measured.loss >= state.best.loss, epoch == job.epochs
        changes: dict[str, Any] = {} if is_worse else {"best": measured}
        if not is_worse and (job.early_stop or is_last):
            changes["scale"], changes["probe_values"] = self._export()
        return self._advance(state, record, epoch=epoch, done=0, over=is_worse or is_last, **changes)

    def _advance(self, state: TrainingState, record: dict[str, Any], **changes: Any) -> TrainingState:
        """Record the updates; write a checkpoint if one is due, if the training is over, or if it is asked to stop."""
        state = state.model_copy(update={**changes, "history": (*state.history, record)})
        updates = int(record["updates"])
        self.stops = self.peers.is_stopping()
        if state.over or self.stops or updates - state.saved >= self.job.checkpoint_every:
            self._enter(f"checkpoint after update {updates}")
            state = state.model_copy(update={"saved": updates})
            shard = self.checkpoints.write_shard(self.learner, state)
            self.learner.await_peers()
            shards = self.peers.gather(shard)
            if self.learner.rank == 0:
                self.checkpoints.seal(state, shards)
        self.peers.tell(Progressed(record=record))
        return state

    def _update(self, phase: str, state: TrainingState, count: int) -> UpdateReport:
        from actors.learner.learner import UpdatePlan

        self._enter(phase)
        plan = UpdatePlan(
            step=state.epoch,
            epochs=1,
            minibatches=self.job.minibatches,
            seed=self.job.seed,
            aggregation="token_mean",
            first=state.done,
            count=count,
        )
        report = self.learner.update(self.train, plan)
        self._check_loss(report.loss, phase, self._lower_rate())
        return report

    def _measure(self, phase: str, remedy: str) -> HeldoutLoss:
        self._enter(phase)
        measured = self.job.measure(self.learner, self.heldout)
        self._check_loss(measured.loss, phase, remedy)
        return measured

    def _export(self) -> tuple[float, dict[str, list[float]]]:
        """Export the weights; returns what `Learner.export` returned, and the learner's numbers for the probes."""
        self._enter("export")
        scale = self.learner.export(str(self.job.best))
        self._enter("compute what the saved model is compared with")
        return scale, self.job.probes.noted(self.learner, self.heldout)

    def _enter(self, phase: str) -> None:
        """Begin a phase on all ranks together.

        The ranks wait for each other first: one of them may still write the model or read a checkpoint, and that can
        take longer than the deadline of a collective.
        """
        self.learner.await_peers()
        self.peers.tell(Phase(name=phase))

    def _check_loss(self, loss: float, phase: str, remedy: str) -> None:
        if not loss < MAX_LOSS:
            cause = f"its loss is {loss:.3g}, so its weights are not finite or have diverged"
            raise RunError(self.job.name, phase, cause, remedy)

    def _lower_rate(self) -> str:
        return f"Lower {self.job.section}.learner.learning_rate, now {self.job.learner.learning_rate:g}."
