"""The protocols of an objective: the loss that an algorithm gives the learner for each token or comparison.

The pipeline's algorithms implement these protocols.

N: action tokens of a micro-batch in one flat axis; `row[n]` is the rollout (or comparison) that token n belongs to.
There is no padding, and so no mask. The learner divides the loss of each token (or comparison) by the global
normaliser, so an objective never averages over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTokens:
    """The experience columns at the action tokens of a micro-batch, each (N,) float32."""

    COLUMNS: ClassVar = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")

    row: Tensor  # (N,) int64 in [0, rows)
    rows: int
    logprobs: Tensor  # as sampled
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coef: float = 0.0
    """The coefficient of the KL penalty in the loss, in this step."""

    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """The extra columns that the algorithm declares, by name, each (N,) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonBatch:
    """The N texts of a micro-batch's comparisons; the texts of one comparison stand together, the best first."""

    row: Tensor  # (N,) int64 in [0, rows), ascending
    rows: int
    margin: Tensor  # (rows,) float32, by how much the best is better


class PolicyObjective(Protocol):
    """The objective that the policy learner minimises.

    All tokens of a rollout are in the same micro-batch, so a loss may depend on whole rollouts.
    """

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token (N,), and statistics (N,).

        Statistics are averaged over all action tokens; of a statistic called *_max the maximum is kept.
        """
        ...


class ValueObjective(Protocol):
    """The objective that the critic learner minimises."""

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token (N,), and statistics (N,) to be averaged over all action tokens."""
        ...


class RewardObjective(Protocol):
    """The objective that the learner of a reward model minimises."""

    def reward_loss(self, rewards: Tensor, batch: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each comparison (rows,), from the rewards of its texts (N,), and statistics (rows,).

        Statistics are averaged over all comparisons. One of them is "accuracy": the share of pairs ranked right.
        """
        ...
