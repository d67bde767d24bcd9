"""Cuts, joins and reads serialized schema.FieldData columns without one Python object per row.

Laws: results are exact for every field type of Milvus 2.2 to 2.5, and a type not listed here
raises; what leaves this module has the form that a write request takes. That form differs from the
log's in one point: for a nullable column the log holds a placeholder for every null row, a request
must not (milvus `validate_util.go`, `fillWithNullValueImpl`: as many values as valid rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
from google.protobuf.message import DecodeError
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from numpy.typing import NDArray

from milvus_cdc.codec.messages import Keys
from milvus_cdc.codec.wire import LEN, VARINT, BadWireError, delimited, encode_varint, varint, walk
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2

# schema.FieldData
_SCALARS, _VECTORS, _FIELD_ID, _VALID_DATA = 3, 4, 5, 7
# schema.ScalarField, schema.VectorField
_LONG_DATA, _STRING_DATA = 3, 6
_DIM, _SPARSE = 1, 6
# schema.SparseFloatArray
_SPARSE_DIM = 2


class Layout(Enum):
    """How rows lie in the data of a column."""

    VARINTS = auto()
    FIXED = auto()
    """A fixed number of bytes per row in a packed field."""
    DELIMITED = auto()
    """One occurrence of field 1 per row."""
    BYTES = auto()
    """A fixed number of bytes per row in one byte string (of several, protobuf keeps the last)."""


_LAYOUTS: dict[tuple[int, int], tuple[Layout, Callable[[int], int]]] = {
    (_SCALARS, 1): (Layout.VARINTS, lambda dim: 0),  # bool
    (_SCALARS, 2): (Layout.VARINTS, lambda dim: 0),  # int8 to int32
    (_SCALARS, _LONG_DATA): (Layout.VARINTS, lambda dim: 0),
    (_SCALARS, 4): (Layout.FIXED, lambda dim: 4),  # float
    (_SCALARS, 5): (Layout.FIXED, lambda dim: 8),  # double
    (_SCALARS, _STRING_DATA): (Layout.DELIMITED, lambda dim: 0),
    (_SCALARS, 7): (Layout.DELIMITED, lambda dim: 0),  # bytes
    (_SCALARS, 8): (Layout.DELIMITED, lambda dim: 0),  # array
    (_SCALARS, 9): (Layout.DELIMITED, lambda dim: 0),  # json
    (_SCALARS, 10): (Layout.DELIMITED, lambda dim: 0),  # geometry
    (_SCALARS, 11): (Layout.VARINTS, lambda dim: 0),  # timestamptz
    (_SCALARS, 12): (Layout.DELIMITED, lambda dim: 0),  # geometry as text
    (_VECTORS, 2): (Layout.FIXED, lambda dim: dim * 4),  # float
    (_VECTORS, 3): (Layout.BYTES, lambda dim: dim // 8),  # binary
    (_VECTORS, 4): (Layout.BYTES, lambda dim: dim * 2),  # float16
    (_VECTORS, 5): (Layout.BYTES, lambda dim: dim * 2),  # bfloat16
    (_VECTORS, _SPARSE): (Layout.DELIMITED, lambda dim: 0),
    (_VECTORS, 7): (Layout.BYTES, lambda dim: dim),  # int8
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column taken apart, its data still bytes."""

    head: bytes
    """Type, name, id and flags as they came."""
    valid: bytes
    """One byte per row, 0 = null; empty when the column has no valid_data."""
    group: int
    """_SCALARS, _VECTORS, or 0 when there is no data at all (every row null)."""
    kind: int
    """Field number of the data inside the group."""
    dim: int
    data: bytes | memoryview
    """Packed values or byte string without framing; DELIMITED: the whole message of the rows."""

    @property
    def layout(self) -> Layout:
        return _LAYOUTS[self.group, self.kind][0]

    @property
    def width(self) -> int:
        return _LAYOUTS[self.group, self.kind][1](self.dim)


def field_id(column: bytes) -> int:
    """The field's id (`field_id`), 0 for RowID or when absent."""
    found = 0
    try:
        for number, wire, start, _ in walk(column, 0, len(column)):
            if number == _FIELD_ID and wire == VARINT:
                found = varint(column, start)[0]
    except BadWireError as error:
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
    except (BadWireError, DecodeError) as error:
        raise _undecodable(column, error) from error
    raise BugError("UNSUPPORTED_COLUMN", f"a primary key column of scalar kind {kind}")


def concat(columns: Sequence[bytes], *, mark_valid: bool = False) -> bytes:
    """One column with the rows of several of the same field, in order, as a write request takes it.

    `mark_valid` is for fields with a default value: a request must call each row valid or null
    (milvus `fillWithDefaultValue`), while the log, with defaults filled in, says nothing.
    """
    parts = [_request_form(parse(column)) for column in columns]
    merged = _merged(parts)
    if mark_valid and not merged.valid:
        merged = replace(merged, valid=b"\x01" * sum(map(count_rows, parts)))
    return _serialize(merged, [part.data for part in parts])


def select_rows(column: bytes, keep: Sequence[int]) -> bytes:
    """The rows at the indexes `keep`, in that order, in the form of a write request."""
    parsed = _request_form(parse(column))
    rows = np.asarray(keep, np.int64)
    if parsed.valid:
        valid = np.frombuffer(parsed.valid, np.uint8)
        _check_rows(rows, len(valid))
        # A null row has no data: the index of a valid row is the number of valid rows before it.
        places = np.cumsum(valid, dtype=np.int64) - 1
        chosen = valid[rows]
        parsed = replace(parsed, valid=chosen.tobytes())
        rows = places[rows[chosen != 0]]
    taken = _take(parsed, rows)
    return _serialize(taken, [taken.data])


def num_rows(column: bytes) -> int:
    """Rows of a column, nulls included."""
    parsed = parse(column)
    return len(parsed.valid) or count_rows(parsed)


def _undecodable(column: bytes, error: Exception) -> BugError:
    return BugError("UNDECODABLE_COLUMN", f"{error}; column begins {column[:48].hex() or '(none)'}")


def parse(column: bytes) -> Column:
    """Where everything lies in it. Raises BugError UNDECODABLE_COLUMN or UNSUPPORTED_COLUMN."""
    try:
        try:
            return _parse_canonical(column)
        except _NotCanonicalError:
            # Legal protobuf that no Milvus writes (unpacked numbers, split groups).
            message = schema_pb2.FieldData.FromString(column)
            return _parse_canonical(message.SerializeToString())
    except (BadWireError, DecodeError) as error:
        raise _undecodable(column, error) from error


class _NotCanonicalError(BadWireError):
    pass


def _parse_canonical(column: bytes) -> Column:
    head_parts: list[bytes] = []
    valid_parts: list[bytes] = []
    group = kind = dim = group_start = group_end = 0
    at = 0
    for number, wire, start, end in walk(column, 0, len(column)):
        if number in (_SCALARS, _VECTORS) and wire == LEN:
            if group:
                raise _NotCanonicalError("the data occurs twice")
            group, group_start, group_end = number, start, end
        elif number == _VALID_DATA:
            if wire != LEN:
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
    data_start = data_end = 0
    for number, wire, start, end in walk(column, group_start, group_end):
        if group == _VECTORS and number == _DIM and wire == VARINT:
            dim = varint(column, start)[0]
        elif (group, number) not in _LAYOUTS or wire != LEN:
            raise BugError(
                "UNSUPPORTED_COLUMN", f"column data of kind {group}.{number} is not supported"
            )
        elif kind:
            raise _NotCanonicalError("the data occurs twice")
        else:
            kind, data_start, data_end = number, start, end
    if not kind:
        return Column(head, valid, group=0, kind=0, dim=dim, data=b"")
    layout = _LAYOUTS[group, kind][0]
    view = memoryview(column)
    data: bytes | memoryview = view[data_start:data_end]
    if layout is Layout.DELIMITED and group == _VECTORS:
        dim = max(dim, _sparse_dim(data))
    elif layout in (Layout.VARINTS, Layout.FIXED):
        packed = []
        for number, wire, start, end in walk(column, data_start, data_end):
            if number != 1 or wire != LEN:
                raise _NotCanonicalError("the numbers are not packed")
            packed.append(view[start:end])
        data = packed[0] if len(packed) == 1 else b"".join(packed)
    return Column(head, valid, group, kind, dim, data)


def _serialize(column: Column, pieces: Sequence[bytes | memoryview]) -> bytes:
    """The column with the data of all `pieces`."""
    parts: list[bytes | memoryview] = [column.head]
    if column.group:
        content = list(pieces)
        layout = column.layout
        if layout in (Layout.VARINTS, Layout.FIXED):
            content = delimited(1, *pieces) if any(pieces) else []
        elif layout is Layout.DELIMITED and column.group == _VECTORS and column.dim:
            # Of a value said several times the last one counts.
            content.append(bytes((_SPARSE_DIM << 3,)) + encode_varint(column.dim))
        inner = delimited(column.kind, *content)
        if column.group == _VECTORS and column.dim:
            inner.insert(0, bytes((_DIM << 3,)) + encode_varint(column.dim))
        parts += delimited(column.group, *inner)
    if column.valid:
        parts += delimited(_VALID_DATA, column.valid)
    return b"".join(parts)


def _merged(parts: Sequence[Column]) -> Column:
    """What holds for all parts together; its `data` is that of the first alone."""
    first = next((part for part in parts if part.group), parts[0])
    dims_differ = first.group == _VECTORS and first.kind == _SPARSE
    for part in parts:
        if part.head != first.head and field_id(part.head) != field_id(first.head):
            raise BugError("MIXED_COLUMNS", "the chunks to be joined are of different fields")
        if not part.group:
            continue
        if (part.group, part.kind) != (first.group, first.kind) or (
            part.dim != first.dim and not dims_differ
        ):
            raise BugError(
                "MIXED_COLUMNS",
                f"chunks of field {field_id(first.head)} differ in type or dimension: "
                f"{first.group}.{first.kind} dim {first.dim}, "
                f"{part.group}.{part.kind} dim {part.dim}",
            )
    valid = b""
    if any(part.valid for part in parts):
        valid = b"".join(part.valid or b"\x01" * count_rows(part) for part in parts)
    return replace(first, valid=valid, dim=max(part.dim for part in parts))


def _sparse_dim(data: bytes | memoryview) -> int:
    return max(
        (
            varint(data, start)[0]
            for number, wire, start, _ in walk(data, 0, len(data))
            if number == _SPARSE_DIM and wire == VARINT
        ),
        default=0,
    )


def _ends(column: Column) -> NDArray[np.int64]:
    """Where each row's bytes end in `data`, for the layouts without gaps."""
    size = len(column.data)
    if column.layout is Layout.VARINTS:
        ends = np.flatnonzero(np.frombuffer(column.data, np.uint8) < 0x80) + 1
        if size and (not len(ends) or ends[-1] != size):
            raise _undecodable(column.head, BadWireError("the last number is cut off"))
        return ends
    if not size:
        return np.zeros(0, np.int64)
    width = column.width
    if not width or size % width:
        message = f"{size} bytes of rows of {width} bytes, dimension {column.dim}"
        raise _undecodable(column.head, BadWireError(message))
    return np.arange(width, size + 1, width, dtype=np.int64)


def count_rows(column: Column) -> int:
    """Values it holds; nulls may have none."""
    if not column.group:
        return 0
    if column.layout is Layout.DELIMITED:
        return len(_delimited_rows(column)[0])
    return len(_ends(column))


def _delimited_rows(column: Column) -> tuple[list[tuple[int, int]], list[bytes | memoryview]]:
    """Where each row begins and ends, and the fields that are no rows (an array's element type)."""
    data = column.data
    rows: list[tuple[int, int]] = []
    others: list[bytes | memoryview] = []
    at = 0
    try:
        for number, wire, _, end in walk(data, 0, len(data)):
            if number != 1:
                others.append(data[at:end])
            elif wire == LEN:
                rows.append((at, end))
            else:
                raise BadWireError("a row that is not length-delimited")
            at = end
    except BadWireError as error:
        raise _undecodable(column.head, error) from error
    return rows, others


def _check_rows(rows: NDArray[np.int64], count: int) -> None:
    if len(rows) and (rows.min() < 0 or rows.max() >= count):
        raise BugError("ROW_OUT_OF_RANGE", f"row {int(rows.max())} of a column of {count} rows")


def _take(column: Column, rows: NDArray[np.int64]) -> Column:
    if not column.group:
        _check_rows(rows, 0)
        return column
    if column.layout is Layout.DELIMITED:
        places, others = _delimited_rows(column)
        _check_rows(rows, len(places))
        chosen = (places[row] for row in rows.tolist())
        data = b"".join([column.data[start:end] for start, end in chosen] + others)
        return replace(column, data=data)
    ends = _ends(column)
    _check_rows(rows, len(ends))
    if column.layout is Layout.VARINTS:
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))[rows].tolist()
        spans = zip(starts, ends[rows].tolist(), strict=True)
        return replace(column, data=b"".join([column.data[start:end] for start, end in spans]))
    table = np.frombuffer(column.data, np.uint8).reshape(len(ends), column.width)
    return replace(column, data=table[rows].tobytes())


def _request_form(column: Column) -> Column:
    """Without the placeholders of null rows."""
    if not column.valid or b"\x00" not in column.valid or not column.group:
        return column
    count = count_rows(column)
    valid = np.frombuffer(column.valid, np.uint8)
    if count == int(valid.sum()):
        return column
    if count != len(valid):
        raise _undecodable(
            column.head,
            BadWireError(f"{count} values for {len(valid)} rows of which some are null"),
        )
    return _take(column, np.flatnonzero(valid))


def _leaf(column: bytes) -> tuple[bytes, int]:
    """Content and kind of a scalar column's data."""
    parsed = [f for f in walk(column, 0, len(column)) if f[0] == _SCALARS and f[1] == LEN]
    if len(parsed) == 1:
        inner = walk(column, parsed[0][2], parsed[0][3])
        if len(inner) == 1 and inner[0][1] == LEN:
            number, _, start, end = inner[0]
            return column[start:end], number
    canonical = parse(column)
    raise BugError(
        "UNSUPPORTED_COLUMN", f"a primary key column of kind {canonical.group}.{canonical.kind}"
    )
