"""Advantage actor-critic. Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", one worker: A2C.

    L_t = -log pi(a_t|s_t) A_t
    A_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}) - V(s_t),    R_t = A_t + V(s_t)

n = 1 is the one-step TD error, GAE with lam = 0; an n beyond the rollout's end gives reward to go minus V. A reward
that comes at the last token alone reaches the first one through the critic only, n tokens a step: with small n the
critic must learn faster than the policy.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.algorithms.base import Advantages, Algorithm, Trajectories
from pipeline.algorithms.estimators import n_step


class A2C(Algorithm):
    """Plain policy gradient with a critic that bootstraps."""

    name: str = "a2c"
    """Advantage actor-critic."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; tokens of the environment do not count, and returns cross turns."""

    n_steps: int = Field(default=1, ge=1)
    """Tokens whose own rewards count before the critic's value stands for the rest."""

    @property
    def needs_critic(self) -> bool:
        return True

    def advantages(self, batch: Trajectories) -> Advantages:
        advantages, returns = n_step(
            batch.bootstrapped(self.gamma), batch.values, batch.mask, gamma=self.gamma, steps=self.n_steps
        )
        return Advantages(advantages=advantages, returns=returns)
