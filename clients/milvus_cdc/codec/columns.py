"""Cuts, joins and reads serialized schema.FieldData columns without one Python object per row.

Laws: results are exact for every field type of Milvus 2.2 to 2.5 and a type not listed here raises, it is never passed
on half understood; what leaves this module has the form that a write request takes. That form differs from the log's
in one point: for a nullable column the log holds a placeholder for every null row, a request must not (milvus
`validate_util.go`, `fillWithNullValueImpl`: the data is as long as the number of valid rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import accumulate

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from pymilvus.grpc_gen import schema_pb2

from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import BugError
from milvuscdc.internal import milvus_log_pb2 as log_pb2

_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5

# schema.FieldData
_SCALARS, _VECTORS, _FIELD_ID, _VALID_DATA = 3, 4, 5, 7
# schema.ScalarField, schema.VectorField
_LONG_DATA, _STRING_DATA = 3, 6
_DIM, _SPARSE = 1, 6


class _Layout(Enum):
    """How rows lie in the data of a column."""

    VARINTS = auto()
    FIXED = auto()
    """A fixed number of bytes per row in a packed field."""
    DELIMITED = auto()
    """One occurrence of field 1 per row."""
    BYTES = auto()
    """A fixed number of bytes per row in one byte string: protobuf's merge would keep the last string only."""


_LAYOUTS: dict[tuple[int, int], tuple[_Layout, Callable[[int], int]]] = {
    (_SCALARS, 1): (_Layout.VARINTS, lambda dim: 0),  # bool
    (_SCALARS, 2): (_Layout.VARINTS, lambda dim: 0),  # int8 to int32
    (_SCALARS, _LONG_DATA): (_Layout.VARINTS, lambda dim: 0),
    (_SCALARS, 4): (_Layout.FIXED, lambda dim: 4),  # float
    (_SCALARS, 5): (_Layout.FIXED, lambda dim: 8),  # double
    (_SCALARS, _STRING_DATA): (_Layout.DELIMITED, lambda dim: 0),
    (_SCALARS, 7): (_Layout.DELIMITED, lambda dim: 0),  # bytes
    (_SCALARS, 8): (_Layout.DELIMITED, lambda dim: 0),  # array
    (_SCALARS, 9): (_Layout.DELIMITED, lambda dim: 0),  # json
    (_SCALARS, 10): (_Layout.DELIMITED, lambda dim: 0),  # geometry
    (_SCALARS, 11): (_Layout.VARINTS, lambda dim: 0),  # timestamptz
    (_SCALARS, 12): (_Layout.DELIMITED, lambda dim: 0),  # geometry as text
    (_VECTORS, 2): (_Layout.FIXED, lambda dim: dim * 4),  # float
    (_VECTORS, 3): (_Layout.BYTES, lambda dim: dim // 8),  # binary
    (_VECTORS, 4): (_Layout.BYTES, lambda dim: dim * 2),  # float16
    (_VECTORS, 5): (_Layout.BYTES, lambda dim: dim * 2),  # bfloat16
    (_VECTORS, _SPARSE): (_Layout.DELIMITED, lambda dim: 0),
    (_VECTORS, 7): (_Layout.BYTES, lambda dim: dim),  # int8
}


@dataclass(frozen=True, slots=True)
class _Column:
    head: bytes
    """Type, name, id and flags as they came."""
    valid: bytes
    """One byte per row, 0 = null; empty when the column has no valid_data."""
    group: int
    """_SCALARS, _VECTORS, or 0 when there is no data at all (every row null)."""
    kind: int
    """Field number of the data inside the group."""
    dim: int
    data: bytes
    """Packed values or byte string without framing, or the whole repeated field (DELIMITED)."""
    extra: bytes
    """What else stands beside repeated rows: an array's element type."""

    @property
    def layout(self) -> _Layout:
        return _LAYOUTS[self.group, self.kind][0]

    @property
    def width(self) -> int:
        return _LAYOUTS[self.group, self.kind][1](self.dim)


def field_id(column: bytes) -> int:
    """The field's id (`field_id`), 0 for RowID or when absent."""
    found = 0
    try:
        for number, wire, start, _ in _walk(column, 0, len(column)):
            if number == _FIELD_ID and wire == _VARINT:
                found = _varint(column, start)[0]
    except _BadWireError as error:
        raise _undecodable(column, error) from error
    return found


def key_values(column: bytes) -> Keys:
    """Primary keys of an Int64 or VarChar column. Raises BugError when it is another type."""
    try:
        data, kind = _leaf(column)
        if kind == _LONG_DATA:
            longs = log_pb2.LogInt64Array.FromString(data).data
            return np.fromiter(longs, np.int64, len(longs))
        if kind == _STRING_DATA:
            return tuple(log_pb2.LogStringArray.FromString(data).data)
    except (_BadWireError, DecodeError) as error:
        raise _undecodable(column, error) from error
    raise BugError("UNSUPPORTED_COLUMN", f"a primary key column of scalar kind {kind}")


def concat(columns: Sequence[bytes], *, mark_valid: bool = False) -> bytes:
    """One column with the rows of several of the same field, in order, in the form of a write request.

    `mark_valid` is for fields with a default value: requests must call each row valid or null (milvus
    `fillWithDefaultValue`), while the log, where defaults are already filled in, says nothing.
    """
    parts = [_request_form(_parse(column)) for column in columns]
    joined = _join(parts) if len(parts) > 1 else parts[0]
    if mark_valid and not joined.valid:
        joined = replace(joined, valid=b"\x01" * _count(joined))
    return _serialize(joined)


def select_rows(column: bytes, keep: Sequence[int]) -> bytes:
    """The rows at the indexes `keep`, in that order, in the form of a write request."""
    parsed = _request_form(_parse(column))
    rows = np.asarray(keep, np.int64)
    if parsed.valid:
        valid = np.frombuffer(parsed.valid, np.uint8)
        _check_rows(rows, len(valid))
        # A null row has no data: the index of a valid row is the number of valid rows before it.
        places = np.cumsum(valid, dtype=np.int64) - 1
        chosen = valid[rows]
        parsed = replace(parsed, valid=chosen.tobytes())
        rows = places[rows[chosen != 0]]
    return _serialize(_take(parsed, rows))


def num_rows(column: bytes) -> int:
    """Rows of a column, nulls included."""
    parsed = _parse(column)
    return len(parsed.valid) or _count(parsed)


# --- protobuf wire format -------------------------------------------------------------------------------------------


class _BadWireError(Exception):
    """Not protobuf, or not laid out as a column is."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Value and the position after it."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value = byte & 0x7F
    shift = 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + 1
        shift += 7
        if shift > 63:
            raise _BadWireError("a varint of more than ten bytes")


def _walk(data: bytes, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """(field number, wire type, start and end of the value) of every field between two positions."""
    fields = []
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = _varint(data, at - 1)
            wire = tag & 7
            if wire == _LEN:
                size = data[at]
                at += 1
                if size >= 0x80:
                    size, at = _varint(data, at - 1)
                start, at = at, at + size
            elif wire == _VARINT:
                start, at = at, _varint(data, at)[1]
            elif wire == _FIXED64:
                start, at = at, at + 8
            elif wire == _FIXED32:
                start, at = at, at + 4
            else:
                raise _BadWireError(f"wire type {wire}")
            fields.append((tag >> 3, wire, start, at))
    except IndexError:
        raise _BadWireError("the column ends inside a field") from None
    if at != end:
        raise _BadWireError("a field reaches beyond its message")
    return fields


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, *content: bytes) -> list[bytes]:
    size = sum(map(len, content))
    return [_encode_varint(number << 3 | _LEN) + _encode_varint(size), *content]


# --- columns --------------------------------------------------------------------------------------------------------


def _undecodable(column: bytes, error: Exception) -> BugError:
    return BugError("UNDECODABLE_COLUMN", f"{error}; column begins {column[:48].hex() or '(none)'}")


def _parse(column: bytes) -> _Column:
    try:
        try:
            return _parse_canonical(column)
        except _NotCanonicalError:
            # Legal protobuf that no Milvus writes (unpacked numbers, split groups): let protobuf lay it out anew.
            message = schema_pb2.FieldData.FromString(column)
            return _parse_canonical(message.SerializeToString())
    except (_BadWireError, DecodeError) as error:
        raise _undecodable(column, error) from error


class _NotCanonicalError(_BadWireError):
    pass


def _parse_canonical(column: bytes) -> _Column:
    head_parts: list[bytes] = []
    valid_parts: list[bytes] = []
    group = kind = dim = group_start = group_end = 0
    at = 0
    for number, wire, start, end in _walk(column, 0, len(column)):
        if number in (_SCALARS, _VECTORS) and wire == _LEN:
            if group:
                raise _NotCanonicalError("the data occurs twice")
            group, group_start, group_end = number, start, end
        elif number == _VALID_DATA:
            if wire != _LEN:
                raise _NotCanonicalError("valid_data is not packed")
            valid_parts.append(column[start:end])
        elif number == 8:
            raise BugError(
                "UNSUPPORTED_COLUMN", "a struct array column (Milvus 2.6) is not supported"
            )
        else:
            head_parts.append(column[at:end])
        at = end
    head = b"".join(head_parts)
    valid = b"".join(valid_parts)
    if valid.strip(b"\x00\x01"):
        raise _NotCanonicalError("valid_data holds a bool that is not one byte of 0 or 1")
    data = extra = b""
    data_start = data_end = 0
    for number, wire, start, end in _walk(column, group_start, group_end):
        if group == _VECTORS and number == _DIM and wire == _VARINT:
            dim = _varint(column, start)[0]
        elif (group, number) not in _LAYOUTS or wire != _LEN:
            raise BugError(
                "UNSUPPORTED_COLUMN", f"column data of kind {group}.{number} is not supported"
            )
        elif kind:
            raise _NotCanonicalError("the data occurs twice")
        else:
            kind, data_start, data_end = number, start, end
    if not kind:
        return _Column(head, valid, group=0, kind=0, dim=dim, data=b"", extra=b"")
    layout = _LAYOUTS[group, kind][0]
    if layout is _Layout.BYTES:
        data = column[data_start:data_end]
    elif layout is _Layout.DELIMITED:
        data, dim, extra = _delimited_rows(column, data_start, data_end, group, dim)
    else:
        packed = []
        for number, wire, start, end in _walk(column, data_start, data_end):
            if number != 1 or wire != _LEN:
                raise _NotCanonicalError("the numbers are not packed")
            packed.append(column[start:end])
        data = packed[0] if len(packed) == 1 else b"".join(packed)
    return _Column(head, valid, group, kind, dim, data, extra)


def _delimited_rows(
    column: bytes, start: int, end: int, group: int, dim: int
) -> tuple[bytes, int, bytes]:
    """The rows' fields, the largest dimension said, and the fields that are not rows."""
    content = column[start:end]
    # Most columns hold rows alone, but that shows only at the last one.
    rows: list[bytes] = []
    extra: list[bytes] = []
    row_start = at = 0
    for number, wire, value, stop in _walk(content, 0, len(content)):
        if number != 1:
            rows.append(content[row_start:at])
            row_start = stop
            if group == _VECTORS and number == 2 and wire == _VARINT:
                dim = max(dim, _varint(content, value)[0])
            else:
                extra = [content[at:stop]]
        elif wire != _LEN:
            raise _BadWireError("a row that is not length-delimited")
        at = stop
    if not row_start:
        return content, dim, b""
    rows.append(content[row_start:])
    return b"".join(rows), dim, b"".join(extra)


def _serialize(column: _Column) -> bytes:
    parts = [column.head]
    if column.group:
        content = [column.data]
        match column.layout:
            case _Layout.VARINTS | _Layout.FIXED:
                content = _delimited(1, column.data) if column.data else []
            case _Layout.DELIMITED if column.group == _VECTORS:
                if column.dim:
                    content.append(bytes((2 << 3,)) + _encode_varint(column.dim))
            case _Layout.DELIMITED:
                content.append(column.extra)
        inner = _delimited(column.kind, *content)
        if column.group == _VECTORS and column.dim:
            inner.insert(0, bytes((_DIM << 3,)) + _encode_varint(column.dim))
        parts += _delimited(column.group, *inner)
    if column.valid:
        parts += _delimited(_VALID_DATA, column.valid)
    return b"".join(parts)


def _join(parts: Sequence[_Column]) -> _Column:
    first = next((part for part in parts if part.group), parts[0])
    for part in parts:
        if part.group and (part.group, part.kind) != (first.group, first.kind):
            raise BugError("UNSUPPORTED_COLUMN", "chunks of one field hold data of different types")
        if (
            part.dim != first.dim
            and part.group
            and first.kind != _SPARSE
            and part.group == _VECTORS
        ):
            raise BugError(
                "UNSUPPORTED_COLUMN",
                f"chunks of one vector field have dimensions {first.dim} and {part.dim}",
            )
    valid = b""
    if any(part.valid for part in parts):
        valid = b"".join(part.valid or b"\x01" * _count(part) for part in parts)
    return replace(
        first,
        valid=valid,
        dim=max(part.dim for part in parts),
        data=b"".join(part.data for part in parts),
        extra=max((part.extra for part in parts), key=len),
    )


def _ends(column: _Column) -> NDArray[np.int64]:
    """Where each row's bytes end in `data`."""
    size = len(column.data)
    if not size or not column.group:
        return np.zeros(0, np.int64)
    match column.layout:
        case _Layout.VARINTS:
            ends = np.flatnonzero(np.frombuffer(column.data, np.uint8) < 0x80) + 1
            if not len(ends) or ends[-1] != size:
                raise _undecodable(column.head, _BadWireError("the last number is cut off"))
            return ends
        case _Layout.DELIMITED:
            return np.fromiter((field[3] for field in _walk(column.data, 0, size)), np.int64)
        case _:
            width = column.width
            if not width or size % width:
                raise _undecodable(
                    column.head,
                    _BadWireError(f"{size} bytes of rows of {width} bytes, dimension {column.dim}"),
                )
            return np.arange(width, size + 1, width, dtype=np.int64)


def _count(column: _Column) -> int:
    return len(_ends(column))


def _check_rows(rows: NDArray[np.int64], count: int) -> None:
    if len(rows) and (rows.min() < 0 or rows.max() >= count):
        raise BugError("ROW_OUT_OF_RANGE", f"row {int(rows.max())} of a column of {count} rows")


def _take(column: _Column, rows: NDArray[np.int64]) -> _Column:
    ends = _ends(column)
    _check_rows(rows, len(ends))
    if not len(rows):
        return replace(column, data=b"")
    if len(rows) == len(ends) and np.array_equal(rows, np.arange(len(ends))):
        return column
    if column.layout in (_Layout.FIXED, _Layout.BYTES):
        table = np.frombuffer(column.data, np.uint8).reshape(len(ends), column.width)
        return replace(column, data=table[rows].tobytes())
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    view = memoryview(column.data)
    pieces: Iterable[memoryview] = (
        view[start:end]
        for start, end in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)
    )
    return replace(column, data=b"".join(pieces))


def _request_form(column: _Column) -> _Column:
    """Without the placeholders of null rows."""
    if not column.valid or b"\x00" not in column.valid or not column.group:
        return column
    count = _count(column)
    valid = np.frombuffer(column.valid, np.uint8)
    if count == int(valid.sum()):
        return column
    if count != len(valid):
        raise _undecodable(
            column.head,
            _BadWireError(f"{count} values for {len(valid)} rows of which some are null"),
        )
    return _take(column, np.flatnonzero(valid))


def _leaf(column: bytes) -> tuple[bytes, int]:
    """Content and kind of a scalar column's data."""
    parsed = [f for f in _walk(column, 0, len(column)) if f[0] == _SCALARS and f[1] == _LEN]
    if len(parsed) == 1:
        inner = _walk(column, parsed[0][2], parsed[0][3])
        if len(inner) == 1 and inner[0][1] == _LEN:
            number, _, start, end = inner[0]
            return column[start:end], number
    canonical = _parse(column)
    raise BugError(
        "UNSUPPORTED_COLUMN", f"a primary key column of kind {canonical.group}.{canonical.kind}"
    )
