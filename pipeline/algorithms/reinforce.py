"""REINFORCE: the plain policy gradient. Williams 1992, "Simple Statistical Gradient-Following Algorithms".

    L_t = -log pi(a_t|s_t) G_t,    G_t = sum_{k >= t} gamma^(k - t) r_k

No critic and no importance ratio: with more than one epoch or minibatch a step the later updates are off-policy
without correction. Whitening the returns (on by default) takes the batch mean away and so serves as a baseline.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import discounted_returns


class Reinforce(Algorithm):
    """Log-probability times reward to go."""

    name: str = "reinforce"
    """Plain policy gradient."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; tokens of the environment do not count, and returns cross turns."""

    def advantages(self, batch: Trajectories) -> Advantages:
        returns = discounted_returns(batch.rewards, batch.mask, gamma=self.gamma)
        return Advantages(advantages=returns, returns=returns)
