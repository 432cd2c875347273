"""REINFORCE with a baseline that does not depend on the action, which lowers the variance and leaves the mean.

Williams 1992; Sutton & Barto, 13.4.

    L_t = -log pi(a_t|s_t) (G_t - b),    G_t = sum_{k >= t} gamma^(k - t) r_k

    value          b = V(s_t), of a critic that learns G_t: GAE with lam = 1
    batch_mean     b = mean of G_0 over the step's rollouts, each counted once whatever its length
    leave_one_out  b = mean of G_0 over the prompt's other samples (Kool et al. 2019); one left alone has advantage 0

Unlike RLOO a token is credited with the reward from there on, which differs where there is a KL penalty in the rewards
or gamma < 1. A rollout without action tokens is no sample of the policy and enters no mean.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import discounted_returns, group_moments, leave_one_out, over_tokens


class ReinforceBaseline(Algorithm):
    """Log-probability times what the reward to go exceeds a baseline by."""

    name: str = "reinforce_baseline"
    """Policy gradient with a baseline."""

    baseline: Literal["value", "batch_mean", "leave_one_out"] = "batch_mean"
    """What is taken from the return: a critic's value, the mean of the step, or the mean of the prompt's other samples.
    """

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; tokens of the environment do not count, and returns cross turns."""

    whiten_advantages: bool = False
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens; this is a second baseline.
    """

    @property
    def needs_critic(self) -> bool:
        return self.baseline == "value"

    @property
    def min_group_size(self) -> int:
        return 2 if self.baseline == "leave_one_out" else 1

    def advantages(self, batch: Trajectories) -> Advantages:
        rewards = batch.bootstrapped(self.gamma) if self.needs_critic else batch.rewards
        returns = discounted_returns(rewards, batch.mask, gamma=self.gamma)
        start, counted = returns[:, 0], batch.mask.any(dim=1)  # (B,) G_0
        match self.baseline:
            case "value":
                baseline, compared = batch.values, counted
            case "batch_mean":
                everything = batch.groups.new_zeros(batch.groups.shape)  # one group
                baseline, compared = over_tokens(group_moments(start, everything, counted)[0], batch.mask), counted
            case "leave_one_out":
                mean, compared = leave_one_out(start, batch.groups, counted)
                baseline = over_tokens(mean, batch.mask)
        advantages = (returns - baseline).where(batch.mask & compared[:, None], returns.new_zeros(()))
        return Advantages(advantages=advantages, returns=returns)
