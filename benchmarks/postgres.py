"""Rows into PostgreSQL by the writer, against plain COPY of the same rows on the same server.

The rival gets its bytes ready-made, in batches of the same size, each its own transaction.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.postgres.copying import HEADER, TRAILER
from milvus_cdc.sink.writer import Batch, Checkpoint, Opening
from milvuscdc.v1 import sink_postgres_pb2

from tests.servers import PostgresServer
from tests.servers.postgres import PASSWORD, USER

ROWS_PER_REQUEST = 1_000
ROUNDS = 3
_PLACE = '"default".rows'


@dataclass(frozen=True, slots=True)
class PostgresFigures:
    """Rows per second, the best of some rounds; CPU of this process per million rows."""

    dim: int
    rows: int
    writer: float
    plain_copy: float
    upserts: float
    cpu_seconds_per_million: float

    @property
    def ratio(self) -> float:
        return self.writer / self.plain_copy


def measure(rows: int = 200_000, dim: int = 128) -> PostgresFigures:
    """Starts a server of its own; about half a minute."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer(Path(folder), checkpoint_timeout="1h", max_wal_size="8GB") as server,
    ):
        return asyncio.run(_measure(server, rows, dim))


async def _measure(server: PostgresServer, rows: int, dim: int) -> PostgresFigures:
    spec = sink_postgres_pb2.PostgresSink(
        host=server.host, port=server.port, database="postgres", user=USER
    )
    spec.password.env = "BENCH_PASSWORD"
    secrets = SecretResolver(env_prefix="BENCH_", environ={"BENCH_PASSWORD": PASSWORD})
    writer = PostgresWriter(spec, secrets)
    table = _table(dim)
    per_batch = writer.capabilities.rows_per_batch
    batches = _batches(rows, dim, per_batch)
    best, cpu, rival = float("inf"), float("inf"), float("inf")
    for _ in range(ROUNDS):
        await writer.open(table, Opening.RECREATE, 1)
        for changes in (each for batch in batches for each in batch.changes):
            changes.__dict__.pop("_arrow", None)
        began, busy = time.perf_counter(), time.process_time()
        await _write(writer, table, batches)
        best = min(best, time.perf_counter() - began)
        cpu = min(cpu, time.process_time() - busy)
        rival = min(rival, await asyncio.to_thread(_plain, server, rows, per_batch))
    upserts = [
        Batch(tuple(replace(each, op=ChangeOp.UPDATE) for each in batch.changes), batch.checkpoints)
        for batch in batches
    ]
    began = time.perf_counter()
    await _write(writer, table, upserts)
    again = time.perf_counter() - began
    await writer.close()
    return PostgresFigures(dim, rows, rows / best, rows / rival, rows / again, cpu / rows * 1e6)


async def _write(writer: PostgresWriter, table: Table, batches: Sequence[Batch]) -> None:
    for batch in batches:
        await writer.write(table, batch, 60)


def _plain(server: PostgresServer, rows: int, per_batch: int) -> float:
    with server.connect() as connection:
        cursor = connection.cursor()
        with cursor.copy(f"COPY {_PLACE} TO STDOUT (FORMAT BINARY)") as copy:
            data = b"".join(bytes(part) for part in copy)
        body = data[len(HEADER) : -len(TRAILER)]
        width = len(body) // rows * per_batch
        cursor.execute(f"CREATE TABLE plain (LIKE {_PLACE} INCLUDING ALL)")
        began = time.perf_counter()
        for begin in range(0, len(body), width):
            with cursor.copy("COPY plain FROM STDIN (FORMAT BINARY)") as copy:
                copy.write(HEADER + body[begin : begin + width] + TRAILER)
        seconds = time.perf_counter() - began
        cursor.execute("DROP TABLE plain")
    return seconds


def _table(dim: int) -> Table:
    fields = (
        Field(100, "id", FieldType.INT64, primary_key=True),
        Field(101, "v", FieldType.FLOAT_VECTOR, dim=dim),
        Field(102, "n", FieldType.INT64),
    )
    return Table("tasks/bench", "bench", 1, "default", "rows", "default", "rows", fields)


def _batches(rows: int, dim: int, per_batch: int) -> list[Batch]:
    requests = [
        _request(begin, min(ROWS_PER_REQUEST, rows - begin), dim)
        for begin in range(0, rows, ROWS_PER_REQUEST)
    ]
    step = per_batch // ROWS_PER_REQUEST
    return [
        Batch(tuple(requests[at : at + step]), (Checkpoint("v0", b"1", at),))
        for at in range(0, len(requests), step)
    ]


def _request(begin: int, count: int, dim: int) -> Changes:
    keys = schema_pb2.FieldData(type=schema_pb2.Int64, field_id=100)
    keys.scalars.long_data.data.extend(range(begin, begin + count))
    vectors = schema_pb2.FieldData(type=schema_pb2.FloatVector, field_id=101)
    vectors.vectors.dim = dim
    numbers = np.random.default_rng(begin).random(count * dim, np.float32)
    vectors.vectors.float_vector.data.extend(numbers.tolist())
    others = schema_pb2.FieldData(type=schema_pb2.Int64, field_id=102)
    others.scalars.long_data.data.extend(range(count))
    columns = tuple(each.SerializeToString() for each in (keys, vectors, others))
    return Changes(ChangeOp.CREATE, begin + 1, "v0", begin, "_default", count, columns)


if __name__ == "__main__":
    print(measure())
