"""`raylign replay`: a step is computed again from the run's files, and compared with its records.

    experience of the step --assemble--> advantages, returns        must be those in the table
    commit, or the model the run began with
        --update on every step's experience since--> losses, norms of the step, as in metrics.jsonl

No prompt is drawn and nothing is generated or scored: the learners alone are started. On the same machine and settings
all is the same to the bit. Left out: the log-probs, values and rewards in the table, which are taken as they were
logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors import ragged
from actors.experience import Experience, Rollouts, Scores
from cluster.events import Pump
from cluster.imports import OWN
from cluster.placement import place
from cluster.runtime import Runtime
from cluster.session import Session
from cluster.signals import load
from cluster.storage import Folder
from pipeline.config.run_config import RunConfig
from pipeline.data.registry import load_task
from pipeline.folder.run_folder import read_history, steps_at
from pipeline.loop.commits import commit_at_or_before
from pipeline.loop.learners import LearnerReports, Learners
from pipeline.loop.metrics import learner_values, manager_values
from pipeline.loop.wiring import declare_roles, demands
from pipeline.observe.log import DriverLog
from pipeline.observe.observer import read_metrics
from pipeline.observe.progress import Progress, waiting
from pipeline.run.stages import WITH_OPTIONS, reward_of

ROUNDING = 1e-4  # relative; what another number of ranks or threads may change


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayComparison:
    """A number that the run recorded, and the same number computed again.

    For a column it is the largest difference of its entries, compared with zero.
    """

    name: str
    recorded: float
    replayed: float

    @property
    def is_same(self) -> bool:
        return self.recorded == self.replayed

    @property
    def is_close(self) -> bool:
        return math.isclose(self.recorded, self.replayed, rel_tol=ROUNDING, abs_tol=ROUNDING / 10)


def replay(config: RunConfig, run_dir: Path, step: int, console: Console) -> bool:
    """Compute a step again and print the comparison. Whether all agrees within rounding.

    Raises ValueError when the run did not record the step, or the experience that leads to it is gone.
    """
    with waiting(console, "load libraries"):
        load("torch", "transformers")
    recorded = {int(record["step"]): record for record in read_metrics(run_dir)}
    if step not in recorded:
        known = f"0 to {max(recorded)}" if recorded else "none"
        raise ValueError(f"--step: must be a step that the run recorded ({known}), got {step}")
    rows = [
        *_advantages(config, _experience(run_dir, step), float(recorded[step]["kl/coef"])),
        *_losses(config, run_dir, step, recorded, console),
    ]
    table = Table(title=f"step {step} of {run_dir.name}", title_justify="left")
    for column in ("", "recorded", "replayed", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(row.name, f"{row.recorded:.9g}", f"{row.replayed:.9g}", f"{row.replayed - row.recorded:.2g}")
    console.print(table)
    same, close = all(row.is_same for row in rows), all(row.is_close for row in rows)
    verdict = "the same to the bit" if same else "the same within rounding" if close else "NOT what the run recorded"
    console.print(Text(f"{len(rows)} numbers computed again: {verdict}."), soft_wrap=True)
    return close


def _experience(run_dir: Path, step: int) -> Experience:
    path = run_dir / "experience" / f"step={step}" / "experience.parquet"
    if not path.is_file():
        raise ValueError(
            f"--step: must be one whose experience, and that of the steps since the commit before it, is there; {path} "
            "is missing"
        )
    return Experience.read(path)


def _advantages(config: RunConfig, experience: Experience, kl_coef: float) -> list[ReplayComparison]:
    """The step assembled again from its own columns."""
    from pipeline.assembly.assembly import Assembly, assemble
    from pipeline.assembly.hierarchy import advantages_table

    table = experience.table
    ids = table["sample_id"]
    rollouts = table.select(Rollouts.schema.names)
    rows = table.num_rows
    scores = Scores.of(
        {
            "sample_id": ids,
            "reward": table["reward"],
            "turn_rewards": table["turn_rewards"],
            "status": ["ok"] * rows,
            "detail": [""] * rows,
        }
    ).table
    reference = (
        [pa.table({"sample_id": ids, "logprobs": table["reference_logprobs"]})]
        if config.algorithm.needs_reference
        else []
    )
    values = [pa.table({"sample_id": ids, "values": table["values"]})] if config.algorithm.needs_critic else []
    proximal = (
        [pa.table({"sample_id": ids, "logprobs": table["proximal_logprobs"]})]
        if config.algorithm.needs_proximal
        else []
    )
    advised = [advantages_table(table)] if config.manager.options else []
    parts = (reference, values, proximal, advised)
    counts, tables = (1, 1, *map(len, parts)), [one for part in parts for one in part]
    _, again = assemble(Assembly.of(config, kl_coef), ids.to_pylist(), counts, rollouts, scores, *tables)
    return [_column(name, table, again) for name in ("advantages", "returns", *config.algorithm.columns)]


def _column(name: str, before: pa.Table, after: pa.Table) -> ReplayComparison:
    old, new = (ragged.flat(table[name])[0] for table in (before, after))
    worst = int(np.abs(new - old).argmax()) if old.size else 0
    return ReplayComparison(
        name=f"{name} (worst of {old.size:,})", recorded=float(old[worst]), replayed=float(new[worst])
    )


def _losses(
    config: RunConfig, run_dir: Path, step: int, recorded: Mapping[int, Mapping[str, Any]], console: Console
) -> list[ReplayComparison]:
    """The learners, from the commit before the step through every step since, to the end of this one."""
    commits, history = Folder(run_dir / "checkpoints"), read_history(run_dir)
    commit = commit_at_or_before(commits, history, step)
    first = commit.state.step if commit else 0
    for number in range(first, step + 1):
        _experience(run_dir, number)
    log_dir = run_dir / "log" / "replay"
    log_dir.mkdir(parents=True, exist_ok=True)
    model = str(run_dir / "finetuned") if config.finetune.epochs else config.model.path
    model = str(run_dir / WITH_OPTIONS) if config.manager.options else model
    with (
        DriverLog(log_dir),
        Progress(console) as progress,
        Session(
            config.cluster,
            log_dir,
            packages=OWN,
            local_cpus=place(config.cluster, demands(config)).cpus,
            folder=run_dir,
        ) as session,
    ):
        progress.stage("start learners", 1)
        placed = session.place(place(config.cluster, demands(config)))
        runtime = Runtime(placed=placed, pump=Pump(), fingerprint=session.fingerprint, config=config.cluster)
        roles = declare_roles(
            config, runtime, model, reward_of(config, load_task(config.task, config.data, config.model.path), run_dir)
        )
        learners = Learners(config, roles, runtime)
        try:
            for gang in roles.gangs.values():
                gang.start()
            learners.connect()
            if commit is not None:
                learners.restore(commit, commits)
            progress.stage("replay", step + 1 - first)
            for number in range(first, step + 1):
                learners.config = config.model_copy(update={"steps": steps_at(history, number)})
                reports = _update(learners, run_dir, number, float(recorded[number]["kl/coef"]))
                progress.advance(f"step {number}: policy loss {reports.policy.loss:.4g}")
        finally:
            roles.close()
            placed.remove()
    return _compared(reports, recorded[step])


def _compared(reports: LearnerReports, then: Mapping[str, Any]) -> list[ReplayComparison]:
    """The learners' numbers beside those in the record of the step."""
    values = learner_values("policy", reports.policy)
    if reports.critic is not None:
        values |= learner_values("critic", reports.critic)
    if reports.manager is not None:
        values |= manager_values(reports.manager)
    return [
        ReplayComparison(name=name, recorded=float(then[name]), replayed=value)
        for name, value in values.items()
        if then.get(name) is not None
    ]


def _update(learners: Learners, run_dir: Path, step: int, kl_coef: float) -> LearnerReports:
    import ray

    from pipeline.assembly.hierarchy import manager_turns

    table, manager = _experience(run_dir, step).table, learners.config.manager
    rollouts = table.select(Rollouts.schema.names)
    turns = ray.put(manager_turns(rollouts, table["turn_rewards"], manager)) if manager.options else None
    return learners.update(ray.put(table), step, kl_coef, turns)
