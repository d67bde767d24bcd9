"""Rows into PostgreSQL by the writer, against plain COPY of the same rows on the same server.

The rival gets its bytes ready-made, in batches of the same size, each its own transaction.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.postgres.copying import HEADER, TRAILER
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_postgres_pb2

from benchmarks.changes import ROUNDS, Spent, batches, requests, spent, table, upserts, write
from tests.servers import PostgresServer
from tests.servers.postgres import PASSWORD, USER

_PLACE = '"default".rows'


@dataclass(frozen=True, slots=True)
class PostgresFigures:
    """The best of some rounds; CPU is that of this process."""

    dim: int
    rows: int
    rate: float
    cpu_per_million: float
    plain_copy: float
    """Rows per second of the rival."""
    ratio: float
    upserts: float
    """Rows per second when they replace what is there."""


def measure(rows: int, dim: int) -> PostgresFigures:
    """Starts a server of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder,
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
    target, changes = table(dim), requests(rows, dim)
    per_batch = batches(changes, writer.capabilities)[0].num_rows
    best, rival = Spent(), Spent()
    for _ in range(ROUNDS):
        await writer.open(target, Opening.RECREATE, 1)
        best = best.best(await spent(lambda: write(writer, target, changes)))
        rival = rival.best(await _plain(server, rows, per_batch))
    again = await spent(lambda: write(writer, target, upserts(changes)))
    await writer.close()
    return PostgresFigures(
        dim=dim,
        rows=rows,
        rate=rows / best.seconds,
        cpu_per_million=best.cpu / rows * 1e6,
        plain_copy=rows / rival.seconds,
        ratio=rival.seconds / best.seconds,
        upserts=rows / again.seconds,
    )


async def _plain(server: PostgresServer, rows: int, per_batch: int) -> Spent:
    with server.connect() as connection:
        cursor = connection.cursor()
        with cursor.copy(f"COPY {_PLACE} TO STDOUT (FORMAT BINARY)") as copy:
            data = b"".join(bytes(part) for part in copy)
        body = data[len(HEADER) : -len(TRAILER)]
        width = len(body) // rows * per_batch
        cursor.execute(f"CREATE TABLE plain (LIKE {_PLACE} INCLUDING ALL)")

        def work() -> None:
            for begin in range(0, len(body), width):
                with cursor.copy("COPY plain FROM STDIN (FORMAT BINARY)") as copy:
                    copy.write(HEADER + body[begin : begin + width] + TRAILER)

        seen = await spent(lambda: asyncio.to_thread(work))
        cursor.execute("DROP TABLE plain")
    return seen
