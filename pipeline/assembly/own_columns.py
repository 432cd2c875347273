"""Columns that an algorithm declares for its own loss, computed over the whole step."""

from __future__ import annotations

import pyarrow as pa
import torch

from actors import ragged
from actors.experience import Experience, Rollouts
from pipeline.algorithms.base import Algorithm, StepArrays, Trajectories
from pipeline.assembly.grid import ActionGrid

_SHOWN = ("advantages", "returns", "logprobs", "proximal_logprobs", "reference_logprobs", "versions")  # to producers


def with_own_columns(
    experience: Experience, algorithm: Algorithm, trajectories: Trajectories, grid: ActionGrid
) -> Experience:
    """The experience and the columns that the algorithm declares for itself.

    Raises ValueError where one has another shape than the step, or a name that is taken.
    """
    if not algorithm.columns:
        return experience
    table = experience.table
    arrays = {name: grid.pad(ragged.flat(table[name])[0]) for name in _SHOWN}
    step = StepArrays(trajectories=trajectories, rollouts=table.select(Rollouts.schema.names), **arrays)
    offsets, found = ragged.flat(table["tokens"])[1], {}
    for name, produce in algorithm.columns.items():
        column = produce(step)
        if not isinstance(column, torch.Tensor) or column.shape != grid.mask.shape:
            got = tuple(column.shape) if isinstance(column, torch.Tensor) else f"a {type(column).__name__}"
            raise ValueError(
                f"algorithm.columns[{name!r}]: must give a number for each action token, a tensor of shape "
                f"{tuple(grid.mask.shape)}, got {got}"
            )
        if not bool(column[grid.mask].isfinite().all()):
            raise ValueError(f"algorithm.columns[{name!r}]: must give finite numbers for action tokens")
        found[name] = ragged.unflat(grid.unpad(column.float()), offsets, pa.float32())
    return experience.with_extra(found)
