"""The work that is already done in a run's folder, in words, for the last lines of a run that ends early.

Left out: whether it is still valid, which the next start checks (`manifests.py`, `pipeline/loop/commits.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.folder.manifests import ORDER, StageName
from pipeline.folder.run_folder import HISTORY, counts, read_history

STAGES: dict[StageName, str] = {
    "sft": "fine-tuning",
    "reward": "reward model",
    "rl": "reinforcement learning",
    "evaluate": "evaluation",
}
_COMMIT = re.compile(r"step=(\d+)-epoch=(\d+)")


def kept_work(run_dir: Path) -> str:
    """The stages that are done or begun, as "fine-tuning, reinforcement learning up to step 20"; "" if none."""
    found = []
    for stage in ORDER:
        if _is_finished(run_dir, stage):
            found.append(STAGES[stage])
        elif part := _committed(run_dir) if stage == "rl" else _checkpointed(run_dir / stage):
            found.append(f"{STAGES[stage]} up to {part}")
    return ", ".join(found)


def how_it_ends(run_dir: Path, again: str) -> str:
    """A sentence that says what is kept and how to go on. again: the command for that."""
    if not (run_dir / HISTORY).is_file():
        return "Nothing was begun."
    found = kept_work(run_dir)
    return (
        f"Kept in {run_dir}: {found}. To go on from there: {again}"
        if found
        else f"Nothing was finished or committed yet. To begin again: {again}"
    )


def _is_finished(run_dir: Path, stage: StageName) -> bool:
    try:
        return bool(json.loads((run_dir / "stages" / f"{stage}.json").read_text(encoding="utf-8"))["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checkpointed(folder: Path) -> str:
    """The update from which a training on Ray Train can go on; "" if there is no checkpoint."""
    updates = [
        int(path.parent.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("updates-*/commit.json")
    ]
    return f"update {max(updates)}" if updates else ""


def _committed(run_dir: Path) -> str:
    """The step of the run's newest commit; "" if there is none."""
    found = [_COMMIT.fullmatch(path.parent.name) for path in (run_dir / "checkpoints").glob("*/commit.json")]
    try:
        history = read_history(run_dir)
    except ValueError:
        return ""
    steps = [
        step for step, epoch in (map(int, match.groups()) for match in found if match) if counts(history, epoch, step)
    ]
    return f"step {max(steps)}" if steps else ""
