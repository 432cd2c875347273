"""The manager's table: one row for each turn of each conversation.

Shapes: N turns, C conversations, D features (the width of the language model's hidden state), K options.

What was left out: the rewards of the low-level policy. The manager learns from the extrinsic reward only; what was said
is for its discriminator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from actors import ragged
from actors.table import TypedTable, required

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Turns(TypedTable):
    """Whole conversations, in the order of their sample ids. Example with D = 2, K = 3:

    sample_id       [  7,   7,   9]         the conversation's rollout
    turn            [  0,   1,   0]         counts from 0 within the conversation
    features        [[.1, .2], ...]         h: the hidden state of the last token before the turn
    offered         [[1, 1, 1], ...]        which options could be chosen in this turn
    option          [  2,   0,   1]         the option that was chosen
    option_logprob  [-1.1, -1.1, -.7]       log pi(option | h), as it was sampled
    reward          [  0,   1,  .5]         extrinsic reward of the turn
    terminated      [  0,   1,   0]         the conversation ended: no state follows
    truncated       [  0,   0,   1]         the conversation was cut: a state follows, which nobody acted in
    last_features   [[], [], [.3, .4]]      h of this following state where `truncated`, else empty
    utterance       [[5, 9], [7], [8, 2]]   the tokens of the turn, as the policy sampled them; all empty without a
                                            discriminator
    """

    may_be_empty: ClassVar[tuple[str, ...]] = ("utterance",)
    schema: ClassVar[pa.Schema] = required(
        [
            ("sample_id", pa.int64()),
            ("turn", pa.int32()),
            ("features", pa.list_(pa.float32())),
            ("offered", pa.list_(pa.bool_())),
            ("option", pa.int16()),
            ("option_logprob", pa.float32()),
            ("reward", pa.float32()),
            ("terminated", pa.bool_()),
            ("truncated", pa.bool_()),
            ("last_features", pa.list_(pa.float32())),
            ("utterance", pa.list_(pa.int32())),
        ]
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming column and row unless the rows are whole, well-formed conversations."""
        TypedTable.__post_init__(self)
        self._check_order()
        self._check_ends()
        self._check_features()
        self._check_options()
        self._check_utterances()
        self._must("reward", np.isfinite(self.column("reward")), "must be finite")

    @property
    def width(self) -> int:
        """D, or 0 if there are no turns."""
        return int(ragged.lengths(self.table["features"])[0]) if len(self) else 0

    @property
    def options(self) -> int:
        """K, or 0 if there are no turns."""
        return int(ragged.lengths(self.table["offered"])[0]) if len(self) else 0

    @property
    def starts(self) -> ragged.Array:
        """(C + 1,) the row of each conversation's first turn, and the number of rows."""
        return np.append(np.flatnonzero(self.column("turn") == 0), len(self))

    @property
    def features(self) -> ragged.Array:
        """(N, D) float32"""
        return ragged.flat(self.table["features"])[0].reshape(len(self), self.width)

    @property
    def offered(self) -> ragged.Array:
        """(N, K) bool"""
        return ragged.flat(self.table["offered"])[0].reshape(len(self), self.options)

    @property
    def last_features(self) -> ragged.Array:
        """(C, D) float32: the state after each conversation, zero where there is none."""
        values, offsets = ragged.flat(self.table["last_features"])
        ends = self.starts[1:] - 1
        out = np.zeros((len(ends), self.width), np.float32)
        out[np.diff(offsets)[ends] > 0] = values.reshape(-1, max(self.width, 1))
        return out

    @property
    def utterances(self) -> tuple[ragged.Array, ragged.Array]:
        """The tokens of all turns, one after the other, and the offsets of each turn's, (N + 1,)."""
        return ragged.flat(self.table["utterance"])

    def column(self, name: str) -> ragged.Array:
        """(N,) a column of numbers or booleans."""
        return np.asarray(self.table[name].to_numpy())

    def _check_order(self) -> None:
        sample, turn = self.column("sample_id"), self.column("turn")
        before = np.roll(sample, 1)
        new = sample != before
        new[:1] = True
        ascending = sample >= before
        ascending[:1] = True
        self._must("sample_id", ascending, "must not descend, so that each conversation stands whole and once")
        expected = np.where(new, 0, np.roll(turn, 1) + 1)
        self._must("turn", turn == expected, "must count from 0 within each conversation")

    def _check_ends(self) -> None:
        terminated, truncated = self.column("terminated"), self.column("truncated")
        last = np.zeros(len(self), bool)
        last[self.starts[1:] - 1] = True
        ended = terminated | truncated
        self._must("terminated", ended | ~last, "must be true in a conversation's last turn, unless `truncated` is")
        self._must("terminated", ~terminated | last, "must be false before a conversation's last turn")
        self._must("truncated", ~truncated | last, "must be false before a conversation's last turn")
        self._must("truncated", ~(terminated & truncated), "must be false where `terminated` is true")
        expected = np.where(truncated, self.width, 0)
        self._must(
            "last_features",
            ragged.lengths(self.table["last_features"]) == expected,
            f"must have the {self.width} features of the state after the turn where `truncated` is true, else none",
        )

    def _check_features(self) -> None:
        for name in ("features", "last_features"):
            values, offsets = ragged.flat(self.table[name])
            row = np.repeat(np.arange(len(self)), np.diff(offsets))
            holds = np.bincount(row, ~np.isfinite(values), minlength=len(self)) == 0
            self._must(name, holds, "must be finite")
        sizes = ragged.lengths(self.table["features"])
        self._must("features", sizes == max(self.width, 1), "must be as many as in the first row, and at least one")

    def _check_options(self) -> None:
        sizes, option = ragged.lengths(self.table["offered"]), self.column("option")
        self._must("offered", sizes == max(self.options, 1), "must be as many as in the first row, and at least one")
        self._must("option", (option >= 0) & (option < self.options), f"must be >= 0 and < {self.options}")
        self._must("option", self.offered[np.arange(len(self)), option], "must be an option that was offered")
        logprob = self.column("option_logprob")
        self._must("option_logprob", np.isfinite(logprob) & (logprob <= 0), "must be finite and <= 0")

    def _check_utterances(self) -> None:
        sizes = ragged.lengths(self.table["utterance"])
        self._must("utterance", (sizes > 0) | ~sizes.any(), "must have a token in each row, or none in any")

    def _must(self, name: str, holds: ragged.Array, rule: str) -> None:
        if not holds.all():
            row = int(np.argmin(holds))
            value = str(self.table[name][row].as_py())
            shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
            raise ValueError(f"Turns.{name}: {rule}, got {shown} in row {row}")


@dataclass(frozen=True, slots=True)
class TurnAdvantages(TypedTable):
    """What the manager thinks of each turn of a table of `Turns`, in its order, before it learns from them.

    advantage: GAE over turns, not whitened. value: V(h). log_q: log q(option | utterance) of the discriminator, 0 if
    there is none.
    """

    schema: ClassVar[pa.Schema] = required(
        [
            ("sample_id", pa.int64()),
            ("turn", pa.int32()),
            ("advantage", pa.float32()),
            ("value", pa.float32()),
            ("log_q", pa.float32()),
        ]
    )
