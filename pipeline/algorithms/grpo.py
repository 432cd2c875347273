"""Group relative policy optimisation.

Shao et al. 2024, "DeepSeekMath"; without std Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO).

    A_i = (R_i - mean_group R) / (std_group R + 1e-6)        std = true
    A_i = (R_i - mean_group R) / (std_step R + 1e-6)         std = true, std_over = "batch"
    A_i =  R_i - mean_group R                                std = false

with the clipped surrogate and beta k3 in the loss. Where camps differ: the paper averages over each rollout first
(`sequence_mean`, the default here), DAPO over all tokens (`token_mean`); Dr. GRPO divides by a constant, since both of
the paper's divisions, by length and by std, weigh prompts and rollouts unequally: `std = false` with `aggregation =
"constant"`. The deviation is the unbiased one. A group of one has A = 0, and so has one whose returns are all equal, to
the bit. With two samples and no std A is half of RLOO's.
"""

from __future__ import annotations

from typing import Literal

from pipeline.algorithms.base import Advantages, Trajectories
from pipeline.algorithms.clipping import Clipped
from pipeline.algorithms.estimators import deviation, group_moments, over_tokens, rollout_returns
from pipeline.algorithms.losses import KLEstimator

EPSILON = 1e-6


class GRPO(Clipped):
    """Each sample against the mean, and in units of the spread, of its prompt's samples."""

    name: str = "grpo"
    """Group relative policy optimisation."""

    std: bool = True
    """Divide by the standard deviation; false is Dr. GRPO."""

    std_over: Literal["group", "batch"] = "group"
    """The returns whose standard deviation it is: group or batch.

    group: those of the prompt. batch: all of the step, so that a group of nearly equal returns is not scaled up (Liu et
    al. 2025, "Tricks or Traps?").
    """

    kl_in: Literal["reward", "loss"] = "loss"
    """Place of the KL penalty: loss or reward.

    loss: in the policy's loss, as in the paper. reward: in the token rewards, which the group compares.
    """

    kl_estimator: KLEstimator = "k3"
    """KL_t of a sampled token: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d, with d = log pi - log pi_ref."""

    whiten_advantages: bool = False
    """Shift and scale the step's advantages to mean 0 and variance 1 over all action tokens."""

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "sequence_mean"
    """Normaliser of the token losses of a minibatch: token_mean, sequence_mean, or constant.

    token_mean: the number of tokens (DAPO). sequence_mean: the rollout's length, then the number of rollouts (GRPO).
    constant: the number of rollouts times sampling.max_new_tokens, which favours no length (Dr. GRPO); in conversations
    also times environment.max_turns.
    """

    @property
    def min_group_size(self) -> int:
        return 2

    def rules(self) -> None:
        super().rules()
        if self.std_over == "batch" and not self.std:
            raise ValueError(
                "algorithm.std: must be true when algorithm.std_over is batch, got false; it says which deviation "
                "divides, so set it, or remove std_over"
            )

    def advantages(self, batch: Trajectories) -> Advantages:
        returns = rollout_returns(batch.rewards, batch.mask)
        mean, std = group_moments(returns, batch.groups, batch.mask.any(dim=1))
        if self.std_over == "batch":
            std = deviation(returns, batch.mask.any(dim=1))
        advantages = (returns - mean) / (std + EPSILON) if self.std else returns - mean
        return Advantages(advantages=over_tokens(advantages, batch.mask), returns=over_tokens(returns, batch.mask))
