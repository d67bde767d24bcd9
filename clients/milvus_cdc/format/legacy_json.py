"""The JSON of the Go milvus-cdc's Kafka target, decoded: `{"data": "<JSON>", "info": "<what>"}`.

That program has a row formatter (`insert data`: a list of `{"name", "type", "value"}`; `delete
data`: one of them) which it never calls: its rows are undecoded protobuf. This is the form the
formatter was written for, one record per row. Differences, all of them additions: keys, JSON fields
as JSON, one record per deleted key. Schema changes are the JSON of its Go structs; `Base`,
`ShardsNum`, `ConsistencyLevel` and `Properties` are not known here and have their empty values.
(zilliztech/milvus-cdc `core/writer/kafka_formatter.go`, `kafka_common.go`, `core/api/
data_handler.go`; milvus-sdk-go `entity.Schema`, `entity.Field`.)
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from milvus_cdc.format import Record, assemble, json_cells
from milvus_cdc.format.json_cells import PLAIN, JsonStyle
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.sink.writer import SchemaChange

_BASE64: Final = JsonStyle(base64_vectors=True)
_BYTES_IN_GO: Final = {
    FieldType.BINARY_VECTOR,
    FieldType.FLOAT16_VECTOR,
    FieldType.BFLOAT16_VECTOR,
}
"""Go's JSON has slices of bytes as base64."""
_INFO: Final = {
    "DROP_COLLECTION": "drop collection",
    "CREATE_PARTITION": "create partition",
    "DROP_PARTITION": "drop partition",
    "RENAME_COLLECTION": "rename collection",
}
"""A rename has no counterpart there."""


class LegacyJson:
    content_type = "application/json"

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        delete = changes.op is ChangeOp.DELETE
        fields = (table.key,) if delete else table.fields
        info = b"delete data" if delete else b"insert data"
        records: list[Record] = []
        for batch in assemble.chunks(changes.arrow(table)):
            parts: list[assemble.Part] = []
            for field, column in zip(fields, batch.columns, strict=True):
                style = _BASE64 if field.type in _BYTES_IN_GO else PLAIN
                head = orjson.dumps({"name": field.name, "type": field.type.value})[:-1]
                comma = b"," if parts else b""
                parts += [comma + head + b',"value":', json_cells.cells(field, column, style), b"}"]
            texts = assemble.join_rows(parts if delete else [b"[", *parts, b"]"])
            data = [orjson.dumps(text.decode()) for text in texts]
            values = assemble.join_rows([b'{"data":', data, b',"info":"' + info + b'"}'])
            keys = json_cells.cells(table.key, batch.column(table.key.name), PLAIN)
            records += map(Record, keys, values)
        return records

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        data: dict[str, Any] = {"Base": None, "Database": table.database}
        if change is None:
            info = "create collection"
            data["Schema"] = _schema(table)
            data |= {"ShardsNum": 0, "ConsistencyLevel": 0, "Properties": None}
        else:
            info = _INFO[change.kind.value]
            data["CollectionName"] = table.collection
            if change.partition:
                data["PartitionName"] = change.partition
            if any(change.renamed_from):
                data["OldDatabase"], data["OldCollectionName"] = change.renamed_from
        value = {"data": orjson.dumps(data).decode(), "info": info}
        return Record(orjson.dumps(table.full_name), orjson.dumps(value))

    async def close(self) -> None:
        pass


def _schema(table: Table) -> dict[str, Any]:
    return {
        "CollectionName": table.collection,
        "Description": table.description,
        "AutoID": table.key.auto_id,
        "Fields": [_field(field) for field in table.fields if not field.dynamic],
        "EnableDynamicField": any(field.dynamic for field in table.fields),
    }


def _field(field: Field) -> dict[str, Any]:
    params = {"dim": field.dim, "max_length": field.max_length, "max_capacity": field.max_capacity}
    element = field.element_type
    return {
        "ID": field.field_id,
        "Name": field.name,
        "PrimaryKey": field.primary_key,
        "AutoID": field.auto_id,
        "Description": field.description,
        "DataType": schema_pb2.DataType.Value(field.type.value),
        "TypeParams": {name: str(value) for name, value in params.items() if value},
        "IndexParams": {},
        "IsDynamic": field.dynamic,
        "IsPartitionKey": field.partition_key,
        "ElementType": schema_pb2.DataType.Value(element.value) if element is not None else 0,
    }
