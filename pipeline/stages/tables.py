"""What a training is given: tables that are encoded already, and the model to begin from, made here where the recipe names none."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from actors.experience import Rollouts
from pipeline.config import ModelConfig, RunConfig
from pipeline.data.encode import Encoded
from pipeline.stages.loop import HELDOUT, TRAIN, Prepared
from pipeline.tasks.task import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A preparation, carried out where the training is.

    train, heldout: Parquet files in the cache, named by their content. is_rollouts: whether the held-out table is measured as Rollouts, without the
    columns that are only trained on. start: folder or hub name of the model, or of the tokenizer alone of a new one, whose shape is `new`.
    """

    train: Path
    heldout: Path
    is_rollouts: bool
    start: str
    new: ModelConfig | None
    seed: int
    remark: str = ""

    def __call__(self, folder: Path) -> Prepared:
        shutil.copyfile(self.train, folder / TRAIN)
        heldout = pq.read_table(self.heldout, partitioning=None)
        if self.is_rollouts:
            heldout = heldout.select(Rollouts.schema.names).cast(Rollouts.schema)
        pq.write_table(heldout, folder / HELDOUT)
        rows = pq.read_metadata(folder / TRAIN).num_rows
        return Prepared(train=rows, heldout=heldout.num_rows, model=self._model(folder / "model"), remark=self.remark)

    def _model(self, folder: Path) -> str:
        if self.new is None:
            return self.start
        from actors.model import load_tokenizer, new_gpt2

        tokenizer, shape = load_tokenizer(self.start), self.new
        model = new_gpt2(tokenizer, layers=shape.layers, width=shape.width, heads=shape.heads, context=shape.context, seed=self.seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


def context_limit(config: RunConfig) -> int:
    """Longest row of a training, in tokens."""
    from actors.model import context_of

    return context_of(config.model.path) if config.model.path else config.model.context


def cache_of(run_dir: Path) -> Path:
    """Where tokens are kept, beside the runs that share them."""
    return run_dir.absolute().parent / "cache"


def told(tables: Mapping[Split, Encoded], what: str, context: int) -> str:
    """What a person should hear of how rows were made to fit, in one line; "" when all fitted."""
    lost = sum(len(table.excluded) for table in tables.values())
    shortened = sum(table.truncated for table in tables.values())
    if not (lost or shortened):
        return ""
    rows = sum(table.rows for table in tables.values()) + lost
    return f"of {rows} {what}, {shortened} are shortened and {lost} left out, to fit the model's context of {context} tokens"
