"""The texts on which a reward model's scale is set: mean 0 and std 1 there, before training and after it (Huang et al. 2023, detail 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.experience import Comparisons
from actors.micro_batches import Batch, Share
from actors.model import TokenInputs

ROWS = 512


class Yardstick:
    """All texts of the first ROWS comparisons of a Parquet file, chosen and rejected alike."""

    def __init__(self, path: str, device: torch.device) -> None:
        """Raises ValueError when it is no file of Comparisons, or has none."""
        self.path = path
        self.batch = Batch(Comparisons.read(Path(path)).slice(0, ROWS).table, device)
        if not len(self.batch):
            raise ValueError(f"reference: must have comparisons to bring the rewards to mean 0 and std 1 on, got none in {path}")

    @torch.no_grad()
    def sums(self, forward: Callable[[TokenInputs], Tensor], shares: Sequence[Share]) -> Tensor:
        """(3,) float64: number, sum and sum of squares of the rewards of these shares; one without rows counts nothing."""
        total = torch.zeros(3, dtype=torch.float64, device=self.batch.device)
        for share in shares:
            rewards = forward(self.batch.inputs(*self.batch.filled(share)))[: None if len(share.rows) else 0].double()
            total += torch.stack([rewards.new_tensor(len(rewards)), rewards.sum(), rewards.square().sum()])
        return total

    def moments(self, sums: Tensor) -> tuple[float, float]:
        """Mean and population std. Raises ValueError where all rewards are the same or one is not finite, for nothing would scale them."""
        count, total, squares = sums.tolist()
        mean = total / count
        variance = squares / count - mean**2
        if not variance > 1e-12 * squares / count:  # also where it is NaN
            raise ValueError(f"reference: must have texts of finite and different rewards, got mean {mean:.3g} and variance {variance:.3g} over {self.path}")
        return mean, math.sqrt(variance)
