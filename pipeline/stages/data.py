"""The data report of a run: what became of every row of the files, first as text, then as tokens."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import RunConfig
from pipeline.data.config import Kind
from pipeline.data.encode import Encoded, encode_comparisons, encode_demonstrations
from pipeline.data.files import Files
from pipeline.data.report import Measured, write_report
from pipeline.prompts import Asked
from pipeline.stages.finetune import CACHE
from pipeline.tasks.task import SPLITS, Split, Task


def report_texts(task: Task, run_dir: Path) -> str:
    """Write the report of what was read, before anything is started. A line for the terminal; "" for a task that has no files."""
    return write_report(task, run_dir) if isinstance(task, Files) else ""


def report_tokens(config: RunConfig, task: Task, run_dir: Path, model: str, asked: Asked | None) -> None:
    """Write it again with what a tokenizer has made of it. The tables come out of the cache, where the stages have put them."""
    if not isinstance(task, Files):
        return
    from actors.model import context_of

    context, cache = context_of(model), run_dir.parent / CACHE
    encoded: dict[tuple[Kind, Split], Encoded] = {}
    for split in SPLITS:
        if config.finetune.epochs:
            encoded["demonstrations", split] = encode_demonstrations(task, split, model, context, cache)
        if config.reward_model.epochs and config.reward_model.pairs == "task":
            encoded["comparisons", split] = encode_comparisons(task, split, model, context, cache)
    write_report(task, run_dir, Measured(encoded=encoded, fitted=asked.fitted if asked else {}))
