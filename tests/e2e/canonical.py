"""Rows in one form, whoever was asked for them, so that they can be compared bit for bit.

Float32 values become what their four bytes say, vectors lists of those, binary vectors their
bytes, JSON is compared by value; dynamic fields stand below `$meta`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from tests.e2e.load import Row, Shape

META = "$meta"
QUERY_LIMIT = 16_384
Rows = dict[Any, Row]


def source_rows(uri: str, database: str, shape: Shape) -> Rows:
    """Every row that the source has, by key."""
    client = MilvusClient(uri=uri, db_name=database)
    try:
        # An iterator of pymilvus reads a 2.3 at the client's idea of time, and can miss rows.
        rows = client.query(
            shape.name,
            filter="",
            limit=QUERY_LIMIT,
            output_fields=["*"],
            consistency_level="Strong",
        )
        assert len(rows) < QUERY_LIMIT, "more rows than one query of Milvus gives"
        return {row[shape.key.name]: canonical(shape, nested(shape, row)) for row in rows}
    finally:
        client.close()


def nested(shape: Shape, row: Mapping[str, Any]) -> Row:
    """With the dynamic fields below `$meta`, where a row has them beside the others."""
    names = {field.name for field in shape.fields}
    plain = {name: value for name, value in row.items() if name in names}
    if shape.dynamic:
        plain[META] = {name: value for name, value in row.items() if name not in names}
    return plain


def canonical(shape: Shape, row: Mapping[str, Any]) -> Row:
    """`row` has a value for each field, and `$meta` where there may be more."""
    out = {f.name: _value(f.dtype, row[f.name]) for f in shape.fields}
    if shape.dynamic:
        meta = row[META] or {}
        out[META] = json.loads(meta) if isinstance(meta, str | bytes) else meta
    return out


def _value(kind: DataType, value: Any) -> Any:
    match kind:
        case DataType.FLOAT:
            return np.float32(value).tobytes()
        case DataType.DOUBLE:
            return np.float64(value).tobytes()
        case DataType.FLOAT_VECTOR:
            numbers = json.loads(value) if isinstance(value, str) else value
            return np.asarray(numbers, np.float32).tobytes()
        case DataType.BINARY_VECTOR:
            return _bits(value)
        case DataType.JSON:
            return json.loads(value) if isinstance(value, str | bytes) else value
        case DataType.ARRAY:
            return list(value)
        case _:
            return value


def _bits(value: Any) -> bytes:
    if isinstance(value, str):  # '0101...', the highest bit of each byte first
        return int(value, 2).to_bytes(len(value) // 8, "big")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        return value[0]
    return bytes(value)


def differences(source: Rows, sink: Rows) -> list[str]:
    """What is missing, extra or different, in words; empty when nothing is."""
    told = [f"missing {key!r}" for key in source.keys() - sink.keys()]
    told += [f"extra {key!r}" for key in sink.keys() - source.keys()]
    for key in source.keys() & sink.keys():
        if source[key] != sink[key]:
            fields = [name for name in source[key] if source[key][name] != sink[key].get(name)]
            told.append(f"different {key!r}: {fields}")
    return sorted(told)
