"""Whether two collections have the same shape, and what of it a comparison reads.

Field ids are each cluster's own; the autoID flag may differ (a replicated autoID collection keeps
its keys with autoID off); so may descriptions, shards and consistency level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milvus_cdc.verify.keys import KeyField

if TYPE_CHECKING:
    from pymilvus.grpc_gen import schema_pb2
else:
    from milvus_cdc.milvus_protos import schema_pb2

_DEFAULT_ROW_BYTES = {
    schema_pb2.VarChar: 64,
    schema_pb2.JSON: 128,
    schema_pb2.Array: 128,
    schema_pb2.SparseFloatVector: 512,
}
_BYTES_PER_DIM = {
    schema_pb2.FloatVector: 4.0,
    schema_pb2.Float16Vector: 2.0,
    schema_pb2.BFloat16Vector: 2.0,
    schema_pb2.Int8Vector: 1.0,
    schema_pb2.BinaryVector: 0.125,
}
META_FIELD = "$meta"


@dataclass(frozen=True, slots=True)
class Shape:
    key: KeyField
    fields: tuple[str, ...]
    """Every field but the key that can be read back, `$meta` included."""
    partition_key: bool
    row_bytes: int
    """A first guess, until rows have been seen."""


def shape_of(schema: schema_pb2.CollectionSchema) -> Shape:
    key = next(f for f in schema.fields if f.is_primary_key)
    fields = [f.name for f in schema.fields if not f.is_primary_key and not f.is_function_output]
    fields += [f.name for f in schema.struct_array_fields]
    if schema.enable_dynamic_field and META_FIELD not in fields:
        fields.append(META_FIELD)
    return Shape(
        KeyField(key.name, key.data_type == schema_pb2.VarChar),
        tuple(fields),
        any(f.is_partition_key for f in schema.fields),
        sum(map(_row_bytes, schema.fields)),
    )


def _row_bytes(field: schema_pb2.FieldSchema) -> int:
    per_dim = _BYTES_PER_DIM.get(field.data_type)
    if per_dim is None:
        return _DEFAULT_ROW_BYTES.get(field.data_type, 8)
    return int(per_dim * int(_params(field).get("dim", "0")))


def _params(field: schema_pb2.FieldSchema) -> Mapping[str, str]:
    return {pair.key: pair.value for pair in field.type_params}


def mismatch(source: schema_pb2.CollectionSchema, sink: schema_pb2.CollectionSchema) -> str:
    """What differs, for a person; empty when nothing does."""
    if source.enable_dynamic_field != sink.enable_dynamic_field:
        return "only one side has a dynamic field"
    ours = {f.name: f for f in source.fields if f.name != META_FIELD}
    theirs = {f.name: f for f in sink.fields if f.name != META_FIELD}
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"field {name} exists only at the {'source' if name in ours else 'sink'}"
    for name, field in ours.items():
        there = theirs[name]
        for what, left, right in (
            ("type", field.data_type, there.data_type),
            ("element type", field.element_type, there.element_type),
            ("primary key flag", field.is_primary_key, there.is_primary_key),
            ("partition key flag", field.is_partition_key, there.is_partition_key),
            ("nullable flag", field.nullable, there.nullable),
            ("dim", _params(field).get("dim"), _params(there).get("dim")),
        ):
            if left != right:
                return f"field {name}: {what} is {left} at the source, {right} at the sink"
    structs = [sorted(f.name for f in s.struct_array_fields) for s in (source, sink)]
    return "" if structs[0] == structs[1] else "struct array fields differ"
