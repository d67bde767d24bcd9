"""What is asked of the fleet and can not be: the answer says why, and nothing has changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from milvuscdc.v1 import fleet_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2 as stream_pb
from milvuscdc.v1 import replication_service_pb2_grpc as stream_rpc

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    until,
)
from tests.integration.test_fleet_service import assignments, create, refused, replicators

COLLECTIONS = tuple(collection(10 + number, f"c{number}") for number in range(4))
HELD = len(COLLECTIONS) + 1


async def shown(api: Api) -> tuple[object, ...]:
    """All that is stored, who holds what and what is on its way, who is there and as what."""
    return (
        await api.store.load(),
        {(i.name, i.epoch, i.replicator, i.moving_to) for i in (await assignments(api)).values()},
        {
            (r.name, r.state, r.cordoned, r.assignments, r.drain.state)
            for r in (await replicators(api)).values()
        },
    )


async def greeted(api: Api, **hello: Any) -> tuple[str, str, str]:
    """The refusal of a stream that begins so."""
    call: Any = stream_rpc.ReplicationServiceStub(api.channel).Connect()
    whole = {"name": "x", "instance_id": "i", "protocol_min": 1, "protocol_max": 1, **hello}
    await call.write(stream_pb.ConnectRequest(hello=stream_pb.Hello(**whole)))
    return await refused(call.read())


async def of_another_cluster(api: Api, _name: str) -> tuple[str, str, str]:
    return await greeted(api, cluster="elsewhere")


async def of_another_protocol(api: Api, _name: str) -> tuple[str, str, str]:
    return await greeted(api, protocol_min=2, protocol_max=3)


async def of_an_instance_that_is_there(api: Api, _name: str) -> tuple[str, str, str]:
    return await greeted(api, name="twin", instance_id="the only one", connects=1)


async def move_to_a_cordoned_one(api: Api, name: str) -> tuple[str, str, str]:
    request = pb.MoveAssignmentRequest(name=name, replicator="replicators/cordoned")
    return await refused(api.fleet.MoveAssignment(request))


async def move_to_a_full_one(api: Api, name: str) -> tuple[str, str, str]:
    request = pb.MoveAssignmentRequest(name=name, replicator="replicators/full")
    return await refused(api.fleet.MoveAssignment(request))


async def drain_of_the_last_one(api: Api, _name: str) -> tuple[str, str, str]:
    request = pb.DrainReplicatorRequest(name="replicators/a")
    return await refused(api.fleet.DrainReplicator(request))


NOT_NOW = "FAILED_PRECONDITION"
CASES: dict[Callable[[Api, str], Awaitable[tuple[str, str, str]]], tuple[str, str, str]] = {
    of_another_cluster: (NOT_NOW, "CLUSTER_MISMATCH", "cluster"),
    of_another_protocol: (NOT_NOW, "PROTOCOL_VERSION", ""),
    of_an_instance_that_is_there: (NOT_NOW, "INSTANCE_IN_USE", ""),
    move_to_a_cordoned_one: (NOT_NOW, "REPLICATOR_CORDONED", "replicator"),
    move_to_a_full_one: (NOT_NOW, "REPLICATOR_FULL", "replicator"),
    drain_of_the_last_one: (NOT_NOW, "NO_OTHER_REPLICATOR", "name"),
}


@pytest.mark.parametrize("ask", CASES, ids=lambda ask: ask.__name__)
async def test_refused_with_its_reason(
    tmp_path: Path, ask: Callable[[Api, str], Awaitable[tuple[str, str, str]]]
) -> None:
    async with AsyncExitStack() as stack:
        path = tmp_path / "store.db"
        api = await stack.enter_async_context(controller(path, HandFedSource(*COLLECTIONS)))
        a = FakeReplicator(api, "a", instance="the only one")
        a.hello = {"connects": 3}
        await stack.enter_async_context(a)
        await create(api)
        await until(lambda: len(a.held) == HELD)
        name = (await assignments(api))["default.c1"].name
        if ask is move_to_a_cordoned_one:
            await stack.enter_async_context(FakeReplicator(api, "cordoned"))
            request = pb.CordonReplicatorRequest(name="replicators/cordoned")
            await api.fleet.CordonReplicator(request)
        elif ask is move_to_a_full_one:
            full = FakeReplicator(api, "full")
            full.hello = {"capacity": 1}
            await stack.enter_async_context(full)
            other = (await assignments(api))["default.c2"].name
            move = pb.MoveAssignmentRequest(name=other, replicator="replicators/full")
            await api.fleet.MoveAssignment(move)
            await until(lambda: full.epoch_of("default.c2") == 2)
        # Everything that was said has been taken and stored.
        await a.acked(name.partition("/")[2], await a.report(name.partition("/")[2]))
        held, before = dict(a.held), await shown(api)
        assert await ask(api, name) == CASES[ask]
        assert await shown(api) == before
        assert a.held == held
        assert a.ended is None, "the one that was there stays"


async def test_a_report_of_what_another_holds_or_nobody_changes_nothing(tmp_path: Path) -> None:
    async with (
        controller(tmp_path / "store.db", HandFedSource(*COLLECTIONS)) as api,
        FakeReplicator(api, "a") as a,
    ):
        await create(api)
        await until(lambda: len(a.held) == HELD)
        key = (await assignments(api))["default.c1"].name.partition("/")[2]
        vchannel = a.held[key].collection.vchannels[0].vchannel
        far = [stream_pb.VchannelReport(vchannel=vchannel, read_from=b"far", resolved_ts=10**6)]
        async with FakeReplicator(api, "b") as b:
            await a.acked(key, await a.report(key))
            before = await shown(api)
            await b.report(key, epoch=1, vchannels=far)
            await until(lambda: "revoke 1 HELD_BY_ANOTHER" in b.history)
            await b.report("none.1", epoch=1, vchannels=far)
            await until(lambda: "revoke 1 UNKNOWN_ASSIGNMENT" in b.history)
            await a.report(key, epoch=7, vchannels=far)
            await until(lambda: "revoke 7 STALE_EPOCH" in a.history)
            await b.release(key, epoch=1)
            await b.say(heartbeat=stream_pb.Heartbeat(seq=10**6))
            assert await shown(api) == before
            assert key in a.held
