"""What an algorithm is: a frozen configuration that is also the mathematics.

An algorithm turns token rewards and values into advantages, and gives the policy's (and the critic's) loss per
token. It declares what it needs; nobody asks its name. It knows nothing of Ray, files, ranks or micro-batches, and
imports no torch: tensors bring their own methods.

Shapes: B rollouts of the step, A action tokens of the longest one (right-padded, `mask` true where real),
N action tokens of a micro-batch laid flat.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.config import Config
from pipeline.algorithms import losses

if TYPE_CHECKING:
    import pyarrow as pa
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
    values_after: Tensor | None = None
    """(B,) float32: V of the state in which a conversation was broken off, 0 where it ended; None: all have ended."""

    def bootstrapped(self, gamma: float) -> Tensor:
        """The rewards for an estimator with a critic, (B, A): r + gamma V(next) where a conversation was broken off."""
        if self.values_after is None:
            return self.rewards
        last = self.mask.clone()
        last[:, :-1] &= ~self.mask[:, 1:]
        return (self.rewards + gamma * self.values_after[:, None]).where(last, self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """advantages: what the policy is trained on; returns: what the critic is trained towards.

    Both (B, A), 0 where not real.
    """

    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """A step whose advantages are known, as the producer of a column sees it: the whole of it, on one process.

    Each Tensor is (B, A), 0 where not real.
    """

    trajectories: Trajectories
    advantages: Tensor  # as the policy is trained on them
    returns: Tensor
    logprobs: Tensor  # as sampled
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    versions: Tensor  # int32, of the weights that sampled each token
    rollouts: pa.Table  # the B rows of Rollouts


Producer = Callable[[StepArrays], "Tensor"]
"""Computes a column of the experience, (B, A); a pure function. What it says where not real is dropped."""


class Algorithm(Config):
    """Fields every algorithm has, and the pieces of mathematics one may override."""

    name: str = ""
    """Your own algorithm, by the import path of its class, `package.module:name`."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL penalty; where kl_target is set, its start value. 0: no reference is kept."""

    kl_every: int = Field(default=5, ge=0)
    """With kl_coef 0, every so many steps the KL to the starting model is estimated; 0: never.

    A rollout worker does it on a few rollouts, with a copy of that model that it then frees. It changes no weight and
    no token.
    """

    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the KL penalty: reward or loss.

    reward: in the token rewards, r_t = -kl_coef * KL_t (Ziegler et al. 2019). loss: in the policy's loss (GRPO).
    """

    kl_estimator: losses.KLEstimator = "k1"
    """KL_t of a sampled token: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d, with d = log pi - log pi_ref.

    In a loss k1 has no effect in the mean. d is bounded to +-20 and k3 to 10; how often is in kl/bounded_fraction
    (reward) and policy/kl_bounded_fraction (loss).
    """

    kl_target: float = Field(default=0.0, ge=0)
    """Target of the adaptive KL controller, in nats per rollout; 0: kl_coef stays fixed. Ziegler et al. 2019."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Rollouts over which the adaptive controller acts."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus in the policy's loss. 0: the entropy is reported, but not differentiated."""

    whiten_advantages: bool = True
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens."""

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Normaliser of the token losses of a minibatch: token_mean, sequence_mean, or constant.

    token_mean: the number of tokens (DAPO). sequence_mean: the rollout's length, then the number of rollouts (GRPO).
    constant: the number of rollouts times sampling.max_new_tokens, which favours no length (Dr. GRPO); in conversations
    also times environment.max_turns.
    """

    decoupled: bool = False
    """Use the decoupled objective (Hilton et al. 2022).

    Each token's loss is weighted by pi_proximal / pi_behaviour, and the policy is compared with pi_proximal. The
    learner computes pi_proximal before the step; pi_behaviour is the sampler's.
    """

    importance_ratio: Literal["token", "sequence"] = "token"
    """Weight of a token in the decoupled objective: token or sequence.

    token: its own pi_proximal / pi_behaviour. sequence: the product over its rollout, which has no bias, and more
    variance the longer the rollout is.
    """

    importance_cap: float = Field(default=0.0, ge=0)
    """Largest weight of the decoupled objective (truncated importance sampling); 0: no limit.

    Yao et al. 2025 take 2.
    """

    mask_low: float = Field(default=0.0, ge=0)
    """Rollouts whose pi_proximal / pi_behaviour, the geometric mean over their tokens, is below this have no loss.

    0: no lower bound.
    """

    mask_high: float = Field(default=0.0, ge=0)
    """Rollouts whose pi_proximal / pi_behaviour, the geometric mean over their tokens, is above this have no loss.

    0: no upper bound.
    """

    @property
    def needs_critic(self) -> bool:
        """Whether advantages depend on a critic's values."""
        return False

    @property
    def min_group_size(self) -> int:
        """The smallest number of samples of a prompt that can be compared."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl_coef > 0

    @property
    def needs_proximal(self) -> bool:
        """Whether the learner computes log-probs of the batch before its first update; else the sampler's are used."""
        return self.decoupled or self.mask_low > 0 or self.mask_high > 0

    @property
    def corrects_staleness(self) -> bool:
        """Whether the loss corrects for samples of older weights: with truncated weights pi_proximal / pi_behaviour."""
        return self.decoupled and self.importance_cap > 0

    @property
    def columns(self) -> Mapping[str, Producer]:
        """Columns that only this algorithm's losses need: name -> how a step gives it.

        A loss finds them in `batch.extra`, (N,) float32.
        """
        return {}

    @abstractmethod
    def advantages(self, batch: Trajectories) -> Advantages:
        """Advantages and returns of the step."""

    def surrogate(self, logprobs: Tensor, batch: ActionTokens) -> losses.Loss:
        """The part of the policy's loss with the advantages, (N,), and its statistics; -log pi * A by default."""
        return losses.plain(logprobs, batch.advantages), {}

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> losses.Loss:
        """Loss of each action token (N,), and statistics (N,) that the learner averages.

        The loss is the surrogate with its off-policy correction, the KL penalty and the entropy bonus.
        """
        log_weight = batch.proximal_logprobs - batch.logprobs
        kept = losses.kept_rollouts(log_weight, batch.row, batch.rows, low=self.mask_low, high=self.mask_high)
        # what is dropped has no gradient, whatever it comes to
        logprobs = logprobs.where(kept, batch.proximal_logprobs)
        loss, statistics = self.surrogate(logprobs, batch)
        zero, moved = loss.new_zeros(()), (logprobs - batch.proximal_logprobs).detach()
        # k3 of KL(old || new), never negative
        statistics |= {"entropy": entropy.detach(), "policy_kl": losses.kl_estimate(-moved, "k3").where(kept, zero)}
        if self.decoupled:
            weight = losses.importance_weight(
                log_weight, kept, batch.row, batch.rows, per=self.importance_ratio, cap=self.importance_cap
            )
            loss = weight * loss
            statistics |= {"importance_weight": weight, "importance_weight_max": weight}
        if self.kl_in == "loss" and self.needs_reference:
            log_ratio = logprobs - batch.reference_logprobs
            kl = losses.kl_estimate(log_ratio, self.kl_estimator)
            loss = loss + batch.kl_coef * kl
            statistics["kl_loss"] = kl.detach().where(kept, zero)
            statistics["kl_bounded_fraction"] = (losses.kl_out_of_bounds(log_ratio, self.kl_estimator) & kept).float()
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
                f"algorithm.decoupled: must be true when algorithm.importance_cap is {self.importance_cap:g}, got "
                "false; "
                "the cap limits the decoupled objective's weights, so set it, or remove importance_cap"
            )
        if self.importance_ratio == "sequence" and not self.decoupled:
            raise ValueError(
                "algorithm.decoupled: must be true when algorithm.importance_ratio is 'sequence', got false; "
                "it says how the decoupled objective weighs, so set it, or remove importance_ratio"
            )
        if self.mask_high and self.mask_high <= self.mask_low:
            raise ValueError(
                f"algorithm.mask_high: must be above algorithm.mask_low = {self.mask_low:g}, got {self.mask_high:g}; "
                "no rollout would be left"
            )
