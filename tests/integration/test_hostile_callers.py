"""Who lies to a controller or asks too much of it harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc, task_pb2
from milvuscdc.v1 import task_service_pb2 as api_pb

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    task_message,
    until,
)
from tests.integration.test_controller_api import refused

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
FUTURE = 2**63 - 2**18


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    source = HandFedSource(collection(11, "mine"), collection(12, "theirs"))
    limits = {"tasks": 2, "streams": 3, "watches": 2}
    async with controller(tmp_path / "store.db", source, limits=limits) as api:
        yield api


async def checkpoints(api: Api, name: str) -> dict[str, tuple[int, bytes]]:
    request = api_pb.ListTaskCollectionsRequest(parent=f"tasks/{name}")
    answer = await api.tasks.ListTaskCollections(request)
    points = (point for each in answer.collections for point in each.vchannels)
    return {point.vchannel: (point.resolved_ts, point.read_from) for point in points}


def vchannel(assign: pb.Assign, ts: int, read_from: bytes = b"there") -> pb.VchannelReport:
    name = assign.collection.vchannels[0].vchannel
    return pb.VchannelReport(vchannel=name, resolved_ts=ts, read_from=read_from)


async def test_a_replicator_that_lies_harms_only_what_it_holds(api: Api) -> None:
    for name, label in (("mine", "liar"), ("theirs", "honest")):
        task = task_message(name, (f"*.{name}",), replicator_labels={"who": label})
        await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task))
    honest, liar = FakeReplicator(api, "honest"), FakeReplicator(api, "liar")
    honest.hello = {"labels": {"who": "honest"}}
    liar.hello = {"labels": {"who": "liar"}}
    async with honest, liar:
        await until(lambda: honest.collections() and liar.collections())
        own = liar.collections()["default.mine"]
        other = honest.collections()["default.theirs"]
        seq = await honest.report(other.assignment_id, vchannels=[vchannel(other, 2000, b"true")])
        await honest.acked(other.assignment_id, seq)
        true = await checkpoints(api, "theirs")
        assert list(true.values()) == [(2000, b"true")]

        async def lies() -> None:
            wrong = vchannel(other, 5000, b"a lie")
            # Of what another one holds, with its epoch and with newer ones.
            for epoch in (other.epoch, other.epoch + 1, 2**62):
                for state in (pb.Progress.STATE_RUNNING, pb.Progress.STATE_FAILED):
                    await liar.report(
                        other.assignment_id,
                        epoch=epoch,
                        state=state,
                        reason="LIE",
                        vchannels=[wrong],
                        dropped=True,
                    )
                await liar.say(released=pb.Released(assignment_id=other.assignment_id, epoch=epoch))
                await liar.say(
                    nack=pb.Nack(assignment_id=other.assignment_id, epoch=epoch, reason="LIE")
                )
            # Of its own, with the other's log in it, from the future and from nowhere.
            await liar.report(own.assignment_id, vchannels=[wrong])
            await liar.report(own.assignment_id, vchannels=[wrong] * 500)
            await liar.report(own.assignment_id, epoch=own.epoch + 7, renamed_to=pb.SinkName())
            for name in ("", "?", "x" * 10_000, "1/2/3", f"{other.assignment_id}/9", "\0"):
                await liar.report(name, epoch=1, vchannels=[wrong])
                await liar.say(released=pb.Released(assignment_id=name, epoch=1))
                await liar.say(partition_query=pb.PartitionQuery(assignment_id=name, epoch=1))
                await liar.say(job_update=pb.JobUpdate(job_id=name, probe=pb.ProbeResult()))
            await liar.say(hello=pb.Hello(name="honest", instance_id=honest.instance))
            await liar.say(heartbeat=pb.Heartbeat(seq=2**62))

        await lies()
        before = liar.beats_acked
        await until(lambda: liar.beats_acked > before + 2 or liar.ended)
        assert await checkpoints(api, "theirs") == true
        assert list((await checkpoints(api, "mine")).values()) != [(5000, b"a lie")]
        assert honest.collections()["default.theirs"].epoch == other.epoch
        assert not any(line.startswith("revoke") for line in honest.history)
        task = (await api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/theirs"))).task
        assert task.state == task_pb2.TASK_STATE_RUNNING
        # The honest one goes on.
        seq = await honest.report(other.assignment_id, vchannels=[vchannel(other, 3000, b"on")])
        await honest.acked(other.assignment_id, seq)
        assert list((await checkpoints(api, "theirs")).values()) == [(3000, b"on")]


async def test_a_position_from_the_future_is_that_of_its_own_collection_only(api: Api) -> None:
    for name in ("mine", "theirs"):
        task = task_message(name, (f"*.{name}",))
        await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task))
    async with FakeReplicator(api, "r1") as replicator:
        await until(lambda: len(replicator.collections()) == 2)
        held = replicator.collections()
        own, other = held["default.mine"], held["default.theirs"]
        mad = vchannel(own, FUTURE)
        mad.wanted_horizon_ts = 2**64 - 1
        seq = await replicator.report(own.assignment_id, vchannels=[mad], lag_ms=-(2**40))
        await replicator.acked(own.assignment_id, seq)
        seq = await replicator.report(other.assignment_id, vchannels=[vchannel(other, 2000)])
        await replicator.acked(other.assignment_id, seq)
        assert list((await checkpoints(api, "theirs")).values()) == [(2000, b"there")]
        # Whoever asks gets answers.
        assert len((await api.tasks.ListTasks(api_pb.ListTasksRequest())).tasks) == 2
        assert len(await checkpoints(api, "mine")) == 1


async def test_too_many_tasks_streams_and_watches_are_refused(api: Api) -> None:
    for name in ("mine", "theirs"):
        task = task_message(name, (f"*.{name}",))
        await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task))
    third = api_pb.CreateTaskRequest(task=task_message("third", ("*.third",)))
    code, info = await refused(api.tasks.CreateTask(third))
    assert (code, info.reason) == (EXHAUSTED, "TOO_MANY_TASKS")
    await api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/mine"))
    await api.tasks.CreateTask(third)

    async with FakeReplicator(api, "r1") as honest:
        stub: Any = replication_service_pb2_grpc.ReplicationServiceStub(api.channel)
        # They say nothing, and take a place all the same.
        silent = [stub.Connect() for _ in range(2)]
        for call in silent:
            await call.initial_metadata() if call.done() else await asyncio.sleep(0.05)
        one_more = stub.Connect()
        code, info = await refused(one_more)
        assert (code, info.reason) == (EXHAUSTED, "TOO_MANY_STREAMS")
        before = honest.beats_acked
        await until(lambda: honest.beats_acked > before + 1)
        for call in silent:
            call.cancel()

    watches = [api.tasks.WatchTasks(api_pb.WatchTasksRequest()) for _ in range(2)]
    for watch in watches:
        await watch.read()
    code, info = await refused(api.tasks.WatchTasks(api_pb.WatchTasksRequest()))
    assert (code, info.reason) == (EXHAUSTED, "TOO_MANY_WATCHES")
    for watch in watches:
        watch.cancel()
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                call = api.tasks.WatchTasks(api_pb.WatchTasksRequest())
                await call.read()
                call.cancel()
                break
            await asyncio.sleep(0.05)


async def test_globs_that_cost_too_much_are_refused(api: Api) -> None:
    heavy = [f"*{'a?' * 200}{n}.*" for n in range(40)]
    create = api_pb.CreateTaskRequest(task=task_message("mine", tuple(heavy)))
    code, info = await refused(api.tasks.CreateTask(create))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SELECTION_TOO_COMPLEX")
    many = task_message("mine", tuple(f"a{n}*.b" for n in range(50)))
    many.rename.extend(task_pb2.NameRule(**{"from": f"x.y{n}", "to": f"x.z{n}"}) for n in range(50))
    code, info = await refused(api.tasks.CreateTask(api_pb.CreateTaskRequest(task=many)))
    assert info.reason == "SELECTION_TOO_COMPLEX"
    # Hundreds of names, and as many globs of usual length as the rules allow, are taken.
    usual = task_message("mine", tuple(f"shop.products_{n}" for n in range(300)))
    await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=usual))
    mask = field_mask_pb2.FieldMask(paths=["selection"])
    changed = api_pb.UpdateTaskRequest(task=task_message("mine", tuple(heavy)), update_mask=mask)
    code, info = await refused(api.tasks.UpdateTask(changed))
    assert info.reason == "SELECTION_TOO_COMPLEX"


async def test_a_message_beyond_the_limit_ends_its_call_only(api: Api) -> None:
    await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task_message("mine")))
    target = f"127.0.0.1:{api.running.port}"
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        call: Any = channel.unary_unary("/milvuscdc.v1.TaskService/GetTask")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\0" * (65 * 2**20))
        assert caught.value.code() == EXHAUSTED
    await api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/mine"))
