"""REINFORCE++. Hu 2025, "REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models".

    r_t = -kl_coef k1_t  (+ score at the last token)
    G_t = sum_{k >= t} gamma^(k - t) r_k,    A_t = (G_t - mean G) / std G

with mean and std over all action tokens of the step (`whiten_advantages`), and PPO's clipped surrogate. No critic, no
groups: what PPO is with V = 0 and lam = 1.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.algorithms.base import Advantages, Trajectories
from pipeline.algorithms.clipping import Clipped
from pipeline.algorithms.estimators import discounted_returns


class ReinforcePP(Clipped):
    """Clipped surrogate with reward to go, normalised over the step."""

    name: str = "reinforce_pp"
    """REINFORCE++."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; tokens of the environment do not count, and returns cross turns."""

    def advantages(self, batch: Trajectories) -> Advantages:
        returns = discounted_returns(batch.rewards, batch.mask, gamma=self.gamma)
        return Advantages(advantages=returns, returns=returns)
