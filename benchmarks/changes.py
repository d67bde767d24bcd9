"""Rows as they come from a source's log, in batches as the replicator makes them, and what writing
them costs.

Vectors are of length one, as embeddings are: their digits and exponents are what the size of JSON
and of compressed files depends on. Law: what is fed to a writer was never decoded before.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from milvus_cdc.codec.wire import delimited, encode_varint
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.sink.writer import Batch, Capabilities, Checkpoint, Writer

ROUNDS = 2
"""The best of so many counts, of every contender."""
ROWS_PER_REQUEST = 1_000
SHARDS = ("by-dev-rootcoord-dml_0_449v0", "by-dev-rootcoord-dml_1_449v1")
WRITE_SECONDS = 60.0
_BEGIN = ms_to_tso(1_750_000_000_000)
_STEP = ms_to_tso(5)


def table(dim: int, name: str = "rows", collection_id: int = 1) -> Table:
    fields = (
        Field(100, "id", FieldType.INT64, primary_key=True),
        Field(101, "v", FieldType.FLOAT_VECTOR, dim=dim),
        Field(102, "n", FieldType.INT64),
    )
    return Table("tasks/bench", "bench", collection_id, "default", name, "default", name, fields)


def requests(rows: int, dim: int) -> list[Changes]:
    """Inserts of the source, by turns in each of its shards; keys count from 0."""
    return [
        _request(begin, min(ROWS_PER_REQUEST, rows - begin), dim)
        for begin in range(0, rows, ROWS_PER_REQUEST)
    ]


def upserts(inserts: Sequence[Changes]) -> list[Changes]:
    """The same rows again, later."""
    later = len(inserts)
    return [
        replace(each, op=ChangeOp.UPDATE, ts=each.ts + later * _STEP, order=each.order + later)
        for each in inserts
    ]


def _request(begin: int, count: int, dim: int) -> Changes:
    keys = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    keys.scalars.long_data.data.extend(range(begin, begin + count))
    others = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="n", field_id=102)
    others.scalars.long_data.data.extend(range(count))
    columns = (keys.SerializeToString(), _vectors(begin, count, dim), others.SerializeToString())
    number = begin // ROWS_PER_REQUEST
    return Changes(
        ChangeOp.CREATE,
        _BEGIN + number * _STEP,
        SHARDS[number % len(SHARDS)],
        number + 1,
        "_default",
        count,
        columns,
        size=sum(map(len, columns)),
    )


def _vectors(seed: int, count: int, dim: int) -> bytes:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    head = schema_pb2.FieldData(type=schema_pb2.FloatVector, field_name="v")
    tail = schema_pb2.FieldData(field_id=101)
    floats = delimited(1, vectors.tobytes())
    content = delimited(4, b"\x08" + encode_varint(dim), *delimited(2, *floats))
    return b"".join([head.SerializeToString(), *content, tail.SerializeToString()])


def batches(changes: Iterable[Changes], wanted: Capabilities) -> list[Batch]:
    """As large as the writer wants them, of whole requests."""
    made: list[Batch] = []
    waiting: list[Changes] = []
    rows = size = 0
    for each in changes:
        full = rows + each.num_rows > wanted.rows_per_batch
        if waiting and (full or size + each.size > wanted.bytes_per_batch):
            made.append(_batch(waiting, wanted))
            waiting, rows, size = [], 0, 0
        waiting.append(each)
        rows += each.num_rows
        size += each.size
    return [*made, _batch(waiting, wanted)] if waiting else made


def _batch(changes: list[Changes], wanted: Capabilities) -> Batch:
    if not wanted.own_checkpoint:
        return Batch(tuple(changes))
    last = {each.vchannel: each for each in changes}
    places = (Checkpoint(v, each.order.to_bytes(8, "little"), each.ts) for v, each in last.items())
    return Batch(tuple(changes), tuple(places))


async def write(writer: Writer, target: Table, changes: Iterable[Changes]) -> None:
    """All of them, with as many batches under way as the writer wants."""
    wanted = writer.capabilities
    room = asyncio.Semaphore(1 if wanted.own_checkpoint else wanted.in_flight)

    async def one(batch: Batch) -> None:
        try:
            await writer.write(target, batch, WRITE_SECONDS)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for batch in batches(changes, wanted):
            await room.acquire()
            # Copies: an original would keep its columns once they are decoded.
            fresh = replace(batch, changes=tuple(replace(each) for each in batch.changes))
            group.create_task(one(fresh))


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds by the clock and of CPU, all threads of this process together."""

    seconds: float = float("inf")
    cpu: float = float("inf")

    def best(self, other: Spent) -> Spent:
        return Spent(min(self.seconds, other.seconds), min(self.cpu, other.cpu))


async def spent(work: Callable[[], Awaitable[object]]) -> Spent:
    gc.collect()
    began, busy = time.perf_counter(), time.process_time()
    await work()
    return Spent(time.perf_counter() - began, time.process_time() - busy)
