"""Three controllers on one real etcd, as processes that are killed, stopped and frozen: one leads,
every one of them answers, and nothing that replicators hold moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from milvus_cdc.etcd import EtcdClient, KeyRange
from milvuscdc.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.integration.controller_harness import FakeReplicator, task_message, until, until_task
from tests.servers import EtcdServer, many
from tests.servers.services import LEADER_LEASE_SECONDS, ControllerProcess

FAIL_OVER_SECONDS = LEADER_LEASE_SECONDS + 3
COLLECTIONS = 3
LEADER = fleet_service_pb2.CONTROLLER_ROLE_LEADER
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
"""The second is what gRPC makes of a heartbeat that is being written while the stream ends."""


class At:
    """The API at one controller's address."""

    def __init__(self, process: ControllerProcess) -> None:
        self.process = process
        self.channel = grpc.aio.insecure_channel(
            process.address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 100),
            ],
        )
        self.tasks: Any = task_service_pb2_grpc.TaskServiceStub(self.channel)
        self.fleet: Any = fleet_service_pb2_grpc.FleetServiceStub(self.channel)

    async def controllers(self) -> list[fleet_service_pb2.Controller]:
        request = fleet_service_pb2.ListControllersRequest()
        return list((await self.fleet.ListControllers(request, timeout=5)).controllers)

    async def task(self, name: str = "tasks/copy") -> task_pb2.Task:
        request = task_service_pb2.GetTaskRequest(name=name)
        task: task_pb2.Task = (await self.tasks.GetTask(request, timeout=5)).task
        return task

    async def held(self) -> list[tuple[str, int, str]]:
        request = fleet_service_pb2.ListAssignmentsRequest()
        answer = await self.fleet.ListAssignments(request, timeout=5)
        return sorted((a.name, a.epoch, a.replicator) for a in answer.assignments)

    def leads_by_metric(self) -> bool:
        with urllib.request.urlopen(self.process.metrics_url, timeout=5) as answer:
            return b"milvus_cdc_controller_leader 1.0" in answer.read()


class Trio:
    """Three controllers; `source` is an etcd with the keys of a Milvus."""

    def __init__(self, etcd: EtcdServer, folder: Path) -> None:
        self.etcd = etcd
        self.endpoint = etcd.endpoint
        self.prefix = f"cdc-{uuid.uuid4()}"
        self.root = f"source-{uuid.uuid4()}"
        many.put_all(self.endpoint, many.cluster_keys(self.root))
        for number in range(COLLECTIONS):
            many.put_all(self.endpoint, many.collection_keys(number, self.root))
        store = {
            "etcd": {
                "endpoints": [self.endpoint],
                "prefix": self.prefix,
                "leaseSeconds": LEADER_LEASE_SECONDS,
            }
        }
        self.processes = [
            ControllerProcess(folder, store=store, name=f"controller-{n}") for n in range(3)
        ]
        self.at: list[At] = []

    async def start(self) -> None:
        for process in self.processes:
            process.spawn()
        for process in self.processes:
            await asyncio.to_thread(process.wait_ready)
        self.at = [At(process) for process in self.processes]

    async def stop(self) -> None:
        for at in self.at:
            await at.channel.close()
        for process in self.processes:
            await asyncio.to_thread(process.stop)

    async def leader(self, *, but: At | None = None, seconds: float = 30) -> At:
        """Waits until all that run agree on one, which answers; not `but`."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(grpc.RpcError):
                running = [at for at in self.at if at.process.running and at is not but]
                said = [
                    {c.address for c in await at.controllers() if c.role == LEADER}
                    for at in running
                ]
                for at in running:
                    if all(addresses == {at.process.address} for addresses in said):
                        await at.held()
                        return at
            assert time.monotonic() < deadline, "nobody leads"
            await asyncio.sleep(0.02)

    def followers(self, leader: At) -> list[At]:
        return [at for at in self.at if at is not leader]

    def task(self, name: str = "copy") -> task_pb2.Task:
        task = task_message(name)
        del task.source.etcd.endpoints[:]
        task.source.etcd.endpoints.append(self.endpoint)
        task.source.etcd.root_path = self.root
        return task

    async def create(self, at: At) -> task_pb2.Task:
        request = task_service_pb2.CreateTaskRequest(task=self.task())
        task: task_pb2.Task = (await at.tasks.CreateTask(request, timeout=30)).task
        return task

    async def stored(self) -> dict[str, bytes]:
        async with EtcdClient([self.endpoint]) as client:
            listing = await client.list(KeyRange.prefix(f"{self.prefix}/records/"))
        return {kv.key: kv.value for kv in listing.kvs}


@pytest.fixture
async def trio(etcd_server: EtcdServer, tmp_path: Path) -> AsyncIterator[Trio]:
    three = Trio(etcd_server, tmp_path)
    await three.start()
    yield three
    await three.stop()


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """For those who stop it."""
    with EtcdServer(tmp_path / "etcd") as server:
        yield server


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Of the ErrorInfo that every error of ours carries."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    assert info.domain == "milvuscdc.io"
                    return str(info.reason)
    raise AssertionError(f"no ErrorInfo in {error!r}")


async def reconnect(replicator: FakeReplicator, at: At) -> FakeReplicator:
    """The same process at another controller, with what it holds."""
    await replicator.kill()
    again = FakeReplicator(at, replicator.name, replicator.instance)
    again.held = replicator.held
    deadline = time.monotonic() + 30
    while True:
        try:
            await asyncio.wait_for(again.connect(), 2)
            return again
        except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            assert time.monotonic() < deadline
            await again.kill()
            await asyncio.sleep(0.05)


def all_held(replicator: FakeReplicator) -> Callable[[], bool]:
    return lambda: len(replicator.collections()) == COLLECTIONS


async def test_every_controller_answers_whatever_it_is_asked(trio: Trio) -> None:
    leader = await trio.leader()
    first, second = trio.followers(leader)
    listed = await first.controllers()
    assert {c.address for c in listed} == {at.process.address for at in trio.at}
    assert [at.leads_by_metric() for at in trio.at] == [at is leader for at in trio.at]

    async with FakeReplicator(first, "a") as replicator:
        # What a follower passes on: a task made, watched, changed, listed; a stream both ways.
        watch = second.tasks.WatchTasks(task_service_pb2.WatchTasksRequest())
        assert (await watch.read()).type == task_service_pb2.WatchTasksResponse.TYPE_BOOKMARK
        created = await trio.create(second)
        assert (await watch.read()).task.uid == created.uid
        await until(all_held(replicator))
        await until_task(first, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
        assignment_id = replicator.collections()["default.many_000001"].assignment_id
        seq = await replicator.report(assignment_id, rows_inserted=5)
        await replicator.acked(assignment_id, seq)
        shown = await asyncio.gather(*(at.task() for at in trio.at))
        assert [task.progress.rows_inserted for task in shown] == [5, 5, 5]
        listing = fleet_service_pb2.ListReplicatorsRequest()
        [connected] = (await leader.fleet.ListReplicators(listing)).replicators
        assert connected.peer.startswith("ipv4:127.0.0.1:"), "the replicator's, not the follower's"
        watch.cancel()

        # Errors with their details, deadlines, cancellation.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await first.task("tasks/none")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert reason_of(refused.value) == "TASK_NOT_FOUND"
        with pytest.raises(grpc.aio.AioRpcError) as late:
            async for _ in second.tasks.WatchTasks(
                task_service_pb2.WatchTasksRequest(), timeout=0.5
            ):
                pass
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        unknown: Any = first.channel.unary_unary("/milvuscdc.v1.TaskService/NoSuchMethod")
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await unknown(b"")
            # A call refused while it is still being sent may come back as one to try again.
            if refused.value.code() is not grpc.StatusCode.UNAVAILABLE:
                break
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

        # A half-closed stream ends as at the leader.
        connect: Any = first.channel.stream_stream(
            "/milvuscdc.v1.ReplicationService/Connect",
            request_serializer=pb.ConnectRequest.SerializeToString,
            response_deserializer=pb.ConnectResponse.FromString,
        )
        hello = pb.Hello(name="b", instance_id="b", version="1", protocol_min=1, protocol_max=1)
        stream = connect()
        await stream.write(pb.ConnectRequest(hello=hello))
        said = await stream.read()
        assert said.WhichOneof("message") == "welcome"
        assert said.welcome.silence.ToMilliseconds() == 1000 * (LEADER_LEASE_SECONDS + 5)
        await stream.done_writing()
        async with asyncio.timeout(10):
            while await stream.read() is not grpc.aio.EOF:
                pass
        assert await stream.code() is grpc.StatusCode.OK
        wrong = connect()
        await wrong.write(pb.ConnectRequest(heartbeat=pb.Heartbeat(seq=1)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wrong.read()
        assert reason_of(refused.value) == "HELLO_MISSING"
    # The fake replicator has gone without a word, and the leader knows.
    async with asyncio.timeout(10):
        while True:
            known = (await leader.fleet.ListReplicators(listing)).replicators
            if fleet_service_pb2.REPLICATOR_STATE_SUSPECT in [each.state for each in known]:
                break
            await asyncio.sleep(0.05)


async def test_a_call_is_passed_on_once(trio: Trio) -> None:
    follower = trio.followers(await trio.leader())[0]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await follower.tasks.ListTasks(
            task_service_pb2.ListTasksRequest(), metadata=[("milvus-cdc-hop", "somebody")]
        )
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(refused.value) == "NO_LEADER"


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_another_one_leads_and_what_replicators_hold_stays(trio: Trio, how: str) -> None:
    leader = await trio.leader()
    follower = trio.followers(leader)[0]
    # One replicator at a follower, one at the leader itself.
    async with FakeReplicator(follower, "a") as through, FakeReplicator(leader, "b") as direct:
        await trio.create(follower)
        await until(lambda: len(through.collections()) + len(direct.collections()) == COLLECTIONS)
        await until_task(follower, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
        before = await follower.held()
        began = time.monotonic()
        if how == "kill":
            leader.process.kill()
        else:
            stopping = asyncio.create_task(asyncio.to_thread(leader.process.stop))
        following = await trio.leader(but=leader)
        took = time.monotonic() - began
        print(f"fail-over after {how}: {took:.2f} s, lease {LEADER_LEASE_SECONDS} s")
        assert took < FAIL_OVER_SECONDS
        if how == "stop":
            await stopping
            assert leader.process.returncode == 0
        await until(lambda: through.ended is not None)
        assert through.ended is not None
        assert through.ended.code() in BROKEN
        other = next(at for at in trio.followers(following) if at is not leader)
        async with await reconnect(through, other) as a, await reconnect(direct, following) as b:
            await until_task(other, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
            assert await other.held() == before, "no assignment moved"
            assert not [line for line in (*a.history, *b.history) if "revoke" in line]
            # It leads: a change is stored, through it and through a follower.
            pause = task_service_pb2.PauseTaskRequest(name="tasks/copy")
            await other.tasks.PauseTask(pause, timeout=10)
            await until(lambda: not a.collections() and not b.collections())
        if how == "kill":
            await asyncio.to_thread(leader.process.start)
            assert len({c.name for c in await other.controllers()}) == 3
            await until_task(leader, "tasks/copy", task_pb2.TASK_STATE_PAUSED)


def _but_sources(stored: dict[str, bytes]) -> dict[str, bytes]:
    """What the one that leads sees of a source, it stores at any time."""
    return {key: value for key, value in stored.items() if "/records/sources/" not in key}


async def test_a_leader_that_wakes_up_after_its_lease_changes_nothing(trio: Trio) -> None:
    zombie = await trio.leader()
    async with FakeReplicator(zombie, "a") as replicator:
        await trio.create(zombie)
        await until(all_held(replicator))
        await until_task(zombie, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
        held = replicator.collections()["default.many_000001"]
        vchannel = held.collection.vchannels[0].vchannel
        await asyncio.to_thread(zombie.process.pause)
        # What it finds when it wakes up: heartbeats and a report that would change a checkpoint.
        acked = replicator.beats_acked
        await replicator.report(
            held.assignment_id,
            rows_inserted=1000,
            vchannels=[pb.VchannelReport(vchannel=vchannel, read_from=b"z", resolved_ts=2**62)],
        )
        following = await trio.leader(but=zombie)
        pause = task_service_pb2.PauseTaskRequest(name="tasks/copy")
        paused = await following.tasks.PauseTask(pause, timeout=10)
        before = _but_sources(await trio.stored())

        zombie.process.resume()
        await until(lambda: replicator.ended is not None, 30)
        assert replicator.ended is not None
        assert replicator.ended.code() in BROKEN
        assert replicator.beats_acked <= acked + 1, "no lease is renewed by a zombie"
        assert await trio.leader() is following
        assert _but_sources(await trio.stored()) == before
        # It has become a follower that answers as the leader does.
        assert (await zombie.task()).generation == paused.task.generation
        assert not zombie.leads_by_metric()
        assert zombie.process.running
    await asyncio.to_thread(following.process.kill)
    again = await trio.leader(but=following)
    assert (await again.task()).generation == paused.task.generation


async def test_without_etcd_nobody_leads_and_that_is_said(
    own_etcd: EtcdServer, tmp_path: Path
) -> None:
    trio = Trio(own_etcd, tmp_path)
    await trio.start()
    try:
        leader = await trio.leader()
        own_etcd.kill()

        async def reason(at: At) -> str:
            listing = task_service_pb2.ListTasksRequest()
            while True:
                try:
                    await at.tasks.ListTasks(listing, timeout=5)
                except grpc.aio.AioRpcError as refused:
                    return f"{refused.code().name} {reason_of(refused)}"
                await asyncio.sleep(0.1)

        async with asyncio.timeout(20):
            said = await asyncio.gather(*(reason(at) for at in trio.at))
        reasons = ("NO_LEADER", "LEADERSHIP_LOST", "LEADER_CHANGED", "LEADER_UNREACHABLE")
        assert set(said) <= {f"UNAVAILABLE {reason}" for reason in reasons}
        for at in trio.at:
            assert at.process.running
            health = health_pb2_grpc.HealthStub(at.channel)
            alive = await health.Check(health_pb2.HealthCheckRequest(service=""), timeout=5)
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
        service = health_pb2.HealthCheckRequest(service="milvuscdc.v1.TaskService")
        answers = await health_pb2_grpc.HealthStub(leader.channel).Check(service, timeout=5)
        assert answers.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert LEADER not in [c.role for c in await leader.controllers()]

        await asyncio.to_thread(own_etcd.start)
        await trio.leader()
        for at in trio.at:
            await at.tasks.ListTasks(task_service_pb2.ListTasksRequest(), timeout=5)
    finally:
        await trio.stop()
