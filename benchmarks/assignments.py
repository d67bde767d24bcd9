"""Very many assignments on many replicators: what a controller needs for them at rest, and how long
it takes after its restart until everybody has been told everything.

The replicators are streams of this process; they speak and keep the intervals that the controller
asks for, read nothing and write nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from milvuscdc.v1 import (
    fleet_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)
from milvuscdc.v1 import replication_service_pb2 as pb

from benchmarks.usage import cpu_seconds, peak_mib
from tests.integration.controller_harness import FakeReplicator
from tests.servers import EtcdServer, many
from tests.servers.services import ControllerProcess

ROOT = "many"
LEASE = {"ttl": 15, "heartbeat": 3, "clockMargin": 2}
"""The defaults, which shorter leases of tests would hide."""
TOLD_SECONDS = 600
REST_SECONDS = 60
ROUND_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Held:
    """Of one controller."""

    assignments: int
    replicators: int
    rest_percent: float
    """Of a core, with all of them at rest."""
    reports_per_second: float
    """Of resting assignments, while that was measured."""
    peak_mib: float
    resync_seconds: float
    """From the start of its process, killed before, until every replicator is in sync again."""


@dataclass
class _Api:
    channel: grpc.aio.Channel
    tasks: Any
    fleet: Any


class _Resting(FakeReplicator):
    """Keeps to the intervals that it is told, and connects anew when its stream ends."""

    def __init__(self, api: _Api, name: str) -> None:
        super().__init__(api, name)
        self.reports = 0
        self._heartbeat_seconds = 1.0
        self._resting_seconds = 3.0
        self._reported: dict[str, float] = {}
        self.connects = 0
        self.over = asyncio.Event()

    async def connect(self) -> None:
        self.connects += 1
        self.hello = {"connects": self.connects, "capacity": 100_000}
        self.over.clear()
        connecting = asyncio.create_task(super().connect())
        over = asyncio.create_task(self.over.wait())
        await asyncio.wait({connecting, over}, return_when=asyncio.FIRST_COMPLETED)
        if self.ended is not None:
            connecting.cancel()
            raise self.ended
        over.cancel()
        await connecting

    async def stay(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.wait({self._tasks[0]})
            while True:
                await self.kill()
                try:
                    await self.connect()
                    break
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                    await asyncio.sleep(0.3)

    async def _take(self, message: pb.ConnectResponse) -> None:
        await super()._take(message)
        match message.WhichOneof("message"):
            case "welcome":
                interval = message.welcome.heartbeat_interval
                self._heartbeat_seconds = interval.ToMilliseconds() / 1000
            case "heartbeat_ack":
                interval = message.heartbeat_ack.resting_interval
                self._resting_seconds = interval.ToMilliseconds() / 1000

    async def _read(self) -> None:
        await super()._read()
        self.over.set()

    async def _beat(self) -> None:
        seq, beaten = 0, 0.0
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                now = time.monotonic()
                if now >= beaten + self._heartbeat_seconds:
                    seq, beaten = seq + 1, now
                    await self.say(heartbeat=pb.Heartbeat(seq=seq))
                await self._rest(now)
                await asyncio.sleep(ROUND_SECONDS)

    async def _rest(self, now: float) -> None:
        turns = 1 + int(len(self.held) * ROUND_SECONDS / self._resting_seconds)
        oldest = sorted(self.held, key=lambda each: self._reported.get(each, 0.0))[:turns]
        for assignment_id in oldest:
            if now < self._reported.get(assignment_id, 0.0) + self._resting_seconds / 2:
                break
            self._reported[assignment_id] = now
            self.reports += 1
            ts = int(time.time() * 1000) << 18
            lanes = [
                pb.VchannelReport(
                    vchannel=each.vchannel,
                    read_from=b"position",
                    resolved_ts=ts,
                    wanted_horizon_ts=ts + (int(2000 * self._resting_seconds) << 18),
                )
                for each in self.held[assignment_id].collection.vchannels
            ]
            await self.report(assignment_id, vchannels=lanes, lag_ms=200)


def measure(collections: int, replicators: int) -> Held:
    """One task that follows so many collections."""
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder:
        with EtcdServer(Path(folder) / "etcd") as etcd:
            many.put_all(etcd.endpoint, many.cluster_keys(ROOT))
            keys = (key for n in range(collections) for key in many.collection_keys(n, ROOT))
            many.put_all(etcd.endpoint, keys)
            with ControllerProcess(Path(folder) / "own", lease=LEASE) as controller:
                return asyncio.run(_measure(etcd, controller, collections, replicators))


async def _measure(
    etcd: EtcdServer, controller: ControllerProcess, collections: int, replicators: int
) -> Held:
    async with _fleet(controller, replicators) as (api, fleet):
        request = task_service_pb2.CreateTaskRequest(task=_task(etcd))
        await api.tasks.CreateTask(request, timeout=120)
        await _until(lambda: _running(api, collections), "every collection runs")
        cpu, said = cpu_seconds(controller.pid), sum(each.reports for each in fleet)
        await asyncio.sleep(REST_SECONDS)
        used = cpu_seconds(controller.pid) - cpu
        reports = sum(each.reports for each in fleet) - said
        peak = peak_mib(controller.pid)

        before = {each.name: each.connects for each in fleet}
        controller.kill()
        began = time.monotonic()
        await asyncio.to_thread(controller.start)
        await _until(
            lambda: _all(
                each.connects > before[each.name] and each.synced.is_set() for each in fleet
            ),
            "all in sync",
        )
        resync = time.monotonic() - began
        return Held(
            sum(len(each.held) for each in fleet),
            replicators,
            100 * used / REST_SECONDS,
            reports / REST_SECONDS,
            max(peak, peak_mib(controller.pid)),
            resync,
        )


@contextlib.asynccontextmanager
async def _fleet(
    controller: ControllerProcess, replicators: int
) -> AsyncIterator[tuple[_Api, list[_Resting]]]:
    def channel() -> grpc.aio.Channel:
        # A connection each, as separate processes have.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.insecure_channel(controller.address, options=options)

    async with AsyncExitStack() as stack:
        fleet = []
        for number in range(replicators):
            own = await stack.enter_async_context(channel())
            fleet.append(_Resting(_Api(own, None, None), f"replicator-{number}"))
            await stack.enter_async_context(fleet[-1])
        staying = [asyncio.create_task(each.stay()) for each in fleet]
        common = await stack.enter_async_context(channel())
        try:
            yield (
                _Api(
                    common,
                    task_service_pb2_grpc.TaskServiceStub(common),
                    fleet_service_pb2_grpc.FleetServiceStub(common),
                ),
                fleet,
            )
        finally:
            for task in staying:
                task.cancel()
            await asyncio.gather(*staying, return_exceptions=True)


async def _running(api: _Api, collections: int) -> bool:
    request = task_service_pb2.GetTaskRequest(name="tasks/many")
    task = (await api.tasks.GetTask(request, timeout=60)).task
    return bool(task.progress.collections_running >= collections)


async def _all(conditions: Any) -> bool:
    return all(conditions)


async def _until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + TOLD_SECONDS
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {TOLD_SECONDS} s")
        await asyncio.sleep(0.1)


def _task(etcd: EtcdServer) -> task_pb2.Task:
    return task_pb2.Task(
        name="tasks/many",
        source=task_pb2.Source(
            etcd=task_pb2.EtcdMetadata(endpoints=[etcd.endpoint], root_path=ROOT),
            nats=task_pb2.NatsQueue(url="nats://127.0.0.1:1"),
        ),
        sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
        selection=task_pb2.Selection(include=["default.many_*"]),
        start=task_pb2.Start(earliest=task_pb2.Earliest()),
    )
