"""Changes of a collection for those who read them: what a row consists of, and columns as Arrow.

A `Table` says what the fields are, `Changes` holds rows of one request of the source as they came
from its log, and decodes them when asked. Arrow types by Milvus type:

| Milvus | Arrow |
|---|---|
| Bool, Int8 to Int64, Float, Double | bool, int8 to int64, float32, float64 |
| VarChar, JSON, the dynamic field `$meta` | string (JSON as its text) |
| Array | list of the element's type |
| FloatVector | fixed_size_list<float32>[dim] |
| Float16Vector | fixed_size_list<float16>[dim] |
| BFloat16Vector | fixed_size_binary[2 dim], little-endian words: Arrow has no bfloat16 |
| Int8Vector | fixed_size_list<int8>[dim] |
| BinaryVector | fixed_size_binary[dim / 8], as Milvus packs its bits |
| SparseFloatVector | list<struct<index: uint32, value: float32>>, ascending |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from milvus_cdc.codec.columns import field_id, key_values
from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import BugError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import Collection

if TYPE_CHECKING:
    # Imported where it is used: 40 MiB of memory that whoever writes to Milvus does without.
    import pyarrow as pa

FIRST_USER_FIELD_ID = 100
"""Fields below it are Milvus' own (RowID, Timestamp)."""
DYNAMIC_FIELD = "$meta"


class FieldType(StrEnum):
    """schema.DataType of milvus-proto, by name."""

    BOOL = "Bool"
    INT8 = "Int8"
    INT16 = "Int16"
    INT32 = "Int32"
    INT64 = "Int64"
    FLOAT = "Float"
    DOUBLE = "Double"
    VARCHAR = "VarChar"
    JSON = "JSON"
    ARRAY = "Array"
    FLOAT_VECTOR = "FloatVector"
    BINARY_VECTOR = "BinaryVector"
    FLOAT16_VECTOR = "Float16Vector"
    BFLOAT16_VECTOR = "BFloat16Vector"
    SPARSE_FLOAT_VECTOR = "SparseFloatVector"
    INT8_VECTOR = "Int8Vector"

    @property
    def is_vector(self) -> bool:
        return self.value.endswith("Vector")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a collection; numbers are 0 where they do not apply."""

    field_id: int
    name: str
    type: FieldType
    nullable: bool = False
    primary_key: bool = False
    partition_key: bool = False
    auto_id: bool = False
    """The source makes the keys itself."""
    dynamic: bool = False
    """`$meta`: the fields that rows bring beyond the schema, as one JSON object."""
    dim: int = 0
    max_length: int = 0
    max_capacity: int = 0
    element_type: FieldType | None = None
    description: str = ""

    @property
    def arrow_type(self) -> pa.DataType:
        from milvus_cdc.codec import arrow

        element = self.element_type.value if self.element_type is not None else ""
        return arrow.arrow_type(self.type.value, self.dim, element)


@dataclass(frozen=True)
class Table:
    """A followed collection: its names and fields. Fields are in the order of their ids, without
    those that Milvus adds for itself, `$meta` last where rows may bring more.
    """

    task: str
    """`tasks/{task}`; empty outside of a task."""
    task_uid: str
    collection_id: int
    """Of the source: another one under the same name is another collection."""
    source_database: str
    source_collection: str
    database: str
    """At the sink, after the task's rename rules."""
    collection: str
    fields: tuple[Field, ...]
    description: str = ""
    schema_version: int = 1
    """Up to Milvus 2.5 the schema of a collection never changes."""
    schema: bytes = b""
    """Serialized schema.CollectionSchema of the source; empty where a table was made by hand."""

    @property
    def full_name(self) -> str:
        return f"{self.database}.{self.collection}"

    @cached_property
    def key(self) -> Field:
        """The primary key's field."""
        return next(field for field in self.fields if field.primary_key)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Of whole rows."""
        import pyarrow as pa

        return pa.schema(
            [pa.field(f.name, f.arrow_type, nullable=f.nullable or f.dynamic) for f in self.fields]
        )


class ChangeOp(StrEnum):
    CREATE = "CREATE"
    """Rows that an insert of the source brought."""
    UPDATE = "UPDATE"
    """Rows that an upsert of the source brought: they replace those of the same key, if any."""
    DELETE = "DELETE"
    """Keys that a delete of the source named; a row may or may not have been there."""


@dataclass(frozen=True, eq=False)
class Changes:
    """Rows, or keys to delete, of one request of the source in one shard: they share a timestamp.

    A key may occur more than once; then the later row counts.
    """

    op: ChangeOp
    ts: int
    """TSO: Unix milliseconds * 2**18 + a counter (`milvus_cdc.model.tso_to_ms`)."""
    vchannel: str
    order: int
    """The log entry's number in its topic: a Kafka offset, a NATS stream sequence."""
    partition: str
    """Empty where a delete means all of them, and where Milvus places rows by a partition key."""
    num_rows: int
    columns: tuple[bytes, ...] = ()
    """One serialized schema.FieldData per field; none of a delete."""
    delete_keys: Keys | None = None
    size: int = 0
    """Payload bytes in the log."""
    traceparent: str = ""
    """W3C trace context of the source's request; empty where it left none."""

    def keys(self, table: Table) -> Keys:
        """Primary keys, row by row: an int64 array, or strings."""
        if self.delete_keys is not None:
            return self.delete_keys
        for column in self.columns:
            if field_id(column) == table.key.field_id:
                return key_values(column)
        raise BugError("KEY_COLUMN_MISSING", f"rows of {table.full_name} without their key")

    def arrow(self, table: Table) -> pa.RecordBatch:
        """Whole rows with `table.arrow_schema`; of a delete the key alone. Decoded once."""
        known = self.__dict__.get("_arrow")
        if known is None:
            known = self.__dict__["_arrow"] = self._decode(table)
        return known

    def _decode(self, table: Table) -> pa.RecordBatch:
        import pyarrow as pa

        from milvus_cdc.codec import arrow

        if self.delete_keys is not None:
            keys = pa.array(self.delete_keys, type=table.key.arrow_type)
            return pa.record_batch([keys], names=[table.key.name])
        by_id = {field_id(column): column for column in self.columns}
        arrays = [
            arrow.decode(by_id.get(field.field_id), field.arrow_type, self.num_rows)
            for field in table.fields
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=table.arrow_schema)

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """The same as one dict per row; convenient, and slow."""
        rows: list[dict[str, Any]] = self.arrow(table).to_pylist()
        return rows


def field_of(message: Any) -> Field:
    """Of a schema_pb2.FieldSchema. Raises BugError for a type that is not known."""
    params = {pair.key: pair.value for pair in message.type_params}
    dynamic = bool(message.is_dynamic) or message.name == DYNAMIC_FIELD
    element = None
    if message.data_type == schema_pb2.Array:
        element = _type(message.element_type)
    return Field(
        field_id=message.fieldID,
        name=message.name,
        type=_type(message.data_type),
        nullable=message.nullable,
        primary_key=message.is_primary_key,
        partition_key=message.is_partition_key,
        auto_id=message.autoID,
        dynamic=dynamic,
        dim=int(params.get("dim", 0)),
        max_length=int(params.get("max_length", 0)),
        max_capacity=int(params.get("max_capacity", 0)),
        element_type=element,
        description=message.description,
    )


def _type(number: int) -> FieldType:
    name = schema_pb2.DataType.Name(number)
    try:
        return FieldType(name)
    except ValueError:
        raise BugError("UNSUPPORTED_TYPE", f"fields of type {name} are not known here") from None


def fields_of(schema: bytes) -> tuple[Field, ...]:
    """Of a serialized schema_pb2.CollectionSchema as `milvus_cdc.model.Collection` holds it."""
    parsed = schema_pb2.CollectionSchema.FromString(schema)
    fields = [field_of(f) for f in parsed.fields if f.fieldID >= FIRST_USER_FIELD_ID]
    return tuple(sorted(fields, key=lambda f: (f.dynamic, f.field_id)))


def table_of(
    collection: Collection,
    *,
    task: str = "",
    task_uid: str = "",
    source_name: tuple[str, str] | None = None,
) -> Table:
    """`collection` with its names at the sink; `source_name` when they differ at the source."""
    database, name = source_name or (collection.database, collection.name)
    return Table(
        task=task,
        task_uid=task_uid,
        collection_id=collection.collection_id,
        source_database=database,
        source_collection=name,
        database=collection.database,
        collection=collection.name,
        fields=fields_of(collection.schema),
        description=schema_pb2.CollectionSchema.FromString(collection.schema).description,
        schema=collection.schema,
    )
