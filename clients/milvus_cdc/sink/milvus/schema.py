"""A source collection's schema as the sink's create request, and whether one fits the other. Pure.

Facts: the log and the metadata carry system fields (ids below 100) and the dynamic field `$meta` as
ordinary fields; a create request must hold neither, the server adds its own (milvus
`internal/proxy/task.go`, `createCollectionTask`). Rows are matched to the sink's fields by name and
get the sink's field ids (`fillFieldIDBySchema`), so ids and order may differ. An autoID key becomes
an ordinary one, else the sink would make keys of its own.
"""

from __future__ import annotations

from typing import Any

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2, schema_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink.differences import wanted_properties

FIRST_USER_FIELD_ID = 100
AUTO_ID_KEYS = (
    "AUTO_ID_KEYS",
    "the source makes the keys of this collection itself (autoID); at the sink it has the same key "
    "field with autoID off, so that every row keeps its key. After a failover to the sink, writers "
    "must bring keys of their own",
)

_COMPARED_PARAMS = ("dim", "max_length", "max_capacity")
_DYNAMIC = "$meta"


def parse(want: Collection) -> Any:
    """The source's schema_pb2.CollectionSchema, all fields."""
    return schema_pb2.CollectionSchema.FromString(want.schema)


def user_fields(schema: Any) -> list[Any]:
    """Fields a user declared, by id: no system fields, no `$meta`."""
    seen = [field for field in schema.fields if not _is_system(field) and not field.is_dynamic]
    return sorted(seen, key=lambda field: int(field.fieldID))


def is_dynamic(schema: Any) -> bool:
    return bool(schema.enable_dynamic_field) or any(field.is_dynamic for field in schema.fields)


def key_field(schema: Any) -> Any:
    """Raises BugError when there is none."""
    for field in schema.fields:
        if field.is_primary_key:
            return field
    raise BugError("SCHEMA_WITHOUT_KEY", f"the schema of {schema.name!r} has no primary key field")


def has_partition_key(schema: Any) -> bool:
    return any(field.is_partition_key for field in schema.fields)


def conditions(want: Collection) -> tuple[tuple[str, str], ...]:
    """(TYPE, message) pairs that follow from the schema alone."""
    schema = parse(want)
    return (AUTO_ID_KEYS,) if schema.autoID or key_field(schema).autoID else ()


def created_schema(want: Collection) -> Any:
    """The schema_pb2.CollectionSchema asked for at the sink."""
    source = parse(want)
    schema = schema_pb2.CollectionSchema()
    schema.CopyFrom(source)
    schema.name = want.name
    schema.autoID = False
    schema.enable_dynamic_field = is_dynamic(source)
    schema.ClearField("dbName")
    del schema.fields[:]
    for each in user_fields(source):
        field = schema.fields.add()
        field.CopyFrom(each)
        field.autoID = False
        field.ClearField("state")
        # Indexes are made by reconcile, not by what a client once sent beside the field.
        del field.index_params[:]
    return schema


def create_request(want: Collection) -> Any:
    """The milvus_pb2.CreateCollectionRequest that makes an equal collection at the sink."""
    return milvus_pb2.CreateCollectionRequest(
        db_name=want.database,
        collection_name=want.name,
        schema=created_schema(want).SerializeToString(),
        shards_num=want.shards,
        consistency_level=want.consistency_level,
        properties=[
            common_pb2.KeyValuePair(key=key, value=value)
            for key, value in wanted_properties(want).items()
        ],
        num_partitions=len(want.partitions) if has_partition_key(parse(want)) else 0,
    )


def check_fits(want: Collection, there: Any) -> None:
    """Raises UserError SCHEMA_MISMATCH when the sink's collection cannot take the source's rows.

    `there` is the sink's schema as DescribeCollection tells it.
    """
    source = parse(want)
    sink_fields = {field.name: field for field in user_fields(there)}
    for field in user_fields(source):
        other = sink_fields.pop(field.name, None)
        if other is None:
            raise _mismatch(want, field.name, "it is missing at the sink")
        for what, ours, theirs in _facts(field, other):
            if ours != theirs:
                raise _mismatch(
                    want, field.name, f"{what} should be {ours!s} and is {theirs!s} at the sink"
                )
    for name in sink_fields:
        raise _mismatch(want, name, "the sink has this field and the source does not")
    if is_dynamic(source) != is_dynamic(there):
        raise _mismatch(
            want,
            _DYNAMIC,
            f"dynamic fields are {_on(is_dynamic(source))} at the source and "
            f"{_on(is_dynamic(there))} at the sink",
        )


def _facts(field: Any, other: Any) -> list[tuple[str, object, object]]:
    ours = {pair.key: pair.value for pair in field.type_params}
    theirs = {pair.key: pair.value for pair in other.type_params}
    if field.data_type == schema_pb2.Array and "max_length" not in theirs:
        # milvus-lite 3.2 keeps no limit for the texts of an array: it takes any.
        ours.pop("max_length", None)
    return [
        ("type", _type_name(field.data_type), _type_name(other.data_type)),
        ("element type", _type_name(field.element_type), _type_name(other.element_type)),
        ("primary key", _on(field.is_primary_key), _on(other.is_primary_key)),
        ("partition key", _on(field.is_partition_key), _on(other.is_partition_key)),
        ("nullable", _on(field.nullable), _on(other.nullable)),
        ("autoID", _on(False), _on(other.autoID)),
        *((name, ours.get(name, "unset"), theirs.get(name, "unset")) for name in _COMPARED_PARAMS),
    ]


def _type_name(number: int) -> str:
    known = schema_pb2.DataType.values()
    return str(schema_pb2.DataType.Name(number)) if number in known else f"type {number}"


def _is_system(field: Any) -> bool:
    return field.name in ("RowID", "Timestamp") and field.fieldID < FIRST_USER_FIELD_ID


def _mismatch(want: Collection, field: str, why: str) -> UserError:
    return UserError(
        "SCHEMA_MISMATCH",
        f"collection {want.full_name}, field {field!r}: {why}; drop the sink's collection or "
        "exclude it from the task",
        field=field,
    )


def _on(value: bool) -> str:
    return "on" if value else "off"
