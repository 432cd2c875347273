"""`raylign replay`: a step computed again from what the run wrote down, and compared with what it recorded.

    experience of the step --assemble--> advantages, returns        must be those in the table
    commit, or the model the run began with --update on every step's experience since--> losses, norms of the step, as in metrics.jsonl

No prompt is drawn and nothing is generated or scored: the learners alone are started. On the same machine and settings all is the same to
the bit. Left out: the log-probs, values and rewards in the table, which are taken as they were logged.
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
from actors.learner import UpdateReport
from cluster.events import Pump
from cluster.session import Session
from cluster.storage import Folder
from pipeline.checkpoint import commit_at_or_before
from pipeline.config import RunConfig
from pipeline.learners import Learners
from pipeline.observe.journal import Journal
from pipeline.observe.metrics import learner_values
from pipeline.observe.observer import read_metrics
from pipeline.observe.progress import Progress
from pipeline.roles import Stage, declare_roles, demands, place
from pipeline.run import PACKAGES
from pipeline.run_folder import read_history

ROUNDING = 1e-4  # relative; what another number of ranks or threads may change


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A number the run recorded and the same number computed again; for a column, the largest difference of its entries against zero."""

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
    recorded = {int(record["step"]): record for record in read_metrics(run_dir)}
    if step not in recorded:
        known = f"0 to {max(recorded)}" if recorded else "none"
        raise ValueError(f"--step: must be a step that the run recorded ({known}), got {step}")
    rows = [*_advantages(config, _experience(run_dir, step), float(recorded[step]["kl/coef"])), *_losses(config, run_dir, step, recorded, console)]
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
        raise ValueError(f"--step: must be one whose experience, and that of the steps since the commit before it, is there; {path} is missing")
    return Experience.read(path)


def _advantages(config: RunConfig, experience: Experience, kl_coef: float) -> list[Compared]:
    """The step assembled again from its own columns."""
    from pipeline.assemble import Assembly, assemble

    table = experience.table
    ids = table["sample_id"]
    rollouts = table.select(Rollouts.schema.names)
    rows = table.num_rows
    scores = Scores.of(
        {"sample_id": ids, "reward": table["reward"], "turn_rewards": table["turn_rewards"], "status": ["ok"] * rows, "detail": [""] * rows}
    ).table
    reference = [pa.table({"sample_id": ids, "logprobs": table["reference_logprobs"]})] if config.algorithm.needs_reference else []
    values = [pa.table({"sample_id": ids, "values": table["values"]})] if config.algorithm.needs_critic else []
    proximal = [pa.table({"sample_id": ids, "logprobs": table["proximal_logprobs"]})] if config.algorithm.needs_proximal else []
    counts = (1, 1, len(reference), len(values), len(proximal))
    _, again = assemble(Assembly.of(config, kl_coef), ids.to_pylist(), counts, rollouts, scores, *reference, *values, *proximal)
    return [_column(name, table, again) for name in ("advantages", "returns")]


def _column(name: str, before: pa.Table, after: pa.Table) -> Compared:
    old, new = (ragged.flat(table[name])[0] for table in (before, after))
    worst = int(np.abs(new - old).argmax()) if old.size else 0
    return Compared(name=f"{name} (worst of {old.size:,})", recorded=float(old[worst]), replayed=float(new[worst]))


def _losses(config: RunConfig, run_dir: Path, step: int, recorded: Mapping[int, Mapping[str, Any]], console: Console) -> list[Compared]:
    """The learners, from the commit before the step through every step since, to the end of this one."""
    from pipeline.tasks.task import load_task

    commits = Folder(run_dir / "checkpoints")
    commit = commit_at_or_before(commits, read_history(run_dir), step)
    first = commit.state.step if commit else 0
    for number in range(first, step + 1):
        _experience(run_dir, number)
    log_dir = run_dir / "log" / "replay"
    log_dir.mkdir(parents=True, exist_ok=True)
    model = str(run_dir / "finetuned") if config.finetune.epochs else config.model.path
    with (
        Journal(log_dir),
        Progress(console) as progress,
        Session(config.cluster, log_dir, packages=PACKAGES, local_cpus=place(config, demands(config)).cpus) as session,
    ):
        progress.stage("start learners", 1)
        placed = session.place(place(config, demands(config)))
        stage = Stage(placed=placed, pump=Pump(), fingerprint=session.fingerprint, timeout_s=config.cluster.call_timeout_s)
        roles = declare_roles(config, stage, model, load_task(config.task, config.data, config.model.path).reward)
        learners = Learners(config, roles, stage)
        try:
            roles.start_gangs()
            if commit is not None:
                learners.restore(commit, commits)
            progress.stage("replay", step + 1 - first)
            for number in range(first, step + 1):
                reports = _update(learners, run_dir, number, float(recorded[number]["kl/coef"]))
                progress.advance(f"step {number}: policy loss {reports['policy'].loss:.4g}")
        finally:
            roles.close()
            placed.remove()
    values = {name: value for role, report in reports.items() for name, value in learner_values(role, report).items()}
    then = recorded[step]
    return [Compared(name=name, recorded=float(then[name]), replayed=value) for name, value in values.items() if then.get(name) is not None]


def _update(learners: Learners, run_dir: Path, step: int, kl_coef: float) -> dict[str, UpdateReport]:
    import ray

    policy, critic = learners.update(ray.put(_experience(run_dir, step).table), step, kl_coef)
    return {"policy": policy} | ({"critic": critic} if critic else {})
