"""Proximal policy optimisation. Schulman et al. 2017; for language models Ziegler et al. 2019, Huang et al. 2023.

    ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    L_policy = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - clip_low, 1 + clip_high))
    L_value  = 1/2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2)

with A from GAE(gamma, lam). Policy and critic are separate models, so there is no value-loss coefficient: the
critic's learning rate plays that part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import gae

if TYPE_CHECKING:
    from torch import Tensor

    from actors.objective import ActionTokens


class PPO(Algorithm):
    """Clipped surrogate with a critic and generalised advantage estimation."""

    name: Literal["ppo"] = "ppo"
    """Proximal policy optimisation."""

    needs_critic: ClassVar[bool] = True

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the critic alone, 1 the sampled return alone."""

    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The ratio earns nothing below 1 - clip_low."""

    clip_high: float = Field(default=0.2, ge=0)
    """The ratio earns nothing above 1 + clip_high (DAPO uses more than clip_low, Yu et al. 2025)."""

    value_clip: float = Field(default=0.2, ge=0)
    """The critic earns nothing by moving a value further than this in one step; 0 turns it off."""

    def advantages(self, batch: Trajectories) -> Advantages:
        advantages, returns = gae(batch.rewards, batch.values, batch.mask, gamma=self.gamma, lam=self.lam)
        return Advantages(advantages=advantages, returns=returns)

    def policy_loss(self, logprobs: Tensor, entropy: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = logprobs - batch.proximal_logprobs
        ratio = log_ratio.exp()
        plain = -batch.advantages * ratio
        clipped = -batch.advantages * ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        moved = log_ratio.detach()
        statistics = {
            "entropy": entropy,
            "clip_fraction": (clipped > plain).float(),
            "policy_kl": moved.exp() - 1 - moved,  # k3 of KL(old || new), never negative; Schulman, "Approximating KL Divergence"
        }
        return plain.maximum(clipped), statistics

    def value_loss(self, values: Tensor, batch: ActionTokens) -> tuple[Tensor, dict[str, Tensor]]:
        loss, statistics = super().value_loss(values, batch)
        if self.value_clip == 0:
            return loss, statistics
        near = batch.values + (values - batch.values).clamp(-self.value_clip, self.value_clip)
        clipped = 0.5 * (near - batch.returns) ** 2
        return loss.maximum(clipped), statistics | {"value_clip_fraction": (clipped > loss).float()}
