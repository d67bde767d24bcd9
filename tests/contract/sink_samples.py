"""Source collections and log columns as sinks get them, built from Python rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milvus_cdc.model import Collection, Index, Load, LoadKind, ObjectState, Partition
from milvus_cdc.sink import Op, RowBatch, RowChunk
from pymilvus.grpc_gen import schema_pb2
from pymilvus.grpc_gen.common_pb2 import KeyValuePair
from pymilvus.grpc_gen.schema_pb2 import DataType

DIM = 8

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    name: str
    type: int
    primary: bool = False
    partition_key: bool = False
    auto_id: bool = False
    nullable: bool = False
    dynamic: bool = False
    element: int = 0
    params: Mapping[str, str] = field(default_factory=dict)

    def schema(self, field_id: int) -> Any:
        return schema_pb2.FieldSchema(
            fieldID=field_id,
            name=self.name,
            data_type=self.type,
            is_primary_key=self.primary,
            is_partition_key=self.partition_key,
            autoID=self.auto_id,
            nullable=self.nullable,
            is_dynamic=self.dynamic,
            element_type=self.element,
            type_params=[KeyValuePair(key=k, value=v) for k, v in self.params.items()],
        )

    def column(self, field_id: int, rows: Sequence[Row]) -> bytes:
        """The column as the log has it."""
        data = schema_pb2.FieldData(
            type=self.type, field_name=self.name, field_id=field_id, is_dynamic=self.dynamic
        )
        values = [row[self.name] for row in rows]
        match self.type:
            case DataType.FloatVector:
                data.vectors.dim = DIM
                data.vectors.float_vector.data.extend(x for value in values for x in value)
            case DataType.BinaryVector:
                data.vectors.dim = DIM
                data.vectors.binary_vector = b"".join(values)
            case DataType.Array:
                data.scalars.array_data.element_type = self.element
                part = "string_data" if self.element == DataType.VarChar else "int_data"
                for value in values:
                    getattr(data.scalars.array_data.data.add(), part).data.extend(value)
            case _:
                getattr(data.scalars, _SCALARS[self.type]).data.extend(values)
        return bytes(data.SerializeToString())


_SCALARS = {
    DataType.Bool: "bool_data",
    DataType.Int8: "int_data",
    DataType.Int16: "int_data",
    DataType.Int32: "int_data",
    DataType.Int64: "long_data",
    DataType.Float: "float_data",
    DataType.Double: "double_data",
    DataType.VarChar: "string_data",
    DataType.JSON: "json_data",
}

KEY = Field("id", DataType.Int64, primary=True)
TEXT_KEY = Field("id", DataType.VarChar, primary=True, params={"max_length": "200"})
VECTOR = Field("v", DataType.FloatVector, params={"dim": str(DIM)})
BITS = Field("v", DataType.BinaryVector, params={"dim": str(DIM)})
META = Field("$meta", DataType.JSON, dynamic=True)
NUMBER = Field("n", DataType.Int64)
SCALARS = (
    Field("yes", DataType.Bool),
    Field("i8", DataType.Int8),
    Field("i16", DataType.Int16),
    Field("i32", DataType.Int32),
    Field("i64", DataType.Int64),
    Field("f", DataType.Float),
    Field("d", DataType.Double),
    Field("s", DataType.VarChar, params={"max_length": "300"}),
    Field("j", DataType.JSON),
    Field("ai", DataType.Array, element=DataType.Int32, params={"max_capacity": "10"}),
    Field(
        "as",
        DataType.Array,
        element=DataType.VarChar,
        params={"max_capacity": "10", "max_length": "50"},
    ),
)
PLAIN = (KEY, VECTOR, NUMBER)

LOADED = Load(LoadKind.COLLECTION, (), 1)


def flat_index(
    field_name: str = "v", metric: str = "L2", index_type: str = "FLAT", name: str = ""
) -> Index:
    params = (("index_type", index_type), ("metric_type", metric))
    return Index(1, name or f"of_{field_name}", 101, field_name, params, 1)


@dataclass(frozen=True)
class Sample:
    """A source collection and its log's columns."""

    database: str
    name: str
    fields: tuple[Field, ...]
    partitions: tuple[str, ...] = ("_default",)
    shards: int = 2

    def want(
        self,
        *,
        indexes: tuple[Index, ...] = (),
        load: Load | None = None,
        dropped: tuple[str, ...] = (),
        properties: tuple[tuple[str, str], ...] = (),
        description: str = "",
    ) -> Collection:
        system = [
            schema_pb2.FieldSchema(fieldID=0, name="RowID", data_type=DataType.Int64),
            schema_pb2.FieldSchema(fieldID=1, name="Timestamp", data_type=DataType.Int64),
        ]
        fields = [each.schema(100 + at) for at, each in enumerate(self.fields)]
        schema = schema_pb2.CollectionSchema(
            name=self.name, description=description, fields=[*system, *fields]
        )
        return Collection(
            collection_id=7,
            database_id=1,
            database=self.database,
            name=self.name,
            schema=schema.SerializeToString(),
            shards=self.shards,
            consistency_level=1,
            create_ts=1,
            properties=properties,
            partitions=tuple(
                Partition(
                    partition_id=50 + at,
                    name=name,
                    create_ts=1,
                    state=ObjectState.DROPPED if name in dropped else ObjectState.CREATED,
                )
                for at, name in enumerate(self.partitions)
            ),
            indexes=indexes,
            load=load or Load(),
        )

    def chunk(self, rows: Sequence[Row], keep: Sequence[int] | None = None) -> RowChunk:
        columns = tuple(each.column(100 + at, rows) for at, each in enumerate(self.fields))
        return RowChunk(columns, len(rows), None if keep is None else tuple(keep))

    def batch(
        self, rows: Sequence[Row], *, op: Op = Op.INSERT, partition: str = "_default"
    ) -> RowBatch:
        return RowBatch(op, partition, (self.chunk(rows),))


def plain_rows(keys: Sequence[Any], n: int = 0) -> list[Row]:
    """Rows of the fields PLAIN, `n` told apart."""
    return [{"id": key, "v": [float(at)] * DIM, "n": n} for at, key in enumerate(keys)]
