"""The tables that cross process boundaries: one declared Arrow schema a type, checked at construction.

    Prompts --rollout--> Rollouts --reward----> Scores
                            |-----reference---> TokenLogprobs
                            |-----critic------> TokenValues
                            `-----assemble----> Experience --learner--> new weights
    Comparisons --learner--> a reward model

Sequences are ragged list columns: nothing is padded on the wire, a slice costs nothing and Ray sends only its
own bytes, and a step's table is written to Parquet as it is. Every list column that speaks of tokens is
aligned with `tokens`; entries where `action_mask` is false are zero (versions: -1) and mean nothing.

What was left out: tensors and padding (see `ragged.py`); they exist only inside a model call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors import ragged
from cluster.storage import Folder

FINISH = ("stop", "length", "error")
STATUS = ("ok", "timeout", "error")

_ids = [("sample_id", pa.int64())]
_tokens = [("tokens", pa.list_(pa.int32()))]
_rollout = [
    ("sample_id", pa.int64()),
    ("group_id", pa.int64()),
    ("tokens", pa.list_(pa.int32())),
    ("action_mask", pa.list_(pa.bool_())),
    ("logprobs", pa.list_(pa.float32())),
    ("versions", pa.list_(pa.int32())),
    ("turn_starts", pa.list_(pa.int32())),
    ("option", pa.list_(pa.int16())),
    ("option_logprobs", pa.list_(pa.float32())),
    ("finish", pa.string()),
    ("metadata", pa.string()),
]


def _required(fields: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in fields])


@dataclass(frozen=True, slots=True)
class _Typed:
    """A table known to have exactly the columns and types of `schema`, in that order, without nulls."""

    table: pa.Table
    schema: ClassVar[pa.Schema] = pa.schema([])

    def __post_init__(self) -> None:
        schema = type(self).schema
        _check(type(self).__name__, self.table, schema)
        if not self.table.schema.equals(schema):  # only nullability is left to differ, but then two tables would not concatenate
            object.__setattr__(self, "table", pa.Table.from_arrays(self.table.columns, schema=schema))

    @classmethod
    def of(cls, columns: dict[str, object]) -> Self:
        """Build from one Arrow array, or Python or numpy sequence, a column.

        Raises ValueError naming the column that is missing, unknown, of another length, or does not fit its declared type.
        """
        _check_names(cls.__name__, list(columns), cls.schema)
        arrays = []
        for field in cls.schema:
            value = columns[field.name]
            try:
                arrays.append(value if isinstance(value, (pa.Array, pa.ChunkedArray)) else pa.array(value, field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise ValueError(f"{cls.__name__}.{field.name}: must be {field.type}, got values that do not fit: {error}") from error
        rows = len(arrays[0])
        for field, array in zip(cls.schema, arrays, strict=True):
            if len(array) != rows:
                raise ValueError(f"{cls.__name__}.{field.name}: must have {rows} rows, as {cls.schema.names[0]} has, got {len(array)}")
        return cls(pa.Table.from_arrays(arrays, names=cls.schema.names))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """One table after the other, without copying; an empty list gives an empty table."""
        return cls(pa.concat_tables([p.table for p in parts]) if parts else cls.schema.empty_table())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read back what `write` wrote. Raises ValueError naming file and column if the file has another schema."""
        table = pq.read_table(path, partitioning=None)
        _check(f"{path}: {cls.__name__}", table, cls.schema)
        return cls(table)

    def write(self, path: Path) -> None:
        """Write one Parquet file (zstd), making its folder; afterwards it is there whole and on the disk. Raises OSError."""
        Folder(path.parent).write_file(path.name, lambda draft: pq.write_table(self.table, draft, compression="zstd"))

    def slice(self, start: int, length: int | None = None) -> Self:
        """Rows [start, start + length) as a view: no copy, and only these rows are sent by Ray (plain pickle takes the whole buffers)."""
        return type(self)(self.table.slice(start, length))

    def __len__(self) -> int:
        return int(self.table.num_rows)


def _check_names(owner: str, names: Sequence[str], schema: pa.Schema) -> None:
    missing = [n for n in schema.names if n not in names]
    unknown = [n for n in names if n not in schema.names]
    if missing or unknown:
        problem = "missing" if missing else "not declared"
        raise ValueError(f"{owner}: column {(missing + unknown)[0]!r} is {problem}; it must have {schema.names}, got {list(names)}")


def _check(owner: str, table: pa.Table, schema: pa.Schema) -> None:
    _check_names(owner, table.column_names, schema)
    if table.column_names != schema.names:
        raise ValueError(f"{owner}: columns must be {schema.names}, each once and in this order, got {table.column_names}")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise ValueError(f"{owner}.{field.name}: must be {field.type}, got {column.type}")
        nulls = column.null_count or (sum(chunk.flatten().null_count for chunk in column.chunks) if pa.types.is_list(field.type) else 0)
        if nulls:
            raise ValueError(f"{owner}.{field.name}: must have no nulls, got {nulls}; a value that is not there is a status, not a null")


@dataclass(frozen=True, slots=True)
class Prompts(_Typed):
    """One row a group: the prompt that its `group_size` samples share.

    group_id: c, the c-th prompt drawn in the run; sample k of it is `c * group_size + k`.
    tokens:   the prompt's token ids.
    metadata: JSON object of the prompt's row, handed to reward functions.
    """

    schema: ClassVar[pa.Schema] = _required([("group_id", pa.int64()), *_tokens, ("metadata", pa.string())])


@dataclass(frozen=True, slots=True)
class Rollouts(_Typed):
    """Prompt and sampled tokens, with the log-probs they were sampled with. Example of one row:

    tokens       [11, 12, 13, 40, 41, 2]     prompt of 3, then 3 sampled tokens
    action_mask  [ 0,  0,  0,  1,  1, 1]
    logprobs     [ 0,  0,  0, -1.2, -.3, -.1]   log pi(tokens[t] | tokens[:t]), at the sampling temperature
    versions     [-1, -1, -1,  7,  7, 7]     weights that produced each token
    turn_starts  [3]                         index of each turn's first action token
    option, option_logprobs                  one per turn in hierarchical runs, else empty
    finish       stop | length | error
    """

    schema: ClassVar[pa.Schema] = _required(_rollout)


@dataclass(frozen=True, slots=True)
class Scores(_Typed):
    """Reward of each rollout. Only a row whose status is `ok` has a reward; a failure is never a zero.

    turn_rewards: one per turn, or empty where the reward speaks of the whole. detail: what went wrong, or "".
    """

    schema: ClassVar[pa.Schema] = _required(
        [*_ids, ("reward", pa.float32()), ("turn_rewards", pa.list_(pa.float32())), ("status", pa.string()), ("detail", pa.string())]
    )


@dataclass(frozen=True, slots=True)
class TokenLogprobs(_Typed):
    """Log-probs of a rollout's tokens under another model (reference, or the learner's own), aligned with tokens."""

    schema: ClassVar[pa.Schema] = _required([*_ids, ("logprobs", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class TokenValues(_Typed):
    """values[t] = V(tokens[:t]), the critic's value of the state in which tokens[t] was chosen, aligned with tokens."""

    schema: ClassVar[pa.Schema] = _required([*_ids, ("values", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class Experience(_Typed):
    """A rollout made ready to train on. Every list column is aligned with tokens.

    proximal_logprobs: log-probs under the learner's policy before its first update of the step (the ratio's denominator).
    reference_logprobs, values: zero where the algorithm needs no reference or no critic.
    """

    schema: ClassVar[pa.Schema] = _required(
        [
            *_rollout,
            ("reward", pa.float32()),
            ("turn_rewards", pa.list_(pa.float32())),
            ("proximal_logprobs", pa.list_(pa.float32())),
            ("reference_logprobs", pa.list_(pa.float32())),
            ("values", pa.list_(pa.float32())),
            ("advantages", pa.list_(pa.float32())),
            ("returns", pa.list_(pa.float32())),
        ]
    )


@dataclass(frozen=True, slots=True)
class Comparisons(_Typed):
    """Texts that were compared, a row a comparison: its texts one after the other, the best first. Example of one row, two texts of one prompt:

    tokens          [11, 12, 13, 40, 2,  11, 12, 13, 50, 51, 2]   prompt, reply and end of text, twice
    action_mask     [ 0,  0,  0,  0, 1,   0,  0,  0,  0,  0, 1]   true at each end of text: the state it is chosen in is what is rewarded
    segment_starts  [0, 5]                                        where each text begins
    margin          by how much the best is better, or 0
    """

    schema: ClassVar[pa.Schema] = _required(
        [*_ids, *_tokens, ("action_mask", pa.list_(pa.bool_())), ("segment_starts", pa.list_(pa.int32())), ("margin", pa.float32())]
    )

    def __post_init__(self) -> None:
        """Raises ValueError naming column and row where a row is not at least two texts of at least two tokens, each with its last one marked."""
        _Typed.__post_init__(self)
        starts, first = ragged.flat(self.table["segment_starts"])
        offsets = ragged.flat(self.table["tokens"])[1]
        mask, mask_offsets = ragged.flat(self.table["action_mask"])
        self._must("segment_starts", np.diff(first) >= 2, "must begin at least two texts")
        row = np.repeat(np.arange(len(self)), np.diff(first))
        ends = np.roll(starts, -1)
        ends[first[1:] - 1] = np.diff(offsets)  # a row's last text ends with the row
        self._must("segment_starts", starts[first[:-1]] == 0, "must begin with 0")
        self._must("segment_starts", _all(ends - starts >= 2, row, len(self)), "must ascend within tokens, each text of at least two tokens")
        self._must("action_mask", np.diff(mask_offsets) == np.diff(offsets), "must be aligned with tokens")
        last = np.zeros(len(mask), bool)
        last[offsets[row] + ends - 1] = True
        self._must("action_mask", _all(mask == last, np.repeat(np.arange(len(self)), np.diff(offsets)), len(self)), "must mark each text's last token alone")
        self._must("margin", np.isfinite(self.table["margin"].to_numpy()), "must be finite")

    @classmethod
    def of_texts(cls, rankings: Sequence[Sequence[Sequence[int]]], margins: Sequence[float] | None = None) -> Self:
        """The table of these comparisons, numbered from 0: of each the ids of its texts, the best first, each with its end of text. margins: 0 if not given."""
        rows = [[token for text in ranking for token in text] for ranking in rankings]
        return cls.of(
            {
                "sample_id": np.arange(len(rankings)),
                "tokens": rows,
                "action_mask": [[i == len(text) - 1 for text in ranking for i in range(len(text))] for ranking in rankings],
                "segment_starts": [list(accumulate((len(text) for text in ranking[:-1]), initial=0)) for ranking in rankings],
                "margin": [0.0] * len(rankings) if margins is None else list(margins),
            }
        )

    def _must(self, name: str, holds: ragged.Array, rule: str) -> None:
        if not holds.all():
            row = int(np.argmin(holds))
            raise ValueError(f"Comparisons.{name}: {rule}, got {self.table[name][row].as_py()} in row {row}")


def _all(holds: ragged.Array, row: ragged.Array, rows: int) -> ragged.Array:
    """Whether all entries of each row hold, (rows,)."""
    return np.asarray(np.bincount(row, ~holds, minlength=rows) == 0)
