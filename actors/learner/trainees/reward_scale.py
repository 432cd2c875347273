"""The scale of a reward model: mean 0 and std 1 on given texts, before and after training.

Huang et al. 2023, detail 5.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from actors.experience import Comparisons
from actors.learner.micro_batches import Batch
from actors.learner.trainees.base import Moments, Passes
from actors.models.reward_model import RewardModel

ROWS = 512


class RewardScale:
    """The scale of rewards on all texts of the first ROWS comparisons of a Parquet file, chosen and rejected alike."""

    def __init__(self, path: str, device: torch.device) -> None:
        """Raises ValueError when the file does not hold Comparisons, or holds none."""
        self.path = path
        self._batch = Batch(Comparisons.read(Path(path)).slice(0, ROWS).table, device)
        if not len(self._batch):
            raise ValueError(
                "reward_model.standardise: must have comparisons on whose texts rewards are brought to mean 0 and std "
                f"1, got none in {path}; give some, or set it to false"
            )

    def apply(self, model: RewardModel, passes: Passes) -> None:
        """Scale a model that is whole on this rank. Raises as `moments` does."""
        model.standardise(*self.moments(passes))

    @torch.no_grad()
    def moments(self, passes: Passes) -> Moments:
        """The mean and std of the rewards of the texts, over all ranks.

        Raises ValueError when all rewards are equal or one is not finite, because they cannot be scaled then.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self._batch.device)  # number, sum and sum of squares
        for share in passes.share(self._batch):
            rewards = passes.forward(self._batch.inputs(*self._batch.filled(share)))
            rewards = rewards[: None if len(share.rows) else 0].double()  # a rank without rows counts nothing
            sums += torch.stack([rewards.new_tensor(len(rewards)), rewards.sum(), rewards.square().sum()])
        count, total, squares = passes.total(sums).tolist()
        mean = total / count
        variance = squares / count - mean**2
        if not variance > 1e-12 * squares / count:  # also where it is NaN
            raise ValueError(
                "reward_model.standardise: must have texts of finite and different rewards to scale them by, got mean "
                f"{mean:.3g} and variance {variance:.3g} over {self.path}; give other comparisons, or set it to false"
            )
        return Moments(mean, math.sqrt(variance))
