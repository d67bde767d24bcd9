"""A source collection's schema as the sink's create request, and whether one fits the other. Pure.

Facts: a create request carries neither system fields (ids below 100) nor the dynamic column `$meta`
(the server adds them: milvus `internal/proxy/task.go`, `createCollectionTask`); DescribeCollection
leaves them out too. An autoID collection is created with `autoID=false`, else the sink would make
keys of its own.
"""

from __future__ import annotations

from typing import Any

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2, schema_pb2
from milvus_cdc.model import Collection, ObjectState

FIRST_USER_FIELD_ID = 100
DEFAULT_PARTITION = "_default"
AUTO_ID_KEYS = (
    "AUTO_ID_KEYS",
    "the source makes the keys of this collection itself (autoID); at the sink it was created "
    "with the same key field and autoID=false, so that every row keeps its key. After a failover "
    "to the sink, writers must bring keys of their own",
)

_COMPARED_PARAMS = ("dim", "max_length", "max_capacity")
# The source's own replication marks; taken over they would make the sink refuse ordinary writes.
_OMITTED_PROPERTIES = frozenset({"replicate.id", "replicate.endTS"})


def parse(schema: bytes) -> Any:
    """A schema_pb2.CollectionSchema with the fields that a user sees, by field id."""
    parsed = schema_pb2.CollectionSchema.FromString(schema)
    return user_visible(parsed)


def user_visible(schema: Any) -> Any:
    """The same without system fields and `$meta`; `enable_dynamic_field` says what the latter did.

    A schema from DescribeCollection of Milvus 2.3 has `enable_dynamic_field` already.
    """
    seen = schema_pb2.CollectionSchema()
    seen.CopyFrom(schema)
    del seen.fields[:]
    for field in sorted(schema.fields, key=lambda f: f.fieldID):
        if field.is_dynamic:
            seen.enable_dynamic_field = True
        elif field.fieldID >= FIRST_USER_FIELD_ID or not field.fieldID:
            seen.fields.append(field)
    return seen


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
    schema = parse(want.schema)
    return (AUTO_ID_KEYS,) if schema.autoID or key_field(schema).autoID else ()


def create_request(want: Collection) -> Any:
    """The milvus_pb2.CreateCollectionRequest that makes an equal collection at the sink."""
    schema = parse(want.schema)
    partition_key = has_partition_key(schema)
    schema.name = want.name
    schema.autoID = False
    schema.ClearField("dbName")
    for field in schema.fields:
        field.autoID = False
        field.ClearField("state")
        # Indexes are made by reconcile, not by what a client once sent beside the field.
        del field.index_params[:]
    return milvus_pb2.CreateCollectionRequest(
        db_name=want.database,
        collection_name=want.name,
        schema=schema.SerializeToString(),
        shards_num=want.shards,
        consistency_level=want.consistency_level,
        properties=[
            common_pb2.KeyValuePair(key=key, value=value)
            for key, value in want.properties
            if key not in _OMITTED_PROPERTIES
        ],
        num_partitions=len(want.partitions) if partition_key else 0,
    )


def wanted_partitions(want: Collection) -> tuple[str, ...]:
    """Names to be there besides `_default`; none for a partition-key collection, whose partitions
    the sink makes itself.
    """
    if has_partition_key(schema_pb2.CollectionSchema.FromString(want.schema)):
        return ()
    return tuple(
        partition.name
        for partition in want.partitions
        if partition.state is ObjectState.CREATED and partition.name != DEFAULT_PARTITION
    )


def check_fits(want: Collection, there: Any, there_partitions: int) -> None:
    """Raises UserError SCHEMA_MISMATCH when the sink's collection cannot take the source's rows.

    `there` is the sink's schema as DescribeCollection tells it. Field ids count too: the log's
    columns carry them and Milvus stores rows by them.
    """
    source, sink = parse(want.schema), user_visible(there)
    sink_fields = {field.name: field for field in sink.fields}
    for field in source.fields:
        other = sink_fields.pop(field.name, None)
        if other is None:
            _mismatch(want, field.name, "presence", "there", "missing")
        for what, ours, theirs in _differences(field, other):
            _mismatch(want, field.name, what, ours, theirs)
    for name in sink_fields:
        _mismatch(want, name, "presence", "missing", "there")
    if source.enable_dynamic_field != sink.enable_dynamic_field:
        _mismatch(
            want, "$meta", "dynamic field", source.enable_dynamic_field, sink.enable_dynamic_field
        )
    if has_partition_key(source) and there_partitions and want.partitions:
        ours_count = len(want.partitions)
        if ours_count != there_partitions:
            name = next(field.name for field in source.fields if field.is_partition_key)
            _mismatch(want, name, "number of partitions", ours_count, there_partitions)


def _differences(field: Any, other: Any) -> list[tuple[str, object, object]]:
    ours, theirs = _params(field), _params(other)
    pairs: list[tuple[str, object, object]] = [
        ("type", _type_name(field.data_type), _type_name(other.data_type)),
        ("element type", _type_name(field.element_type), _type_name(other.element_type)),
        ("primary key", field.is_primary_key, other.is_primary_key),
        ("autoID", False, other.autoID),
        ("partition key", field.is_partition_key, other.is_partition_key),
        ("nullable", field.nullable, other.nullable),
    ]
    pairs += [(name, ours.get(name), theirs.get(name)) for name in _COMPARED_PARAMS]
    if other.fieldID:
        pairs.append(("field id", field.fieldID, other.fieldID))
    return [(what, a, b) for what, a, b in pairs if a != b]


def _params(field: Any) -> dict[str, str]:
    return {pair.key: pair.value for pair in field.type_params}


def _type_name(number: int) -> str:
    if not number:
        return "none"
    known = schema_pb2.DataType.values()
    return str(schema_pb2.DataType.Name(number)) if number in known else f"type {number}"


def _mismatch(want: Collection, field: str, what: str, ours: object, theirs: object) -> None:
    raise UserError(
        "SCHEMA_MISMATCH",
        f"collection {want.full_name}, field {field}: {what} is {ours} at the source and {theirs} "
        "at the sink; drop or rename the sink's collection, then retry",
    )
