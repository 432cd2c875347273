"""Calls to the assembler: the experience of a step is made in one call, then written to disk while learners train."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.pool import Pool
from cluster.runtime import Runtime
from cluster.shared import check_seen
from cluster.storage import Folder, StoredFile
from cluster.work import Work
from pipeline.assembly.assembly import Assembly
from pipeline.config.loop_config import LoopConfig
from pipeline.folder.run_folder import RunFolder
from pipeline.loop.phases import EvaluatedBatch, StepExperience
from pipeline.samples.buffer import Batch

if TYPE_CHECKING:
    from ray import ObjectRef


class StepAssembler:
    """The assembler, as the driver speaks to it."""

    logged: int  # steps whose experience is on disk; the driver sets it when it takes up a state

    def __init__(self, config: LoopConfig, folder: RunFolder, pool: Pool, runtime: Runtime) -> None:
        self.config = config
        self.folder = folder
        self.pool = pool
        self.runtime = runtime

    def assemble(self, evaluated: EvaluatedBatch, kl_coef: float) -> StepExperience:
        """Make the experience of the whole step in one call, and begin to write it to disk.

        kl_coef: the coefficient of the KL penalty in this step.
        """
        batch = evaluated.batch
        parts = (
            batch.rollouts,
            batch.scores,
            evaluated.reference,
            evaluated.values,
            evaluated.proximal,
            evaluated.turn_advantages,
        )
        counts, tables = tuple(map(len, parts)), [table for part in parts for table in part]
        how = Assembly.of(self.config, kl_coef)

        def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
            return tuple(worker.assemble.options(num_returns=2).remote(how, batch.sample_ids, counts, *tables))

        [(summary, (experience,))] = self.runtime.map(self.pool, "assembling", [send])
        assert summary.version_min >= batch.oldest, (
            f"step {batch.step} has a token of version {summary.version_min}, must be {batch.oldest} or newer"
        )
        if (kl := evaluated.start_kl) is not None:
            summary = replace(summary, kl_per_rollout=kl.per_rollout, kl_per_token=kl.per_token)
        self._log(batch.step, experience)
        return StepExperience(batch=batch, experience=experience, report=summary, turns=evaluated.turns)

    def turns(self, batch: Batch) -> ObjectRef:
        """What a manager learns from this batch, as a reference of a table `Turns`."""
        tables, counts = [*batch.rollouts, *batch.scores], (len(batch.rollouts), len(batch.scores), 0, 0, 0)
        how = Assembly.of(self.config, 0.0)

        def send(worker: Any, attempt: int) -> tuple[ObjectRef, ...]:
            return tuple(worker.turns.options(num_returns=2).remote(how, batch.sample_ids, counts, *tables))

        [(_, (found,))] = self.runtime.map(self.pool, "gathering the turns", [send])
        return found

    def _log(self, step: int, experience: ObjectRef) -> None:
        """Begin to write the step's experience to disk; the learners train on it meanwhile."""
        folder = self.folder.path / "experience" / f"step={step}"
        path, phase = str(folder / "experience.parquet"), f"writing the experience of step {step}"

        def done(file: StoredFile, data: tuple[ObjectRef, ...], attempt: int) -> None:
            check_seen("assembler[0]", phase, Folder(folder), [file])
            self.logged = step + 1

        self.pool.submit(
            Work(
                phase=phase,
                send=lambda worker, attempt: (worker.write.remote(path, experience),),
                on_done=done,
                timeout_s=self.runtime.timeout_s,
            )
        )
