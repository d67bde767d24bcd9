"""Serialized schema.FieldData columns as Arrow arrays, without one Python object per number.

Types as in `milvus_cdc.rows`. Laws: values keep their bits; a null is a null whether the log holds
a placeholder for it (as Milvus 2.5 writes it) or not (as a write request has it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from milvus_cdc.codec.columns import Column, Layout, count_rows, parse
from milvus_cdc.codec.wire import BadWireError
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2

_SCALARS = {
    "Bool": pa.bool_(),
    "Int8": pa.int8(),
    "Int16": pa.int16(),
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "Float": pa.float32(),
    "Double": pa.float64(),
    "VarChar": pa.string(),
    "JSON": pa.string(),
}
_LISTS = {
    "FloatVector": pa.float32(),
    "Float16Vector": pa.float16(),
    "Int8Vector": pa.int8(),
}
SPARSE = pa.list_(pa.struct([pa.field("index", pa.uint32()), pa.field("value", pa.float32())]))


def arrow_type(milvus_type: str, dim: int, element: str) -> pa.DataType:
    """Raises BugError for a type not known here."""
    if (scalar := _SCALARS.get(milvus_type)) is not None:
        return scalar
    if (value := _LISTS.get(milvus_type)) is not None:
        return pa.list_(value, dim)
    match milvus_type:
        case "Array":
            return pa.list_(arrow_type(element, 0, ""))
        case "BFloat16Vector":
            return pa.binary(2 * dim)
        case "BinaryVector":
            return pa.binary(dim // 8)
        case "SparseFloatVector":
            return SPARSE
    raise BugError("UNSUPPORTED_TYPE", f"fields of type {milvus_type} are not known here")


def decode(column: bytes | None, kind: pa.DataType, num_rows: int) -> pa.Array:
    """`num_rows` values of that type; all null where there is no column. Raises BugError
    UNDECODABLE_COLUMN when the column holds something else.
    """
    if column is None:
        return pa.nulls(num_rows, kind)
    parsed = parse(column)
    valid = np.frombuffer(parsed.valid, np.bool_) if parsed.valid else None
    if valid is not None and len(valid) != num_rows:
        raise _wrong(column, f"{len(valid)} marks of validity for {num_rows} rows")
    if valid is not None and valid.all():
        valid = None
    cells: list[bytes] | None = None
    try:
        if parsed.group and parsed.layout is Layout.DELIMITED:
            cells = _cells(parsed)
        held = count_rows(parsed) if cells is None else len(cells)
    except DecodeError as error:
        raise _wrong(column, str(error)) from error
    places: NDArray[np.int64] | None = None
    if held != num_rows:
        if valid is None or held != int(valid.sum()):
            raise _wrong(column, f"{held} values for {num_rows} rows")
        # A null has no value: take any other in its place, the mask hides it.
        places = np.maximum(np.cumsum(valid, dtype=np.int64) - 1, 0)
    if not held:
        return pa.nulls(num_rows, kind)
    try:
        values = _numbers(parsed, kind, held) if cells is None else _objects(cells, kind)
    except (BadWireError, DecodeError, ValueError, pa.ArrowException) as error:
        raise _wrong(column, str(error)) from error
    if places is not None:
        values = values.take(pa.array(places))
    if valid is not None:
        values = pc.if_else(pa.array(valid), values, pa.scalar(None, kind))
    return values


def _wrong(column: bytes, why: str) -> BugError:
    return BugError("UNDECODABLE_COLUMN", f"{why}; column begins {column[:48].hex()}")


def _numbers(column: Column, kind: pa.DataType, count: int) -> pa.Array:
    data = column.data
    match column.layout:
        case Layout.VARINTS:
            if pa.types.is_boolean(kind):
                return pa.array(np.frombuffer(data, np.uint8) != 0)
            return pa.array(varints(data)).cast(kind)
        case Layout.FIXED | Layout.BYTES if pa.types.is_fixed_size_list(kind):
            numbers = np.frombuffer(data, kind.value_type.to_pandas_dtype())
            return pa.FixedSizeListArray.from_arrays(pa.array(numbers), kind.list_size)
        case Layout.BYTES:
            return pa.FixedSizeBinaryArray.from_buffers(kind, count, [None, pa.py_buffer(data)])
        case Layout.FIXED:
            return pa.array(np.frombuffer(data, kind.to_pandas_dtype()))
    raise ValueError(f"no {kind} in a column of {column.layout.name}")


def _objects(cells: list[bytes], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array(cells, pa.binary()).cast(kind)
    if kind == SPARSE:
        return _sparse(cells, kind)
    return _arrays(cells, kind)


def varints(data: bytes | memoryview) -> NDArray[np.int64]:
    """Packed varints of int32, int64: two's complement in 64 bits."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(raw) and (not len(ends) or ends[-1] != len(raw) - 1):
        raise BadWireError("the last number is cut off")
    starts = np.empty_like(ends)
    starts[:1] = 0
    starts[1:] = ends[:-1] + 1
    lengths = ends - starts + 1
    if len(lengths) and lengths.max() > 10:
        raise BadWireError("a varint of more than ten bytes")
    values = (raw[starts] & 0x7F).astype(np.uint64)
    for at in range(1, int(lengths.max(initial=1))):
        longer = np.flatnonzero(lengths > at)
        part = (raw[starts[longer] + at] & 0x7F).astype(np.uint64)
        values[longer] |= part << np.uint64(7 * at)
    return values.view(np.int64)


def _cells(column: Column) -> list[bytes]:
    """The content of each row of a delimited column: field 1 of its data, whatever that is."""
    return list(schema_pb2.BytesArray.FromString(bytes(column.data)).data)


def _sparse(cells: list[bytes], kind: pa.DataType) -> pa.Array:
    """Each cell is a run of (uint32 index, float32 value), little-endian (milvus
    `pkg/util/typeutil/schema.go`, sparse float rows).
    """
    sizes = np.fromiter(map(len, cells), np.int64, len(cells))
    if (sizes % 8).any():
        raise BadWireError("a sparse vector whose length is no multiple of 8")
    pairs = np.frombuffer(b"".join(cells), np.dtype([("index", "<u4"), ("value", "<f4")]))
    offsets = np.zeros(len(cells) + 1, np.int32)
    np.cumsum(sizes // 8, out=offsets[1:])
    struct = pa.StructArray.from_arrays(
        [
            pa.array(np.ascontiguousarray(pairs["index"])),
            pa.array(np.ascontiguousarray(pairs["value"])),
        ],
        fields=list(kind.value_type),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=kind)


def _arrays(cells: list[bytes], kind: pa.DataType) -> pa.Array:
    """Each cell is a schema.ScalarField with the elements of one row."""
    rows: list[Any] = []
    for cell in cells:
        scalar = schema_pb2.ScalarField.FromString(cell)
        which = scalar.WhichOneof("data")
        rows.append([] if which is None else list(getattr(scalar, which).data))
    return pa.array(rows, kind)
