"""The little a replicator must know of a collection's schema."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2


@dataclass(frozen=True, slots=True)
class KeyField:
    field_id: int
    name: str
    partition_key: bool
    """Some field is a partition key: Milvus places rows itself, writes name no partition."""


def key_field(schema: bytes) -> KeyField:
    """Raises BugError when the schema has no primary key."""
    parsed = schema_pb2.CollectionSchema.FromString(schema)
    partition_key = any(f.is_partition_key for f in parsed.fields)
    for f in parsed.fields:
        if f.is_primary_key:
            return KeyField(f.fieldID, f.name, partition_key)
    raise BugError("SCHEMA_WITHOUT_KEY", f"the schema of {parsed.name!r} has no primary key field")
