"""The critic as a learner trains it: it estimates the values of the states in which the policy chose its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from actors.config import LearnerConfig
from actors.device import torch_dtype
from actors.experience import TokenValues
from actors.learner.micro_batches import Batch, Rows
from actors.learner.trainees.base import LossTerms, Moments, ready
from actors.learner.trainees.rollouts import RolloutTrainee
from actors.models.causal_lm import Entropy, TokenInputs, ValueModel, is_classifier, load_causal_lm
from actors.models.reward_model import head_of, load_classifier
from actors.objective import ValueObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticTrainee(RolloutTrainee[ValueModel]):
    """A critic that learns from experience.

    Made from a reward model, it begins with that model's rewards as values; made from a causal LM, with zeros.
    """

    role: ClassVar[str] = "critic"
    objective: ValueObjective

    def load(self, path: str, config: LearnerConfig, seed: int) -> tuple[ValueModel, int]:
        dtype = torch_dtype(config.dtype)
        if is_classifier(path):
            loaded = load_classifier(path, dtype)
            model = ValueModel(loaded, head_of(loaded).weight)
        else:
            loaded = load_causal_lm(path, dtype)
            model = ValueModel(loaded)
        return ready(model, model.head, loaded, path, config)

    def forward(self, run: Callable[..., Any], inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, ...]:
        """The values of the targets' states, as ((N,),)."""
        return (run(inputs),)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch, rows: Rows) -> LossTerms:
        [values] = outputs
        actions = self.actions(batch, rows)
        each, statistics = self.objective.value_loss(values, actions)
        return LossTerms(each=each, row=actions.row, rows=actions.rows, statistics=statistics)

    def inferred(self, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
        return TokenValues.of({"sample_id": sample_ids, "values": column}).table

    def published(self, model: ValueModel) -> Iterable[tuple[str, Tensor]]:
        return model.named_parameters()

    def save(self, model: ValueModel, folder: Path, path: str, moments: Moments | None) -> None:
        raise AssertionError("nobody reads a critic")
