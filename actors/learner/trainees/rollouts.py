"""The common part of policy and critic: both learn from Experience, with one loss for each action token.

The weight of a loss depends on the aggregation, where rows are those of the whole minibatch:

    token_mean      1 / (action tokens of the whole minibatch)
    sequence_mean   1 / (rows * action tokens of the loss's own row)
    constant        1 / (rows * a constant)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from actors.experience import Experience, Rollouts
from actors.learner.micro_batches import Batch, Rows
from actors.learner.reports import UpdatePlan
from actors.learner.trainees.base import Model, Normaliser, Trainee
from actors.objective import ActionTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTrainee(Trainee[Model]):
    """The common base of policy and critic.

    columns: the extra columns of the experience that the objective declares; it finds them in `batch.extra`.
    """

    columns: tuple[str, ...] = ()

    def learning(self, table: pa.Table, device: torch.device, kl_coef: float = 0.0) -> Batch:
        return Batch(Experience(table).check_extra(self.columns).table, device, kl_coef=kl_coef)

    def inferring(self, tables: Sequence[pa.Table], device: torch.device) -> Batch:
        return Batch(Rollouts.concat([Rollouts(table) for table in tables]).table, device)

    def actions(self, batch: Batch, rows: Rows) -> ActionTokens:
        """The action tokens of these rows, as an objective takes them."""
        found = batch.at_targets((*ActionTokens.COLUMNS, *self.columns), rows)
        extra = {name: found.pop(name) for name in self.columns}
        return ActionTokens(row=batch.row(rows), rows=len(rows), kl_coef=batch.kl_coef, extra=extra, **found)

    def count(self, batch: Batch, rows: Rows) -> int:
        return int(batch.target_counts(rows).sum())

    def normaliser(self, batch: Batch, rows: Rows, plan: UpdatePlan) -> Normaliser:
        if plan.aggregation == "token_mean":
            return Normaliser(count=self.count(batch, rows))
        if plan.aggregation == "sequence_mean":
            return Normaliser(count=len(rows), per_row=True)
        return Normaliser(count=len(rows) * plan.constant)
