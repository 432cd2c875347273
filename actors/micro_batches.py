"""From a step's table to micro-batches: which rows make a minibatch, which rank runs them, and the tensors a model takes.

Shapes: R rows of the table, B rows of a micro-batch, T its longest row, N its action tokens.
Every rank sees the whole table and computes the same plan, so nothing about it is ever communicated. The plan of
minibatches depends on (seed, step, epoch) alone; only who runs what depends on the number of ranks.

What was left out: packing by token budget. Rows of similar length meet in one micro-batch, which removes most padding
at a fixed memory bound in rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors import ragged
from actors.model import TokenInputs
from actors.objective import ActionTokens

Rows = npt.NDArray[np.int64]


def minibatches(rows: int, *, epochs: int, minibatches: int, seed: int, step: int) -> list[list[Rows]]:
    """Per epoch, a permutation of range(rows) cut into `minibatches` near-equal parts.

    The permutation is drawn from (seed, step, epoch) alone: never from the number of ranks or anything drawn before.
    Raises ValueError when there are more minibatches than rows.
    """
    if not 1 <= minibatches <= rows:
        raise ValueError(f"minibatches: must be >= 1 and <= the {rows} rows of the step, got {minibatches}")
    return [np.array_split(np.random.default_rng([seed, step, epoch]).permutation(rows).astype(np.int64), minibatches) for epoch in range(epochs)]


def deal(rows: Rows, lengths: npt.NDArray[Any], *, ranks: int, micro_batch_size: int) -> list[list[Rows]]:
    """For each rank the same number of micro-batches of at most `micro_batch_size` of these rows; every row lands exactly once.

    lengths: (R,) length of every row of the table, indexed by row. Rows are sorted by length and dealt in snake order, so ranks
    get near-equal work and micro-batches hold rows of similar length. A micro-batch may be empty: its rank then re-runs a row with weight
    zero, because ranks that differ in the number of backward passes hang in ZeRO 2 and 3.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(ordered))
    owner = np.where(turn // ranks % 2 == 0, turn % ranks, ranks - 1 - turn % ranks)  # 0 1 2 | 2 1 0 | 0 1 2 | ...
    shares = [ordered[owner == rank] for rank in range(ranks)]
    count = max(-(-len(share) // micro_batch_size) for share in shares)
    return [np.array_split(share, count) for share in shares] if count else [[] for _ in shares]


class Batch:
    """The columns of one Rollouts or Experience table as flat arrays, from which micro-batches are cut."""

    COLUMNS = ("logprobs", "proximal_logprobs", "reference_logprobs", "values", "advantages", "returns")

    def __init__(self, table: pa.Table, device: torch.device, kl_coef: float = 0.0) -> None:
        """kl_coef: what an objective is told of the step besides the table."""
        self.device = device
        self.kl_coef = kl_coef
        self.sample_ids = table.column("sample_id").to_numpy()  # (R,)
        self.tokens, self.offsets = ragged.flat(table.column("tokens"))
        mask, mask_offsets = ragged.flat(table.column("action_mask"))
        assert np.array_equal(mask_offsets, self.offsets), "action_mask must be aligned with tokens"
        self.lengths = np.diff(self.offsets)
        self._actions = np.flatnonzero(mask)  # flat position of every action token
        self.action_offsets = np.searchsorted(self._actions, self.offsets)  # (R + 1,) into _actions
        assert not np.isin(self._actions, self.offsets[:-1]).any(), "a row's first token has no state to be chosen in; prompts have at least one token"
        self._columns = {name: ragged.flat(table.column(name))[0] for name in self.COLUMNS if name in table.column_names}

    def __len__(self) -> int:
        return len(self.lengths)

    def action_counts(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Action tokens of each of these rows."""
        return np.asarray(np.diff(self.action_offsets)[rows])

    def inputs(self, rows: Rows) -> TokenInputs:
        """What the model takes. The last column is cut off: no state after the longest row's last token is ever asked for."""
        tokens, offsets = ragged.take(self.tokens, self.offsets, rows)
        actions, action_offsets = ragged.take(self._actions, self.action_offsets, rows)
        row = np.repeat(np.arange(len(rows)), np.diff(action_offsets))
        column = actions - self.offsets[:-1][rows][row]  # position of the chosen token in its own row, >= 1
        width = max(int(np.diff(offsets).max(initial=0)) - 1, 1)
        padded = ragged.pad(tokens, offsets, width=width + 1)[:, :width]
        return TokenInputs(
            input_ids=self._tensor(padded, np.int64),
            states=self._tensor(row * width + column - 1, np.int64),
            targets=self._tensor(self.tokens[actions], np.int64),
        )

    def actions(self, rows: Rows) -> ActionTokens:
        """What an objective takes, in the order of `inputs(rows).targets`. Raises KeyError on a table that is no Experience."""
        index, offsets = ragged.take(self._actions, self.action_offsets, rows)
        row = np.repeat(np.arange(len(rows)), np.diff(offsets))
        columns = {name: self._tensor(self._columns[name][index], np.float32) for name in self.COLUMNS}
        return ActionTokens(row=self._tensor(row, np.int64), rows=len(rows), kl_coef=self.kl_coef, **columns)

    def micro_batch(self, rows: Rows) -> tuple[TokenInputs, ActionTokens]:
        return self.inputs(rows), self.actions(rows)

    def aligned(self, rows: Rows, values: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Numbers at the action tokens of these rows, (N,), as a flat column aligned with their tokens: (values, offsets), zero elsewhere."""
        actions, action_offsets = ragged.take(self._actions, self.action_offsets, rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        row = np.repeat(np.arange(len(rows)), np.diff(action_offsets))
        out = np.zeros(int(offsets[-1]), np.float32)
        out[offsets[:-1][row] + actions - self.offsets[:-1][rows][row]] = values.float().cpu().numpy()
        return out, offsets

    def _tensor(self, array: npt.NDArray[Any], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device, non_blocking=True)


def in_row_order(micro: Sequence[Rows], parts: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]) -> tuple[Rows, pa.ListArray]:
    """Undo the dealing: the rows of all micro-batches ascending, and their `aligned` parts as one list column."""
    rows = np.concatenate(micro) if micro else np.zeros(0, np.int64)
    values = np.concatenate([v for v, _ in parts]) if parts else np.zeros(0, np.float32)
    sizes = np.concatenate([np.diff(o) for _, o in parts]) if parts else np.zeros(0, np.int64)
    order = np.argsort(rows, kind="stable")
    taken, offsets = ragged.take(values, np.concatenate([[0], np.cumsum(sizes)]), order)
    return rows[order], ragged.unflat(taken, offsets, pa.float32())
