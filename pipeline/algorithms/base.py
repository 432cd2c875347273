"""What an algorithm is: a frozen configuration that is also the mathematics.

An algorithm turns token rewards and values into advantages, and gives the policy's (and the critic's) loss per
token. It declares what it needs; nobody asks its name. It knows nothing of Ray, files, ranks or micro-batches, and
imports no torch: tensors bring their own methods.

Shapes: B rollouts of the step, A action tokens of the longest one (right-padded, `mask` true where real),
N action tokens of a micro-batch laid flat.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from cluster.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from actors.objective import ActionTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """A step's rollouts, their action tokens side by side."""

    rewards: Tensor  # (B, A) float32, KL penalty and score included; 0 where not real
    values: Tensor  # (B, A) float32, V(s_t); 0 without a critic
    scores: Tensor  # (B,) float32
    groups: Tensor  # (B,) int64 in [0, groups)
    mask: Tensor  # (B, A) bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """advantages: what the policy is trained on; returns: what the critic is trained towards. Both (B, A), 0 where not real."""

    advantages: Tensor
    returns: Tensor


class Algorithm(Config):
    """Fields every algorithm has, and the three pieces of mathematics one may override."""

    needs_critic: ClassVar[bool] = False
    min_group_size: ClassVar[int] = 1

    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL penalty in the token rewards, r_t = -kl_coef * (log pi - log pi_ref); where kl_target is set, its start value.
    0: no reference is kept."""

    kl_target: float = Field(default=0.0, ge=0)
    """KL per rollout, in nats, that the adaptive controller steers towards (Ziegler et al. 2019). 0: kl_coef stays fixed."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Rollouts over which the adaptive controller acts."""

    whiten_advantages: bool = True
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens."""

    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How token losses are averaged: over all action tokens of the minibatch, or within each rollout first."""

    @property
    def needs_reference(self) -> bool:
        """Whether token rewards hold a KL penalty."""
        return self.kl_coef > 0

    @abstractmethod
    def advantages(self, batch: Trajectories) -> Advantages:
        """Advantages and returns of the step."""

    @abstractmethod
    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each action token (N,), and statistics (N,) that the learner averages."""

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each value (N,): half the squared error to the return."""
        return 0.5 * (values - batch.returns) ** 2, {"value_error": (values - batch.returns).detach().abs()}
