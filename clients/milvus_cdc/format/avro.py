"""Avro with a schema registry: key and value are records of the collection's fields.

A delete is a key without a value. A field that may be null is a union with null and has null as its
default, so a field that is added later is a compatible change in either direction. Attributes that
Avro itself does not know (`milvus.type`, `milvus.dim`) say what a field is at the source.

| Milvus | Avro |
|---|---|
| Bool, Int8 to Int32, Int64, Float, Double | boolean, int, long, float, double |
| VarChar | string |
| JSON, the dynamic field (as `_meta`) | string with its JSON |
| Array | array of the element's type |
| FloatVector, Float16Vector, BFloat16Vector, Int8Vector | bytes; as arrays float or int |
| BinaryVector | bytes, as Milvus packs its bits |
| SparseFloatVector | bytes: runs of (uint32 index, float32 value); as arrays records of both |

Numbers in bytes are little-endian.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import fastavro
import orjson
import pyarrow as pa

from milvus_cdc.format import Record, assemble, avro_pieces, schema_event, schema_names, wire_pieces
from milvus_cdc.format.schema_registry import Part, Registry, frame
from milvus_cdc.rows import Changes, Field, FieldType, Table
from milvus_cdc.sink.writer import SchemaChange

_TYPES: Final = {
    FieldType.BOOL: "boolean",
    FieldType.INT8: "int",
    FieldType.INT16: "int",
    FieldType.INT32: "int",
    FieldType.INT64: "long",
    FieldType.FLOAT: "float",
    FieldType.DOUBLE: "double",
    FieldType.VARCHAR: "string",
    FieldType.JSON: "string",
}


class AvroFormat:
    content_type = "application/vnd.apache.avro"

    def __init__(self, registry: Registry, *, arrays: bool = False) -> None:
        """`arrays`: vectors as arrays of numbers."""
        self._registry = registry
        self._arrays = arrays
        self._frames: dict[Table, wire_pieces.Frames] = {}
        self._event_frames: dict[Table, wire_pieces.Frames] = {}

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        name = schema_names.namespace(table)
        key = await self._register(topic or name, key_schema(table), "key")
        value = await self._register(topic or name, value_schema(table, self._arrays), "value")
        self._frames[table] = (key, value)
        if schema_topic:
            self._event_frames[table] = (
                await self._register(schema_topic, EVENT_KEY, "key"),
                await self._register(schema_topic, EVENT, "value"),
            )

    async def _register(self, topic: str, schema: dict[str, Any], part: Part) -> bytes:
        subject = self._registry.subject(topic, f"{schema['namespace']}.{schema['name']}", part)
        text = orjson.dumps(schema).decode()
        return frame(await self._registry.schema_id(subject, "AVRO", text))

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        def parts(field: Field, column: pa.Array) -> Sequence[assemble.Part]:
            return avro_pieces.parts(field, column, self._arrays)

        return wire_pieces.records(table, changes, wire_pieces.prepared(self._frames, table), parts)

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        key_frame, value_frame = wire_pieces.prepared(self._event_frames, table)
        key, value = io.BytesIO(), io.BytesIO()
        fastavro.schemaless_writer(key, EVENT_KEY, schema_event.key(table))
        fastavro.schemaless_writer(value, EVENT, schema_event.event(change, table))
        return Record(key_frame + key.getvalue(), value_frame + value.getvalue())

    async def close(self) -> None:
        await self._registry.close()


def key_schema(table: Table) -> dict[str, Any]:
    return _record(table, "Key", (table.key,), arrays=False)


def value_schema(table: Table, arrays: bool) -> dict[str, Any]:
    return _record(table, "Value", table.fields, arrays)


def _record(table: Table, name: str, fields: tuple[Field, ...], arrays: bool) -> dict[str, Any]:
    names = dict(zip(table.fields, schema_names.field_names(table), strict=True))
    return {
        "type": "record",
        "name": name,
        "namespace": schema_names.namespace(table),
        "fields": [_field(field, names[field], arrays) for field in fields],
    }


def _field(field: Field, name: str, arrays: bool) -> dict[str, Any]:
    kind = _value(field, name, arrays)
    described = {
        "name": name,
        "type": ["null", kind] if avro_pieces.optional(field) else kind,
        **({"doc": field.description} if field.description else {}),
        "milvus.type": field.type.value,
        **({"milvus.dim": field.dim} if field.dim else {}),
    }
    return {**described, "default": None} if avro_pieces.optional(field) else described


def _value(field: Field, name: str, arrays: bool) -> Any:
    if field.type is FieldType.ARRAY and field.element_type is not None:
        return {"type": "array", "items": _TYPES[field.element_type]}
    if not field.type.is_vector:
        return _TYPES[field.type]
    if not arrays or field.type is FieldType.BINARY_VECTOR:
        return "bytes"
    if field.type is FieldType.SPARSE_FLOAT_VECTOR:
        fields = [{"name": "index", "type": "long"}, {"name": "value", "type": "float"}]
        return {
            "type": "array",
            "items": {"type": "record", "name": f"{name}_entry", "fields": fields},
        }
    return {"type": "array", "items": "int" if field.type is FieldType.INT8_VECTOR else "float"}


_PLAIN: Final[dict[type, str]] = {bool: "boolean", int: "long", str: "string"}


def _plain_record(name: str, types: dict[str, type], *more: dict[str, Any]) -> dict[str, Any]:
    fields = [{"name": each, "type": _PLAIN[kind]} for each, kind in types.items()]
    return {
        "type": "record",
        "name": name,
        "namespace": "io.milvuscdc",
        "fields": [*fields, *more],
    }


EVENT_KEY: Final = _plain_record("SchemaEventKey", schema_event.KEY_TYPES)
EVENT: Final = _plain_record(
    "SchemaEvent",
    schema_event.EVENT_TYPES,
    {
        "name": "fields",
        "type": {"type": "array", "items": _plain_record("SchemaField", schema_event.FIELD_TYPES)},
    },
)
