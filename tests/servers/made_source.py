"""A source without a Milvus: the metadata of real collections in an etcd, and a log of rows on a
real NATS, written as Milvus 2.3.5 writes them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import nats
from milvus_cdc.milvus_protos import common_pb2, schema_pb2
from milvus_cdc.model import ms_to_tso
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from milvuscdc.internal import milvus_meta_pb2 as meta_pb
from milvuscdc.v1 import task_pb2

from tests.servers import many
from tests.servers.etcd import EtcdServer
from tests.servers.nats import NatsServer

ROOT = "made"
PCHANNELS = 4
_LEFT_OUT = ("/snapshots/", "/field-index/", "/101", "/103", "/104")
"""An Int64 key and a VarChar are left."""


class MadeSource:
    """Of so many collections with a shard each; `fill` puts rows into the log."""

    def __init__(self, etcd: EtcdServer, queue: NatsServer, collections: int) -> None:
        self._queue = queue
        self.collections = collections
        self.spec = task_pb2.Source(
            etcd=task_pb2.EtcdMetadata(endpoints=[etcd.endpoint], root_path=ROOT),
            nats=task_pb2.NatsQueue(url=queue.url),
        )
        self._partitions: dict[int, int] = {}
        many.put_all(etcd.endpoint, many.cluster_keys(ROOT))
        many.put_all(etcd.endpoint, self._keys())

    def fill(self, rows: int, *, rows_per_message: int = 100) -> None:
        """So many rows of each collection, evenly, with a tick after each message of all."""
        asyncio.run(self._fill(rows, rows_per_message))

    async def _fill(self, rows: int, rows_per_message: int) -> None:
        client = await nats.connect(self._queue.url)
        stream = client.jetstream(timeout=30)
        topics = [_topic(n) for n in range(PCHANNELS)]
        for topic in topics:
            await stream.add_stream(name=topic, subjects=[topic], max_age=259_200)
        ms = int(time.time() * 1000)
        for begin in range(0, rows, rows_per_message):
            ts, keys = ms_to_tso(ms + begin), range(begin, min(rows, begin + rows_per_message))
            async with asyncio.TaskGroup() as group:
                for n in range(self.collections):
                    payload = self._insert(n, ts, keys)
                    group.create_task(_publish(stream, _topic(n), payload))
            for topic in topics:
                await stream.publish(topic, _tick(ts))
        await client.close()

    def _insert(self, number: int, ts: int, keys: range) -> bytes:
        ids = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
        ids.scalars.long_data.data.extend(keys)
        texts = schema_pb2.FieldData(type=schema_pb2.VarChar, field_name="s", field_id=102)
        texts.scalars.string_data.data.extend(map(str, keys))
        return log_pb2.LogInsert(
            base=log_pb2.LogBase(msg_type=common_pb2.Insert, timestamp=ts),
            shard_name=_vchannel(number),
            partition_name="_default",
            collection_id=many.collection_id_of(number),
            partition_id=self._partitions[number],
            timestamps=[ts] * len(keys),
            fields_data=[ids.SerializeToString(), texts.SerializeToString()],
            num_rows=len(keys),
            version=1,
        ).SerializeToString()

    def _keys(self) -> Iterator[many.Put]:
        for number in range(self.collections):
            for key, value in many.collection_keys(number, ROOT):
                if any(part in key.removesuffix("/") for part in _LEFT_OUT[:2]):
                    continue
                if "/fields/" in key and key.endswith(_LEFT_OUT[2:]):
                    continue
                if "/partitions/" in key:
                    partition = meta_pb.PartitionInfo.FromString(value)
                    if partition.partition_name == "_default":
                        self._partitions[number] = partition.partition_id
                if "/collection-info/" in key:
                    value = _with_one_shard(value, number)
                yield key, value


def _with_one_shard(value: bytes, number: int) -> bytes:
    info = meta_pb.CollectionInfo.FromString(value)
    info.virtual_channel_names[:] = [_vchannel(number)]
    info.physical_channel_names[:] = [_topic(number)]
    del info.start_positions[1:]
    info.start_positions[0].key = _topic(number)
    return info.SerializeToString()


def _topic(number: int) -> str:
    return f"{ROOT}-rootcoord-dml_{number % PCHANNELS}"


def _vchannel(number: int) -> str:
    return f"{_topic(number)}_{many.collection_id_of(number)}v0"


def _tick(ts: int) -> bytes:
    base = log_pb2.LogBase(msg_type=common_pb2.TimeTick, timestamp=ts)
    return log_pb2.LogHeader(base=base).SerializeToString()


async def _publish(stream: nats.js.JetStreamContext, topic: str, payload: bytes) -> None:
    await stream.publish(topic, payload)
