"""Rows as PostgreSQL's binary COPY has them, from Arrow columns, without a Python object per value.

A row is its number of columns (int16), then per column its length (int32, -1 for null) and its
content in the binary form of its type, all big-endian. What has the same width in every row becomes
one numpy array; Arrow then joins that with what varies, so the result is one buffer.

Format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format); contents are what the
types' receive functions read (`array_recv`, `jsonb_recv`, `varbit_recv` of PostgreSQL;
`vector_recv`, `halfvec_recv`, `sparsevec_recv` of pgvector).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from milvus_cdc.rows import Field, FieldType
from milvus_cdc.sink.postgres.columns import MAX_SPARSE_DIM
from milvus_cdc.sink.postgres.texts import without_constants, without_nul, without_nul_json

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"

_JSONB_VERSION = 1
_NUMBERS = {
    FieldType.BOOL: "u1",
    FieldType.INT8: ">i2",
    FieldType.INT16: ">i2",
    FieldType.INT32: ">i4",
    FieldType.INT64: ">i8",
    FieldType.FLOAT: ">f4",
    FieldType.DOUBLE: ">f8",
}
_OIDS = {
    FieldType.BOOL: 16,
    FieldType.INT8: 21,
    FieldType.INT16: 21,
    FieldType.INT32: 23,
    FieldType.INT64: 20,
    FieldType.FLOAT: 700,
    FieldType.DOUBLE: 701,
    FieldType.VARCHAR: 25,
    FieldType.JSON: 3802,
}
"""`pg_type.dat`; fixed for the types of PostgreSQL's own."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    """One value per row, or one for all of them, that is `dtype` on the wire."""

    dtype: np.dtype[Any]
    values: NDArray[Any] | int


_Part: TypeAlias = "_Fixed | pa.Array"
"""Of a cell: the same width in every row, or a large_binary array."""
_Content: TypeAlias = Callable[[pa.Array], list[_Part]]
"""Parts of the cells of an array without nulls."""


class Encoder:
    """Of the cells of one column."""

    def __init__(self, field: Field, *, sparsevec: bool = False, strip_nul: bool = False) -> None:
        self.name = field.name
        self._content = _content(field, sparsevec, strip_nul and not field.primary_key)

    def parts(self, array: pa.Array) -> list[_Part]:
        return _cells(array, self._content)


def rows(
    columns: Sequence[tuple[str, list[_Part]]], count: int, order: Sequence[str] | None = None
) -> tuple[list[str], pa.Buffer]:
    """Names of the columns in the order in which the rows have them, and the rows. Without an
    `order` that is the one that costs least.
    """
    if order is None:
        varies = {name: any(not isinstance(p, _Fixed) for p in cells) for name, cells in columns}
        order = sorted(varies, key=varies.__getitem__)
    cells_of = dict(columns)
    parts: list[_Part] = [_Fixed(np.dtype(">i2"), len(order))]
    parts += [part for name in order for part in cells_of[name]]
    return list(order), _span(_joined(parts, count))[1]


def array_parameter(keys: pa.Array) -> bytes:
    """bigint[] or text[] as a parameter in binary form."""
    of_text = pa.types.is_string(keys.type)
    kind = FieldType.VARCHAR if of_text else FieldType.INT64
    element = Field(0, "", kind)
    whole = pa.ListArray.from_arrays(pa.array([0, len(keys)], pa.int32()), keys)
    field = Field(0, "", FieldType.ARRAY, element_type=element.type)
    joined = _joined(_content(field, False, False)(whole), 1)
    return bytes(joined[0].as_py())


def _cells(array: pa.Array, content: _Content) -> list[_Part]:
    """With their lengths before them."""
    if not array.null_count:
        parts = content(array)
        return [_Fixed(np.dtype(">i4"), _width(parts)), *parts]
    valid = np.asarray(pc.is_valid(array).to_numpy(zero_copy_only=False))
    dense = array.drop_null()
    lengths = np.full(len(array), -1, np.int64)
    if not len(dense):
        return [_Fixed(np.dtype(">i4"), lengths)]
    parts = content(dense)
    lengths[valid] = _width(parts)
    spread = _binary(np.maximum(lengths, 0), _span(_joined(parts, len(dense)))[1])
    return [_Fixed(np.dtype(">i4"), lengths), spread]


def _width(parts: Sequence[_Part]) -> NDArray[np.int64] | int:
    total: NDArray[np.int64] | int = 0
    for part in parts:
        if isinstance(part, _Fixed):
            total = total + part.dtype.itemsize
        else:
            total = total + pc.binary_length(part).to_numpy(zero_copy_only=False)
    return total


def _joined(parts: Sequence[_Part], count: int) -> pa.Array:
    """Row by row, as one large_binary array."""
    arrays: list[pa.Array] = []
    run: list[_Fixed] = []
    for part in (*parts, None):
        if isinstance(part, _Fixed):
            run.append(part)
            continue
        if run:
            arrays.append(_block(run, count))
            run = []
        if part is not None:
            arrays.append(part)
    if len(arrays) == 1:
        return arrays[0]
    return pc.binary_join_element_wise(*arrays, pa.scalar(b"", pa.large_binary()))


def _block(run: Sequence[_Fixed], count: int) -> pa.Array:
    dtype = np.dtype([(str(at), part.dtype) for at, part in enumerate(run)])
    block = np.empty(count, dtype)
    for at, part in enumerate(run):
        block[str(at)] = part.values
    lengths = np.full(count, dtype.itemsize, np.int64)
    return _binary(lengths, pa.py_buffer(block.view(np.uint8)))


def _binary(lengths: NDArray[Any], data: pa.Buffer) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets), data]
    )


def _span(cells: pa.Array) -> tuple[NDArray[np.int64], pa.Buffer]:
    """Where each cell begins, and the last one ends, in the bytes of all of them."""
    _, offsets, data = cells.buffers()
    if data is None:
        return np.zeros(len(cells) + 1, np.int64), pa.py_buffer(b"")
    places = np.frombuffer(offsets, np.int64)[cells.offset :][: len(cells) + 1]
    return places - places[0], data.slice(places[0], places[-1] - places[0])


def _content(field: Field, sparsevec: bool, strip_nul: bool) -> _Content:
    """The reader of one type; `field` has one (`columns.violations`)."""
    if (number := _NUMBERS.get(field.type)) is not None:
        return partial(_numbers, np.dtype(number))
    match field.type:
        case FieldType.VARCHAR:
            return partial(_text, strip_nul)
        case FieldType.JSON:
            return partial(_jsonb, strip_nul)
        case FieldType.ARRAY:
            assert field.element_type is not None
            element = Field(0, "", field.element_type)
            return partial(_array, field.element_type, _content(element, False, strip_nul))
        case FieldType.FLOAT_VECTOR:
            return partial(_vector, field.dim, ">f4")
        case FieldType.FLOAT16_VECTOR:
            return partial(_vector, field.dim, ">f2")
        case FieldType.BFLOAT16_VECTOR:
            return partial(_bfloat16, field.dim)
        case FieldType.INT8_VECTOR:
            return partial(_int8_vector, field.dim)
        case FieldType.BINARY_VECTOR:
            return partial(_bits, field.dim)
        case FieldType.SPARSE_FLOAT_VECTOR:
            return _sparsevec if sparsevec else _sparse_json
    raise AssertionError(field.type)


def _numbers(dtype: np.dtype[Any], array: pa.Array) -> list[_Part]:
    return [_Fixed(dtype, array.to_numpy(zero_copy_only=False))]


def _text(strip_nul: bool, array: pa.Array) -> list[_Part]:
    return [(without_nul(array) if strip_nul else array).cast(pa.large_binary())]


def _jsonb(strip_nul: bool, array: pa.Array) -> list[_Part]:
    text = without_constants(without_nul_json(array) if strip_nul else array)
    return [_Fixed(np.dtype("u1"), _JSONB_VERSION), text.cast(pa.large_binary())]


def _matrix(array: pa.Array, dim: int) -> NDArray[Any]:
    values: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), dim)


def _vector(dim: int, number: str, array: pa.Array) -> list[_Part]:
    return _vector_of(_matrix(array, dim), dim, number)


def _vector_of(values: NDArray[Any], dim: int, number: str) -> list[_Part]:
    short = np.dtype(">i2")
    return [_Fixed(short, dim), _Fixed(short, 0), _Fixed(np.dtype((number, (dim,))), values)]


def _bytes(array: pa.Array) -> NDArray[np.uint8]:
    width = array.type.byte_width
    held = np.frombuffer(array.buffers()[1], np.uint8)
    return held[array.offset * width :][: len(array) * width].reshape(len(array), width)


def _bfloat16(dim: int, array: pa.Array) -> list[_Part]:
    words = _bytes(array).view("<u2").astype(np.uint32) << np.uint32(16)
    return _vector_of(words.view(np.float32), dim, ">f4")


def _bits(dim: int, array: pa.Array) -> list[_Part]:
    return [_Fixed(np.dtype(">i4"), dim), _Fixed(np.dtype(("u1", (dim // 8,))), _bytes(array))]


def _array_header(oid: int, lengths: NDArray[Any] | int) -> list[_Part]:
    """Dimensions (one), no nulls, the element's type; the dimension's length and lower bound. A
    length of 0 is read as the empty array.
    """
    word = np.dtype(">i4")
    head = [_Fixed(word, 1), _Fixed(word, 0), _Fixed(word, oid)]
    return [*head, _Fixed(word, lengths), _Fixed(word, 1)]


def _int8_vector(dim: int, array: pa.Array) -> list[_Part]:
    element = np.dtype([("length", ">i4"), ("value", ">i2")])
    cells = np.empty((len(array), dim), element)
    cells["length"] = 2
    cells["value"] = _matrix(array, dim)
    header = _array_header(_OIDS[FieldType.INT8], dim)
    return [*header, _Fixed(np.dtype((element, (dim,))), cells)]


def _array(element: FieldType, content: _Content, array: pa.Array) -> list[_Part]:
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    elements = array.flatten()
    header = _array_header(_OIDS[element], lengths)
    if not len(elements):
        return header
    cells = _joined(_cells(elements, content), len(elements))
    return [*header, _regrouped(cells, lengths)]


def _regrouped(cells: pa.Array, lengths: NDArray[np.int64]) -> pa.Array:
    """Each run of `lengths` cells as one; the cells lie side by side."""
    places, data = _span(cells)
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return _binary(np.diff(places[ends]), data)


def _sparse(array: pa.Array) -> tuple[NDArray[np.int64], pa.Array, pa.Array]:
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)
    index, value = array.flatten().flatten()
    return lengths, index, value


def _sparsevec(array: pa.Array) -> list[_Part]:
    """Elements that are zero are left out: the type holds none."""
    lengths, index, value = _sparse(array)
    numbers = value.to_numpy(zero_copy_only=False)
    kept = numbers != 0
    if not kept.all():
        row = np.repeat(np.arange(len(lengths)), lengths)[kept]
        lengths = np.bincount(row, minlength=len(lengths)).astype(np.int64)
    # An index beyond int32 becomes negative, which the type refuses as out of bounds.
    places = index.to_numpy(zero_copy_only=False)[kept].astype(">u4")
    word = np.dtype(">i4")
    return [
        *(_Fixed(word, MAX_SPARSE_DIM), _Fixed(word, lengths), _Fixed(word, 0)),
        _binary(lengths * 4, pa.py_buffer(places.view(np.uint8))),
        _binary(lengths * 4, pa.py_buffer(numbers[kept].astype(">f4").view(np.uint8))),
    ]


def _sparse_json(array: pa.Array) -> list[_Part]:
    lengths, index, value = _sparse(array)
    empty = pa.scalar("", pa.string())
    pairs = pc.binary_join_element_wise(
        pa.scalar('"'), index.cast(pa.string()), pa.scalar('":'), value.cast(pa.string()), empty
    )
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    inner = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), pairs), ",")
    text = pc.binary_join_element_wise(pa.scalar("{"), inner, pa.scalar("}"), empty)
    return [_Fixed(np.dtype("u1"), _JSONB_VERSION), text.cast(pa.large_binary())]
