"""Where a sink of any kind is tried: in memory and at a real Milvus, asked in the same words."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.model import Carry, Collection
from milvus_cdc.sink import DeleteBatch, Op, Sink, reconcile
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.sink.memory_rows import decode_cells
from milvus_cdc.sink.milvus import MilvusSink
from pymilvus.grpc_gen import common_pb2, milvus_pb2
from pymilvus.grpc_gen.schema_pb2 import DataType

from tests.contract.sink_samples import (
    LOADED,
    PLAIN,
    Sample,
    flat_index,
)

SECONDS = 20.0


class Bench(Protocol):
    """A sink, a database of one's own in it, and a look at what it holds."""

    sink: Sink
    database: str

    async def rows(self, sample: Sample) -> dict[Any, dict[str, Any]]:
        """By key, a doubled key once."""
        ...

    async def count(self, sample: Sample) -> int: ...

    async def partitions(self, sample: Sample) -> set[str]: ...

    async def databases(self) -> set[str]: ...


class MemoryBench:
    def __init__(self) -> None:
        self.memory = MemorySink()
        self.sink: Sink = self.memory
        self.database = "contract"

    async def rows(self, sample: Sample) -> dict[Any, dict[str, Any]]:
        return {row["id"]: row for row in self.memory.rows(self.database, sample.name)}

    async def count(self, sample: Sample) -> int:
        return self.memory.count(self.database, sample.name)

    async def partitions(self, sample: Sample) -> set[str]:
        return set(self.memory.partitions(self.database, sample.name))

    async def databases(self) -> set[str]:
        return set(self.memory.databases())


class MilvusBench:
    def __init__(self, uri: str) -> None:
        self.sink: Sink = MilvusSink(uri)
        self.client = MilvusClient(uri)
        self.database = f"sink_{uuid.uuid4().hex[:8]}"

    async def _query(self, sample: Sample, fields: Sequence[str], **params: str) -> Any:
        binary = any(each.type == DataType.BinaryVector for each in sample.fields)
        index = flat_index("v", "JACCARD", "BIN_FLAT") if binary else flat_index()
        # Partitions that a test made are no drift here.
        carry = Carry(schema=False)
        await reconcile(self.sink, sample.want(indexes=(index,), load=LOADED), carry)
        at = {"db_name": self.database, "collection_name": sample.name}
        async with asyncio.timeout(60):
            await self._loaded(milvus_pb2.GetLoadStateRequest(**at))
        request = milvus_pb2.QueryRequest(
            **at,
            output_fields=fields,
            consistency_level=common_pb2.Strong,
            query_params=[common_pb2.KeyValuePair(key=k, value=v) for k, v in params.items()],
        )
        return (await self.client.call("Query", request, timeout=60)).fields_data

    async def _loaded(self, request: Any) -> None:
        answer = await self.client.call("GetLoadState", request)
        while answer.state != common_pb2.LoadStateLoaded:
            await asyncio.sleep(0.1)
            answer = await self.client.call("GetLoadState", request)

    async def rows(self, sample: Sample) -> dict[Any, dict[str, Any]]:
        names = [each.name for each in sample.fields]
        columns = await self._query(sample, names, limit="16000")
        cells = {
            "$meta" if column.is_dynamic else column.field_name: decode_cells(column)
            for column in columns
        }
        found = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
        return {row["id"]: row for row in found}

    async def count(self, sample: Sample) -> int:
        (column,) = await self._query(sample, ["count(*)"])
        return int(column.scalars.long_data.data[0])

    async def partitions(self, sample: Sample) -> set[str]:
        request = milvus_pb2.ShowPartitionsRequest(
            db_name=self.database, collection_name=sample.name
        )
        return set((await self.client.call("ShowPartitions", request)).partition_names)

    async def databases(self) -> set[str]:
        answer = await self.client.call("ListDatabases", milvus_pb2.ListDatabasesRequest())
        return set(answer.db_names)

    async def clean(self) -> None:
        shown = await self.client.call(
            "ShowCollections", milvus_pb2.ShowCollectionsRequest(db_name=self.database)
        )
        for name in shown.collection_names:
            await self.client.call(
                "DropCollection",
                milvus_pb2.DropCollectionRequest(db_name=self.database, collection_name=name),
            )
        await self.sink.drop_database(self.database)
        await self.sink.close()
        await self.client.close()


async def opened(bench: Bench, want: Collection, **how: Any) -> Any:
    options = {"opened": False, "adopt": False, "recreate": False, "sink_collection_id": 0, **how}
    return await bench.sink.open_collection(want, **options)


async def put(
    bench: Bench, sample: Sample, rows: Sequence[Any], op: Op = Op.INSERT, partition: str = ""
) -> None:
    batch = sample.batch(rows, op=op, partition=partition or "_default")
    await bench.sink.write(bench.sink.target(sample.want()), batch, SECONDS)


async def remove(bench: Bench, sample: Sample, keys: Any, partition: str = "") -> None:
    await bench.sink.write(bench.sink.target(sample.want()), DeleteBatch(partition, keys), SECONDS)


def ints(*keys: int) -> Any:
    return np.array(keys, np.int64)


async def plain(bench: Bench, name: str = "plain", **about: Any) -> Sample:
    sample = Sample(bench.database, name, PLAIN, **about)
    await opened(bench, sample.want())
    return sample
