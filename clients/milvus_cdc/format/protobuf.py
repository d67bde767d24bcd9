"""Protobuf (proto3) with a schema registry: key and value are messages `Key` and `Value`.

A delete is a key without a value. A field's number is its Milvus id less 99, so a field that is
added later is a compatible change; a field that may be null is `optional`, or a message around its
list. The JSON name of a field is its own name. Comments say what a field is at the source.

| Milvus | Protobuf |
|---|---|
| Bool, Int8 to Int32, Int64, Float, Double | bool, int32, int64, float, double |
| VarChar | string |
| JSON, the dynamic field (as `_meta`) | string with its JSON |
| Array | repeated of the element's type |
| FloatVector, Float16Vector, BFloat16Vector, Int8Vector | bytes; as arrays float or int32 |
| BinaryVector | bytes, as Milvus packs its bits |
| SparseFloatVector | bytes: runs of (uint32 index, float32 value); as arrays messages of both |

Numbers in bytes are little-endian.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa
from google.protobuf import descriptor_pb2, json_format
from milvuscdc.v1 import schema_event_pb2

from milvus_cdc.format import (
    Record,
    assemble,
    proto_text,
    protobuf_pieces,
    schema_event,
    schema_names,
    wire_pieces,
)
from milvus_cdc.format.schema_registry import Part, Registry, frame
from milvus_cdc.rows import Changes, Field, FieldType, Table
from milvus_cdc.sink.writer import SchemaChange

_F = descriptor_pb2.FieldDescriptorProto
_TYPES: Final = {
    FieldType.BOOL: _F.TYPE_BOOL,
    FieldType.INT8: _F.TYPE_INT32,
    FieldType.INT16: _F.TYPE_INT32,
    FieldType.INT32: _F.TYPE_INT32,
    FieldType.INT64: _F.TYPE_INT64,
    FieldType.FLOAT: _F.TYPE_FLOAT,
    FieldType.DOUBLE: _F.TYPE_DOUBLE,
    FieldType.VARCHAR: _F.TYPE_STRING,
    FieldType.JSON: _F.TYPE_STRING,
}


def _framed(schema_id: int, message: int = 0) -> bytes:
    """A record's beginning: which message of the file follows is a list of places, zigzag varints
    with their number before them; the first message alone is written as one zero.
    """
    return frame(schema_id) + (b"\x00" if message == 0 else bytes((2, 2 * message)))


class ProtobufFormat:
    content_type = "application/x-protobuf"

    def __init__(self, registry: Registry, *, arrays: bool = False) -> None:
        """`arrays`: vectors as arrays of numbers."""
        self._registry = registry
        self._arrays = arrays
        self._frames: dict[Table, wire_pieces.Frames] = {}
        self._event_frames: dict[Table, wire_pieces.Frames] = {}

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        name = schema_names.namespace(table)
        topic = topic or name
        key = await self._register(topic, f"{name}.Key", key_schema(table), "key")
        value = value_schema(table, self._arrays)
        self._frames[table] = (
            _framed(key),
            _framed(await self._register(topic, f"{name}.Value", value, "value")),
        )
        if schema_topic:
            file = descriptor_pb2.FileDescriptorProto()
            schema_event_pb2.DESCRIPTOR.CopyToProto(file)
            text = proto_text.render(file)
            key_name, name = (f"{file.package}.{m.name}" for m in file.message_type[:2])
            self._event_frames[table] = (
                _framed(await self._register(schema_topic, key_name, text, "key"), 0),
                _framed(await self._register(schema_topic, name, text, "value"), 1),
            )

    async def _register(self, topic: str, record: str, schema: str, part: Part) -> int:
        subject = self._registry.subject(topic, record, part)
        return await self._registry.schema_id(subject, "PROTOBUF", schema)

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        def parts(field: Field, column: pa.Array) -> Sequence[assemble.Part]:
            return protobuf_pieces.parts(field, column, self._arrays)

        return wire_pieces.records(table, changes, wire_pieces.prepared(self._frames, table), parts)

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        key_frame, value_frame = wire_pieces.prepared(self._event_frames, table)
        event = schema_event.event(change, table)
        key = schema_event_pb2.SchemaEventKey(**schema_event.key(table))
        value = json_format.ParseDict(event, schema_event_pb2.SchemaEvent())
        return Record(key_frame + key.SerializeToString(), value_frame + value.SerializeToString())

    async def close(self) -> None:
        await self._registry.close()


def key_schema(table: Table) -> str:
    """Text of the key's .proto file."""
    return _file(table, "Key", (table.key,), arrays=False)


def value_schema(table: Table, arrays: bool) -> str:
    """Text of the value's .proto file."""
    return _file(table, "Value", table.fields, arrays)


def _file(table: Table, name: str, fields: tuple[Field, ...], arrays: bool) -> str:
    names = _field_names(table)
    file = descriptor_pb2.FileDescriptorProto(package=schema_names.namespace(table))
    message = file.message_type.add(name=name)
    scope = f".{file.package}.{name}."
    for field in fields:
        _add(message, field, names, scope, arrays)
    comments = {names[field]: _comment(field) for field in fields}
    return proto_text.render(file, comments)


def _field_names(table: Table) -> dict[Field, str]:
    """Proto3 refuses two fields of one JSON name, by default that in camel case (`foo_bar` and
    `fooBar`), whatever it is told: the one that Milvus made later also has its number.
    """
    names = dict(zip(table.fields, schema_names.field_names(table), strict=True))
    taken: set[str] = set()
    for field in sorted(names, key=lambda field: field.field_id):
        while (camel := _camel_case(names[field])) in taken:
            names[field] += f"_{protobuf_pieces.number(field)}"
        taken.add(camel)
    return names


def _camel_case(name: str) -> str:
    """As protoc makes a JSON name."""
    return re.sub(r"_+(.?)", lambda found: found.group(1).upper(), name)


def _add(
    message: descriptor_pb2.DescriptorProto,
    field: Field,
    names: Mapping[Field, str],
    scope: str,
    arrays: bool,
) -> None:
    kind, repeated = _value(field, arrays)
    name = names[field]
    nested = name
    taken = frozenset(names.values())
    while taken & {f"{nested}_Entry", f"{nested}_List"}:
        # A nested message must not be called as another field is.
        nested += "_"
    described = _F(name=name, number=protobuf_pieces.number(field), type=kind)
    if field.name != _camel_case(name):
        described.json_name = field.name
    if kind == _F.TYPE_MESSAGE:
        entry = message.nested_type.add(name=f"{nested}_Entry")
        entry.field.add(name="index", number=1, type=_F.TYPE_UINT32)
        entry.field.add(name="value", number=2, type=_F.TYPE_FLOAT)
        described.type_name = scope + entry.name
    if repeated:
        described.label = _F.LABEL_REPEATED
    if repeated and protobuf_pieces.optional(field):
        values = message.nested_type.add(name=f"{nested}_List")
        inner = values.field.add()
        inner.CopyFrom(described)
        inner.name, inner.number, inner.json_name = "values", 1, ""
        described.type, described.label = _F.TYPE_MESSAGE, _F.LABEL_OPTIONAL
        described.type_name = scope + values.name
    elif protobuf_pieces.optional(field):
        described.proto3_optional = True
    message.field.append(described)


def _value(field: Field, arrays: bool) -> tuple[_F.Type.ValueType, bool]:
    """(type, whether repeated)."""
    if field.type is FieldType.ARRAY and field.element_type is not None:
        return _TYPES[field.element_type], True
    if not field.type.is_vector:
        return _TYPES[field.type], False
    if not arrays or field.type is FieldType.BINARY_VECTOR:
        return _F.TYPE_BYTES, False
    if field.type is FieldType.SPARSE_FLOAT_VECTOR:
        return _F.TYPE_MESSAGE, True
    return (_F.TYPE_INT32 if field.type is FieldType.INT8_VECTOR else _F.TYPE_FLOAT), True


def _comment(field: Field) -> str:
    what = field.type.value + (f", dim {field.dim}" if field.dim else "")
    return f"{what}. {field.description}" if field.description else f"{what}."
