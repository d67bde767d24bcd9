"""The fleet over the real API: marks, drains, moves, watches, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from milvus_cdc.control import ControlClient
from milvuscdc.v1 import fleet_service_pb2 as pb
from milvuscdc.v1 import fleet_service_pb2_grpc as rpc
from milvuscdc.v1 import task_pb2, task_service_pb2

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    task_message,
    until,
)

COLLECTIONS = tuple(collection(10 + number, f"c{number}") for number in range(6))


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with controller(tmp_path / "store.db", HandFedSource(*COLLECTIONS)) as api:
        yield api


async def create(api: Api, **other: Any) -> task_pb2.Task:
    request = task_service_pb2.CreateTaskRequest(task=task_message(**other))
    return (await api.tasks.CreateTask(request)).task  # type: ignore[no-any-return]


async def refused(call: Awaitable[Any]) -> tuple[str, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status = rpc_status.from_call(raised.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "milvuscdc.io"
    return raised.value.code().name, info.reason, info.metadata["field"]


async def replicators(api: Api) -> dict[str, pb.Replicator]:
    answer = await api.fleet.ListReplicators(pb.ListReplicatorsRequest())
    return {r.name.partition("/")[2]: r for r in answer.replicators}


async def assignments(api: Api) -> dict[str, pb.AssignmentInfo]:
    answer = await api.fleet.ListAssignments(pb.ListAssignmentsRequest())
    return {a.collection or "(metadata)": a for a in answer.assignments}


async def test_a_drain_is_watched_from_its_begin_to_its_end(api: Api) -> None:
    async with FakeReplicator(api, "a") as a:
        await create(api)
        await until(lambda: len(a.held) == 7)
        async with FakeReplicator(api, "b") as b:
            call = api.fleet.WatchReplicators(pb.WatchReplicatorsRequest(name="replicators/a"))
            seen: list[pb.WatchReplicatorsResponse] = []

            async def watch() -> None:
                async for event in call:
                    seen.append(event)

            watching = asyncio.create_task(watch())
            await until(lambda: len(seen) == 2)
            assert [e.type for e in seen] == [
                pb.WatchReplicatorsResponse.TYPE_ADDED,
                pb.WatchReplicatorsResponse.TYPE_BOOKMARK,
            ]
            drained = await api.fleet.DrainReplicator(
                pb.DrainReplicatorRequest(name="replicators/a", timeout=Duration(seconds=60))
            )
            assert drained.replicator.drain.total == 7
            assert drained.replicator.cordoned
            await until(lambda: not a.held)
            await until(lambda: seen[-1].replicator.drain.state == pb.Drain.STATE_DONE)
            last = seen[-1].replicator
            assert last.state == pb.REPLICATOR_STATE_STOPPED
            assert (last.drain.left, last.assignments) == (0, 0)
            assert len(b.held) == 7
            watching.cancel()
            shown = (
                await api.fleet.UncordonReplicator(
                    pb.UncordonReplicatorRequest(name="replicators/a")
                )
            ).replicator
            assert shown.state == pb.REPLICATOR_STATE_ALIVE
            assert not shown.HasField("drain")


async def test_the_python_client_moves_and_evens_out(api: Api) -> None:
    async with (
        FakeReplicator(api, "a") as a,
        ControlClient(f"127.0.0.1:{api.running.port}") as client,
    ):
        await create(api)
        await until(lambda: len(a.held) == 7)
        async with FakeReplicator(api, "b") as b:
            (name,) = [i.name for k, i in (await assignments(api)).items() if k == "default.c3"]
            moving = await client.move_assignment(name, "b")
            assert (moving.moving_to, moving.moving_reason) == ("replicators/b", "MOVE")
            await until(lambda: b.epoch_of("default.c3") == 2)
            plan = await client.rebalance(validate_only=True)
            loads = {load.replicator: (load.before, load.after) for load in plan.loads}
            assert loads == {"replicators/a": (5, 3), "replicators/b": (1, 3)}
            assert len(plan.moves) == 2
            assert len(b.collections()) == 1, "it was only shown"
            await client.rebalance(max_moves=1)
            await until(lambda: len(b.collections()) == 2)
            await client.rebalance()
            await until(lambda: len(b.collections()) == 3)
            assert not (await client.rebalance()).moves


async def test_a_cordoned_one_gets_no_new_collection_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    source = HandFedSource(*COLLECTIONS[:2])
    async with controller(path, source) as api:
        async with FakeReplicator(api, "a") as a, FakeReplicator(api, "b"):
            await create(api)
            await until(lambda: a.held)
            await api.fleet.CordonReplicator(pb.CordonReplicatorRequest(name="replicators/b"))
            before = (await replicators(api))["b"].assignments
    async with controller(path, source) as api:
        assert (await replicators(api))["b"].cordoned
        async with FakeReplicator(api, "b", instance="new start") as b:
            source.set(*COLLECTIONS)
            await asyncio.sleep(1.5)
            assert len(b.held) <= before
            assert not b.held


async def test_what_can_not_be_is_refused_by_name(api: Api) -> None:
    fleet = api.fleet
    async with FakeReplicator(api, "a") as a:
        await create(api)
        await until(lambda: len(a.held) == 7)
        found = await assignments(api)
        books = found["default.c1"].name
        nobody, ours = "replicators/nobody", "replicators/a"
        full = FakeReplicator(api, "full")
        full.hello = {"capacity": 1}
        async with full:
            await fleet.MoveAssignment(
                pb.MoveAssignmentRequest(name=books, replicator="replicators/full")
            )
            await until(lambda: full.held)
            answers = [
                await refused(call)
                for call in (
                    fleet.DrainReplicator(pb.DrainReplicatorRequest(name=nobody)),
                    fleet.DrainReplicator(pb.DrainReplicatorRequest(name="a")),
                    fleet.DrainReplicator(
                        pb.DrainReplicatorRequest(name=ours, timeout=Duration(seconds=-1))
                    ),
                    fleet.DrainReplicator(pb.DrainReplicatorRequest(name=ours)),
                    fleet.CordonReplicator(pb.CordonReplicatorRequest(name=nobody)),
                    fleet.UncordonReplicator(pb.UncordonReplicatorRequest(name=nobody)),
                    fleet.CancelDrain(pb.CancelDrainRequest(name=ours)),
                    fleet.MoveAssignment(
                        pb.MoveAssignmentRequest(name="assignments/none.1", replicator=ours)
                    ),
                    fleet.MoveAssignment(pb.MoveAssignmentRequest(name=books, replicator=nobody)),
                    fleet.MoveAssignment(
                        pb.MoveAssignmentRequest(
                            name=found["default.c2"].name, replicator="replicators/full"
                        )
                    ),
                    fleet.RebalanceAssignments(pb.RebalanceAssignmentsRequest(max_moves=-1)),
                )
            ]
        assert answers == [
            ("NOT_FOUND", "REPLICATOR_NOT_FOUND", "name"),
            ("INVALID_ARGUMENT", "INVALID_FIELD", "name"),
            ("INVALID_ARGUMENT", "INVALID_FIELD", "timeout"),
            ("FAILED_PRECONDITION", "NO_CAPACITY", "name"),
            ("NOT_FOUND", "REPLICATOR_NOT_FOUND", "name"),
            ("NOT_FOUND", "REPLICATOR_NOT_FOUND", "name"),
            ("FAILED_PRECONDITION", "NOT_DRAINING", "name"),
            ("NOT_FOUND", "ASSIGNMENT_NOT_FOUND", "name"),
            ("NOT_FOUND", "REPLICATOR_NOT_FOUND", "replicator"),
            ("FAILED_PRECONDITION", "REPLICATOR_FULL", "replicator"),
            ("INVALID_ARGUMENT", "INVALID_FIELD", "max_moves"),
        ]
        assert len(a.held) == 6


async def test_labels_keep_a_task_where_it_wants_to_be(api: Api) -> None:
    near, far = FakeReplicator(api, "near"), FakeReplicator(api, "far")
    near.hello, far.hello = {"labels": {"zone": "a"}}, {"labels": {"zone": "b"}}
    async with far:
        await create(api, replicator_labels={"zone": "a"})
        request = task_service_pb2.ListTaskCollectionsRequest(parent="tasks/copy")

        async def waits() -> bool:
            listed = (await api.tasks.ListTaskCollections(request)).collections
            return bool(listed) and listed[0].reason in ("NOT_PROBED", "NO_MATCHING_REPLICATOR")

        async with asyncio.timeout(20):
            while not await waits():
                await asyncio.sleep(0.05)
        async with near:
            await until(lambda: len(near.held) == 7)
            assert not far.held
            update = task_service_pb2.UpdateTaskRequest(
                task=task_pb2.Task(name="tasks/copy", replicator_labels={"zone": "b"}),
                update_mask=field_mask_pb2.FieldMask(paths=["replicator_labels"]),
            )
            task = (await api.tasks.UpdateTask(update)).task
            assert dict(task.replicator_labels) == {"zone": "b"}
            await until(lambda: len(far.held) == 7)
            assert not near.held


async def test_a_watch_ends_with_its_controller(tmp_path: Path) -> None:
    async with AsyncExitStack() as stays:
        async with controller(tmp_path / "store.db", HandFedSource()) as api:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{api.running.port}")
            await stays.enter_async_context(channel)
            fleet: Any = rpc.FleetServiceStub(channel)
            call = fleet.WatchReplicators(pb.WatchReplicatorsRequest())
            assert (await call.read()).type == pb.WatchReplicatorsResponse.TYPE_BOOKMARK
            reading = asyncio.create_task(refused(call.read()))
        assert (await reading)[:2] == ("UNAVAILABLE", "WATCH_ENDED")
