"""REINFORCE leave-one-out.

Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for RLHF"; Kool et al. 2019.

    A_i = R_i - mean_{j != i} R_j,    R_i = score_i - kl_coef sum_t KL_t

A rollout is one action: all its tokens share A_i, and a KL penalty in the rewards is part of R_i, so it is compared,
too. The paper takes one update a step with the plain gradient; the clipped ratio has that gradient at its first update,
and bounds those that follow. A rollout left alone in its group, its fellows without a reward or an action, has nothing
to be compared with: A = 0.
"""

from __future__ import annotations

from pipeline.algorithms.base import Advantages, Trajectories
from pipeline.algorithms.clipping import Clipped
from pipeline.algorithms.estimators import leave_one_out, over_tokens, rollout_returns


class RLOO(Clipped):
    """Each sample against the mean of its prompt's others."""

    name: str = "rloo"
    """REINFORCE leave-one-out."""

    whiten_advantages: bool = False
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens."""

    @property
    def min_group_size(self) -> int:
        return 2

    def advantages(self, batch: Trajectories) -> Advantages:
        returns = rollout_returns(batch.rewards, batch.mask)
        mean, compared = leave_one_out(returns, batch.groups, batch.mask.any(dim=1))
        advantages = (returns - mean).where(compared, returns.new_zeros(()))
        return Advantages(advantages=over_tokens(advantages, batch.mask), returns=over_tokens(returns, batch.mask))
