"""Arrow columns in Avro's binary encoding, as parts of rows.

Facts (Avro 1.12 specification, binary encoding): int and long are zigzag varints; string and bytes
have their length as a long before them; a union has the number of its branch as a long before the
value; an array is a count, that many items, and a count of zero at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.format import assemble, wire_pieces
from milvus_cdc.rows import Field, FieldType

_NULL: Final = b"\x00"
_NOT_NULL: Final = b"\x02"
_END: Final = b"\x00"


def optional(field: Field) -> bool:
    """May be null; the dynamic field is where a row brings nothing beyond the schema."""
    return field.nullable or field.dynamic


def parts(field: Field, column: pa.Array, arrays: bool) -> Sequence[assemble.Part]:
    """The field of each row; constant bytes where rows have some in common."""
    found = _parts(field, column, arrays)
    if not optional(field):
        return found
    if not column.null_count:
        return [_NOT_NULL, *found]
    return [assemble.with_nulls(assemble.join_rows([_NOT_NULL, *found]), column, _NULL)]


def _parts(field: Field, column: pa.Array, arrays: bool) -> Sequence[assemble.Part]:
    kind = field.type
    if kind is FieldType.ARRAY and field.element_type is not None:
        elements, ends = assemble.lists(column)
        return [_arrays(_scalars(field.element_type, elements), ends)]
    if kind is FieldType.SPARSE_FLOAT_VECTOR:
        elements, ends = assemble.lists(column)
        if not arrays:
            return [wire_pieces.prefixed_zigzag(assemble.sparse_bytes(elements, ends))]
        index, value = elements.flatten()
        entries = assemble.join_rows(
            [_scalars(FieldType.INT64, index), _scalars(FieldType.FLOAT, value)]
        )
        return [_arrays(entries, ends)]
    if kind.is_vector:
        if arrays and kind is not FieldType.BINARY_VECTOR:
            return _vector_arrays(field, column)
        flat = assemble.fixed_bytes(column)
        width = len(flat) // max(1, len(column))
        return [wire_pieces.varint(2 * width), assemble.fixed(flat, width)]
    return [_scalars(kind, column)]


def _scalars(kind: FieldType, column: pa.Array) -> list[bytes]:
    return wire_pieces.scalars(kind, column, wire_pieces.prefixed_zigzag, wire_pieces.zigzag)


def _arrays(items: list[bytes], ends: NDArray[np.int64]) -> list[bytes]:
    return [
        wire_pieces.varint(2 * (end - start)) + b"".join(items[start:end]) + _END
        if end > start
        else _END
        for start, end in pairwise(ends.tolist())
    ]


def _vector_arrays(field: Field, column: pa.Array) -> Sequence[assemble.Part]:
    count = wire_pieces.varint(2 * field.dim)
    if field.type is FieldType.INT8_VECTOR:
        values = assemble.numbers(column).reshape(-1)
        flat, ends = wire_pieces.varints(wire_pieces.zigzag(values))
        return [count, assemble.slices(flat, ends[:: field.dim]), _END]
    return [count, assemble.fixed(wire_pieces.floats(field, column), 4 * field.dim), _END]
