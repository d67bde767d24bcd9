"""Kafka Connect's JSON schemas (`{"schema": ..., "payload": ...}`) of Debezium-style records.

Facts: `org.apache.kafka.connect.json.JsonSchema` (type names, `optional`, `field`), Debezium's
semantic names `io.debezium.data.Json` and `io.debezium.data.FloatVector`. Connect has no type for
"any JSON", so JSON fields are strings that hold JSON here, and `$meta` is one of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import orjson

from milvus_cdc.format.json_cells import JsonStyle
from milvus_cdc.rows import Field, FieldType, Table

_TYPES: Final = {
    FieldType.BOOL: "boolean",
    FieldType.INT8: "int8",
    FieldType.INT16: "int16",
    FieldType.INT32: "int32",
    FieldType.INT64: "int64",
    FieldType.FLOAT: "float",
    FieldType.DOUBLE: "double",
    FieldType.VARCHAR: "string",
    FieldType.JSON: "string",
}
_ELEMENTS: Final = {
    FieldType.BINARY_VECTOR: "int16",
    FieldType.INT8_VECTOR: "int8",
}
NAMESPACE: Final = "io.milvuscdc"
_SOURCE: Final[dict[str, Any]] = {
    "type": "struct",
    "name": f"{NAMESPACE}.Source",
    "optional": False,
    "fields": [
        *(
            {"field": name, "type": "string", "optional": False}
            for name in ("version", "connector", "name")
        ),
        {"field": "ts_ms", "type": "int64", "optional": False},
        *(
            {"field": name, "type": "string", "optional": False}
            for name in ("snapshot", "db", "collection", "partition", "vchannel")
        ),
    ],
}


def record_name(table: Table, part: str) -> str:
    return f"milvus.{table.full_name}.{part}"


def _value(field: Field, style: JsonStyle) -> dict[str, Any]:
    kind = field.type
    if kind.is_vector and style.base64_vectors:
        # The converter reads base64 where the schema says bytes.
        return {"type": "bytes"}
    if kind is FieldType.SPARSE_FLOAT_VECTOR:
        return {
            "type": "map",
            "keys": {"type": "string", "optional": False},
            "values": {"type": "float", "optional": False},
        }
    if kind.is_vector:
        element = _ELEMENTS.get(kind, "float")
        named = {"name": "io.debezium.data.FloatVector"} if element == "float" else {}
        return {"type": "array", "items": {"type": element, "optional": False}, **named}
    if kind is FieldType.ARRAY and field.element_type is not None:
        return {"type": "array", "items": {**_scalar(field.element_type, style), "optional": False}}
    return _scalar(kind, style)


def _scalar(kind: FieldType, style: JsonStyle) -> dict[str, Any]:
    if kind is FieldType.INT64 and style.int64_as_string:
        return {"type": "string"}
    if kind is FieldType.JSON:
        return {"type": "string", "name": "io.debezium.data.Json"}
    return {"type": _TYPES[kind]}


def _struct(table: Table, part: str, fields: tuple[Field, ...], style: JsonStyle) -> dict[str, Any]:
    return {
        "type": "struct",
        "name": record_name(table, part),
        "fields": [
            {"field": f.name, **_value(f, style), "optional": f.nullable or f.dynamic}
            for f in fields
        ],
    }


def _source(style: JsonStyle) -> dict[str, Any]:
    number = {"type": "string" if style.int64_as_string else "int64", "optional": False}
    fields = [*_SOURCE["fields"], {"field": "order", **number}, {"field": "tso", **number}]
    return {**_SOURCE, "fields": fields}


@lru_cache(maxsize=4096)
def key_schema(table: Table, style: JsonStyle) -> bytes:
    """Of a record's key."""
    return orjson.dumps({**_struct(table, "Key", (table.key,), style), "optional": False})


@lru_cache(maxsize=4096)
def envelope_schema(table: Table, style: JsonStyle) -> bytes:
    """Of a record's value."""
    before = _struct(table, "Key", (table.key,), style)
    after = _struct(table, "Value", table.fields, style)
    envelope = {
        "type": "struct",
        "name": record_name(table, "Envelope"),
        "optional": False,
        "version": 1,
        "fields": [
            {"field": "before", **before, "optional": True},
            {"field": "after", **after, "optional": True},
            {"field": "source", **_source(style)},
            {"field": "op", "type": "string", "optional": False},
            {"field": "ts_ms", "type": "int64", "optional": True},
        ],
    }
    return orjson.dumps(envelope)


def of_value(name: str, value: Any) -> dict[str, Any]:
    """The schema of a plain value whose strings, numbers and lists are never empty of meaning:
    for events of one fixed shape, which schema changes are.
    """
    if isinstance(value, dict):
        fields = [{"field": key, **of_value(f"{name}.{key}", each)} for key, each in value.items()]
        return {"type": "struct", "name": name, "optional": False, "fields": fields}
    if isinstance(value, list):
        return {"type": "array", "optional": False, "items": of_value(f"{name}.item", value[0])}
    kind = {bool: "boolean", int: "int64", str: "string"}[type(value)]
    return {"type": kind, "optional": False}
