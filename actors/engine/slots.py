"""The key-value cache of the rows being decoded, in slots that are refilled when a row ends; and its attention.

Shapes: L layers, S slots, H key-value heads, E extent, D head width, T padded prompt length, P prompt length.

A Hugging Face model takes both caches as `past_key_values`: it calls `update` in every layer and needs nothing else
when position ids are given and the mask is ready-made or not needed. Rows are left-aligned, and extents are multiples
of 32 and at least 64. With a fixed number of rows, the bits of a row then do not depend on its neighbours' lengths.
(Left padding and other extents change the order of summation; so do, on CPU, grouped queries in float32 when a
neighbour is 384 to 512 tokens long.)

Left out: paging. Every slot is as long as the longest row so far; at GPT-2 scale that costs less than a page table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ATTENTION = "raylign_slots"
ALIGN = 16  # padded prompts have a multiple of it as their length
# extents are multiples of it: at some odd multiples of 16 (112, 240) bfloat16 products sum in another order
EXTENTS = 32
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # arguments of some families that are not supported
SHORTEST = 64  # extent; torch multiplies smaller matrices on another path, which sums in another order


def align(length: int, multiple: int = ALIGN) -> int:
    """Round a length up to a multiple."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A prompt after its one pass through the model, to be copied into the slots of its samples."""

    length: int  # P
    keys: Tensor  # (L, H, T, D)
    values: Tensor  # (L, H, T, D)
    hidden: Tensor  # (D,) state of the last token, after the final norm; D is the model's width here
    logits: Tensor  # (V,) float32, for the first sampled token


class PromptCache:
    """Collects the keys and values of one prefill."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the model's layers in order; returns its arguments, because a prompt attends to itself alone."""
        assert layer == len(self._keys), f"layer {layer} ran when layer {len(self._keys)} was due"
        self._keys.append(keys)
        self._values.append(values)
        return keys, values

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, each (L, B, H, T, D)."""
        return torch.stack(self._keys), torch.stack(self._values)


class SlotCache:
    """Keys and values of S rows, all as long as the longest needs; zero at first, because masked places must be finite.

    Everything is copied when the extent grows, once every 32 tokens. Reserving room would cost more: bfloat16 products
    on CPU copy an operand whose heads are not contiguous in memory, in every layer of every step (measured: 3.9 ms a
    layer instead of 1.2).
    """

    def __init__(self, slots: int, like: Prefill) -> None:
        layers, heads, _, width = like.keys.shape
        self.extent = SHORTEST
        self.keys = [like.keys.new_zeros(slots, heads, SHORTEST, width) for _ in range(layers)]
        self.values = [like.keys.new_zeros(slots, heads, SHORTEST, width) for _ in range(layers)]
        self._shut = torch.finfo(like.keys.dtype).min
        self._mask = like.keys.new_full((slots, SHORTEST), self._shut)  # (S, E), added to the scores
        self._rows = torch.arange(slots, device=like.keys.device)
        self._positions = self._rows  # (S,), positions of the next tokens

    def admit(self, slots: npt.NDArray[np.int64], prompt: Prefill) -> None:
        """Copy the prompt into these slots, over their former contents."""
        width = prompt.keys.shape[2]
        self._grow(width)
        index = torch.from_numpy(slots).to(self._mask.device)
        for layer in range(len(self.keys)):
            self.keys[layer][index, :, :width] = prompt.keys[layer]
            self.values[layer][index, :, :width] = prompt.values[layer]
        self._mask[index, : prompt.length] = 0
        self._mask[index, prompt.length :] = self._shut

    def open(self, positions: Tensor, longest: int) -> Tensor:
        """Prepare for one token a row at `positions` (S,), at most `longest`; returns the mask (S, 1, 1, E)."""
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


def attend(
    _: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it.

    query (B, heads, Q, D), keys and values (B, H, E, D) -> (B, Q, heads, D). Without a mask it is a causal prefill of
    right-padded prompts. With a mask it is one token a row, for which two plain matrix products are twice as fast on
    CPU as `scaled_dot_product_attention`. Grouped queries share the keys of their head without a copy. sliding_window:
    number of tokens that a token of this layer sees, itself included. Raises ValueError for arguments that would change
    the result and are not supported.
    """
    if strange := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise ValueError(
            f"model.path: must be of a family with plain attention, got one with {strange[0]}; choose Llama, Qwen2, "
            "Mistral or GPT-2"
        )
    rows, heads, length, width = query.shape
    windowed = sliding_window is not None and keys.shape[2] > sliding_window
    if mask is None:
        band = _band(length, sliding_window, query.device) if windowed else None
        out = nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=heads != keys.shape[1],
        )
        return out.transpose(1, 2), None
    if windowed:
        mask = _last(mask, sliding_window)
    grouped = query.reshape(rows, keys.shape[1], -1, width) * (
        width**-0.5 if scaling is None else scaling
    )  # (B, H, G, D)
    # oneDNN repacks the second operand: 0.9 ms a layer instead of 2.0 if that is the query (float32: 4.4 and 2.2)
    if keys.dtype == torch.bfloat16:
        scores = torch.matmul(keys, grouped.transpose(-1, -2)).transpose(-1, -2).add_(mask)
    else:
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).add_(mask)
    return torch.matmul(torch.softmax(scores, -1), values).view(rows, length, heads, width), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """The mask of a prompt, (T, T): each token sees itself and the window - 1 tokens before it."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril().triu(1 - window) if window else everything.tril()


def _last(mask: Tensor, window: int | None) -> Tensor:
    """The mask of one token a row (S, 1, 1, E), open only at the last `window` of the row's tokens.

    The open places of a row are its first ones.
    """
    to_the_end = (mask == 0).flip(-1).cumsum(-1).flip(-1)  # open places from here on
    return mask if window is None else mask.masked_fill(to_the_end > window, torch.finfo(mask.dtype).min)


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. Its masks stay unregistered, so it builds none."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)


@torch.no_grad()
def check_windows(model: Any, path: str) -> None:
    """Raises ValueError when a layer with a sliding window does not pass the window to `attend`; runs one token.

    model: its attention is `ATTENTION`. Such a layer would see the whole text here, and only its window in a learner.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None:
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    told: list[int | None] = []

    def listen(
        layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        told.append(others.get("sliding_window"))
        return attend(layer, query, keys, values, mask, **others)

    from transformers import AttentionInterface

    AttentionInterface.register(f"{ATTENTION}_told", listen)
    model.set_attn_implementation(f"{ATTENTION}_told")
    position = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=position, position_ids=position, past_key_values=PromptCache(), use_cache=True)
    model.set_attn_implementation(ATTENTION)
    if told != [window if kind == "sliding_attention" else None for kind in kinds]:
        raise ValueError(
            f"model.path: must tell each layer's attention of its sliding window, got {path!r} (family "
            f"{config.model_type}), which has one of {window} "
            "and does not; choose a model of another family, such as Mistral, Qwen2 or Llama"
        )
