"""What the PostgreSQL writer's tests write, and how they read it back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.writer import Batch, Checkpoint, Opening
from milvuscdc.v1 import sink_postgres_pb2

from tests.servers import PostgresServer
from tests.servers.postgres import PASSWORD, USER
from tests.unit.format.tables import column

V1, V2 = "by-dev-rootcoord-dml_0_7v0", "by-dev-rootcoord-dml_1_7v1"
BEGIN = ms_to_tso(1_700_000_000_000)
DIM = 4

KEY = Field(100, "id", FieldType.INT64, primary_key=True)
TEXT_KEY = Field(100, "id", FieldType.VARCHAR, primary_key=True, max_length=200)
VECTOR = Field(101, "v", FieldType.FLOAT_VECTOR, dim=DIM)
NUMBER = Field(102, "n", FieldType.INT64)
TEXT = Field(103, "s", FieldType.VARCHAR, max_length=1000)
PLAIN = (KEY, VECTOR, NUMBER)

Row = dict[str, Any]


def table_of(
    *fields: Field,
    collection: str = "articles",
    database: str = "default",
    collection_id: int = 7,
    task_uid: str = "",
) -> Table:
    return Table(
        task="tasks/t",
        task_uid=task_uid or f"uid-of-{collection}",
        collection_id=collection_id,
        source_database=database,
        source_collection=collection,
        database=database,
        collection=collection,
        fields=fields or PLAIN,
    )


def renamed(table: Table, database: str, collection: str) -> Table:
    return replace(table, database=database, collection=collection)


def put(
    table: Table,
    rows: Sequence[Row],
    *,
    op: ChangeOp = ChangeOp.CREATE,
    at: int = 1,
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
        columns=tuple(column(each, [row[each.name] for row in rows]) for each in table.fields),
    )


def gone(
    keys: Sequence[Any], *, at: int = 1, partition: str = "_default", vchannel: str = V1
) -> Changes:
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


def upto(ts: int, place: bytes = b"", vchannel: str = V1) -> Checkpoint:
    return Checkpoint(vchannel, place or str(ts).encode(), ts)


@dataclass
class Database:
    """A database of its own, and writers into it, each as another process would have it."""

    server: PostgresServer
    name: str

    @classmethod
    def fresh(cls, server: PostgresServer) -> Database:
        return cls(server, server.make_database(f"t{uuid.uuid4().hex[:12]}"))

    def spec(self, **options: Any) -> sink_postgres_pb2.PostgresSink:
        given: dict[str, Any] = {
            "host": self.server.host,
            "port": self.server.port,
            "database": self.name,
            "user": USER,
            **options,
        }
        spec = sink_postgres_pb2.PostgresSink(**given)
        spec.password.env = "TEST_PASSWORD"
        return spec

    def writer(self, *, password: str = PASSWORD, **options: Any) -> PostgresWriter:
        secrets = SecretResolver(env_prefix="TEST_", environ={"TEST_PASSWORD": password})
        return PostgresWriter(self.spec(**options), secrets)

    def execute(self, query: str, *values: Any) -> None:
        with self.server.connect(self.name) as connection:
            connection.execute(query, values or None)

    def select(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.server.connect(self.name) as connection:
            return connection.execute(query, values or None).fetchall()

    def numbers(self, place: str = '"default".articles') -> dict[Any, int]:
        """`n` by key."""
        return dict(self.select(f"SELECT id, n FROM {place}"))

    def sessions(self) -> int:
        """How many connections of the sink there are."""
        [(count,)] = self.select(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'milvus-cdc'"
        )
        return int(count)

    async def all_closed(self) -> bool:
        """The server may notice a moment after the client."""
        for _ in range(50):
            if not self.sessions():
                return True
            await asyncio.sleep(0.1)
        return False


async def write(
    writer: PostgresWriter,
    table: Table,
    *changes: Changes,
    checkpoints: Sequence[Checkpoint] = (),
    timeout: float = 20.0,
) -> None:
    await writer.write(table, Batch(changes, tuple(checkpoints)), timeout)


async def opened(
    writer: PostgresWriter, table: Table, opening: Opening = Opening.NEW, epoch: int = 1
) -> dict[str, Checkpoint]:
    answer = await writer.open(table, opening, epoch)
    return {each.vchannel: each for each in answer.checkpoints}


async def until(true: Any, seconds: float = 10.0) -> None:
    """Waits for a condition that is looked at in a thread."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(true):
            await asyncio.sleep(0.05)
