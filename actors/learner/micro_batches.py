"""The micro-batches of a step: the rows of a minibatch, the rank that runs them, and the tensors that a model takes.

Shapes: R rows of the table, S sequences of all rows, B rows of a micro-batch, L lines of a micro-batch, T tokens of the
longest line, N targets of a micro-batch (its action tokens, unless other targets are asked for).

Every rank sees the whole table and computes the same plan, so the plan is never communicated. The minibatches depend on
(seed, step, epoch) alone; the number of ranks only decides which rank runs which rows.

A row of rollouts is one sequence. A row of comparisons is several: the texts compared, which stay together in one
micro-batch. Each sequence has its own padded line; or several rows are packed into one line (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from actors import ragged
from actors.models.causal_lm import TokenInputs
from actors.models.packing import first_fit, side_by_side

Rows = npt.NDArray[np.int64]


def minibatches(rows: int, *, epochs: int, minibatches: int, seed: int, step: int) -> list[list[Rows]]:
    """For each epoch, a permutation of range(rows) cut into `minibatches` nearly equal parts.

    The permutation depends on (seed, step, epoch) alone: not on the number of ranks or on anything drawn before. Raises
    ValueError when there are more minibatches than rows.
    """
    if not 1 <= minibatches <= rows:
        raise ValueError(f"minibatches: must be >= 1 and <= the {rows} rows of the step, got {minibatches}")
    return [
        np.array_split(np.random.default_rng([seed, step, epoch]).permutation(rows).astype(np.int64), minibatches)
        for epoch in range(epochs)
    ]


def deal(rows: Rows, lengths: npt.NDArray[Any], *, ranks: int, micro_batch_size: int) -> list[list[Rows]]:
    """Deal rows to ranks and micro-batches of at most `micro_batch_size` rows; each row is dealt exactly once.

    lengths: (R,) length of every row of the table, indexed by row. Rows are sorted by length and dealt in snake order,
    so ranks get nearly equal work and micro-batches hold rows of similar length. All ranks get the same number of
    micro-batches, because under ZeRO 2 and 3 they hang if their numbers of backward passes differ. A micro-batch may be
    empty: its rank then runs a filler row with weight zero.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(ordered))
    owner = np.where(turn // ranks % 2 == 0, turn % ranks, ranks - 1 - turn % ranks)  # 0 1 2 | 2 1 0 | 0 1 2 | ...
    shares = [ordered[owner == rank] for rank in range(ranks)]
    count = max(-(-len(share) // micro_batch_size) for share in shares)
    return [np.array_split(share, count) for share in shares] if count else [[] for _ in shares]


class MicroBatch(NamedTuple):
    """A micro-batch; it has no rows if its rank has none left.

    line: (B,) the line of each row, ascending; None if every sequence has its own line.
    """

    rows: Rows
    line: Rows | None = None


def share_out(
    rows: Rows, lengths: npt.NDArray[Any], *, ranks: int, micro_batch_size: int, pack_tokens: int
) -> list[list[MicroBatch]]:
    """Deal rows as `deal` does; with `pack_tokens` > 0, pack rows into lines of that many tokens and deal the lines.

    The packing depends on these rows alone, not on the number of ranks. A line is then dealt like a row of its length.
    """
    if not pack_tokens:
        return [
            [MicroBatch(micro) for micro in share]
            for share in deal(rows, lengths, ranks=ranks, micro_batch_size=micro_batch_size)
        ]
    bins = first_fit(rows, lengths, pack_tokens)
    filled = np.asarray([lengths[own].sum() for own in bins], np.int64)

    def laid(micro: Rows) -> MicroBatch:
        own = [bins[i] for i in micro]
        return MicroBatch(np.concatenate([rows[:0], *own]), np.repeat(np.arange(len(own)), [len(rows) for rows in own]))

    return [
        [laid(micro) for micro in share]
        for share in deal(np.arange(len(bins)), filled, ranks=ranks, micro_batch_size=micro_batch_size)
    ]


class Batch:
    """One table of rollouts, experience or comparisons as flat arrays, from which micro-batches are cut.

    A target is a token for which the model gives a number: its log-prob, or the value of the state in which it was
    chosen.
    """

    def __init__(
        self, table: pa.Table, device: torch.device, *, targets: npt.NDArray[np.bool_] | None = None, kl_coef: float = 0
    ) -> None:
        """targets: mask of the target tokens, flat over all rows; None: `action_mask`. kl_coef: this step's."""
        self.device = device
        self.kl_coef = kl_coef
        self.sample_ids = table.column("sample_id").to_numpy()  # (R,)
        self.tokens, self.offsets = ragged.flat(table.column("tokens"))
        self.lengths = np.diff(self.offsets)
        self._table = table
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._first, self._sequences = _sequences(table, self.offsets)
        self._targets = np.flatnonzero(self._action_mask() if targets is None else targets)  # flat position of each
        self.target_offsets = np.searchsorted(self._targets, self.offsets)  # (R + 1,) into _targets
        self._target_offsets = np.searchsorted(self._targets, self._sequences)  # (S + 1,) likewise
        assert not np.isin(self._targets, self._sequences[:-1]).any(), (
            "a row's first token has no state to be chosen in; prompts have at least one token"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def target_counts(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The number of targets in each of these rows, (B,)."""
        return np.asarray(np.diff(self.target_offsets)[rows])

    def filled(self, share: MicroBatch, among: Rows | None = None) -> MicroBatch:
        """The share itself or, if it has no rows, a filler: the shortest row of `among`, or of all rows."""
        if len(share.rows):
            return share
        rows = np.arange(len(self)) if among is None else among
        return MicroBatch(rows[[self.lengths[rows].argmin()]])

    def inputs(self, rows: Rows, line: Rows | None = None) -> TokenInputs:
        """The tensors that the model takes for these rows. line: as in `MicroBatch`."""
        sequences, first = ragged.take(np.arange(len(self._sequences) - 1), self._first, rows)
        chosen, chosen_offsets = ragged.take(self._targets, self._target_offsets, sequences)
        owner = np.repeat(np.arange(len(sequences)), np.diff(chosen_offsets))
        # for each target, the position in its own sequence of the token before it, where its state is read
        before = chosen - self._sequences[:-1][sequences][owner] - 1
        targets = self._tensor(self.tokens[chosen], np.int64)
        # The state after a sequence's last token is never needed. So the last token is left out where lines are shared;
        # otherwise the last column is cut off.
        if line is not None and len(np.unique(line)) < len(sequences):
            tokens, offsets = self._without_last(sequences)
            grid = side_by_side(tokens, offsets, np.repeat(line, np.diff(first)))
            ids, positions, segments = (
                self._tensor(part, np.int64) for part in (grid.tokens, grid.positions, grid.segments)
            )
            states = self._tensor(grid.starts[owner] + before, np.int64)
            return TokenInputs(input_ids=ids, states=states, targets=targets, position_ids=positions, segments=segments)
        tokens, offsets = ragged.take(self.tokens, self._sequences, sequences)
        width = max(int(np.diff(offsets).max(initial=0)) - 1, 1)
        padded = ragged.pad(tokens, offsets, width=width + 1)[:, :width]
        return TokenInputs(
            input_ids=self._tensor(padded, np.int64),
            states=self._tensor(owner * width + before, np.int64),
            targets=targets,
        )

    def _without_last(self, sequences: Rows) -> tuple[npt.NDArray[Any], Rows]:
        """(values, offsets) of the tokens of these sequences, each without its last token; a single token is kept."""
        starts, sizes = self._sequences[:-1][sequences], np.maximum(np.diff(self._sequences)[sequences] - 1, 1)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return self.tokens[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)], offsets

    def row(self, rows: Rows) -> Tensor:
        """(N,) int64: the index into `rows` of each target, in the order of `inputs(rows).targets`."""
        return self._tensor(self._targets_of(rows)[1], np.int64)

    def text(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """For rows of several texts: the text of each target (N,) and the row of each text, int64, ascending."""
        texts, first = ragged.take(np.arange(len(self._sequences) - 1), self._first, rows)
        text = np.repeat(np.arange(len(texts)), np.diff(self._target_offsets)[texts])
        return self._tensor(text, np.int64), self._tensor(np.repeat(np.arange(len(rows)), np.diff(first)), np.int64)

    def at_targets(self, names: Iterable[str], rows: Rows) -> dict[str, Tensor]:
        """The values of token-aligned columns at the targets of these rows, each (N,) float32.

        The order is that of `inputs(rows).targets`. Raises KeyError when the table lacks a column.
        """
        index = self._targets_of(rows)[0]
        return {name: self._tensor(self._flat(name)[index], np.float32) for name in names}

    def of_rows(self, name: str, rows: Rows) -> Tensor:
        """(B,) float32: a column of one number for each row. Raises KeyError when the table lacks it."""
        return self._tensor(self._table.column(name).to_numpy()[rows], np.float32)

    def aligned(self, rows: Rows, values: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """(values, offsets) of a token-aligned column: `values` (N,) at the targets of these rows, zero elsewhere."""
        index, row = self._targets_of(rows)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        out = np.zeros(int(offsets[-1]), np.float32)
        out[offsets[:-1][row] + index - self.offsets[:-1][rows][row]] = values.float().cpu().numpy()
        return out, offsets

    def _flat(self, name: str) -> npt.NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = ragged.flat(self._table.column(name))[0]
        return self._columns[name]

    def _action_mask(self) -> npt.NDArray[Any]:
        mask, offsets = ragged.flat(self._table.column("action_mask"))
        assert np.array_equal(offsets, self.offsets), "action_mask must be aligned with tokens"
        return mask

    def _targets_of(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(flat position, index into `rows`) of every target of these rows."""
        index, offsets = ragged.take(self._targets, self.target_offsets, rows)
        return index, np.repeat(np.arange(len(rows)), np.diff(offsets))

    def _tensor(self, array: npt.NDArray[Any], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device, non_blocking=True)


def _sequences(table: pa.Table, offsets: Rows) -> tuple[Rows, Rows]:
    """(first sequence of each row (R + 1,), first token of each sequence (S + 1,)).

    The sequences of comparisons are their texts; otherwise they are the rows.
    """
    if "segment_starts" not in table.column_names:
        return np.arange(len(offsets)), offsets
    starts, first = ragged.flat(table.column("segment_starts"))
    return first, np.append(np.repeat(offsets[:-1], np.diff(first)) + starts, offsets[-1])


def in_row_order(
    micro: Sequence[Rows], parts: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]
) -> tuple[Rows, pa.ListArray]:
    """Undo the dealing: the rows of all micro-batches in ascending order, and their `aligned` parts as one column."""
    rows = np.concatenate(micro) if micro else np.zeros(0, np.int64)
    values = np.concatenate([v for v, _ in parts]) if parts else np.zeros(0, np.float32)
    sizes = np.concatenate([np.diff(o) for _, o in parts]) if parts else np.zeros(0, np.int64)
    order = np.argsort(rows, kind="stable")
    taken, offsets = ragged.take(values, np.concatenate([[0], np.cumsum(sizes)]), order)
    return rows[order], ragged.unflat(taken, offsets, pa.float32())
