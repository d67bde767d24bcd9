"""A bulk import into a real source is seen in its metadata, with its rows and time."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import aclosing
from pathlib import Path

import grpc
from milvus_cdc.catalog import CatalogueWatcher, Layout
from milvus_cdc.etcd import EtcdClient
from milvus_cdc.model import Catalogue
from pymilvus import DataType, MilvusClient
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from tests.servers import Stack

ROWS = 50


def _import(address: str, collection: str, file: Path) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = milvus_pb2_grpc.MilvusServiceStub(channel)
        answer = stub.Import(
            milvus_pb2.ImportRequest(collection_name=collection, row_based=True, files=[str(file)]),
            timeout=30,
        )
        assert answer.tasks, answer


async def test_an_import_into_a_real_source_is_seen_with_rows_and_time(
    nats_stack: Stack, tmp_path: Path
) -> None:
    name = f"imported_{uuid.uuid4().hex[:8]}"
    client = MilvusClient(uri=nats_stack.source.uri)
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
    client.create_collection(name, schema=schema)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [{"id": n, "vector": [n, 0, 0, 1]} for n in range(ROWS)]}))
    began_ms = int(time.time() * 1000) - 2_000
    async with EtcdClient([nats_stack.etcd.url]) as etcd:
        watcher = CatalogueWatcher(etcd, Layout(nats_stack.source.root_path))
        async with aclosing(watcher.watch()) as readings:
            importing = asyncio.create_task(
                asyncio.to_thread(_import, nats_stack.source.address, name, file)
            )
            async for reading in readings:
                assert isinstance(reading, Catalogue), reading
                [found] = [c for c in reading.collections if c.name == name]
                if found.imports and found.imports[0].rows == ROWS:
                    break
            await importing
    [one] = found.imports
    assert began_ms <= one.time_ms <= int(time.time() * 1000)
    client.drop_collection(name)
