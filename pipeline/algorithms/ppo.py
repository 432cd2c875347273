"""Proximal policy optimisation. Schulman et al. 2017; for language models Ziegler et al. 2019, Huang et al. 2023.

    ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    L_policy = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - clip_low, 1 + clip_high))
    L_value  = 1/2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2)

with A from GAE(gamma, lam). Policy and critic are separate models, so there is no value-loss coefficient: the
critic's learning rate plays that part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.algorithms import losses
from pipeline.algorithms.base import Advantages, Trajectories
from pipeline.algorithms.clipping import Clipped
from pipeline.algorithms.estimators import gae

if TYPE_CHECKING:
    from torch import Tensor

    from actors.objective import ActionTokens


class PPO(Clipped):
    """Clipped surrogate with a critic and generalised advantage estimation."""

    name: str = "ppo"
    """Proximal policy optimisation."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; tokens of the environment do not count, and returns cross turns."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the critic alone, 1 the sampled return alone."""

    value_clip: float = Field(default=0.2, ge=0)
    """The critic earns nothing by moving a value further than this in one step; 0 turns it off."""

    @property
    def needs_critic(self) -> bool:
        return True

    def advantages(self, batch: Trajectories) -> Advantages:
        advantages, returns = gae(
            batch.bootstrapped(self.gamma), batch.values, batch.mask, gamma=self.gamma, lam=self.lam
        )
        return Advantages(advantages=advantages, returns=returns)

    def value_loss(self, values: Tensor, batch: ActionTokens) -> losses.Loss:
        return losses.squared_error(values, batch.returns, batch.values, clip=self.value_clip)
