"""From a source collection's schema to the one asked for at the sink, and whether what is there
fits. Pure.

The log and the metadata carry system fields (ids below 100) and the dynamic field `$meta` as
ordinary fields; a create request must hold neither: the sink makes its own. An autoID key becomes
an ordinary one, so that keys survive.
"""

from __future__ import annotations

from typing import Any

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import Collection

FIRST_USER_FIELD_ID = 100
_COMPARED_PARAMS = ("dim", "max_length", "max_capacity")


def sink_schema(want: Collection) -> Any:
    """The CollectionSchema for CreateCollection at the sink."""
    source = parse(want)
    schema = schema_pb2.CollectionSchema(
        name=want.name,
        description=source.description,
        enable_dynamic_field=source.enable_dynamic_field
        or any(f.is_dynamic for f in source.fields),
    )
    for source_field in user_fields(source):
        field = schema.fields.add()
        field.CopyFrom(source_field)
        field.autoID = False
        field.fieldID = 0
        field.state = 0
    for function in source.functions:
        schema.functions.add().CopyFrom(function)
    return schema


def parse(want: Collection) -> Any:
    return schema_pb2.CollectionSchema.FromString(want.schema)


def user_fields(schema: Any) -> list[Any]:
    """Fields a user declared: no system fields, no `$meta`."""
    return [f for f in schema.fields if not _is_system(f) and not f.is_dynamic]


def _is_system(field: Any) -> bool:
    return field.name in ("RowID", "Timestamp") and field.fieldID < FIRST_USER_FIELD_ID


def key_field(schema: Any) -> Any:
    """Raises BugError when there is none."""
    for field in schema.fields:
        if field.is_primary_key:
            return field
    raise BugError("SCHEMA_WITHOUT_KEY", f"the schema of {schema.name!r} has no primary key field")


def has_partition_key(schema: Any) -> bool:
    return any(f.is_partition_key for f in schema.fields)


def is_auto_id(schema: Any) -> bool:
    return bool(schema.autoID) or bool(key_field(schema).autoID)


def check_fits(want: Collection, there: Any) -> None:
    """Raises UserError SCHEMA_MISMATCH naming the field when rows of `want` would not fit."""
    wanted = sink_schema(want)
    name = want.full_name
    found = {f.name: f for f in user_fields(there)}
    for field in wanted.fields:
        other = found.pop(field.name, None)
        if other is None:
            raise _mismatch(name, field.name, "it is missing at the sink")
        _check_field(name, field, other)
    if found:
        raise _mismatch(name, next(iter(found)), "the source has no such field")
    dynamic = there.enable_dynamic_field or any(f.is_dynamic for f in there.fields)
    if bool(wanted.enable_dynamic_field) != bool(dynamic):
        raise _mismatch(
            name,
            "$meta",
            f"dynamic fields are {_on(wanted.enable_dynamic_field)} at the source and "
            f"{_on(dynamic)} at the sink",
        )


def _check_field(name: str, field: Any, other: Any) -> None:
    types = schema_pb2.DataType
    facts: list[tuple[str, Any, Any]] = [
        ("type", types.Name(field.data_type), types.Name(other.data_type)),
        ("element type", types.Name(field.element_type), types.Name(other.element_type)),
        ("primary key", field.is_primary_key, other.is_primary_key),
        ("partition key", field.is_partition_key, other.is_partition_key),
        ("nullable", field.nullable, other.nullable),
        ("autoID", False, other.autoID),
    ]
    ours = {p.key: p.value for p in field.type_params}
    theirs = {p.key: p.value for p in other.type_params}
    facts.extend((p, ours.get(p, ""), theirs.get(p, "")) for p in _COMPARED_PARAMS)
    for what, wanted, found in facts:
        if wanted != found:
            raise _mismatch(
                name, field.name, f"{what} should be {wanted} and is {found} at the sink"
            )


def _mismatch(collection: str, field: str, why: str) -> UserError:
    return UserError(
        "SCHEMA_MISMATCH",
        f"collection {collection}, field {field!r}: {why}; drop the sink's collection or exclude it "
        "from the task",
        field=field,
    )


def _on(value: bool) -> str:
    return "on" if value else "off"
