"""A controller served in this process, and what stands around it: a hand-fed source and a
replicator without a sink.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import grpc
from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.model import Catalogue, Collection, Database, ObjectState, Partition, Vchannel
from milvus_cdc_controller.catalogues import Closable, Watcher
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.server import Running, serve
from milvus_cdc_controller.store.sqlite import SqliteStore
from milvuscdc.v1 import (
    fleet_service_pb2_grpc,
    replication_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)
from milvuscdc.v1 import replication_service_pb2 as pb

WAIT_SECONDS = 45.0


def collection(
    collection_id: int, name: str = "books", database: str = "default", **other: Any
) -> Collection:
    pchannel = f"dml_{collection_id % 4}"
    return replace(
        Collection(
            collection_id=collection_id,
            database_id=1,
            database=database,
            name=name,
            schema=b"schema",
            shards=1,
            consistency_level=0,
            create_ts=collection_id * 10,
            partitions=(Partition(collection_id * 100, "_default", collection_id * 10),),
            vchannels=(Vchannel(f"{pchannel}_{collection_id}v0", pchannel, b"start"),),
        ),
        **other,
    )


def dropped(of: Collection) -> Collection:
    return replace(of, state=ObjectState.DROPPED)


class HandFedSource:
    """A source whose metadata the test sets; stands in for milvus_cdc.catalog.CatalogueWatcher."""

    def __init__(self, *collections: Collection) -> None:
        self.catalogue = Catalogue(
            cluster_id=7,
            revision=1,
            tso=1000,
            databases=(Database(1, "default"),),
            collections=collections,
            incarnation=5,
        )
        self.error: CdcError | None = None
        self._changed = asyncio.Event()

    def set(self, *collections: Collection, **other: Any) -> None:
        catalogue = self.catalogue
        fields = {
            "collections": collections,
            "revision": catalogue.revision + 1,
            "tso": catalogue.tso + 1,
            **other,
        }
        self.catalogue = replace(catalogue, **fields)
        self._changed.set()

    def set_unseen(self, *collections: Collection) -> None:
        """Changed, but the watch does not say so."""
        self.set(*collections)
        self._changed.clear()

    def fail(self, error: CdcError | None) -> None:
        self.error = error
        self._changed.set()

    async def read(self) -> Catalogue:
        if self.error is not None:
            raise self.error
        return self.catalogue

    async def watch(self) -> AsyncGenerator[Catalogue | CdcError]:
        while True:
            self._changed.clear()
            yield self.error or self.catalogue
            await self._changed.wait()

    async def close(self) -> None: ...

    def connect(self, source: task_pb2.Source) -> tuple[Closable, Watcher]:
        return self, self


def config(
    path: Path,
    keys: Sequence[Mapping[str, str]] = (),
    limits: Mapping[str, int] | None = None,
    **lease: float,
) -> Config:
    timing = {"ttl": 30.0, "heartbeat": 2.0, "clock_margin": 0.2, "progress": 0.05, **lease}
    return Config.model_validate(
        {
            "listen": "127.0.0.1:0",
            "metrics": None,
            "store": {"sqlite": {"path": str(path)}},
            "lease": timing,
            "secretsKeys": keys,
            "limits": dict(limits or {}),
        }
    )


class BreakableStore(SqliteStore):
    """SQLite that stops answering while `down`."""

    down = False

    async def commit(self, writes: Mapping[str, bytes | None]) -> None:
        if self.down:
            raise RetryableError("STORE_UNAVAILABLE", "the disk is full")
        await super().commit(writes)


@dataclass
class Api:
    """One controller and its stubs."""

    running: Running
    channel: grpc.aio.Channel
    store: BreakableStore
    tasks: Any = field(init=False)
    fleet: Any = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self.channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(self.channel)


class Reachable(Protocol):
    """A controller's API, wherever it runs."""

    channel: grpc.aio.Channel
    tasks: Any
    fleet: Any


@asynccontextmanager
async def controller(
    path: Path,
    source: HandFedSource,
    *,
    keys: Sequence[Mapping[str, str]] = (),
    limits: Mapping[str, int] | None = None,
    **lease: float,
) -> AsyncIterator[Api]:
    """A controller on a store file; leaving the block is a clean stop. `keys`: its secretsKeys."""
    store = await BreakableStore.open(path)
    assert isinstance(store, BreakableStore)
    try:
        async with serve(config(path, keys, limits, **lease), store, source.connect) as running:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
                yield Api(running, channel, store)
    finally:
        await store.close()


class FakeReplicator:
    """Speaks the real stream; acknowledges, begins and lets go like a real one, and writes
    nowhere.
    """

    def __init__(self, api: Reachable, name: str, instance: str = "", *, serves_jobs: bool = True):
        self._stub = replication_service_pb2_grpc.ReplicationServiceStub(api.channel)
        self.name = name
        self.instance = instance or str(uuid.uuid4())
        self.serves_jobs = serves_jobs
        self.releases = True
        self.opens = True
        self.beats = True
        self.draining = False
        self.holds_checkpoints = False
        self.hello: dict[str, Any] = {}
        """More of its Hello."""
        self.held: dict[str, pb.Assign] = {}
        self.acks: dict[str, pb.ProgressAck] = {}
        self.limits: dict[str, task_pb2.Limits] = {}
        self.history: list[str] = []
        self.jobs: list[pb.JobRequest] = []
        self.cancelled: list[str] = []
        self.source_ts = 1000
        self.beats_acked = 0
        self._seq: dict[tuple[str, int], int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._call: Any = None
        self._writing = asyncio.Lock()
        self.synced = asyncio.Event()
        self.ended: grpc.aio.AioRpcError | None = None

    async def __aenter__(self) -> FakeReplicator:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def connect(self) -> None:
        self.synced.clear()
        self.ended = None
        self._call = self._stub.Connect()
        held = [
            pb.HeldAssignment(assignment_id=a.assignment_id, epoch=a.epoch, version=a.version)
            for a in self.held.values()
        ]
        await self.say(
            hello=pb.Hello(
                name=self.name,
                instance_id=self.instance,
                version="test",
                protocol_max=1,
                protocol_min=1,
                held=held,
                **self.hello,
            )
        )
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        async with asyncio.timeout(WAIT_SECONDS):
            await self.synced.wait()

    async def kill(self) -> None:
        """The stream goes away without a word."""
        for task in self._tasks:
            task.cancel()
        if self._call is not None:
            self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def say(self, **message: Any) -> None:
        async with self._writing:  # a call takes one write at a time
            await self._call.write(pb.ConnectRequest(**message))

    async def report(self, assignment_id: str, **fields: Any) -> int:
        """Progress of an assignment it holds; its number."""
        epoch = fields.pop("epoch", None) or self.held[assignment_id].epoch
        seq = self._seq[assignment_id, epoch] = self._seq.get((assignment_id, epoch), 0) + 1
        fields.setdefault("state", pb.Progress.STATE_RUNNING)
        progress = pb.Progress(assignment_id=assignment_id, epoch=epoch, seq=seq, **fields)
        await self.say(progress=progress)
        return seq

    async def acked(self, assignment_id: str, seq: int) -> pb.ProgressAck:
        await until(lambda: assignment_id in self.acks and self.acks[assignment_id].seq >= seq)
        return self.acks[assignment_id]

    async def _beat(self) -> None:
        seq = 0
        with contextlib.suppress(Exception):
            while True:
                await asyncio.sleep(0.1)
                seq += 1
                if self.beats:
                    await self.say(heartbeat=pb.Heartbeat(seq=seq, draining=self.draining))

    async def _read(self) -> None:
        try:
            async for message in self._call:
                await self._take(message)
        except grpc.aio.AioRpcError as error:
            self.ended = error

    async def _take(self, message: pb.ConnectResponse) -> None:
        match message.WhichOneof("message"):
            case "assign":
                await self._begin(message.assign)
            case "revoke":
                revoke = message.revoke
                self.history.append(f"revoke {revoke.epoch} {revoke.reason}")
                if self.releases:
                    await self.release(revoke.assignment_id, revoke.epoch)
            case "synced":
                self.synced.set()
            case "task_limits":
                self.limits[message.task_limits.task_uid] = message.task_limits.limits
            case "heartbeat_ack":
                self.beats_acked += 1
            case "progress_ack":
                self.acks[message.progress_ack.assignment_id] = message.progress_ack
            case "job_cancel":
                self.cancelled.append(message.job_cancel.job_id)
            case "job_request":
                self.jobs.append(message.job_request)
                if self.serves_jobs:
                    await self._do(message.job_request)

    async def _begin(self, assign: pb.Assign) -> None:
        before = self.held.get(assign.assignment_id)
        self.held[assign.assignment_id] = assign
        self.history.append(f"assign {assign.epoch}")
        await self.say(
            ack=pb.Ack(
                assignment_id=assign.assignment_id, epoch=assign.epoch, version=assign.version
            )
        )
        new = before is None or before.epoch != assign.epoch
        if new and self.opens and assign.WhichOneof("spec") == "collection":
            await self.report(
                assign.assignment_id,
                opened=pb.SinkOpened(sink_collection_id=99),
            )
        elif assign.WhichOneof("spec") == "metadata":
            await self.report(assign.assignment_id, applied_version=assign.version)

    async def release(self, assignment_id: str, epoch: int) -> None:
        held = self.held.get(assignment_id)
        if held is not None and held.epoch == epoch:
            del self.held[assignment_id]
        await self.say(released=pb.Released(assignment_id=assignment_id, epoch=epoch))

    async def _do(self, job: pb.JobRequest) -> None:
        match job.WhichOneof("job"):
            case "probe":
                done = pb.ProbeResult(
                    source_version="2.3.5",
                    sink_version="2.3.5",
                    sink_holds_checkpoints=self.holds_checkpoints,
                )
                await self.say(job_update=pb.JobUpdate(job_id=job.job_id, probe=done))
            case "resolve":
                ends = [pb.LogEnd(pchannel=name, position=b"end") for name in job.resolve.pchannels]
                resolved = pb.ResolveResult(log_ends=ends, source_ts=self.source_ts)
                await self.say(job_update=pb.JobUpdate(job_id=job.job_id, resolve=resolved))

    def epoch_of(self, collection: str) -> int:
        """0 when it does not hold it."""
        assign = self.collections().get(collection)
        return assign.epoch if assign is not None else 0

    def collections(self) -> dict[str, pb.Assign]:
        """Collection assignments held, by name."""
        return {
            f"{a.collection.database}.{a.collection.collection}": a
            for a in self.held.values()
            if a.WhichOneof("spec") == "collection"
        }


async def until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Waits for something that other tasks bring about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def until_task(
    api: Reachable, name: str, state: int, reason: str | None = None
) -> task_pb2.Task:
    """The task once it is in a state."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            task = (await api.tasks.GetTask(task_service_pb2.GetTaskRequest(name=name))).task
            if task.state == state and reason in (None, task.reason):
                return task  # type: ignore[no-any-return]
            await asyncio.sleep(0.02)


def task_message(
    name: str = "copy",
    include: tuple[str, ...] = ("*.*",),
    *,
    sink: str = "sink:19530",
    latest: bool = False,
    **other: Any,
) -> task_pb2.Task:
    start = (
        task_pb2.Start(latest=task_pb2.Latest())
        if latest
        else task_pb2.Start(earliest=task_pb2.Earliest())
    )
    return task_pb2.Task(
        name=f"tasks/{name}",
        source=task_pb2.Source(
            etcd=task_pb2.EtcdMetadata(endpoints=["127.0.0.1:2379"]),
            nats=task_pb2.NatsQueue(url="nats://127.0.0.1:4222"),
            milvus=task_pb2.MilvusEndpoint(uri="http://source:19530"),
        ),
        sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri=f"http://{sink}")),
        selection=task_pb2.Selection(include=include),
        start=start,
        **other,
    )
