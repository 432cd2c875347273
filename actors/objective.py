"""What a learner asks of an algorithm: a loss per token, or per comparison. The pipeline's algorithms implement these protocols.

N: action tokens of a micro-batch, laid flat; `row[n]` is the rollout (or comparison) token n belongs to. There is no padding and so
no mask. The learner weighs each token (or comparison) by the global normaliser, so an objective never averages over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTokens:
    """The experience columns at the action tokens of a micro-batch, each (N,) float32."""

    row: Tensor  # (N,) int64 in [0, rows)
    rows: int
    logprobs: Tensor  # as sampled
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coef: float = 0.0
    """Of a KL penalty in the loss, as it is in this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The N texts of a micro-batch's comparisons, those of one comparison together, the best first."""

    row: Tensor  # (N,) int64 in [0, rows), ascending
    rows: int
    margin: Tensor  # (rows,) float32, by how much the best is better


class PolicyObjective(Protocol):
    """Minimised by the policy learner. A rollout's tokens are always there together, so a loss may look at whole rollouts."""

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token (N,), and statistics (N,) to be averaged over all action tokens; of one called *_max the greatest is kept."""
        ...


class ValueObjective(Protocol):
    """Minimised by the critic learner."""

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token (N,), and statistics (N,) to be averaged over all action tokens."""
        ...


class RewardObjective(Protocol):
    """Minimised by the learner of a reward model."""

    def reward_loss(self, rewards: Tensor, batch: Compared) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each comparison (rows,) from the rewards of its texts (N,), and statistics (rows,) to be averaged over all comparisons.

        One of the statistics is "accuracy": the share of it that is ranked right.
        """
        ...
