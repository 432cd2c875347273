"""Ragged Arrow columns as flat or padded numpy arrays, and back.

Shapes: B rows, T longest row, N sum of lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


def flat(column: pa.ChunkedArray | pa.Array) -> tuple[Array, Array]:
    """A list column as (values (N,), offsets (B + 1,)): row i is `values[offsets[i]:offsets[i + 1]]`.

    Nothing is copied if the column is one chunk of fixed-width numbers. (Booleans are bit-packed in Arrow, so they are
    unpacked.)
    """
    array = column
    if isinstance(column, pa.ChunkedArray):  # combine_chunks copies even a single chunk
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values = array.flatten()
    offsets = np.asarray(array.offsets)
    return values.to_numpy(zero_copy_only=values.type != pa.bool_()), (offsets - offsets[0]).astype(np.int64)


def lengths(column: pa.ChunkedArray | pa.Array) -> Array:
    """Length of every row, (B,)."""
    return np.diff(flat(column)[1])


def unflat(values: Array, offsets: Array, dtype: pa.DataType) -> pa.ListArray:
    """The list column whose rows are `values[offsets[i]:offsets[i + 1]]`; the inverse of `flat`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, dtype))


def pad(values: Array, offsets: Array, fill: float = 0, width: int | None = None) -> Array:
    """Rows as a left-aligned array, padded at the right: (B, width), or (B, T) without a width."""
    sizes = np.diff(offsets)
    width = int(sizes.max(initial=0)) if width is None else width
    if sizes.size and int(sizes.max()) > width:
        raise ValueError(f"width: must be >= the longest row {int(sizes.max())}, got {width}")
    out = np.full((sizes.size, width), fill, dtype=values.dtype)
    out[mask(offsets, width)] = values
    return out


def mask(offsets: Array, width: int) -> Array:
    """True where a padded array of `width` columns holds a real entry, (B, width)."""
    return np.asarray(np.arange(width)[None, :] < np.diff(offsets)[:, None])


def unpad(padded: Array, offsets: Array) -> Array:
    """The flat values (N,) of a left-aligned padded array; the inverse of `pad`."""
    return np.asarray(padded[mask(offsets, padded.shape[1])])


def take(values: Array, offsets: Array, rows: Array) -> tuple[Array, Array]:
    """The chosen rows, in the order given, as (values, offsets)."""
    sizes = np.diff(offsets)[rows]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    index = np.arange(starts[-1]) + np.repeat(offsets[:-1][rows] - starts[:-1], sizes)
    return values[index], starts
