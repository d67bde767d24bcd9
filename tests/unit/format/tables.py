"""Collections and rows for the tests of formats, with columns as Milvus' log has them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table

TS = ms_to_tso(1_700_000_000_123) + 5
T = FieldType
DIM = 8


def table(*fields: Field, **names: Any) -> Table:
    given: dict[str, Any] = {
        "task": "tasks/to-kafka",
        "task_uid": "u1",
        "collection_id": 449,
        "source_database": "default",
        "source_collection": "articles",
        "database": "default",
        "collection": "articles",
    }
    return Table(**{**given, **names}, fields=fields)


def field(name: str, kind: FieldType, at: int, **more: Any) -> Field:
    return Field(field_id=100 + at, name=name, type=kind, **more)


def every_type(nullable: bool = False, nullable_vectors: bool = False) -> Table:
    """Up to Milvus 2.5 a vector cannot be null."""
    more: dict[str, Any] = {"nullable": nullable}
    vector: dict[str, Any] = {"nullable": nullable_vectors}
    kinds = [T.BOOL, T.INT8, T.INT16, T.INT32, T.INT64, T.FLOAT, T.DOUBLE, T.VARCHAR, T.JSON]
    vectors = [
        T.FLOAT_VECTOR,
        T.FLOAT16_VECTOR,
        T.BFLOAT16_VECTOR,
        T.INT8_VECTOR,
        T.BINARY_VECTOR,
    ]
    fields = [field("id", T.INT64, 0, primary_key=True)]
    fields += [field(f"a_{kind.lower()}", kind, 1 + at, **more) for at, kind in enumerate(kinds)]
    elements = [T.BOOL, T.INT8, T.INT64, T.FLOAT, T.DOUBLE, T.VARCHAR]
    for kind in elements:
        name = f"some_{kind.lower()}"
        fields.append(field(name, T.ARRAY, len(fields), element_type=kind, **more))
    fields += [
        field(kind.lower(), kind, len(fields) + at, dim=DIM, **vector)
        for at, kind in enumerate(vectors)
    ]
    fields.append(field("sparse", T.SPARSE_FLOAT_VECTOR, len(fields), **vector))
    fields.append(field("$meta", T.JSON, len(fields), dynamic=True))
    return table(*fields)


def column(of: Field, values: Sequence[Any]) -> bytes:
    """Serialized schema.FieldData: values as Python has them, JSON as its text, vectors as lists
    (binary as bytes, bfloat16 as words, sparse as dicts); a null has a placeholder as in the log.
    """
    data = schema_pb2.FieldData(
        type=schema_pb2.DataType.Value(of.type.value), field_id=of.field_id, field_name=of.name
    )
    data.is_dynamic = of.dynamic
    if of.nullable:
        data.valid_data.extend(value is not None for value in values)
        if of.type.is_vector:
            # Only those that are there.
            values = [value for value in values if value is not None]
    match of.type:
        case T.SPARSE_FLOAT_VECTOR:
            data.vectors.sparse_float_vector.contents.extend(
                b"".join(struct.pack("<If", i, v) for i, v in sorted(row.items())) for row in values
            )
        case T.FLOAT_VECTOR:
            data.vectors.float_vector.data.extend(x for row in values for x in row)
        case T.FLOAT16_VECTOR:
            data.vectors.float16_vector = b"".join(np.array(r, "<f2").tobytes() for r in values)
        case T.BFLOAT16_VECTOR:
            data.vectors.bfloat16_vector = b"".join(np.array(r, "<u2").tobytes() for r in values)
        case T.INT8_VECTOR:
            data.vectors.int8_vector = b"".join(np.array(r, "i1").tobytes() for r in values)
        case T.BINARY_VECTOR:
            data.vectors.binary_vector = b"".join(values)
        case T.ARRAY:
            assert of.element_type is not None
            data.scalars.array_data.data.extend(
                _scalars(of.element_type, row or []) for row in values
            )
            data.scalars.array_data.element_type = schema_pb2.DataType.Value(of.element_type.value)
        case kind:
            empty = _EMPTY.get(kind, 0)
            filled = [empty if value is None else value for value in values]
            data.scalars.CopyFrom(_scalars(kind, filled))
    if of.type.is_vector and of.dim:
        data.vectors.dim = of.dim
    serialized: bytes = data.SerializeToString()
    return serialized


_EMPTY: dict[FieldType, Any] = {T.VARCHAR: "", T.JSON: "{}", T.BOOL: False}
_MEMBERS = {
    T.BOOL: "bool_data",
    T.INT64: "long_data",
    T.FLOAT: "float_data",
    T.DOUBLE: "double_data",
    T.VARCHAR: "string_data",
}


def _scalars(kind: FieldType, values: Sequence[Any]) -> Any:
    scalar = schema_pb2.ScalarField()
    if kind is T.JSON:
        scalar.json_data.data.extend(v.encode() for v in values)
    else:
        member = getattr(scalar, _MEMBERS.get(kind, "int_data"))
        member.data.extend(values)
        member.SetInParent()
    return scalar


def changes(of: Table, rows: Sequence[dict[str, Any]], op: ChangeOp = ChangeOp.CREATE) -> Changes:
    return Changes(
        op=op,
        ts=TS,
        vchannel="by-dev-rootcoord-dml_0_449v0",
        order=17,
        partition="_default",
        num_rows=len(rows),
        columns=tuple(column(f, [row.get(f.name) for row in rows]) for f in of.fields),
    )


def deletes(of: Table, keys: Sequence[int] | Sequence[str]) -> Changes:
    return Changes(
        op=ChangeOp.DELETE,
        ts=TS,
        vchannel="by-dev-rootcoord-dml_0_449v0",
        order=18,
        partition="",
        num_rows=len(keys),
        delete_keys=np.array(keys, np.int64) if of.key.type is T.INT64 else list(keys),  # type: ignore[arg-type]
    )


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]  # type: ignore[no-any-return]


def f16(value: float) -> float:
    return float(np.float16(value))


def named(value: float) -> float | str:
    """How JSON shows what it has no number for."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def row(at: int = 0, **other: Any) -> dict[str, Any]:
    """Of `every_type`."""
    made: dict[str, Any] = {
        "id": at,
        "a_bool": at % 2 == 0,
        "a_int8": -128 + at,
        "a_int16": -(2**15) + at,
        "a_int32": 2**31 - 1 - at,
        "a_int64": -(2**63) + at,
        "a_float": f32(0.1 + at),
        "a_double": 0.1 + at,
        "a_varchar": f'"ключ"\n\\ 🐍\x00 {at}',
        "a_json": json.dumps({"deep": [1, {"ü": None}], "at": at}),
        "some_bool": [True, False],
        "some_int8": [-128, 127, at],
        "some_int64": [2**63 - 1, -(2**63)],
        "some_float": [f32(0.1), f32(-1e-38)],
        "some_double": [0.1, 1e308],
        "some_varchar": ["", "a", "é" * at],
        "floatvector": [f32(math.sin(at * DIM + i)) for i in range(DIM)],
        "float16vector": [f16(math.cos(at * DIM + i)) for i in range(DIM)],
        "bfloat16vector": [0x3F80 + at, 0xBF80, 0, 0x8000, 1, 2, 3, 4],
        "int8vector": [-128, 127, 0, 1, 2, 3, at, -at],
        "binaryvector": bytes([255 - at]),
        "sparse": {0: f32(0.5), 2**32 - 2: f32(0.1), 7 + at: f32(-1)},
        "$meta": json.dumps({"extra": at, "more": ["x"]}),
    }
    return made | other
