"""Arrow columns in Protobuf's binary encoding, as parts of rows.

Facts (protobuf.dev, encoding): a field is a tag (number << 3 | wire type) and its value; int32 and
int64 are varints in two's complement; repeated numbers are packed, one run of bytes with its length
before it; what is absent is null where the field is `optional`, else the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.format import assemble, wire_pieces
from milvus_cdc.format.avro_pieces import optional as optional
from milvus_cdc.rows import FIRST_USER_FIELD_ID, Field, FieldType

_VARINT: Final = 0
_FIXED64: Final = 1
_DELIMITED: Final = 2
_FIXED32: Final = 5
_WIRE_TYPES: Final = {
    FieldType.FLOAT: _FIXED32,
    FieldType.DOUBLE: _FIXED64,
    FieldType.VARCHAR: _DELIMITED,
    FieldType.JSON: _DELIMITED,
}


def number(field: Field) -> int:
    return field.field_id - FIRST_USER_FIELD_ID + 1


def _tag(field_number: int, wire_type: int) -> bytes:
    return wire_pieces.varint(field_number << 3 | wire_type)


def parts(field: Field, column: pa.Array, arrays: bool) -> Sequence[assemble.Part]:
    """The field of each row with its tag; constant bytes where rows have some in common. A null is
    left out.
    """
    place = number(field)
    if _is_list(field, arrays) and optional(field):
        lists = assemble.join_rows(_parts(field, 1, column, arrays))
        found: Sequence[assemble.Part] = [_tag(place, _DELIMITED), wire_pieces.prefixed(lists)]
    else:
        found = _parts(field, place, column, arrays)
    if not column.null_count:
        return found
    return [assemble.with_nulls(assemble.join_rows(found), column, b"")]


def _is_list(field: Field, arrays: bool) -> bool:
    if field.type is FieldType.ARRAY:
        return True
    return arrays and field.type.is_vector and field.type is not FieldType.BINARY_VECTOR


def _parts(field: Field, place: int, column: pa.Array, arrays: bool) -> Sequence[assemble.Part]:
    kind = field.type
    if kind is FieldType.ARRAY and field.element_type is not None:
        elements, ends = assemble.lists(column)
        return [_repeated(place, field.element_type, elements, ends)]
    if kind is FieldType.SPARSE_FLOAT_VECTOR:
        elements, ends = assemble.lists(column)
        if not arrays:
            cells = assemble.sparse_bytes(elements, ends)
            return [_tag(place, _DELIMITED), wire_pieces.prefixed(cells)]
        index, value = elements.flatten()
        entries = assemble.join_rows(
            [
                _tag(1, _VARINT),
                _scalars(FieldType.INT64, index),
                _tag(2, _FIXED32),
                _scalars(FieldType.FLOAT, value),
            ]
        )
        return [_messages(place, entries, ends)]
    if kind.is_vector:
        flat, width = _vectors(field, column, arrays)
        if isinstance(width, int):
            return [
                _tag(place, _DELIMITED) + wire_pieces.varint(width),
                assemble.fixed(flat, width),
            ]
        cells = assemble.slices(flat, width)
        return [_tag(place, _DELIMITED), wire_pieces.prefixed(cells)]
    tag = _tag(place, _WIRE_TYPES.get(kind, _VARINT))
    return [tag, _scalars(kind, column)]


def _scalars(kind: FieldType, column: pa.Array) -> list[bytes]:
    return wire_pieces.scalars(kind, column, wire_pieces.prefixed, wire_pieces.twos_complement)


def _repeated(
    place: int, kind: FieldType, elements: pa.Array, ends: NDArray[np.int64]
) -> list[bytes]:
    items = _scalars(kind, elements)
    if kind is FieldType.VARCHAR:
        tag = _tag(place, _DELIMITED)
        return [b"".join([tag + item for item in items[a:b]]) for a, b in pairwise(ends.tolist())]
    cells = [b"".join(items[a:b]) for a, b in pairwise(ends.tolist())]
    return assemble.join_rows([_tag(place, _DELIMITED), wire_pieces.prefixed(cells)])


def _messages(place: int, items: list[bytes], ends: NDArray[np.int64]) -> list[bytes]:
    whole = assemble.join_rows([_tag(place, _DELIMITED), wire_pieces.prefixed(items)])
    return [b"".join(whole[a:b]) for a, b in pairwise(ends.tolist())]


def _vectors(field: Field, column: pa.Array, arrays: bool) -> tuple[bytes, int | NDArray[np.int64]]:
    """The rows one after the other, and their width or where each begins and ends."""
    if not arrays or field.type is FieldType.BINARY_VECTOR:
        flat = assemble.fixed_bytes(column)
        return flat, len(flat) // max(1, len(column))
    if field.type is FieldType.INT8_VECTOR:
        values = assemble.numbers(column).reshape(-1)
        flat, ends = wire_pieces.varints(wire_pieces.twos_complement(values))
        return flat, ends[:: field.dim]
    return wire_pieces.floats(field, column), 4 * field.dim
