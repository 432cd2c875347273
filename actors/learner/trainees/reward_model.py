"""A reward model as a learner trains it: a sequence classifier, with one loss for each comparison.

The reward of a text is the value of the state in which its end-of-text token is chosen. The weight of a loss is
1 / (number of comparisons in the minibatch), whatever the plan's aggregation of tokens is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors.config import LearnerConfig
from actors.device import torch_dtype
from actors.experience import Comparisons, TokenValues
from actors.learner.micro_batches import Batch, Rows
from actors.learner.reports import UpdatePlan
from actors.learner.trainees.base import LossTerms, Moments, Normaliser, Trainee, ready
from actors.learner.trainees.reward_scale import RewardScale
from actors.models.causal_lm import Entropy, TokenInputs
from actors.models.reward_model import RewardModel, load_reward_model
from actors.objective import ComparisonBatch, RewardObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelTrainee(Trainee[RewardModel]):
    """A reward model that learns from comparisons.

    scale_texts: Parquet file of Comparisons on whose texts rewards are scaled to mean 0 and std 1, before training and
    at export; "": they are not scaled.
    """

    role: ClassVar[str] = "reward"
    objective: RewardObjective
    scale_texts: str = ""

    def load(self, path: str, config: LearnerConfig, seed: int) -> tuple[RewardModel, int]:
        model = load_reward_model(path, torch_dtype(config.dtype), seed)
        return ready(model, model.head, model.classifier, path, config)

    def scale(self, device: torch.device) -> RewardScale | None:
        return RewardScale(self.scale_texts, device) if self.scale_texts else None

    def learning(self, table: pa.Table, device: torch.device, kl_coef: float = 0.0) -> Batch:
        return Batch(Comparisons(table).check_extra(()).table, device)

    def inferring(self, tables: Sequence[pa.Table], device: torch.device) -> Batch:
        return Batch(Comparisons.concat([Comparisons(table) for table in tables]).table, device)

    def forward(self, run: Callable[..., Any], inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, ...]:
        """The rewards of the texts, as ((N,),)."""
        return (run(inputs),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch, rows: Rows) -> LossTerms:
        [rewards] = outputs
        compared = ComparisonBatch(row=batch.row(rows), rows=len(rows), margin=batch.of_rows("margin", rows))
        each, statistics = self.objective.reward_loss(rewards, compared)
        row = torch.arange(len(rows), device=batch.device)
        return LossTerms(each=each, row=row, rows=len(rows), statistics=statistics)

    def count(self, batch: Batch, rows: Rows) -> int:
        return len(rows)

    def normaliser(self, batch: Batch, rows: Rows, plan: UpdatePlan) -> Normaliser:
        return Normaliser(count=len(rows))

    def inferred(self, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
        return TokenValues.of({"sample_id": sample_ids, "values": column}).table

    def published(self, model: RewardModel) -> Iterable[tuple[str, Tensor]]:
        return model.classifier.named_parameters()  # type: ignore[no-any-return]

    def save(self, model: RewardModel, folder: Path, path: str, moments: Moments | None) -> None:
        model.save(folder, path, {} if moments is None else model.standardised(*moments))
