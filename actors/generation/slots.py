"""Keys and values of the rows being decoded, in slots that are refilled when a row ends.

Shapes: L layers, S slots, H key-value heads, E extent, D head width, T padded prompt length, P prompt length.

The two classes are what a Hugging Face model takes as `past_key_values`: it calls `update` in every layer and asks for nothing
else when position ids are given and the mask is ready-made or not needed. Rows are left-aligned, and extents are multiples of 32 and
at least 64: with a fixed number of rows, the bits of one row then do not depend on its neighbours' lengths (left padding and other
extents change the order of summation; so, on CPU, do grouped queries in float32 when a neighbour is 384 to 512 tokens long).

What was left out: paging. Every slot is as long as the longest row so far; at GPT-2 scale that costs less than a page table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ATTENTION = "raylign_slots"
ALIGN = 16  # of padded prompts
EXTENTS = 32  # bfloat16 products of values sum in another order at some odd multiples of 16 (112 and 240, with grouped queries)
SHORTEST = 64  # torch multiplies matrices of under 400 products on another path, which sums in another order


def align(length: int, multiple: int = ALIGN) -> int:
    """The next multiple of so many."""
    return -(-length // multiple) * multiple


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
    """Keys and values of S rows, all as long as the longest needs; zero at first, since a masked place must be finite.

    A longer extent means a copy of everything, once every 32 tokens. Room kept in reserve would cost more: bfloat16 products on CPU
    copy an operand whose heads are not side by side in memory, in every layer of every step (measured: 3.9 ms a layer instead of 1.2).
    """

    def __init__(self, slots: int, like: Prefilled) -> None:
        layers, heads, _, width = like.keys.shape
        self.extent = SHORTEST
        self.keys = [like.keys.new_zeros(slots, heads, SHORTEST, width) for _ in range(layers)]
        self.values = [like.keys.new_zeros(slots, heads, SHORTEST, width) for _ in range(layers)]
        self._shut = torch.finfo(like.keys.dtype).min
        self._mask = like.keys.new_full((slots, SHORTEST), self._shut)  # (S, E), added to the scores
        self._rows = torch.arange(slots, device=like.keys.device)
        self._positions = self._rows  # (S,), where the next token goes

    def admit(self, slots: npt.NDArray[np.int64], prompt: Prefilled) -> None:
        """Copy the prompt into these slots, over whatever they held."""
        width = prompt.keys.shape[2]
        self._grow(width)
        index = torch.from_numpy(slots).to(self._mask.device)
        for layer in range(len(self.keys)):
            self.keys[layer][index, :, :width] = prompt.keys[layer]
            self.values[layer][index, :, :width] = prompt.values[layer]
        self._mask[index, : prompt.length] = 0
        self._mask[index, prompt.length :] = self._shut

    def open(self, positions: Tensor, longest: int) -> Tensor:
        """Make ready for one token a row at `positions` (S,), none beyond `longest`; returns the mask (S, 1, 1, E)."""
        self._grow(longest + 1)
        self._positions = positions
        self._mask.scatter_(1, positions[:, None], 0.0)
        return self._mask[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row, (S, H, 1, D) each; returns the layer's keys and values, (S, H, E, D)."""
        self.keys[layer][self._rows, :, self._positions] = keys[:, :, 0]
        self.values[layer][self._rows, :, self._positions] = values[:, :, 0]
        return self.keys[layer], self.values[layer]

    def _grow(self, length: int) -> None:
        extent = align(length, EXTENTS)
        if extent <= self.extent:
            return
        rows, heads, _, width = self.keys[0].shape
        more = self._mask.new_zeros(rows, heads, extent - self.extent, width)
        for layer in range(len(self.keys)):
            self.keys[layer] = torch.cat([self.keys[layer], more], 2)
            self.values[layer] = torch.cat([self.values[layer], more], 2)
        self._mask = nn.functional.pad(self._mask, (0, extent - self.extent), value=self._shut)
        self.extent = extent


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
    if keys.dtype == torch.bfloat16:  # oneDNN repacks the second operand: 0.9 ms a layer instead of 2.0 when that is the query (float32: 4.4 and 2.2)
        scores = torch.matmul(keys, grouped.transpose(-1, -2)).transpose(-1, -2).add_(mask)
    else:
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).add_(mask)
    return torch.matmul(torch.softmax(scores, -1), values).view(rows, length, heads, width), None


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. Its masks stay unregistered, so it builds none."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
