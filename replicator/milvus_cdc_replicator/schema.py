"""The little a replicator must know of a collection's schema."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.sink.milvus import schema as schemas


@dataclass(frozen=True, slots=True)
class KeyField:
    field_id: int
    name: str
    partition_key: bool
    """Some field is a partition key: Milvus places rows itself, writes name no partition."""


def key_field(schema: bytes) -> KeyField:
    """Raises BugError when the schema has no primary key."""
    parsed = schema_pb2.CollectionSchema.FromString(schema)
    key = schemas.key_field(parsed)
    return KeyField(key.fieldID, key.name, schemas.has_partition_key(parsed))
