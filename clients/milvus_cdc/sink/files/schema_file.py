"""The schema of a collection beside its files, so that they can be read and restored without the
source. Content-addressed: one file per schema, written before the first manifest that names it.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from typing import Any

import orjson

from milvus_cdc.errors import UserError
from milvus_cdc.milvus_protos import common_pb2, schema_pb2
from milvus_cdc.rows import Field, FieldType, Table, fields_of

FORMAT = 1


def dump(table: Table) -> tuple[str, bytes]:
    """Hash and content."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "description": table.description,
        "schema_version": table.schema_version,
        "fields": [
            {name: value for name, value in asdict(field).items() if value not in (None, 0, "")}
            for field in table.fields
        ],
        "collection_schema": base64.b64encode(collection_schema(table)).decode(),
    }
    data = orjson.dumps(body, option=orjson.OPT_INDENT_2)
    return hashlib.sha256(data).hexdigest()[:32], data


def load(data: bytes, where: str) -> tuple[tuple[Field, ...], bytes]:
    """The fields and the serialized schema.CollectionSchema. Raises UserError SCHEMA_UNREADABLE."""
    try:
        body = orjson.loads(data)
        if body["format"] > FORMAT:
            raise ValueError(f"format {body['format']}, known is {FORMAT}")
        schema = base64.b64decode(body["collection_schema"])
        return fields_of(schema), schema
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "SCHEMA_UNREADABLE", f"{where}: {error}; restore the file from a copy"
        ) from error


def collection_schema(table: Table) -> bytes:
    """As the source had it; of a table that was made by hand, as its fields say."""
    if table.schema:
        return table.schema
    schema = schema_pb2.CollectionSchema(
        name=table.source_collection,
        description=table.description,
        enable_dynamic_field=any(field.dynamic for field in table.fields),
        fields=[_field(field) for field in table.fields],
    )
    return bytes(schema.SerializeToString(deterministic=True))


def _field(field: Field) -> Any:
    numbers = {
        "dim": field.dim,
        "max_length": field.max_length,
        "max_capacity": field.max_capacity,
    }
    return schema_pb2.FieldSchema(
        fieldID=field.field_id,
        name=field.name,
        description=field.description,
        data_type=_number(field.type),
        element_type=_number(field.element_type) if field.element_type else 0,
        is_primary_key=field.primary_key,
        is_partition_key=field.partition_key,
        is_dynamic=field.dynamic,
        autoID=field.auto_id,
        nullable=field.nullable,
        type_params=[
            common_pb2.KeyValuePair(key=key, value=str(value))
            for key, value in numbers.items()
            if value
        ],
    )


def _number(kind: FieldType) -> int:
    return int(schema_pb2.DataType.Value(kind.value))
