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
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.config import Config
from pipeline.algorithms import losses

if TYPE_CHECKING:
    from torch import Tensor

    from actors.objective import ActionTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """A step's rollouts, their action tokens side by side."""

    rewards: Tensor  # (B, A) float32, KL penalty and score included; 0 where not real
    values: Tensor  # (B, A) float32, V(s_t); 0 without a critic
    scores: Tensor  # (B,) float32, shaped
    groups: Tensor  # (B,) int64 in [0, groups)
    mask: Tensor  # (B, A) bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """advantages: what the policy is trained on; returns: what the critic is trained towards. Both (B, A), 0 where not real."""

    advantages: Tensor
    returns: Tensor


class Algorithm(Config):
    """Fields every algorithm has, and the pieces of mathematics one may override."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL penalty; where kl_target is set, its start value. 0: no reference is kept."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty stands: in the token rewards, r_t = -kl_coef * KL_t (Ziegler et al. 2019), or in the policy's loss (GRPO)."""

    kl_estimator: losses.KLEstimator = "k1"
    """KL_t of a sampled token: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d, with d = log pi - log pi_ref. In a loss k1 has no effect in the mean."""

    kl_target: float = Field(default=0.0, ge=0)
    """KL per rollout, in nats, that the adaptive controller steers towards (Ziegler et al. 2019). 0: kl_coef stays fixed."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Rollouts over which the adaptive controller acts."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus in the policy's loss. 0: the entropy is reported, but not differentiated."""

    whiten_advantages: bool = True
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens."""

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """What a minibatch's token losses are divided by: their number (DAPO), the rollout's length and then the number of rollouts (GRPO),
    or the number of rollouts times sampling.max_new_tokens, which favours no length (Dr. GRPO)."""

    decoupled: bool = False
    """Weigh each token's loss by pi_proximal / pi_behaviour, and compare the policy with pi_proximal: the learner's before the step, recomputed,
    where pi_behaviour is what the sampler said (Hilton et al. 2022)."""

    importance_cap: float = Field(default=0.0, ge=0)
    """Largest weight of the decoupled objective: truncated importance sampling (Yao et al. 2025 take 2). 0: no limit."""

    mask_low: float = Field(default=0.0, ge=0)
    """Rollouts whose pi_proximal / pi_behaviour, the geometric mean over their tokens, is below this have no loss. 0: no lower bound."""

    mask_high: float = Field(default=0.0, ge=0)
    """Rollouts whose pi_proximal / pi_behaviour, the geometric mean over their tokens, is above this have no loss. 0: no upper bound."""

    @property
    def needs_critic(self) -> bool:
        """Whether advantages are made of values."""
        return False

    @property
    def min_group_size(self) -> int:
        """Samples of a prompt that must be there to be compared."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl_coef > 0

    @property
    def needs_proximal(self) -> bool:
        """Whether the learner must say, before its first update, how likely it finds the sampled tokens; else the sampler's word is taken."""
        return self.decoupled or self.mask_low > 0 or self.mask_high > 0

    @abstractmethod
    def advantages(self, batch: Trajectories) -> Advantages:
        """Advantages and returns of the step."""

    def surrogate(self, logprobs: Tensor, batch: ActionTokens) -> losses.Loss:
        """The part of the policy's loss that holds the advantages, (N,), and its statistics: -log pi * A unless overridden."""
        return losses.plain(logprobs, batch.advantages), {}

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> losses.Loss:
        """Loss of each action token (N,), and statistics (N,) that the learner averages: surrogate, corrected off-policy, KL, entropy bonus."""
        log_weight = batch.proximal_logprobs - batch.logprobs
        kept = losses.kept_rollouts(log_weight, batch.row, batch.rows, low=self.mask_low, high=self.mask_high)
        logprobs = logprobs.where(kept, batch.proximal_logprobs)  # what is dropped has no gradient, whatever it comes to
        loss, statistics = self.surrogate(logprobs, batch)
        zero, moved = loss.new_zeros(()), (logprobs - batch.proximal_logprobs).detach()
        # k3 of KL(old || new), never negative
        statistics |= {"entropy": entropy.detach(), "policy_kl": losses.kl_estimate(-moved, "k3").where(kept, zero)}
        if self.decoupled:
            weight = losses.importance_weight(log_weight, kept, cap=self.importance_cap)
            loss = weight * loss
            statistics |= {"importance_weight": weight, "importance_weight_max": weight}
        if self.kl_in == "loss" and self.needs_reference:
            kl = losses.kl_estimate(logprobs - batch.reference_logprobs, self.kl_estimator)
            loss = loss + batch.kl_coef * kl
            statistics["kl_loss"] = kl.detach().where(kept, zero)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        if self.mask_low or self.mask_high:
            statistics["masked_fraction"] = (~kept).float()
        return loss.where(kept, zero), statistics

    def value_loss(self, values: Tensor, batch: ActionTokens) -> losses.Loss:
        """Loss of each value (N,): half the squared error to the return."""
        return losses.squared_error(values, batch.returns, batch.values)

    def rules(self) -> None:
        """Raises ValueError for settings that do not go together, naming field, rule, value and remedy."""
        if self.kl_target and not self.kl_coef:
            raise ValueError(
                f"algorithm.kl_coef: must be > 0 when algorithm.kl_target is {self.kl_target:g}, got 0; "
                "the controller multiplies it, so give it a start value, or remove kl_target"
            )
        if self.importance_cap and not self.decoupled:
            raise ValueError(
                f"algorithm.decoupled: must be true when algorithm.importance_cap is {self.importance_cap:g}, got false; "
                "the cap limits the decoupled objective's weights, so set it, or remove importance_cap"
            )
        if self.mask_high and self.mask_high <= self.mask_low:
            raise ValueError(f"algorithm.mask_high: must be above algorithm.mask_low = {self.mask_low:g}, got {self.mask_high:g}; no rollout would be left")
