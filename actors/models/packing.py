"""Packing: several sequences on one line, which a mask keeps from seeing each other.

Shapes: S sequences, L lines, T tokens of the longest line.

Left out: attention kernels for ragged sequences (flash_attn_varlen), which need a GPU; a mask is the same arithmetic on
any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.models.context import longest_text

Ints = npt.NDArray[np.int64]
_REMEDY = "set pack_tokens to 0, or choose a model of another family, such as Llama, Qwen2 or GPT-2"


def first_fit(rows: Ints, lengths: Ints, capacity: int) -> list[Ints]:
    """Put rows into bins of at most `capacity` tokens; a longer row gets a bin of its own.

    lengths: of every row of the table, indexed by row. First-fit decreasing: the longest row first, each into the first
    bin that has room. It needs at most 11/9 of the fewest possible bins, plus one (Johnson 1973). The same rows in the
    same order give the same bins.
    """
    bins: list[list[int]] = []
    room = np.zeros(len(rows), np.int64)  # of each bin so far
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        fitting = room[: len(bins)] >= lengths[row]
        chosen = int(fitting.argmax()) if fitting.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
            room[chosen] = capacity
        bins[chosen].append(int(row))
        room[chosen] -= lengths[row]
    return [np.asarray(rows, np.int64) for rows in bins]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sequences on lines, each array (L, T) int64, padded at the right: tokens 0, positions 0, segments -1."""

    tokens: Ints
    positions: Ints  # position of a token in its own sequence
    segments: Ints  # number of the sequence to which a token belongs
    starts: Ints  # (S,) the place in the flat grid where each sequence begins


def side_by_side(tokens: npt.NDArray[Any], offsets: Ints, line: Ints) -> Grid:
    """Put sequence s, `tokens[offsets[s]:offsets[s + 1]]`, on line `line[s]`, after the earlier ones there.

    line: (S,) into L lines, ascending.
    """
    sizes = np.diff(offsets)
    # the number of tokens before it on its own line
    columns = offsets[:-1] - offsets[np.searchsorted(line, line)]
    width = int((columns + sizes).max())
    starts = line * width + columns
    sequence = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(len(tokens)) - offsets[:-1][sequence]
    grid = np.zeros((3, int(line[-1] + 1) * width), np.int64)
    grid[2] = -1
    grid[:, starts[sequence] + position] = tokens, position, sequence
    laid = grid.reshape(3, -1, width)
    return Grid(tokens=laid[0], positions=laid[1], segments=laid[2], starts=starts)


def block_causal(segments: Tensor) -> Tensor:
    """The attention mask, (L, 1, T, T): a token sees itself and the earlier tokens of its own sequence.

    Padding sees padding, because a row that sees nothing is NaN.
    """
    width = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()


@torch.no_grad()
def check_packing(model: Any, path: str) -> None:
    """Raises ValueError unless packed sequences have the hidden states that each has alone.

    A family with its own kind of attention may ignore mask or positions.
    """
    window, context = getattr(model.config, "sliding_window", None), longest_text(model.config, model)
    problem = (
        f"which lets a token see the last {window} alone"
        if window is not None and (context is None or window < context)
        else ""
    )
    if not problem:
        # two sequences, of 3 tokens and 2
        ids = torch.arange(1, 6)[None] % model.get_input_embeddings().weight.shape[0]
        segments, positions = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1]])
        packed = model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=block_causal(segments), use_cache=False
        ).last_hidden_state
        alone = torch.cat(
            [model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in (ids[:, :3], ids[:, 3:])],
            1,
        )
        gap, scale = float((packed - alone).abs().max()), float(alone.abs().max())
        problem = (
            f"whose hidden states then differ by up to {gap:.2g}"
            if gap > torch.finfo(model.dtype).eps ** 0.5 * scale
            else ""
        )
    if problem:
        raise ValueError(
            "pack_tokens: must be 0 for a model whose sequences cannot be kept apart on one line by position ids and a "
            "mask, "
            f"got {path!r} (family {model.config.model_type}), {problem}; {_REMEDY}"
        )
