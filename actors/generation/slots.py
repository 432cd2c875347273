"""Keys and values of the rows being decoded, in slots that are allocated once a call and refilled when a row ends.

Shapes: L layers, S slots, H key-value heads, C capacity, E extent in use, D head width, T padded prompt length, P prompt length.

The two classes are what a Hugging Face model takes as `past_key_values`: it calls `update` in every layer and asks for nothing
else when position ids are given and the mask is ready-made or not needed. Rows are left-aligned, and extents are multiples of 16 and
at least 64: with a fixed number of rows, the bits of one row then do not depend on its neighbours' lengths (left padding and other
extents change the order of summation; so, on CPU, do grouped queries in float32 when a neighbour is 384 to 512 tokens long).

What was left out: paging. A slot is as long as the longest sequence of the call; at GPT-2 scale that costs less than a page table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ATTENTION = "raylign_slots"
ALIGN = 16
SHORTEST = 64  # torch multiplies matrices of under 400 products on another path, which sums in another order


def align(length: int) -> int:
    """The next multiple of 16."""
    return -(-length // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """A prompt that went through the model once, to be copied into the slots of its samples."""

    length: int  # P
    keys: Tensor  # (L, H, T, D)
    values: Tensor  # (L, H, T, D)
    logits: Tensor  # (V,) float32, of the first sampled token


class PromptCache:
    """Collects the keys and values of one prefill."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the model's layers in order; hands back what it was given: a prompt attends to itself alone."""
        assert layer == len(self._keys), f"layer {layer} ran when layer {len(self._keys)} was due"
        self._keys.append(keys)
        self._values.append(values)
        return keys, values

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, each (L, B, H, T, D)."""
        return torch.stack(self._keys), torch.stack(self._values)


class SlotCache:
    """Keys and values of S rows with room for `capacity` tokens each, all zero at first: a masked place must be finite."""

    def __init__(self, slots: int, capacity: int, like: Prefilled) -> None:
        layers, heads, _, width = like.keys.shape
        shape = (layers, slots, heads, max(SHORTEST, align(capacity)), width)
        self.keys = like.keys.new_zeros(shape)
        self.values = like.keys.new_zeros(shape)
        self._mask = like.keys.new_full((slots, shape[3]), torch.finfo(like.keys.dtype).min)  # (S, C), added to the scores
        self._flat_keys = list(self.keys.view(layers, -1, width))
        self._flat_values = list(self.values.view(layers, -1, width))
        self._heads = torch.arange(slots * heads, device=self.keys.device).view(slots, heads) * shape[3]  # each head's first row in the flat view
        self._index = self._heads.flatten()
        self._extent = 0

    def admit(self, slots: npt.NDArray[np.int64], prompt: Prefilled) -> None:
        """Copy the prompt into these slots, over whatever they held."""
        index = torch.from_numpy(slots).to(self.keys.device)
        width = prompt.keys.shape[2]
        self.keys[:, index, :, :width] = prompt.keys[:, None]
        self.values[:, index, :, :width] = prompt.values[:, None]
        self._mask[index, : prompt.length] = 0
        self._mask[index, prompt.length :] = torch.finfo(self._mask.dtype).min

    def open(self, positions: Tensor, longest: int) -> Tensor:
        """Make ready for one token a row at `positions` (S,); returns the mask (S, 1, 1, E)."""
        self._index = (self._heads + positions[:, None]).flatten()
        self._extent = max(SHORTEST, align(longest + 1))
        self._mask.scatter_(1, positions[:, None], 0.0)
        return self._mask[:, None, None, : self._extent]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row, (S, H, 1, D) each; returns the layer's keys and values in use, views of (S, H, E, D)."""
        self._flat_keys[layer].index_copy_(0, self._index, keys.reshape(-1, keys.shape[-1]))
        self._flat_values[layer].index_copy_(0, self._index, values.reshape(-1, values.shape[-1]))
        return self.keys[layer, :, :, : self._extent], self.values[layer, :, :, : self._extent]


def attend(_: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None = None, **__: Any) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it: query (B, heads, Q, D), keys and values (B, H, E, D) -> (B, Q, heads, D).

    Without a mask it is a prefill of right-padded prompts (causal); with one it is one token a row, for which two plain matrix
    products are twice as fast on CPU as `scaled_dot_product_attention`. Grouped queries share their head's keys without a copy.
    """
    rows, heads, length, width = query.shape
    if mask is None:
        out = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=heads != keys.shape[1])
        return out.transpose(1, 2), None
    grouped = query.reshape(rows, keys.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)  # (B, H, G, D)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).add_(mask)
    return torch.matmul(torch.softmax(scores, -1), values).view(rows, length, heads, width), None


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. Its masks stay unregistered, so it builds none."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
