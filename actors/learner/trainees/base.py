"""The protocol of a trainee: everything about the trained model that the learner must know.

trainee              made of                          learns from    infers          is exported as
PolicyTrainee        a causal LM                      Experience     TokenLogprobs   a causal LM
CriticTrainee        a causal LM, or a reward model   Experience     TokenValues     -
RewardModelTrainee   a causal LM, or a classifier     Comparisons    TokenValues     a sequence classifier

The learner shares rows out to ranks and micro-batches, adds up gradients and steps the optimiser. Everything that
depends on the kind of model is in its trainee. A new kind needs one file that implements `Trainee`, and one place that
makes it.

Shapes: N targets of a micro-batch, K losses of a micro-batch (one for each token, or one for each row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from actors.config import LearnerConfig
from actors.learner.micro_batches import Batch, MicroBatch, Rows
from actors.learner.reports import UpdatePlan
from actors.models.causal_lm import Entropy, TokenInputs
from actors.models.context import longest_text
from actors.models.packing import check_packing

Model = TypeVar("Model", bound=nn.Module)
ScaledModel = TypeVar("ScaledModel", bound=nn.Module, contravariant=True)


class Logprobs(NamedTuple):
    """Log-probs of a micro-batch's targets, each (N,): by the current model, as sampled, and before the step."""

    new: Tensor
    sampled: Tensor
    proximal: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The losses of a micro-batch's rows, not yet weighted.

    each: (K,) the losses. row: (K,) int64 in [0, rows), the row that each loss belongs to. statistics: (K,) each, to be
    averaged over all losses; of a statistic called *_max the maximum is kept. logprobs: given only for a policy, whose
    probability ratio must be 1 before the first update.
    """

    each: Tensor
    row: Tensor
    rows: int
    statistics: dict[str, Tensor]
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """The number that divides each loss of a minibatch; it depends on the table alone, so it is the same on all ranks.

    count: divides all losses. per_row: divide each loss also by the number of losses of its row.
    """

    count: int
    per_row: bool = False

    def share(self, terms: LossTerms) -> Tensor:
        """A micro-batch's part of the loss of its minibatch, a scalar."""
        weights = torch.full_like(terms.each, 1 / max(self.count, 1))
        if self.per_row:
            weights = weights / torch.bincount(terms.row, minlength=terms.rows)[terms.row]
        return (weights * terms.each).sum()


class Moments(NamedTuple):
    """Mean and population standard deviation."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Passes:
    """How to run the model over a whole batch.

    forward: the model's forward pass. share: gives this rank's micro-batches. total: sums a tensor over all ranks.
    """

    forward: Callable[..., Any]
    share: Callable[[Batch], Sequence[MicroBatch]]
    total: Callable[[Tensor], Tensor]


class Scale(Protocol[ScaledModel]):
    """Scales a model's outputs to mean 0 and std 1 on given texts."""

    def apply(self, model: ScaledModel, passes: Passes) -> None:
        """Scale a model that is whole on this rank."""
        ...

    def moments(self, passes: Passes) -> Moments:
        """The mean and std of the model's outputs as it is now; called on all ranks together."""
        ...


class Trainee(Protocol[Model]):
    """A kind of model that a learner can train.

    An implementation is a frozen dataclass, so that it can be sent to the ranks. role: the trainee's name in messages
    and in the shards of a commit.
    """

    role: ClassVar[str]

    def load(self, path: str, config: LearnerConfig, seed: int) -> tuple[Model, int]:
        """Load the model from a folder or hub name, and freeze the parameters that are not trained.

        Returns the model and its context in tokens. Raises ValueError naming the path when no such model can be loaded
        from there, or as `ready` does.
        """
        ...

    def scale(self, device: torch.device) -> Scale[Model] | None:
        """The scale that is applied to the loaded model before training, and again at export; None: no scaling."""
        return None

    def learning(self, table: pa.Table, device: torch.device, kl_coef: float = 0.0) -> Batch:
        """The batch of a table to learn from. kl_coef: the step's. Raises ValueError for a table of another kind."""
        ...

    def inferring(self, tables: Sequence[pa.Table], device: torch.device) -> Batch:
        """One batch of all tables to infer from. Raises ValueError for tables of another kind."""
        ...

    def forward(self, run: Callable[..., Any], inputs: TokenInputs, entropy: Entropy) -> tuple[Tensor, ...]:
        """Run the model on the targets: first the numbers that `infer` reports, (N,), then what else `loss` needs.

        run: the model's forward pass.
        """
        ...

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch, rows: Rows) -> LossTerms:
        """The losses of these rows, from the outputs of `forward`."""
        ...

    def count(self, batch: Batch, rows: Rows) -> int:
        """The number of losses that these rows have; statistics are means over them."""
        ...

    def normaliser(self, batch: Batch, rows: Rows, plan: UpdatePlan) -> Normaliser:
        """The normaliser of the minibatch made of these rows."""
        ...

    def inferred(self, sample_ids: npt.NDArray[Any], column: pa.ListArray) -> pa.Table:
        """What was inferred of these samples, aligned with tokens, as its table."""
        ...

    def published(self, model: Model) -> Iterable[tuple[str, Tensor]]:
        """The weights under the names that their readers expect; the model is whole on this rank."""
        ...

    def save(self, model: Model, folder: Path, path: str, moments: Moments | None) -> None:
        """Write the model, whole on this rank, and the tokenizer of `path` as `from_pretrained` reads them.

        moments: what the scale measured; the written model is scaled so that they become 0 and 1. None: no scaling.
        """
        ...

    def check(self, model: Model, folder: Path, path: str) -> None:
        """Read back what `save` wrote, and compare it with the model. Raises ValueError where they differ."""
        return None  # nothing to compare, unless overridden


def ready(model: Model, head: nn.Module, loaded: Any, path: str, config: LearnerConfig) -> tuple[Model, int]:
    """Freeze the parameters that the configuration does not train; returns the model and its context in tokens.

    loaded: the transformers model inside. Raises ValueError naming the path when the configuration asks for packing and
    the model cannot do it.
    """
    if config.pack_tokens:
        check_packing(loaded, path)
    if config.trainable == "heads":
        model.requires_grad_(False)
        head.requires_grad_(True)
    context = longest_text(loaded.config, loaded)
    assert context is not None, "loading refuses a model that does not say"
    return model, context
