"""The policy as a learner trains it: a causal LM, trained through the log-probs of the tokens that it sampled."""

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
from actors.experience import TokenLogprobs
from actors.learner.micro_batches import Batch, Rows
from actors.learner.trainees.base import Logprobs, LossTerms, Moments, ready
from actors.learner.trainees.rollouts import RolloutTrainee
from actors.models.causal_lm import Entropy, PolicyModel, TokenInputs, load_causal_lm
from actors.models.export import check_saved, save_model
from actors.models.tokenizer import load_tokenizer
from actors.objective import PolicyObjective


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTrainee(RolloutTrainee[PolicyModel]):
    """A policy that learns from experience. temperature: the temperature at which the tokens were sampled."""

    role: ClassVar[str] = "policy"
    objective: PolicyObjective
    temperature: float = 1.0

    def load(self, path: str, config: LearnerConfig, seed: int) -> tuple[PolicyModel, int]:
        causal_lm = load_causal_lm(path, torch_dtype(config.dtype), untie_head=config.trainable == "heads")
        model = PolicyModel(causal_lm, self.temperature)
        return ready(model, model.head, causal_lm, path, config)

    def forward(self, run: Callable[..., Any], inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, ...]:
        """The targets' (log-probs (N,), entropies (N,)); the entropies are empty unless they were asked for."""
        logprobs, of_all = run(inputs, entropy=entropy)
        return logprobs, of_all

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch, rows: Rows) -> LossTerms:
        new, entropy = outputs
        actions = self.actions(batch, rows)
        each, statistics = self.objective.policy_loss(new, entropy, actions)
        known = Logprobs(new.detach(), actions.logprobs, actions.proximal_logprobs)
        return LossTerms(each=each, row=actions.row, rows=actions.rows, statistics=statistics, logprobs=known)

    def inferred(self, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
        return TokenLogprobs.of({"sample_id": sample_ids, "logprobs": column}).table

    def published(self, model: PolicyModel) -> Iterable[tuple[str, Tensor]]:
        return model.causal_lm.named_parameters()  # type: ignore[no-any-return]

    def save(self, model: PolicyModel, folder: Path, path: str, moments: Moments | None) -> None:
        save_model(model.causal_lm, load_tokenizer(path), folder)

    def check(self, model: PolicyModel, folder: Path, path: str) -> None:
        check_saved(model.causal_lm, load_tokenizer(path), folder)
