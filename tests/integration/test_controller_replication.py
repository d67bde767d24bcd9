"""The controller over its real stream: assignments, progress, hand-over, restart."""

from __future__ import annotations

from pathlib import Path

import pytest
from milvus_cdc.errors import RetryableError
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_pb2
from milvuscdc.v1 import task_service_pb2 as api_pb

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    dropped,
    task_message,
    until,
    until_task,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def create(api: Api, task: task_pb2.Task, **other: object) -> task_pb2.Task:
    request = api_pb.CreateTaskRequest(task=task, **other)  # type: ignore[arg-type]
    return (await api.tasks.CreateTask(request)).task  # type: ignore[no-any-return]


async def collections_of(api: Api, name: str = "tasks/copy") -> list[task_pb2.TaskCollection]:
    answer = await api.tasks.ListTaskCollections(api_pb.ListTaskCollectionsRequest(parent=name))
    return list(answer.collections)


async def test_thin_path(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        replicator.opens = False
        created = await create(api, task_message())
        assert created.uid
        assert created.generation == 1
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        spec = assign.collection
        assert (assign.epoch, spec.opened) == (1, False)
        assert spec.state == pb.CollectionSpec.STATE_CREATED
        assert [(v.read_from, v.resolved_ts, v.horizon_ts) for v in spec.vchannels] == [
            (b"start", 0, 0)
        ]
        # Opened is stored and comes back as the next version of the resource.
        await replicator.report(assign.assignment_id, opened=pb.SinkOpened(sink_collection_id=99))
        await until(lambda: replicator.collections()["default.books"].collection.opened)
        vchannel = spec.vchannels[0].vchannel
        seq = await replicator.report(
            assign.assignment_id,
            rows_inserted=5,
            lag_ms=20,
            vchannels=[
                pb.VchannelReport(
                    vchannel=vchannel, read_from=b"p7", resolved_ts=70, wanted_horizon_ts=500
                )
            ],
        )
        ack = await replicator.acked(assign.assignment_id, seq)
        assert [(h.vchannel, h.horizon_ts) for h in ack.horizons] == [(vchannel, 500)]
        task = await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
        assert (task.progress.collections, task.progress.rows_inserted) == (1, 5)
        assert task.observed_generation == 1
        (shown,) = await collections_of(api)
        assert shown.state == task_pb2.COLLECTION_STATE_RUNNING
        assert shown.replicator == "replicators/a"
        assert shown.vchannels[0].resolved_ts == 70
    async with controller(path, source) as api:
        (stored,) = await collections_of(api)
        assert (stored.rows_inserted, stored.epoch) == (5, 1)
        assert (stored.vchannels[0].resolved_ts, stored.vchannels[0].horizon_ts) == (70, 500)
        assert stored.vchannels[0].read_from == b"p7"


async def test_restart_of_the_controller_moves_nothing(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
    async with controller(path, source) as api:
        other = FakeReplicator(api, "b")
        async with other:
            again = FakeReplicator(api, "a", replicator.instance)
            again.held = replicator.held
            async with again:
                await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
                assert again.collections()["default.books"].epoch == 1
                assert not [line for line in again.history if line.startswith("revoke")]
                assert other.collections() == {}


async def test_a_lost_owner_is_replaced_only_after_its_lease(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source, ttl=3, heartbeat=1) as api:
        first = FakeReplicator(api, "a")
        await first.connect()
        await create(api, task_message())
        await until(lambda: "default.books" in first.collections())
        async with FakeReplicator(api, "b") as second:
            await first.kill()
            await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RETRYING, "REPLICATOR_LOST")
            assert second.collections() == {}
            await until(lambda: "default.books" in second.collections())
            assert second.epoch_of("default.books") >= 2
            # The old owner comes back: what it holds is asked back, and its reports count nothing.
            await first.connect()
            await until(lambda: "revoke 1 STALE_EPOCH" in first.history)
            await first.kill()


async def test_draining_hands_over_at_once(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source, ttl=300) as api:
        async with FakeReplicator(api, "a") as first:
            await create(api, task_message())
            await until(lambda: "default.books" in first.collections())
            async with FakeReplicator(api, "b") as second:
                first.draining = True
                await until(lambda: "default.books" in second.collections())
                assert second.collections()["default.books"].epoch == 2


async def test_a_dropped_collection_is_dropped_once_everything_is_stored(path: Path) -> None:
    old = collection(11)
    source = HandFedSource(old)
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assignment = replicator.collections()["default.books"].assignment_id
        await until(lambda: replicator.held[assignment].collection.opened)
        # Dropped and made again under the same name: the new one waits for the name.
        source.set(dropped(old), collection(12))
        dropping = pb.CollectionSpec.STATE_DROPPING
        await until(lambda: replicator.held[assignment].collection.state == dropping)
        states = {c.collection_id: c for c in await collections_of(api)}
        assert states[12].reason == "WAITING_FOR_NAME"
        assert not replicator.held[assignment].collection.drop_granted
        vchannel = old.vchannels[0].vchannel
        await replicator.report(
            assignment,
            vchannels=[pb.VchannelReport(vchannel=vchannel, resolved_ts=90, closed=True)],
        )
        await until(lambda: replicator.held[assignment].collection.drop_granted)
        await replicator.report(assignment, dropped=True)
        await until(lambda: any(a.collection.collection_id == 12 for a in replicator.held.values()))
        assert [c.collection_id for c in await collections_of(api)] == [12]


async def test_pause_lets_go_and_resume_takes_a_new_epoch(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        await api.tasks.PauseTask(api_pb.PauseTaskRequest(name="tasks/copy"))
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_PAUSED)
        assert replicator.held == {}
        await api.tasks.ResumeTask(api_pb.ResumeTaskRequest(name="tasks/copy"))
        await until(lambda: "default.books" in replicator.collections())
        assert replicator.collections()["default.books"].epoch == 2
        await api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/copy"))
        await until(lambda: not replicator.held)
        await until(lambda: not api.running.loop.controller.world.tasks)


async def test_a_failed_collection_leaves_by_retry_and_by_resync(path: Path) -> None:
    source = HandFedSource(collection(11), collection(12, "films"))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: len(replicator.collections()) == 2)
        books = replicator.collections()["default.books"]
        await replicator.report(
            books.assignment_id,
            state=pb.Progress.STATE_FAILED,
            reason="SCHEMA_MISMATCH",
            message="field x",
            vchannels=[
                pb.VchannelReport(
                    vchannel=books.collection.vchannels[0].vchannel,
                    read_from=b"later",
                    resolved_ts=50,
                )
            ],
        )
        task = await until_task(
            api, "tasks/copy", task_pb2.TASK_STATE_RUNNING, "COLLECTIONS_FAILED"
        )
        assert task.progress.collections_failed == 1
        assert "default.films" in replicator.collections()
        request = api_pb.RetryTaskRequest(name="tasks/copy", collection="default.books")
        await api.tasks.RetryTask(request)
        await until(lambda: replicator.epoch_of("default.books") == 2)
        assert replicator.collections()["default.books"].collection.vchannels[0].resolved_ts == 50
        await api.tasks.ResyncCollection(
            api_pb.ResyncCollectionRequest(name="tasks/copy", collection="default.books")
        )
        await until(lambda: "assign 3" in replicator.history)
        await until(lambda: "default.books" in replicator.collections())
        again = replicator.collections()["default.books"].collection
        assert again.vchannels[0].read_from == b"start"
        assert (again.vchannels[0].resolved_ts, again.vchannels[0].horizon_ts) == (0, 0)


async def test_latest_begins_at_the_log_end_and_new_collections_at_their_start(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api:
        await create(api, task_message(latest=True))
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_CREATING, "NO_REPLICATOR")
        async with FakeReplicator(api, "a") as replicator:
            await until(lambda: "default.books" in replicator.collections())
            spec = replicator.collections()["default.books"].collection
            assert spec.vchannels[0].read_from == b"end"
            source.set(collection(11), collection(12, "films"))
            await until(lambda: "default.films" in replicator.collections())
            spec = replicator.collections()["default.films"].collection
            assert spec.vchannels[0].read_from == b"start"


async def test_a_doubted_source_drops_nothing(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        source.set(cluster_id=8)
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_FAILED, "SOURCE_IDENTITY_CHANGED")
        await until(lambda: not replicator.collections())
        assert len(await collections_of(api)) == 1
        await api.tasks.RetryTask(api_pb.RetryTaskRequest(name="tasks/copy"))
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_FAILED)
        assert not replicator.collections()
        source.set(collection(11), cluster_id=7)
        await api.tasks.RetryTask(api_pb.RetryTaskRequest(name="tasks/copy"))
        await until(lambda: "default.books" in replicator.collections())


async def test_an_unreachable_source_is_shown_and_harms_nobody(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        source.fail(RetryableError("SOURCE_ETCD_UNAVAILABLE", "down"))
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RETRYING, "SOURCE_ETCD_UNAVAILABLE")
        assert "default.books" in replicator.collections()
        source.fail(None)
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RUNNING)


async def test_an_unknown_partition_is_looked_up(path: Path) -> None:
    books = collection(11)
    source = HandFedSource(books)
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        more = collection(
            11, partitions=(*books.partitions, type(books.partitions[0])(7, "new", 300))
        )
        source.set_unseen(more)

        def states() -> dict[int, int]:
            spec = replicator.held[assign.assignment_id].collection
            return {p.partition_id: p.state for p in spec.partitions}

        for partition_id in (7, 8):
            await replicator.say(
                partition_query=pb.PartitionQuery(
                    assignment_id=assign.assignment_id,
                    epoch=assign.epoch,
                    partition_id=partition_id,
                )
            )
        await until(lambda: 7 in states() and 8 in states())
        assert states()[7] == pb.PartitionSpec.STATE_CREATED
        assert states()[8] == pb.PartitionSpec.STATE_DROPPED


async def test_collections_are_spread(path: Path) -> None:
    source = HandFedSource(*(collection(10 + i, f"c{i}") for i in range(8)))
    async with (
        controller(path, source) as api,
        FakeReplicator(api, "a") as a,
        FakeReplicator(api, "b") as b,
    ):
        await create(api, task_message())
        await until(lambda: len(a.collections()) + len(b.collections()) == 8)
        assert len(a.collections()) == len(b.collections()) == 4
        await until(lambda: all(x.collection.opened for x in a.collections().values()))


async def test_while_the_store_is_down_nothing_is_acknowledged_but_heartbeats(path: Path) -> None:
    source = HandFedSource(collection(11))
    async with controller(path, source) as api, FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        first = await replicator.report(assign.assignment_id, rows_inserted=1)
        await replicator.acked(assign.assignment_id, first)
        api.store.down = True
        point = pb.VchannelReport(
            vchannel=assign.collection.vchannels[0].vchannel,
            read_from=b"p",
            resolved_ts=5,
            wanted_horizon_ts=9000,
        )
        seq = await replicator.report(assign.assignment_id, vchannels=[point])
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RETRYING, "STORE_UNAVAILABLE")
        beats = replicator.beats_acked
        await until(lambda: replicator.beats_acked > beats + 3)
        assert replicator.acks[assign.assignment_id].seq < seq
        assert "default.books" in replicator.collections()
        api.store.down = False
        ack = await replicator.acked(assign.assignment_id, seq)
        assert [h.horizon_ts for h in ack.horizons] == [9000]
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_RUNNING)
