"""Collections and changes made by hand, with columns as Milvus' log has them.

Of the types that the contract needs: Int64, VarChar, JSON and FloatVector, which may be null but
for the vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.sink.writer import Checkpoint

Key = int | str
Row = dict[str, Any]

BEGIN = ms_to_tso(1_700_000_000_000)
"""TSO of the first change but one."""
VCHANNEL = "by-dev-rootcoord-dml_0_7v0"
OTHER_VCHANNEL = "by-dev-rootcoord-dml_1_7v1"
PARTITION = "_default"
DIM = 4

KEY = Field(100, "id", FieldType.INT64, primary_key=True)
TEXT_KEY = Field(100, "id", FieldType.VARCHAR, primary_key=True, max_length=200)
FIELDS = (
    Field(101, "v", FieldType.FLOAT_VECTOR, dim=DIM),
    Field(102, "n", FieldType.INT64),
    Field(103, "s", FieldType.VARCHAR, nullable=True, max_length=65_535),
)
_numbers = itertools.count(1_000)


def table(
    collection: str,
    *,
    key: Field = KEY,
    fields: Sequence[Field] = FIELDS,
    database: str = "default",
    collection_id: int = 0,
    task_uid: str = "",
) -> Table:
    """A collection of its own task unless `task_uid` says otherwise."""
    number = collection_id or next(_numbers)
    return Table(
        task="tasks/contract",
        task_uid=task_uid or f"task-of-{number}",
        collection_id=number,
        source_database=database,
        source_collection=collection,
        database=database,
        collection=collection,
        fields=(key, *fields),
    )


def row(key: Key, n: int, s: str | None = "") -> Row:
    """Of the fields above, exact in every reader's numbers."""
    return {"id": key, "v": [float(n), 0.5, -1.25, 0.0], "n": n, "s": s}


def put(
    of: Table,
    rows: Sequence[Row],
    at: int,
    *,
    op: ChangeOp = ChangeOp.UPDATE,
    partition: str = PARTITION,
    vchannel: str = VCHANNEL,
) -> Changes:
    """Rows of one request of the source; `at` is its place in the log, and orders it."""
    columns = tuple(column(each, [row[each.name] for row in rows]) for each in of.fields)
    return Changes(
        op=op,
        ts=BEGIN + at,
        vchannel=vchannel,
        order=at,
        partition=partition,
        num_rows=len(rows),
        columns=columns,
        size=sum(map(len, columns)),
    )


def gone(
    of: Table,
    keys: Sequence[Key],
    at: int,
    *,
    partition: str = PARTITION,
    vchannel: str = VCHANNEL,
) -> Changes:
    """A delete of those keys."""
    text = of.key.type is FieldType.VARCHAR
    return Changes(
        op=ChangeOp.DELETE,
        ts=BEGIN + at,
        vchannel=vchannel,
        order=at,
        partition=partition,
        num_rows=len(keys),
        delete_keys=tuple(str(key) for key in keys) if text else np.array(keys, np.int64),
        size=8 * len(keys),
    )


def reached(at: int, vchannel: str = VCHANNEL) -> Checkpoint:
    """Everything up to the place `at` is in the sink."""
    return Checkpoint(vchannel, b"\0\xff" + at.to_bytes(8, "big"), BEGIN + at)


def column(of: Field, values: Sequence[Any]) -> bytes:
    """Serialized schema.FieldData: JSON as its text, vectors as lists; a null has a placeholder, as
    in the log.
    """
    data = schema_pb2.FieldData(
        type=schema_pb2.DataType.Value(of.type.value), field_id=of.field_id, field_name=of.name
    )
    data.is_dynamic = of.dynamic
    if of.nullable:
        data.valid_data.extend(value is not None for value in values)
    match of.type:
        case FieldType.FLOAT_VECTOR:
            data.vectors.dim = of.dim
            data.vectors.float_vector.data.extend(number for value in values for number in value)
        case FieldType.INT64:
            data.scalars.long_data.data.extend(value or 0 for value in values)
        case FieldType.VARCHAR:
            data.scalars.string_data.data.extend(value or "" for value in values)
        case FieldType.JSON:
            data.scalars.json_data.data.extend((value or "{}").encode() for value in values)
        case other:
            raise ValueError(f"samples have no {other}")
    serialized: bytes = data.SerializeToString()
    return serialized


def places() -> Iterator[int]:
    """Ever later places in the log."""
    return itertools.count(1)
