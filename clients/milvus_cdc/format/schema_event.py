"""A change of schema as an event, whatever the form it is then written in.

The same fields in JSON, Avro and Protobuf (`milvuscdc.v1.SchemaEvent`). The key is the collection's
full name at the sink, so the events of one collection stay in order.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from milvus_cdc.format import Record
from milvus_cdc.rows import Field, Table
from milvus_cdc.sink.writer import SchemaChange

CREATE_COLLECTION: Final = "CREATE_COLLECTION"
KEY_TYPES: Final[dict[str, type]] = {"database": str, "collection": str}
"""Of the key where it is a record."""
FIELD_TYPES: Final[dict[str, type]] = {
    "field_id": int,
    "name": str,
    "type": str,
    "element_type": str,
    "dim": int,
    "max_length": int,
    "max_capacity": int,
    "nullable": bool,
    "primary_key": bool,
    "partition_key": bool,
    "auto_id": bool,
    "dynamic": bool,
    "description": str,
}
"""Of an item of `fields`."""
EVENT_TYPES: Final[dict[str, type]] = {
    "change": str,
    "database": str,
    "collection": str,
    "source_database": str,
    "source_collection": str,
    "source_collection_id": int,
    "partition": str,
    "renamed_from_database": str,
    "renamed_from_collection": str,
    "schema_version": int,
    "description": str,
}
"""Of the event, apart from `fields`."""


def event(change: SchemaChange | None, table: Table) -> dict[str, Any]:
    """None: the collection's creation."""
    renamed_from = change.renamed_from if change is not None else ("", "")
    return {
        "change": CREATE_COLLECTION if change is None else change.kind.value,
        "database": table.database,
        "collection": table.collection,
        "source_database": table.source_database,
        "source_collection": table.source_collection,
        "source_collection_id": table.collection_id,
        "partition": change.partition if change is not None else "",
        "renamed_from_database": renamed_from[0],
        "renamed_from_collection": renamed_from[1],
        "schema_version": table.schema_version,
        "description": table.description,
        "fields": [_field(field) for field in table.fields],
    }


def _field(field: Field) -> dict[str, Any]:
    return {
        "field_id": field.field_id,
        "name": field.name,
        "type": field.type.value,
        "element_type": field.element_type.value if field.element_type is not None else "",
        "dim": field.dim,
        "max_length": field.max_length,
        "max_capacity": field.max_capacity,
        "nullable": field.nullable,
        "primary_key": field.primary_key,
        "partition_key": field.partition_key,
        "auto_id": field.auto_id,
        "dynamic": field.dynamic,
        "description": field.description,
    }


def key(table: Table) -> dict[str, str]:
    """Where the key is a record."""
    return {"database": table.database, "collection": table.collection}


def json_record(change: SchemaChange | None, table: Table) -> Record:
    """The event as flat JSON."""
    return Record(orjson.dumps(table.full_name), orjson.dumps(event(change, table)))
