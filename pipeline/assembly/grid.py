"""The action grid: flat columns of a step as one row of action tokens per sample, and back."""

from __future__ import annotations

import numpy as np
import torch

from actors import ragged


class ActionGrid:
    """Flat token-aligned columns (sum of lengths,) to action tokens side by side (B, A), and back."""

    def __init__(self, acted: ragged.Array, offsets: ragged.Array) -> None:
        self.acted = acted
        self.offsets = np.concatenate([[0], np.cumsum(acted)])[offsets]  # of the action tokens, (B + 1,)
        self.width = max(int(np.diff(self.offsets).max(initial=0)), 1)
        self.mask = torch.from_numpy(ragged.mask(self.offsets, self.width))

    def pad(self, column: ragged.Array) -> torch.Tensor:
        return torch.from_numpy(ragged.pad(column[self.acted], self.offsets, width=self.width))

    def unpad(self, padded: torch.Tensor) -> ragged.Array:
        column = np.zeros(self.acted.size, np.float32)
        column[self.acted] = ragged.unpad(padded.numpy(), self.offsets)
        return column
