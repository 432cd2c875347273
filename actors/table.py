"""A pyarrow table whose columns are declared and checked; the kinds of table are in `experience.py`.

A kind that `takes_extra` may have further columns, with one number for each token, for a loss that needs them. The code
that makes such a column declares it (`with_extra`). The declaration is kept in the metadata of the column's Arrow
field, so it survives slices, Ray and Parquet, and code in between need not know it. The code that reads the column asks
for it by name (`check_extra`). A column that is neither in the kind's schema nor declared is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors import ragged
from cluster.storage import Folder, StoredFile

_DECLARATION = {b"raylign": b"extra"}


def required(fields: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    """The schema of these columns, none of which may hold a null."""
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in fields])


@dataclass(frozen=True, slots=True)
class TypedTable:
    """A table that has exactly the columns and types of `schema`, in that order, without nulls.

    If the kind `takes_extra`, the columns declared by `with_extra` follow.
    """

    table: pa.Table
    schema: ClassVar[pa.Schema] = pa.schema([])
    takes_extra: ClassVar[bool] = False
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    """List columns that `of` need not be given; then every row has an empty list."""

    def __post_init__(self) -> None:
        schema = _check(type(self), self.table)
        # only nullability can still differ; it is made equal, because such tables could not be concatenated
        if not self.table.schema.equals(schema):
            object.__setattr__(self, "table", pa.Table.from_arrays(self.table.columns, schema=schema))

    @classmethod
    def of(cls, columns: dict[str, object]) -> Self:
        """Build a table from one Arrow array, Python sequence or numpy array for each column.

        Raises ValueError naming a column that is missing, unknown, of another length, or not of its declared type.
        """
        rows = len(columns.get(cls.schema.names[0], ()))  # type: ignore[arg-type]
        columns = {name: [[]] * rows for name in cls.may_be_empty} | columns
        _check_names(cls.__name__, list(columns), cls.schema)
        arrays = [_array(cls.__name__, field, columns[field.name]) for field in cls.schema]
        rows = len(arrays[0])
        for field, array in zip(cls.schema, arrays, strict=True):
            if len(array) != rows:
                raise ValueError(
                    f"{cls.__name__}.{field.name}: must have {rows} rows, as {cls.schema.names[0]} has, got "
                    f"{len(array)}"
                )
        return cls(pa.Table.from_arrays(arrays, names=cls.schema.names))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate tables without copying; an empty list gives an empty table.

        Raises ValueError when the tables have different extra columns.
        """
        return cls(pa.concat_tables([p.table for p in parts]) if parts else cls.schema.empty_table())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote. Raises ValueError naming file and column if it has another schema."""
        table = pq.read_table(path, partitioning=None)
        _check(cls, table, f"{path}: ")
        return cls(table)

    def write(self, path: Path) -> StoredFile:
        """Write one Parquet file (zstd) and its folder; when this returns, the whole file is on the disk.

        Raises OSError when it cannot be written.
        """
        return Folder(path.parent).write_file(
            path.name, lambda draft: pq.write_table(self.table, draft, compression="zstd")
        )

    def slice(self, start: int, length: int | None = None) -> Self:
        """Rows [start, start + length) as a view, without a copy; without a length, all rows from `start` on.

        Ray sends only these rows; plain pickle would send the whole buffers.
        """
        return type(self)(self.table.slice(start, length))

    @property
    def extra(self) -> tuple[str, ...]:
        """Names of the extra columns."""
        return tuple(self.table.column_names[len(type(self).schema) :])

    def with_extra(self, columns: Mapping[str, object]) -> Self:
        """This table with further declared columns, each with one float32 for each token, aligned with `tokens`.

        Raises ValueError naming a column that exists already, or whose values do not fit.
        """
        kind, table = type(self), self.table
        for name, values in columns.items():
            if name in table.column_names:
                raise ValueError(f"{kind.__name__}.{name}: must be a new column, got one that is there; name it apart")
            field = _extra_field(name)
            table = table.append_column(field, _array(kind.__name__, field, values))
        return kind(table)

    def check_extra(self, names: Collection[str]) -> Self:
        """The table itself. Raises ValueError unless its extra columns are exactly these."""
        missing = [name for name in names if name not in self.extra]
        unused = [name for name in self.extra if name not in names]
        if missing or unused:
            raise ValueError(
                f"{type(self).__name__}: must have the extra columns that its reader declares, {sorted(names)}, got "
                f"{list(self.extra)}; {(missing or unused)[0]!r} is {'missing' if missing else 'declared by nobody'}"
            )
        return self

    def without(self, ids: Collection[int], column: str = "sample_id") -> Self:
        """The rows whose `column` is none of these ids, in the same order."""
        if not ids:
            return self
        left_out = pc.is_in(self.table[column], value_set=pa.array(sorted(ids), pa.int64()))
        return type(self)(self.table.filter(pc.invert(left_out)))

    def __len__(self) -> int:
        return int(self.table.num_rows)


def _extra_field(name: str) -> pa.Field:
    return pa.field(name, pa.list_(pa.float32()), nullable=False, metadata=_DECLARATION)


def _array(owner: str, field: pa.Field, value: object) -> pa.Array | pa.ChunkedArray:
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return value
    try:
        return pa.array(value, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{owner}.{field.name}: must be {field.type}, got values that do not fit: {error}") from error


def _check_names(owner: str, names: Sequence[str], schema: pa.Schema) -> None:
    missing = [n for n in schema.names if n not in names]
    unknown = [n for n in names if n not in schema.names]
    if missing or unknown:
        problem = "missing" if missing else "not declared"
        raise ValueError(
            f"{owner}: column {(missing + unknown)[0]!r} is {problem}; it must have {schema.names}, got {list(names)}"
        )


def _check(kind: type[TypedTable], table: pa.Table, where: str = "") -> pa.Schema:
    """Check that a table is of that kind; returns its schema, with the extra columns that the table declares.

    where: the beginning of the error's message. Raises ValueError for a table of another kind.
    """
    owner, extra = f"{where}{kind.__name__}", []
    if kind.takes_extra:
        extra = [field.name for field in table.schema if (field.metadata or {}).items() >= _DECLARATION.items()]
    schema = pa.schema([*kind.schema, *map(_extra_field, extra)])
    _check_names(owner, table.column_names, schema)
    if table.column_names != schema.names:
        raise ValueError(
            f"{owner}: columns must be {schema.names}, each once and in this order, got {table.column_names}"
        )
    for field in schema:
        _check_column(owner, table.column(field.name), field)
    for name in extra:
        if not np.array_equal(ragged.flat(table.column(name))[1], ragged.flat(table.column("tokens"))[1]):
            raise ValueError(f"{owner}.{name}: must have a number a token, got rows of other lengths than tokens has")
    return schema


def _check_column(owner: str, column: pa.ChunkedArray, field: pa.Field) -> None:
    if column.type != field.type:
        raise ValueError(f"{owner}.{field.name}: must be {field.type}, got {column.type}")
    nulls = column.null_count or (
        sum(chunk.flatten().null_count for chunk in column.chunks) if pa.types.is_list(field.type) else 0
    )
    if nulls:
        raise ValueError(
            f"{owner}.{field.name}: must have no nulls, got {nulls}; a value that is not there is a status, not a null"
        )
