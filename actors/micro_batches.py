"""From a step's table to micro-batches: which rows make a minibatch, which rank runs them, and the tensors a model takes.

Shapes: R rows of the table, S sequences of all rows, B rows of a micro-batch, L its lines, T the longest line, N its action tokens.
Every rank sees the whole table and computes the same plan, so nothing about it is ever communicated. The plan of
minibatches depends on (seed, step, epoch) alone; only who runs what depends on the number of ranks.

A row is one sequence, or, of comparisons, several: the texts compared, which stay together in one micro-batch. Each sequence
has a line of its own, padded; or rows are packed into lines of so many tokens (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors import ragged
from actors.model import TokenInputs
from actors.objective import ActionTokens, Compared
from actors.packing import first_fit, side_by_side

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


class Share(NamedTuple):
    """A micro-batch. line: (B,) the line of each row, ascending; None where every sequence has one of its own. Without rows, its rank has run out of them."""

    rows: Rows
    line: Rows | None = None


def share_out(rows: Rows, lengths: npt.NDArray[Any], *, ranks: int, micro_batch_size: int, pack_tokens: int) -> list[list[Share]]:
    """For each rank the same number of micro-batches, as `deal` gives them; with pack_tokens, of lines filled with rows instead of rows.

    The lines are made from all these rows, whatever ranks there are, and dealt like rows as long as they are.
    """
    if not pack_tokens:
        return [[Share(micro) for micro in share] for share in deal(rows, lengths, ranks=ranks, micro_batch_size=micro_batch_size)]
    bins = first_fit(rows, lengths, pack_tokens)
    filled = np.asarray([lengths[own].sum() for own in bins], np.int64)

    def laid(micro: Rows) -> Share:
        own = [bins[i] for i in micro]
        return Share(np.concatenate([rows[:0], *own]), np.repeat(np.arange(len(own)), [len(rows) for rows in own]))

    return [[laid(micro) for micro in share] for share in deal(np.arange(len(bins)), filled, ranks=ranks, micro_batch_size=micro_batch_size)]


class Batch:
    """The columns of one table of rollouts, experience or comparisons as flat arrays, from which micro-batches are cut."""

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
        self._first, self._sequences = _sequences(table, self.offsets)
        self._actions = np.flatnonzero(mask)  # flat position of every action token
        self.action_offsets = np.searchsorted(self._actions, self.offsets)  # (R + 1,) into _actions
        self._action_offsets = np.searchsorted(self._actions, self._sequences)  # (S + 1,) likewise
        assert not np.isin(self._actions, self._sequences[:-1]).any(), "a row's first token has no state to be chosen in; prompts have at least one token"
        self._columns = {name: ragged.flat(table.column(name))[0] for name in self.COLUMNS if name in table.column_names}
        self._margin = table.column("margin").to_numpy() if "margin" in table.column_names else None  # (R,)

    def __len__(self) -> int:
        return len(self.lengths)

    def action_counts(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Action tokens of each of these rows."""
        return np.asarray(np.diff(self.action_offsets)[rows])

    def filled(self, share: Share) -> Share:
        """The share itself, or the shortest row for a rank that has run out of rows while others have not."""
        return share if len(share.rows) else Share(np.asarray([int(self.lengths.argmin())]))

    def inputs(self, rows: Rows, line: Rows | None = None) -> TokenInputs:
        """What the model takes. line: of each row, as in a `Share`; where no line holds two sequences, it changes nothing."""
        sequences, first = ragged.take(np.arange(len(self._sequences) - 1), self._first, rows)
        actions, action_offsets = ragged.take(self._actions, self._action_offsets, sequences)
        owner = np.repeat(np.arange(len(sequences)), np.diff(action_offsets))
        before = actions - self._sequences[:-1][sequences][owner] - 1  # tokens before the state that ends there, in its own sequence
        targets = self._tensor(self.tokens[actions], np.int64)
        # No state after a sequence's last token is ever asked for: it is left out where lines are shared, else the last column is cut off.
        if line is not None and len(np.unique(line)) < len(sequences):
            tokens, offsets = self._without_last(sequences)
            grid = side_by_side(tokens, offsets, np.repeat(line, np.diff(first)))
            ids, positions, segments = (self._tensor(part, np.int64) for part in (grid.tokens, grid.positions, grid.segments))
            states = self._tensor(grid.starts[owner] + before, np.int64)
            return TokenInputs(input_ids=ids, states=states, targets=targets, position_ids=positions, segments=segments)
        tokens, offsets = ragged.take(self.tokens, self._sequences, sequences)
        width = max(int(np.diff(offsets).max(initial=0)) - 1, 1)
        padded = ragged.pad(tokens, offsets, width=width + 1)[:, :width]
        return TokenInputs(input_ids=self._tensor(padded, np.int64), states=self._tensor(owner * width + before, np.int64), targets=targets)

    def _without_last(self, sequences: Rows) -> tuple[npt.NDArray[Any], Rows]:
        """Tokens of these sequences but for the last of each, as (values, offsets); of one that is a single token, that one."""
        starts, sizes = self._sequences[:-1][sequences], np.maximum(np.diff(self._sequences)[sequences] - 1, 1)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return self.tokens[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)], offsets

    def actions(self, rows: Rows) -> ActionTokens:
        """What a policy's or value objective takes, in the order of `inputs(rows).targets`. Raises KeyError on a table that is no Experience."""
        index, row = self._actions_of(rows)
        columns = {name: self._tensor(self._columns[name][index], np.float32) for name in self.COLUMNS}
        return ActionTokens(row=self._tensor(row, np.int64), rows=len(rows), kl_coef=self.kl_coef, **columns)

    def compared(self, rows: Rows) -> Compared:
        """What a reward objective takes, in the order of `inputs(rows).targets`, of a table of comparisons."""
        assert self._margin is not None, "only Comparisons are compared"
        row = self._actions_of(rows)[1]
        return Compared(row=self._tensor(row, np.int64), rows=len(rows), margin=self._tensor(self._margin[rows], np.float32))

    def aligned(self, rows: Rows, values: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Numbers at the action tokens of these rows, (N,), as a flat column aligned with their tokens: (values, offsets), zero elsewhere."""
        index, row = self._actions_of(rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        out = np.zeros(int(offsets[-1]), np.float32)
        out[offsets[:-1][row] + index - self.offsets[:-1][rows][row]] = values.float().cpu().numpy()
        return out, offsets

    def _actions_of(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(flat position, index into `rows`) of every action token of these rows."""
        index, offsets = ragged.take(self._actions, self.action_offsets, rows)
        return index, np.repeat(np.arange(len(rows)), np.diff(offsets))

    def _tensor(self, array: npt.NDArray[Any], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device, non_blocking=True)


def _sequences(table: pa.Table, offsets: Rows) -> tuple[Rows, Rows]:
    """Of each row the first sequence, (R + 1,), and of each sequence the first token, (S + 1,): of comparisons their texts, else the rows themselves."""
    if "segment_starts" not in table.column_names:
        return np.arange(len(offsets)), offsets
    starts, first = ragged.flat(table.column("segment_starts"))
    return first, np.append(np.repeat(offsets[:-1], np.diff(first)) + starts, offsets[-1])


def in_row_order(micro: Sequence[Rows], parts: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]) -> tuple[Rows, pa.ListArray]:
    """Undo the dealing: the rows of all micro-batches ascending, and their `aligned` parts as one list column."""
    rows = np.concatenate(micro) if micro else np.zeros(0, np.int64)
    values = np.concatenate([v for v, _ in parts]) if parts else np.zeros(0, np.float32)
    sizes = np.concatenate([np.diff(o) for _, o in parts]) if parts else np.zeros(0, np.int64)
    order = np.argsort(rows, kind="stable")
    taken, offsets = ragged.take(values, np.concatenate([[0], np.cumsum(sizes)]), order)
    return rows[order], ragged.unflat(taken, offsets, pa.float32())
