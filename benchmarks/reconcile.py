"""One comparison of very many unchanged collections with a real sink, rows aside: its time, and how
many calls each collection costs.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import Collection, Index, Load, LoadKind, Partition
from milvus_cdc.sink import reconcile
from milvus_cdc.sink.milvus import MilvusSink
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.drift import Reconciler
from milvus_cdc_replicator.gate import COMPARISONS, WriteGate, boottime
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.spec import CollectionAssignment
from milvuscdc.v1 import task_pb2

from tests.servers import EtcdServer, MilvusServer

MAKERS = 4
LEASE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Reconciled:
    collections: int
    loaded: int
    seconds: float
    calls_most: int
    """For one collection."""
    calls: float
    """On average."""


def measure(collections: int, loaded: int) -> Reconciled:
    """Of them `loaded` are."""
    with (
        tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder,
        EtcdServer(Path(folder) / "etcd") as etcd,
        MilvusServer(
            Path(folder) / "sink",
            etcd_endpoint=etcd.endpoint,
            root_path="sink",
            cluster="sink",
            name="sink",
        ) as milvus,
    ):
        return asyncio.run(_measure(milvus.uri, collections, loaded))


async def _measure(uri: str, collections: int, loaded: int) -> Reconciled:
    wants = [_want(number, number < loaded) for number in range(collections)]
    sink = MilvusSink(uri)
    ids: dict[str, int] = {}
    try:
        todo = iter(wants)

        async def make() -> None:
            for want in todo:
                opened = await sink.open_collection(
                    want, opened=False, adopt=False, recreate=False, sink_collection_id=0
                )
                ids[want.name] = opened.sink_collection_id
                await reconcile(sink, want)

        await asyncio.gather(*(make() for _ in range(MAKERS)))
        calls: Counter[str] = Counter()
        real = MilvusClient.ask

        async def counted(self: MilvusClient, method: str, request: Any, **how: Any) -> Any:
            calls[getattr(request, "collection_name", "")] += 1
            return await real(self, method, request, **how)

        gate = _gate()
        reconcilers = [_reconciler(sink, gate, want) for want in wants]
        MilvusClient.ask = counted  # type: ignore[method-assign]
        try:
            started = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for want, reconciler in zip(wants, reconcilers, strict=True):
                    group.create_task(reconciler.run(_assignment(want, ids[want.name]), want))
            seconds = time.perf_counter() - started
        finally:
            MilvusClient.ask = real  # type: ignore[method-assign]
        for reconciler in reconcilers:
            assert reconciler.applied_version == 1, "a collection that is as wanted was not seen so"
        assert len(calls) == collections
        return Reconciled(
            collections, loaded, seconds, max(calls.values()), calls.total() / collections
        )
    finally:
        await sink.close()


def _want(number: int, loaded: bool) -> Collection:
    schema = schema_pb2.CollectionSchema(name=f"bench_reconcile_{number}")
    schema.fields.add(fieldID=100, name="id", is_primary_key=True, data_type=schema_pb2.Int64)
    vector = schema.fields.add(fieldID=101, name="vector", data_type=schema_pb2.FloatVector)
    vector.type_params.add(key="dim", value="8")
    params = (("index_type", "FLAT"), ("metric_type", "L2"))
    return Collection(
        collection_id=number + 1,
        database_id=1,
        database="default",
        name=schema.name,
        schema=schema.SerializeToString(),
        shards=1,
        consistency_level=1,
        create_ts=1,
        partitions=(Partition(1, "_default", 1),),
        indexes=(Index(1, "by_vector", 101, "vector", params, 1),),
        load=Load(LoadKind.COLLECTION, (), 1) if loaded else Load(),
        properties=(("collection.ttl.seconds", "86400"),),
    )


def _gate() -> WriteGate:
    lease = Lease()
    lease.configure(LEASE_SECONDS)
    lease.heartbeat_sent(1, boottime())
    lease.heartbeat_acked(1)
    return WriteGate(lease, COMPARISONS)


def _reconciler(sink: MilvusSink, gate: WriteGate, want: Collection) -> Reconciler:
    log = structlog.get_logger()
    return Reconciler(
        sink,
        gate=gate,
        halt=asyncio.Event(),
        troubles=Troubles(log, lambda: None),
        conditions={},
        properties=None,
        partitions=asyncio.Lock(),
        current=lambda: want,
        every_seconds=300,
        log=log,
    )


def _assignment(want: Collection, sink_collection_id: int) -> CollectionAssignment:
    return CollectionAssignment(
        assignment_id=f"bench.{want.collection_id}",
        epoch=1,
        version=1,
        task="tasks/bench",
        source=task_pb2.Source(),
        sink=task_pb2.Sink(),
        want=want,
        lanes=(),
        opened=True,
        sink_collection_id=sink_collection_id,
        adopt_existing=False,
        recreate=False,
        drop_granted=False,
    )
