"""Nobody takes more of a controller than his share: tasks, streams and calls of one principal."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from milvus_cdc.control.refusal import api_error
from milvus_cdc.trust.caller import Caller, Role
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.forwarding import CALLER, HOP, PEER
from milvus_cdc_controller.store.records import decode, encode
from milvuscdc.v1 import fleet_service_pb2, task_service_pb2_grpc
from milvuscdc.v1 import task_service_pb2 as pb

from tests.integration.controller_harness import FakeReplicator, task_message, until
from tests.integration.trust_world import World
from tests.unit.controller.world import spec

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
GRANTS = [
    {"name": "alice", "roles": ["admin"]},
    {"name": "bob", "roles": ["admin"]},
    {"name": "replicators", "roles": ["replicator"]},
    {"name": "controllers", "roles": ["controller"]},
]
LIMITS = {"tasksPerPrincipal": 2, "streamsPerPrincipal": 3, "callsPerPrincipal": 2}


@dataclass
class As:
    """A controller as one principal sees it."""

    channel: grpc.aio.Channel
    tasks: Any = field(init=False)
    fleet: Any = None

    def __post_init__(self) -> None:
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self.channel)


@dataclass
class Place:
    """A controller with mutual TLS."""

    world: World
    address: str
    open: contextlib.AsyncExitStack

    async def seen_by(self, name: str) -> As:
        credentials = self.world.authority.issue(name).credentials
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.secure_channel(self.address, credentials, options)
        return As(await self.open.enter_async_context(channel))


@contextlib.asynccontextmanager
async def controller(world: World, path: Path) -> AsyncIterator[Place]:
    own = {"tls": world.server.server, "auth": {"certificates": GRANTS}}
    async with (
        world.serving(path=path, limits=LIMITS, **own) as address,
        contextlib.AsyncExitStack() as stack,
    ):
        yield Place(world, address, stack)


@pytest.fixture
async def place(world: World, tmp_path: Path) -> AsyncIterator[Place]:
    async with controller(world, tmp_path / "store.db") as place:
        yield place


@pytest.fixture
def audited() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []

    def keep(_: Any, __: str, event: Any) -> Any:
        lines.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield lines
    structlog.reset_defaults()


async def refused(call: Any, limit: str, principal: str) -> str:
    """Its message, when it says which limit of whom was met."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call if not hasattr(call, "read") else await call.read()
    error = api_error(caught.value)
    assert (error.code, error.reason) == (EXHAUSTED, "PRINCIPAL_LIMIT")
    assert (error.metadata["limit"], error.metadata["principal"]) == (limit, principal)
    return error.message


def creating(name: str, **other: Any) -> pb.CreateTaskRequest:
    return pb.CreateTaskRequest(task=task_message(name, (f"*.{name}",)), **other)


async def test_tasks_of_one_principal(
    world: World, tmp_path: Path, audited: list[dict[str, Any]]
) -> None:
    path = tmp_path / "store.db"
    async with controller(world, path) as place:
        alice = await place.seen_by("alice")
        for name in ("one", "two"):
            await alice.tasks.CreateTask(creating(name))
    # Who made what is known after a restart, too.
    async with controller(world, path) as place:
        alice, bob = await place.seen_by("alice"), await place.seen_by("bob")
        told = await refused(
            alice.tasks.CreateTask(creating("three")), "limits.tasksPerPrincipal", "alice"
        )
        assert "alice has made 2" in told
        await refused(
            alice.tasks.CreateTask(creating("three", validate_only=True)),
            "limits.tasksPerPrincipal",
            "alice",
        )
        await bob.tasks.CreateTask(creating("three"))
        # A task stays its maker's, whoever works on it.
        await bob.tasks.PauseTask(pb.PauseTaskRequest(name="tasks/one"))
        await bob.tasks.CreateTask(creating("four"))
        await refused(bob.tasks.CreateTask(creating("five")), "limits.tasksPerPrincipal", "bob")
        await bob.tasks.DeleteTask(pb.DeleteTaskRequest(name="tasks/two"))
        await alice.tasks.CreateTask(creating("five"))
    lines = [line for line in audited if line["event"] == "audit"]
    assert [
        (line["principal"], line["resource"])
        for line in lines
        if line.get("reason") == "PRINCIPAL_LIMIT"
    ] == [("alice", "tasks/three"), ("alice", "tasks/three"), ("bob", "tasks/five")]


def test_a_task_of_an_earlier_version_is_nobodys() -> None:
    stored = json.loads(encode(TaskRecord("uid", spec(), creator="alice")))
    assert decode("tasks/uid", json.dumps(stored).encode()) == TaskRecord(
        "uid", spec(), creator="alice"
    )
    del stored["creator"]
    record = decode("tasks/uid", json.dumps(stored).encode())
    assert isinstance(record, TaskRecord)
    assert record.creator == ""


async def test_streams_of_one_principal(place: Place, audited: list[dict[str, Any]]) -> None:
    alice, bob = await place.seen_by("alice"), await place.seen_by("bob")
    key = "limits.streamsPerPrincipal"
    watches = [alice.tasks.WatchTasks(pb.WatchTasksRequest()) for _ in range(3)]
    for watch in watches:
        await watch.read()
    told = await refused(alice.tasks.WatchTasks(pb.WatchTasksRequest()), key, "alice")
    assert "alice has 3 streams" in told
    fleet: Any = alice.channel.unary_stream(
        "/milvuscdc.v1.FleetService/WatchReplicators",
        request_serializer=fleet_service_pb2.WatchReplicatorsRequest.SerializeToString,
    )
    await refused(fleet(fleet_service_pb2.WatchReplicatorsRequest()), key, "alice")
    # Her calls, and others' streams, are counted by themselves; those under way go on.
    await alice.tasks.CreateTask(creating("seen"))
    await bob.tasks.WatchTasks(pb.WatchTasksRequest()).read()
    for watch in watches:
        assert (await watch.read()).task.name in ("tasks/seen", "")
    watches[0].cancel()
    async with asyncio.timeout(20):
        while True:
            try:
                await alice.tasks.WatchTasks(pb.WatchTasksRequest()).read()
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
    found = [line for line in audited if line.get("reason") == "PRINCIPAL_LIMIT"]
    assert {(line["principal"], line["by"], line["code"]) for line in found} == {
        ("alice", "certificate", "RESOURCE_EXHAUSTED")
    }


async def test_calls_of_one_principal_that_wait(place: Place) -> None:
    alice, bob = await place.seen_by("alice"), await place.seen_by("bob")
    workers = await place.seen_by("replicators")
    async with FakeReplicator(workers, "mute", serves_jobs=False) as mute:
        waiting = [
            asyncio.ensure_future(alice.tasks.CreateTask(creating(name, validate_only=True)))
            for name in ("one", "two")
        ]
        await until(lambda: len(mute.jobs) == 2)
        key = "limits.callsPerPrincipal"
        await refused(alice.tasks.ListTasks(pb.ListTasksRequest()), key, "alice")
        await bob.tasks.ListTasks(pb.ListTasksRequest())
        await alice.tasks.WatchTasks(pb.WatchTasksRequest()).read()
        for call in waiting:
            call.cancel()
        async with asyncio.timeout(20):
            while True:
                try:
                    await alice.tasks.ListTasks(pb.ListTasksRequest())
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)


async def test_replicators_of_one_credential(place: Place) -> None:
    workers = await place.seen_by("replicators")
    async with contextlib.AsyncExitStack() as stack:
        known = [
            await stack.enter_async_context(FakeReplicator(workers, f"r{number}"))
            for number in range(3)
        ]
        one_more = FakeReplicator(workers, "r3")
        connecting = asyncio.create_task(one_more.connect())
        await until(lambda: one_more.ended is not None)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        assert one_more.ended is not None
        error = api_error(one_more.ended)
        assert (error.reason, error.metadata["principal"]) == ("PRINCIPAL_LIMIT", "replicators")
        await one_more.kill()
        beats = [replicator.beats_acked for replicator in known]
        await until(
            lambda: all(r.beats_acked > b for r, b in zip(known, beats, strict=True))
        )  # the others go on


async def test_who_asks_through_another_controller_is_counted_himself(place: Place) -> None:
    between, alice = await place.seen_by("controllers"), await place.seen_by("alice")

    def on_behalf_of(name: str) -> Any:
        told = Caller(name, "certificate", frozenset((Role.VIEWER,))).told()
        return ((HOP, "another"), (PEER, "ipv4:10.0.0.1:1"), (CALLER, told))

    def watch(name: str) -> Any:
        return between.tasks.WatchTasks(pb.WatchTasksRequest(), metadata=on_behalf_of(name))

    open_ = [watch("alice") for _ in range(3)]
    for call in open_:
        await call.read()
    await refused(watch("alice"), "limits.streamsPerPrincipal", "alice")
    await refused(
        alice.tasks.WatchTasks(pb.WatchTasksRequest()), "limits.streamsPerPrincipal", "alice"
    )
    await watch("bob").read()
