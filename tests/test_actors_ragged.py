"""Ragged columns to flat or padded arrays and back: inverses, on random rows, however the column is cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import ragged
from random_inputs import random_inputs

many = random_inputs(600)
seeds = st.integers(0, 2**32 - 1)

TYPES = (pa.int32(), pa.int16(), pa.float32(), pa.bool_())
Rows = list[list[float]]


def cut(seed: int) -> tuple[pa.ChunkedArray | pa.Array, Rows, pa.DataType]:
    """A random list column and its rows: one array, or 0 to 3 chunks, each perhaps a slice out of a longer one."""
    random = np.random.default_rng(seed)
    dtype = TYPES[random.integers(len(TYPES))]
    chunks, kept = [], []
    for _ in range(random.integers(4)):
        before, middle, after = random.integers(0, (3, 6, 3))
        sizes = random.integers(0, 6, before + middle + after) * (random.random(before + middle + after) < 0.7)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        values = random.integers(-(2**15), 2**15, offsets[-1]).astype(dtype.to_pandas_dtype())
        chunks.append(
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, dtype)).slice(before, middle)
        )
        kept += rows_of(values, offsets)[before : before + middle]
    if len(chunks) == 1 and random.random() < 0.5:
        return chunks[0], kept, dtype
    return pa.chunked_array(chunks, pa.list_(dtype)), kept, dtype


def rows_of(values: ragged.Array, offsets: ragged.Array) -> Rows:
    return [values[a:b].tolist() for a, b in pairwise(offsets)]


@many
@given(seeds)
def test_flat_gives_the_rows_and_unflat_the_column_back(seed: int) -> None:
    column, rows, dtype = cut(seed)
    values, offsets = ragged.flat(column)
    assert rows_of(values, offsets) == rows
    assert values.dtype == dtype.to_pandas_dtype()
    assert offsets.dtype == np.int64
    assert (offsets[0], offsets[-1], offsets.size) == (0, values.size, len(rows) + 1)
    again = ragged.unflat(values, offsets, dtype)
    assert again.type == pa.list_(dtype)
    assert again.to_pylist() == column.to_pylist()


@many
@given(seeds)
def test_lengths(seed: int) -> None:
    column, rows, _ = cut(seed)
    assert ragged.lengths(column).tolist() == [len(row) for row in rows]


@many
@given(seeds, st.integers(0, 3), st.sampled_from([0, 1, -1]))
def test_pad_puts_rows_side_by_side_and_unpad_takes_them_apart(seed: int, extra: int, fill: int) -> None:
    column, rows, dtype = cut(seed)
    values, offsets = ragged.flat(column)
    longest = max((len(row) for row in rows), default=0)
    for width in (None, longest + extra):
        padded = ragged.pad(values, offsets, fill=fill, width=width)
        wide = longest if width is None else width
        filler = np.array(fill).astype(dtype.to_pandas_dtype()).item()
        assert padded.tolist() == [row + [filler] * (wide - len(row)) for row in rows]
        assert padded.shape == (len(rows), wide)
        assert padded.dtype == values.dtype
        assert ragged.mask(offsets, wide).tolist() == [[t < len(row) for t in range(wide)] for row in rows]
        assert ragged.unpad(padded, offsets).tolist() == values.tolist()


@many
@given(seeds)
def test_take_chooses_rows_in_any_order_and_as_often_as_asked(seed: int) -> None:
    column, rows, _ = cut(seed)
    values, offsets = ragged.flat(column)
    chosen = np.random.default_rng(seed).integers(0, len(rows), seed % 9) if rows else np.zeros(0, np.int64)
    assert rows_of(*ragged.take(values, offsets, chosen)) == [rows[i] for i in chosen]


@many
@given(seeds)
def test_taking_a_permutation_and_then_its_inverse_gives_the_rows_back(seed: int) -> None:
    column, rows, _ = cut(seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    values, offsets = ragged.flat(column)
    back = ragged.take(*ragged.take(values, offsets, order), np.argsort(order))
    assert back[0].tolist() == values.tolist()
    assert back[1].tolist() == offsets.tolist()


def test_the_random_columns_are_of_every_kind() -> None:
    cases = [cut(seed) for seed in range(300)]
    columns = [column for column, _, _ in cases]
    assert {dtype for _, _, dtype in cases} == set(TYPES)
    assert {column.num_chunks if isinstance(column, pa.ChunkedArray) else "array" for column in columns} == {
        0,
        1,
        2,
        3,
        "array",
    }
    assert any(isinstance(column, pa.Array) and column.offset for column in columns)
    assert any([] in rows for _, rows, _ in cases)
    assert any(not rows for _, rows, _ in cases)


def test_a_small_example() -> None:
    values, offsets = ragged.flat(pa.array([[1, 2], [], [3]], pa.list_(pa.int32())))
    assert values.tolist() == [1, 2, 3]
    assert offsets.tolist() == [0, 2, 2, 3]
    assert ragged.pad(values, offsets, fill=-1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert ragged.pad(values, offsets, fill=-1, width=3).tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert [part.tolist() for part in ragged.take(values, offsets, np.array([2, 0]))] == [[3, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize("dtype", [pa.int32(), pa.int16(), pa.float32()], ids=str)
def test_flat_copies_nothing_when_the_column_is_one_chunk_of_numbers(dtype: pa.DataType) -> None:
    array = pa.array([[9], [1, 2], [], [3], [9]], pa.list_(dtype))
    start = array.values.buffers()[1].address
    for column in (array, pa.chunked_array([array])):
        values, _ = ragged.flat(column)
        assert values.ctypes.data == start
        assert not values.flags.writeable
        part, offsets = ragged.flat(column.slice(1, 3))
        assert part.ctypes.data == start + values.itemsize
        assert (part.tolist(), offsets.tolist()) == ([1, 2, 3], [0, 2, 2, 3])


def test_booleans_are_unpacked() -> None:
    values, offsets = ragged.flat(pa.array([[True] * 3, [False] * 9, [True]], pa.list_(pa.bool_())).slice(1))
    assert values.dtype == np.bool_
    assert values.tolist() == [False] * 9 + [True]
    assert offsets.tolist() == [0, 9, 10]


@pytest.mark.parametrize(
    "column",
    [pa.array([], pa.list_(pa.int32())), pa.chunked_array([], pa.list_(pa.int32()))],
    ids=["array", "no chunks"],
)
def test_an_empty_column(column: pa.ChunkedArray | pa.Array) -> None:
    values, offsets = ragged.flat(column)
    assert (values.shape, offsets.tolist()) == ((0,), [0])
    assert ragged.pad(values, offsets).shape == (0, 0)
    assert ragged.pad(values, offsets, width=4).shape == (0, 4)
    assert len(ragged.unflat(values, offsets, pa.int32())) == 0


def test_a_row_longer_than_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^width: must be >= the longest row 2, got 1$"):
        ragged.pad(np.array([1, 2, 3]), np.array([0, 2, 3]), width=1)


def test_nulls_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="null"):
        ragged.flat(pa.array([[1, None]], pa.list_(pa.int32())))
