"""Probes: a few held-out rows for which the learner's numbers are noted at an export.

The saved model must give the same numbers for their texts (preparation/saved_model_check.py).

    driver       Probe: rows of the held-out table that were not cut, with their texts
    all ranks    Probes.noted: at an export, each rank runs its share of the probes' tokens, and all ranks share results

Left out: the other held-out rows. A wrong weight, another tokenizer or one token too many shows in any row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from actors.experience import Rollouts

if TYPE_CHECKING:
    from actors.learner.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A row of the held-out table, and its text."""

    row: int
    prompt: str
    replies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probes:
    """The probes of a training. what: the number that is compared, in messages. column: where `infer` reports it."""

    what: ClassVar[str]
    column: ClassVar[str]
    rows: tuple[Probe, ...] = ()

    def noted(self, learner: Learner, heldout: pa.Table) -> dict[str, list[float]]:
        """Row -> the learner's numbers for it; called on all ranks together, and returns the same on all of them."""
        import torch

        if not self.rows:
            return {}
        rows = self._readable(heldout.take(pa.array([probe.row for probe in self.rows], pa.int64())))
        values = learner.infer(rows)[1]
        masks = dict(zip(rows["sample_id"].to_pylist(), rows["action_mask"].to_pylist(), strict=True))
        noted = {
            str(row): self._numbers([value for value, is_action in zip(own, masks[row], strict=True) if is_action])
            for row, own in zip(values["sample_id"].to_pylist(), values[self.column].to_pylist(), strict=True)
        }
        shares = [noted] * learner.ranks
        if learner.ranks > 1:
            torch.distributed.all_gather_object(shares, noted)
        return {row: values for share in shares for row, values in share.items()}

    def _readable(self, rows: pa.Table) -> pa.Table:
        """The rows as a table that the learner infers from."""
        return rows

    def _numbers(self, marked: list[float]) -> list[float]:
        """What is compared of a row, from the inferred values of its marked tokens."""
        return marked


@dataclass(frozen=True, slots=True)
class RewardProbes(Probes):
    """Comparisons; of each, the rewards of its replies."""

    what: ClassVar[str] = "reward"
    column: ClassVar[str] = "values"


@dataclass(frozen=True, slots=True)
class PolicyProbes(Probes):
    """Demonstrations; of each, the mean log-prob of its response's tokens."""

    what: ClassVar[str] = "mean log-prob"
    column: ClassVar[str] = "logprobs"

    def _readable(self, rows: pa.Table) -> pa.Table:
        return rows.select(Rollouts.schema.names).cast(Rollouts.schema)

    def _numbers(self, marked: list[float]) -> list[float]:
        return [float(np.mean(marked))]
