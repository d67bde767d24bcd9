"""What the file writer's tests write, and how they read it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import FileWriter
from milvus_cdc.sink.files.reading import History, find_collections, open_store
from milvus_cdc.sink.files.store import Store
from milvus_cdc.sink.writer import (
    Batch,
    Checkpoint,
    Opening,
    SchemaChange,
    SchemaChangeKind,
)
from milvuscdc.v1 import sink_file_pb2

from tests.unit.format.tables import column

V1, V2 = "by-dev-rootcoord-dml_0_7v0", "by-dev-rootcoord-dml_1_7v1"
BEGIN = ms_to_tso(1_763_714_000_000)
DIM = 4
KEY = Field(100, "id", FieldType.INT64, primary_key=True)
TEXT_KEY = Field(100, "id", FieldType.VARCHAR, primary_key=True, max_length=200)
VECTOR = Field(101, "v", FieldType.FLOAT_VECTOR, dim=DIM)
NUMBER = Field(102, "n", FieldType.INT64)
PLAIN = (KEY, VECTOR, NUMBER)
Row = dict[str, Any]


def table_of(
    *fields: Field,
    collection: str = "articles",
    database: str = "default",
    collection_id: int = 7,
    task_uid: str = "uid-1",
) -> Table:
    return Table(
        task="tasks/t",
        task_uid=task_uid,
        collection_id=collection_id,
        source_database=database,
        source_collection=collection,
        database=database,
        collection=collection,
        fields=fields or PLAIN,
    )


def put(
    table: Table,
    rows: Sequence[Row],
    at: int = 1,
    *,
    op: ChangeOp = ChangeOp.CREATE,
    partition: str = "_default",
    vchannel: str = V1,
) -> Changes:
    """Rows of one request of the source; `at` orders them."""
    return Changes(
        op=op,
        ts=BEGIN + at,
        vchannel=vchannel,
        order=at,
        partition=partition,
        num_rows=len(rows),
        columns=tuple(column(each, [row.get(each.name) for row in rows]) for each in table.fields),
    )


def gone(keys: Sequence[Any], at: int = 1, *, partition: str = "", vchannel: str = V1) -> Changes:
    text = bool(keys) and isinstance(keys[0], str)
    return Changes(
        op=ChangeOp.DELETE,
        ts=BEGIN + at,
        vchannel=vchannel,
        order=at,
        partition=partition,
        num_rows=len(keys),
        delete_keys=tuple(keys) if text else np.array(keys, np.int64),
    )


def plain(keys: Sequence[Any], n: int = 0) -> list[Row]:
    """Rows of the fields PLAIN."""
    return [{"id": key, "v": [float(at), 1.0, 2.0, 3.0], "n": n} for at, key in enumerate(keys)]


def upto(at: int, vchannel: str = V1) -> Checkpoint:
    return Checkpoint(vchannel, str(at).encode(), BEGIN + at)


def batch(*changes: Changes, upto_at: int | None = None) -> Batch:
    """With the checkpoint of its last change."""
    at = upto_at if upto_at is not None else max(each.ts for each in changes) - BEGIN
    return Batch(changes, (upto(at),))


def spec_for(folder: Path, **options: Any) -> sink_file_pb2.FileSink:
    return sink_file_pb2.FileSink(uri=folder.as_uri(), **options)


def writer_for(folder: Path, **options: Any) -> FileWriter:
    return FileWriter(spec_for(folder, **options), SecretResolver(env_prefix="TEST_"))


async def opened(
    folder: Path, table: Table, opening: Opening = Opening.NEW, epoch: int = 1, **options: Any
) -> FileWriter:
    writer = writer_for(folder, **options)
    await writer.open(table, opening, epoch)
    return writer


def change(
    kind: SchemaChangeKind, table: Table, partition: str = "", at: int = 0, **more: Any
) -> SchemaChange:
    return SchemaChange(kind, table, partition, ts=BEGIN + at if at else 0, **more)


def store_of(folder: Path) -> Store:
    return open_store(folder.as_uri())


def history_of(folder: Path, at: int | None = None) -> History:
    [found] = find_collections(store_of(folder))
    return found.history() if at is None else found.history(BEGIN + at)


def numbers(history: History) -> dict[Any, int]:
    """`n` by key; a key twice is an error."""
    rows = history.state().to_pylist()
    found = {row["id"]: row["n"] for row in rows}
    assert len(found) == len(rows)
    return found


def events(history: History) -> list[tuple[str, Any, int]]:
    """(operation, key, time) of every published change."""
    return [
        (row["_op"], row["id"], row["_ts"] - BEGIN)
        for each in history.changes()
        for row in each.select(["_op", "id", "_ts"]).to_pylist()
    ]


def renamed(table: Table, database: str, collection: str) -> Table:
    return replace(table, database=database, collection=collection)
