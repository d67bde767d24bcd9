"""Rebuilds a collection in a Milvus from its files, as of a point in time.

Laws: the collection is made with the schema stored beside the files (an autoID key becomes an
ordinary one, so that rows keep their keys), partitions and dynamic fields included; indexes, load
state, aliases and properties are not in the files. Memory is bounded: one row group is read while
one request is written. What may have been written is written again as an upsert, so that a hiccup
leaves no row twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from milvus_cdc.codec.field_data import field_data
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_protos import common_pb2
from milvus_cdc.model import Collection, Partition, tso_to_text
from milvus_cdc.rows import Table
from milvus_cdc.sink import Op, RowBatch, RowChunk, Sink
from milvus_cdc.sink.files import alive
from milvus_cdc.sink.files.reading import History

_REQUEST_BYTES = 16 * 2**20
_HELD_BYTES = 64 * 2**20
_WRITE_SECONDS = 60.0
_TRIES = 8
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    written: int
    total: int


async def restore(
    history: History,
    sink: Sink,
    database: str,
    collection: str,
    *,
    into_existing: bool = False,
    memory_bytes: int = alive.MEMORY_BYTES,
    told: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Writes the rows that are there by then. Raises the errors of `milvus_cdc.errors`, among them
    UserError COLLECTION_DROPPED, and COLLECTION_EXISTS where the target holds rows and
    `into_existing` does not allow to put others beside them.
    """
    if history.dropped:
        when = max(event.ts for _, event in history.events)
        raise UserError(
            "COLLECTION_DROPPED",
            f"{'.'.join(history.name)} was dropped at the source at {tso_to_text(when)}; choose a "
            "time before",
        )
    table = history.table
    masks = await asyncio.to_thread(history.masks, memory_bytes)
    total = sum(int(mask.sum()) for mask in masks.values())
    want = collection_of(history, database, collection)
    await sink.ensure_database(database)
    await sink.open_collection(
        want, opened=False, adopt=into_existing, recreate=False, sink_collection_id=0
    )
    target = sink.target(want)
    known = {each.name for each in want.partitions} | {""}
    op = Op.UPSERT if into_existing else Op.INSERT
    written = 0
    told(Progress(0, total))
    requests = _requests(history, masks)
    while (request := await asyncio.to_thread(next, requests, None)) is not None:
        partition, rows = request
        if target.partition_key:
            partition = ""
        if partition not in known:
            await sink.create_partition(want, partition)
            known.add(partition)
        chunk = RowChunk(await asyncio.to_thread(columns_of, table, rows), rows.num_rows)
        await _write(sink, target, RowBatch(op, partition, (chunk,)))
        written += rows.num_rows
        told(Progress(written, total))
    await sink.flush(want)
    return Progress(written, total)


def collection_of(history: History, database: str, collection: str) -> Collection:
    """What is to be made."""
    table = history.table
    named = () if any(field.partition_key for field in table.fields) else history.partitions
    return Collection(
        collection_id=table.collection_id,
        database_id=0,
        database=database,
        name=collection,
        schema=table.schema,
        shards=max(1, len(history.links[-1].shards)),
        consistency_level=common_pb2.ConsistencyLevel.Bounded,
        create_ts=0,
        partitions=tuple(Partition(0, name, 0) for name in named),
    )


def columns_of(table: Table, rows: pa.RecordBatch) -> tuple[bytes, ...]:
    """One serialized schema.FieldData per field."""
    return tuple(
        field_data(
            rows.column(field.name),
            name=field.name,
            field_id=field.field_id,
            milvus_type=field.type.value,
            dim=field.dim,
            element_type=field.element_type.value if field.element_type else "",
            nullable=field.nullable,
            dynamic=field.dynamic,
        )
        for field in table.fields
    )


def _requests(history: History, masks: alive.Masks) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows in large pieces, each of one partition."""
    held: dict[str, list[pa.RecordBatch]] = {}
    for batch in history.rows(masks):
        for partition, rows in _by_partition(batch):
            held.setdefault(partition, []).append(rows)
        for partition in list(held):
            if _size(held[partition]) >= _REQUEST_BYTES:
                yield from _pieces(partition, held.pop(partition))
        while sum(map(_size, held.values())) > _HELD_BYTES:
            largest = max(held, key=lambda name: _size(held[name]))
            yield from _pieces(largest, held.pop(largest))
    for partition, batches in held.items():
        yield from _pieces(partition, batches)


def _by_partition(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    names = batch.column("_partition")
    rows = batch.drop_columns(["_partition"])
    for name in names.unique().to_pylist():
        yield name, rows.filter(pc.equal(names, name))


def _size(batches: list[pa.RecordBatch]) -> int:
    return sum(batch.nbytes for batch in batches)


def _pieces(partition: str, batches: list[pa.RecordBatch]) -> Iterator[tuple[str, pa.RecordBatch]]:
    whole = pa.Table.from_batches(batches).combine_chunks()
    rows = max(1, whole.num_rows * _REQUEST_BYTES // max(1, whole.nbytes))
    for piece in whole.to_batches(max_chunksize=rows):
        yield partition, piece


async def _write(sink: Sink, target: object, batch: RowBatch) -> None:
    for attempt in range(_TRIES):
        try:
            await sink.write(target, batch, _WRITE_SECONDS)  # type: ignore[arg-type]
            return
        except RetryableError as error:
            if attempt == _TRIES - 1:
                raise
            if isinstance(error, UnknownOutcomeError):
                batch = RowBatch(Op.UPSERT, batch.partition, batch.chunks)
        await asyncio.sleep(min(10.0, _PAUSE_SECONDS * 2**attempt))
