"""A source in memory: its log as Milvus writes it, its metadata as a catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from milvus_cdc.errors import CdcError
from milvus_cdc.follow import ChangeBatch, EventKind, Follower, Item, Positions, SchemaEvent
from milvus_cdc.milvus_protos import common_pb2, msg_pb2, schema_pb2
from milvus_cdc.model import (
    Catalogue,
    Collection,
    Database,
    ObjectState,
    Partition,
    Vchannel,
    ms_to_tso,
)
from milvus_cdc.source.memory import MemorySource
from milvuscdc.internal import milvus_log_pb2 as log_pb2

START = ms_to_tso(1_000_000)
DIM = 4
Change = tuple[str, int, int, str]
"""(vchannel, timestamp, key, text); a deletion has no text."""


def schema(name: str) -> bytes:
    made = schema_pb2.CollectionSchema(name=name)
    made.fields.add(fieldID=100, name="id", is_primary_key=True, data_type=schema_pb2.Int64)
    made.fields.add(fieldID=101, name="text", data_type=schema_pb2.VarChar).type_params.add(
        key="max_length", value="64"
    )
    made.fields.add(fieldID=102, name="vector", data_type=schema_pb2.FloatVector).type_params.add(
        key="dim", value=str(DIM)
    )
    return bytes(made.SerializeToString())


def collection(
    collection_id: int, name: str, *pchannels: str, starts: tuple[int, ...] = ()
) -> Collection:
    """A shard for each pchannel; logs begin at `starts`, else at the first entry."""
    begins = starts or (0,) * len(pchannels)
    return Collection(
        collection_id,
        1,
        "default",
        name,
        schema(name),
        len(pchannels),
        2,
        START,
        partitions=(Partition(collection_id * 10, "_default", START),),
        vchannels=tuple(
            Vchannel(f"{p}_{collection_id}v{n}", p, at.to_bytes(8, "little"))
            for n, (p, at) in enumerate(zip(pchannels, begins, strict=True))
        ),
    )


def insert(
    vchannel: str,
    collection_id: int,
    ts: int,
    keys: list[int],
    text: str = "x",
    *,
    partition_id: int = 70,
    partition: str = "_default",
) -> bytes:
    ids = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    ids.scalars.long_data.data.extend(keys)
    texts = schema_pb2.FieldData(type=schema_pb2.VarChar, field_name="text", field_id=101)
    texts.scalars.string_data.data.extend([text] * len(keys))
    vectors = schema_pb2.FieldData(type=schema_pb2.FloatVector, field_name="vector", field_id=102)
    vectors.vectors.dim = DIM
    vectors.vectors.float_vector.data.extend([float(key) for key in keys for _ in range(DIM)])
    return log_pb2.LogInsert(
        base=log_pb2.LogBase(msg_type=common_pb2.Insert, timestamp=ts),
        shard_name=vchannel,
        partition_name=partition,
        collection_id=collection_id,
        partition_id=partition_id,
        timestamps=[ts] * len(keys),
        fields_data=[each.SerializeToString() for each in (ids, texts, vectors)],
        num_rows=len(keys),
        version=1,
    ).SerializeToString()


def delete(vchannel: str, collection_id: int, ts: int, keys: list[int]) -> bytes:
    return log_pb2.LogDelete(
        base=log_pb2.LogBase(msg_type=common_pb2.Delete, timestamp=ts),
        shard_name=vchannel,
        collection_id=collection_id,
        partition_id=-1,
        int64_primary_keys=keys,
        num_rows=len(keys),
        timestamps=[ts] * len(keys),
    ).SerializeToString()


def tick(ts: int) -> bytes:
    return log_pb2.LogHeader(
        base=log_pb2.LogBase(msg_type=common_pb2.TimeTick, timestamp=ts)
    ).SerializeToString()


def drop_collection(collection_id: int, ts: int) -> bytes:
    base = common_pb2.MsgBase(msg_type=common_pb2.DropCollection, timestamp=ts)
    return bytes(
        msg_pb2.DropCollectionRequest(base=base, collectionID=collection_id).SerializeToString()
    )


def drop_partition(collection_id: int, ts: int, partition_id: int, name: str) -> bytes:
    made = msg_pb2.DropPartitionRequest(
        base=common_pb2.MsgBase(msg_type=common_pb2.DropPartition, timestamp=ts),
        collectionID=collection_id,
        partitionID=partition_id,
        partition_name=name,
    )
    return bytes(made.SerializeToString())


@dataclass
class Metadata:
    """`milvus_cdc.follow.follower.Catalogues`, as a test wants it."""

    collections: dict[int, Collection] = field(default_factory=dict)
    cluster_id: int = 1
    errors: list[CdcError] = field(default_factory=list)
    revision: int = 1

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()

    async def put(self, *collections: Collection) -> None:
        self.collections |= {each.collection_id: each for each in collections}
        await self._tell()

    async def drop(self, collection_id: int) -> None:
        gone = replace(self.collections[collection_id], state=ObjectState.DROPPED)
        await self.put(gone)

    async def remove(self, collection_id: int) -> None:
        del self.collections[collection_id]
        await self._tell()

    async def _tell(self) -> None:
        self.revision += 1
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncGenerator[Catalogue | CdcError, None]:
        told = 0
        while True:
            while self.errors:
                yield self.errors.pop(0)
            if told != self.revision:
                told = self.revision
                yield Catalogue(
                    self.cluster_id,
                    self.revision,
                    START + self.revision,
                    (Database(1, "default"),),
                    tuple(self.collections.values()),
                    incarnation=9,
                )
            async with self._changed:
                if told == self.revision:
                    await self._changed.wait()


@dataclass
class World:
    source: MemorySource = field(default_factory=MemorySource)
    metadata: Metadata = field(default_factory=Metadata)

    def follower(self, positions: Positions | None = None, **options: Any) -> Follower:
        options.setdefault("select", ["default.*"])
        return Follower(etcd=self.metadata, queue=self.source, positions=positions, **options)

    def append(self, pchannel: str, *payloads: bytes) -> None:
        for payload in payloads:
            self.source.append(pchannel, payload)


async def take(follower: Follower, done: Callable[[list[Item]], bool]) -> list[Item]:
    """Items until `done` says so; the last one is still in hand."""
    taken: list[Item] = []
    async with asyncio.timeout(20):
        async for item in follower:
            taken.append(item)
            if done(taken):
                break
    return taken


def changes(items: list[Item]) -> list[Change]:
    """Row by row, in the order in which they were handed out."""
    return [
        (item.vchannel, row["$ts"], row["id"], row["text"] or "")
        for item in items
        if isinstance(item, ChangeBatch)
        for row in item.rows()
    ]


def events(items: list[Item]) -> list[tuple[EventKind, str]]:
    return [
        (item.kind, item.partition or item.table.collection)
        for item in items
        if isinstance(item, SchemaEvent)
    ]
