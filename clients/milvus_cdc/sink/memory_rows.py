"""Rows of a batch as Python values, for who holds them in memory and compares them."""

from __future__ import annotations

import struct
from typing import Any

from milvus_cdc.codec.columns import concat, field_id, select_rows
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.sink import RowChunk
from milvus_cdc.sink.milvus import schema as schemas

Row = dict[str, Any]
"""Cells by field name: plain values; bytes for JSON, vectors (as they lie in memory) and arrays
(serialized); None for null.
"""


def decode_rows(chunk: RowChunk) -> list[Row]:
    """The rows of a chunk that are kept, system columns left out."""
    rows: list[Row] = [{} for _ in range(chunk.rows_kept)]
    for column in chunk.columns:
        if field_id(column) < schemas.FIRST_USER_FIELD_ID:
            continue
        kept = concat([column]) if chunk.keep is None else select_rows(column, chunk.keep)
        data = schema_pb2.FieldData.FromString(kept)
        name = "$meta" if data.is_dynamic else data.field_name
        for row, cell in zip(rows, decode_cells(data), strict=True):
            row[name] = cell
    return rows


def decode_cells(data: Any) -> list[Any]:
    """Cells of a schema_pb2.FieldData in request form: null rows have no value."""
    cells = _vectors(data.vectors) if data.HasField("vectors") else _scalars(data.scalars)
    if not data.valid_data:
        return cells
    values = iter(cells)
    return [next(values) if valid else None for valid in data.valid_data]


def _scalars(scalars: Any) -> list[Any]:
    kind = scalars.WhichOneof("data")
    if kind is None:
        return []
    values = list(getattr(scalars, kind).data)
    if kind == "array_data":
        return [_array(value) for value in values]
    if kind == "float_data":
        # By bits, so that NaN equals itself and 0.0 is not -0.0.
        return [struct.pack("<f", value) for value in values]
    if kind == "double_data":
        return [struct.pack("<d", value) for value in values]
    return values


def _array(value: Any) -> bytes:
    # An empty array may or may not say of which type it is.
    kind = value.WhichOneof("data")
    empty = kind is None or not getattr(value, kind).data
    return b"" if empty else bytes(value.SerializeToString(deterministic=True))


def _vectors(vectors: Any) -> list[Any]:
    kind = vectors.WhichOneof("data")
    if kind is None:
        return []
    if kind == "sparse_float_vector":
        return list(vectors.sparse_float_vector.contents)
    if kind == "float_vector":
        packed = struct.pack(f"<{len(vectors.float_vector.data)}f", *vectors.float_vector.data)
        width = vectors.dim * 4
    else:
        packed = getattr(vectors, kind)
        width = {
            "binary_vector": vectors.dim // 8,
            "int8_vector": vectors.dim,
        }.get(kind, vectors.dim * 2)
    return [packed[at : at + width] for at in range(0, len(packed), width)]
