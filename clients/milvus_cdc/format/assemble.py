"""Rows out of columns: constant bytes and one piece per row, joined row by row.

One call of C code per row and column; a row of any width costs well below a microsecond, so every
format makes its columns into lists of pieces and leaves the rest to this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, repeat
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Part: TypeAlias = bytes | Sequence[bytes]
"""The same bytes in every row, or one piece per row."""

_CHUNK_BYTES = 4 * 1024 * 1024


def join_rows(parts: Iterable[Part]) -> list[bytes]:
    """One value per row; at least one part is a list, and all lists have one length."""
    columns: list[Iterable[bytes]] = []
    constant = b""
    for part in parts:
        if isinstance(part, bytes):
            constant += part
            continue
        if constant:
            columns.append(repeat(constant))
            constant = b""
        columns.append(part)
    if constant:
        columns.append(repeat(constant))
    return list(map(b"".join, zip(*columns, strict=False)))


def slices(flat: bytes, ends: NDArray[Any]) -> list[bytes]:
    """`flat` cut at `ends`, which begin with 0."""
    return [flat[start:end] for start, end in pairwise(ends.tolist())]


def fixed(flat: bytes, width: int) -> list[bytes]:
    """`flat` cut into pieces of `width` bytes."""
    return [flat[at : at + width] for at in range(0, len(flat), width)]


def with_nulls(pieces: list[bytes], column: pa.Array, null: bytes) -> list[bytes]:
    """`pieces` with `null` in the places where the column has one."""
    if column.null_count:
        for at in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            pieces[at] = null
    return pieces


def chunks(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of some megabytes: the pieces of a column live as long as their chunk only."""
    rows = max(1, _CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def numbers(column: pa.Array) -> NDArray[Any]:
    """The values of a column of numbers, booleans or lists of fixed size (two dimensions then),
    anything in the place of nulls. Contiguous.
    """
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        # A slice's `values` are those of the whole; a null's are there, whatever they are.
        values = column.values.slice(column.offset * width, len(column) * width)
        return numbers(values).reshape(len(column), width)
    if pa.types.is_boolean(column.type):
        return np.ascontiguousarray(column.fill_null(False).to_numpy(zero_copy_only=False))
    kind = column.type.to_pandas_dtype()
    data = column.buffers()[1]
    if data is None:
        return np.zeros(len(column), kind)
    return np.frombuffer(data, kind, len(column), column.offset * np.dtype(kind).itemsize)


def fixed_bytes(column: pa.Array) -> bytes:
    """The content of a column of fixed width, zeros or anything else in the place of nulls."""
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        data = column.buffers()[1]
        if data is None:
            return bytes(len(column) * width)
        return bytes(data.slice(column.offset * width, len(column) * width))
    return numbers(column).tobytes()


def lists(column: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """The elements of a column of lists, and where each row's begin and end in them. A null has
    none.
    """
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.zeros(len(column) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return column.flatten(), ends


def bfloat16(words: bytes, dim: int) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    wide = np.frombuffer(words, "<u2").astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(-1, dim)


def sparse_bytes(elements: pa.Array, ends: NDArray[np.int64]) -> list[bytes]:
    """Runs of (uint32 index, float32 value), little-endian, as Milvus itself stores them."""
    pairs = np.empty(len(elements), np.dtype([("index", "<u4"), ("value", "<f4")]))
    pairs["index"], pairs["value"] = map(numbers, elements.flatten())
    return slices(pairs.tobytes(), ends * 8)
