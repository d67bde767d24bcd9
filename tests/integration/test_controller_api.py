"""The API over gRPC: refusals with their reasons, idempotence, pages, watch, verify."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from google.rpc import error_details_pb2, status_pb2
from milvus_cdc.errors import RetryableError
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.present import task_spec
from milvus_cdc_controller.store.records import encode
from milvus_cdc_controller.store.sqlite import SqliteStore
from milvuscdc.v1 import (
    dead_letters_pb2,
    fleet_service_pb2,
    format_pb2,
    sink_file_pb2,
    sink_kafka_pb2,
    sink_postgres_pb2,
    task_pb2,
    verify_pb2,
)
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_service_pb2 as api_pb

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    task_message,
    until,
    until_task,
)


@pytest.fixture
async def source() -> HandFedSource:
    return HandFedSource(collection(11))


@pytest.fixture
async def api(tmp_path: Path, source: HandFedSource) -> AsyncIterator[Api]:
    async with controller(tmp_path / "store.db", source) as api:
        yield api


async def create(api: Api, task: task_pb2.Task, **other: Any) -> task_pb2.Task:
    answer = await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task, **other))
    return answer.task  # type: ignore[no-any-return]


async def refused(call: Any) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo]:
    """Code and ErrorInfo of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _end(call)
    metadata = {key: value for key, value in caught.value.trailing_metadata() or ()}
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == caught.value.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "milvuscdc.io"
    return caught.value.code(), info


async def _end(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


def broken(**changes: Any) -> task_pb2.Task:
    task = task_message()
    for path, value in changes.items():
        if path == "no_queue":
            task.source.ClearField("nats")
        elif path == "name":
            task.name = value
        elif path == "include":
            task.selection.include[:] = value
        elif path == "endpoint":
            task.source.etcd.endpoints[0] = value
        elif path == "no_start":
            task.ClearField("start")
        elif path == "same":
            task.sink.milvus.uri = task.source.milvus.uri
        elif path == "literal":
            task.sink.milvus.token.SetInParent()
    return task


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"no_queue": 1}, "INVALID_FIELD", "task.source.queue"),
        ({"name": "tasks/Copy"}, "INVALID_FIELD", "task.name"),
        ({"include": []}, "INVALID_FIELD", "task.selection.include"),
        ({"include": ["nodot"]}, "INVALID_FIELD", "task.selection.include[0]"),
        ({"endpoint": "http://x:1"}, "INVALID_FIELD", "task.source.etcd.endpoints[0]"),
        ({"no_start": 1}, "INVALID_FIELD", "task.start"),
        ({"literal": 1}, "INVALID_FIELD", "task.sink.milvus.token.ref"),
        ({"same": 1}, "SINK_IS_SOURCE", "task.sink.milvus.uri"),
    ],
)
async def test_a_bad_task_names_its_field(
    api: Api, changes: dict[str, Any], reason: str, field: str
) -> None:
    request = api_pb.CreateTaskRequest(task=broken(**changes))
    code, info = await refused(api.tasks.CreateTask(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (info.reason, info.metadata["field"]) == (reason, field)
    assert not (await api.tasks.ListTasks(api_pb.ListTasksRequest())).tasks


async def test_an_unreachable_source_or_sink_stores_nothing(
    api: Api, source: HandFedSource
) -> None:
    source.fail(RetryableError("SOURCE_ETCD_UNAVAILABLE", "nobody answers"))
    request = api_pb.CreateTaskRequest(task=task_message())
    code, info = await refused(api.tasks.CreateTask(request))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert (info.reason, info.metadata["field"]) == (
        "SOURCE_ETCD_UNAVAILABLE",
        "task.source.etcd.endpoints",
    )
    source.fail(None)
    async with FakeReplicator(api, "a", serves_jobs=False) as replicator:
        call = api.tasks.CreateTask(request)
        await until(lambda: replicator.jobs)
        failed = pb.JobFailed(
            reason="SINK_UNAVAILABLE", message="down", field="sink.milvus.uri", transient=True
        )
        job_id = replicator.jobs[0].job_id
        await replicator.say(job_update=pb.JobUpdate(job_id=job_id, failed=failed))
        code, info = await refused(call)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert info.metadata["field"] == "task.sink.milvus.uri"
    assert not (await api.tasks.ListTasks(api_pb.ListTasksRequest())).tasks


async def test_validate_only_stores_nothing_and_needs_a_replicator(api: Api) -> None:
    request = api_pb.CreateTaskRequest(task=task_message(), validate_only=True)
    code, info = await refused(api.tasks.CreateTask(request))
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_REPLICATOR")
    async with FakeReplicator(api, "a"):
        shown = (await api.tasks.CreateTask(request)).task
        assert shown.name == "tasks/copy"
        assert not (await api.tasks.ListTasks(api_pb.ListTasksRequest())).tasks


async def test_create_is_idempotent_by_request_id_over_a_restart(
    tmp_path: Path, source: HandFedSource
) -> None:
    request_id = str(uuid.uuid4())
    async with controller(tmp_path / "store.db", source) as api:
        first = await create(api, task_message(), request_id=request_id)
        again = await create(api, task_message(), request_id=request_id)
        assert again.uid == first.uid
    async with controller(tmp_path / "store.db", source) as api:
        again = await create(api, task_message(), request_id=request_id)
        assert again.uid == first.uid
        other = api_pb.CreateTaskRequest(task=task_message("other"), request_id=request_id)
        code, info = await refused(api.tasks.CreateTask(other))
        assert (code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        code, info = await refused(
            api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task_message()))
        )
        assert (code, info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "TASK_EXISTS")
        overlapping = api_pb.CreateTaskRequest(task=task_message("other", ("default.*",)))
        code, info = await refused(api.tasks.CreateTask(overlapping))
        assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SINK_OVERLAP")
        assert info.metadata["task"] == "tasks/copy"


async def test_update_changes_what_it_may(api: Api) -> None:
    task = await create(api, task_message(labels={"team": "a"}))

    def request(*paths: str, **fields: Any) -> api_pb.UpdateTaskRequest:
        wish = task_pb2.Task(name="tasks/copy", **fields)
        mask = field_mask_pb2.FieldMask(paths=paths)
        return api_pb.UpdateTaskRequest(task=wish, update_mask=mask)

    for path, reason in (
        ("source", "FIELD_IMMUTABLE"),
        ("start", "FIELD_IMMUTABLE"),
        ("state", "FIELD_OUTPUT_ONLY"),
        ("nonsense", "UNKNOWN_FIELD_PATH"),
    ):
        code, info = await refused(api.tasks.UpdateTask(request(path)))
        assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    bad = request("selection.include", selection=task_pb2.Selection(include=["x"]))
    code, info = await refused(api.tasks.UpdateTask(bad))
    assert info.metadata["field"] == "task.selection.include[0]"
    wish = task_pb2.Selection(exclude=["default.scratch"])
    changed = (await api.tasks.UpdateTask(request("selection.exclude", selection=wish))).task
    assert list(changed.selection.include) == ["*.*"]
    assert list(changed.selection.exclude) == ["default.scratch"]
    assert dict(changed.labels) == {"team": "a"}
    assert changed.generation == 2
    stale = api_pb.PauseTaskRequest(name="tasks/copy", etag=task.etag)
    code, info = await refused(api.tasks.PauseTask(stale))
    assert (code, info.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    current = api_pb.PauseTaskRequest(name="tasks/copy", etag=changed.etag)
    await api.tasks.PauseTask(current)


async def test_batching_is_changed_part_by_part_and_reaches_the_owner(api: Api) -> None:
    def request(*paths: str, **fields: Any) -> api_pb.UpdateTaskRequest:
        wish = task_pb2.Task(name="tasks/copy", batching=task_pb2.Batching(**fields))
        return api_pb.UpdateTaskRequest(
            task=wish, update_mask=field_mask_pb2.FieldMask(paths=paths)
        )

    async with FakeReplicator(api, "a") as replicator:
        task = task_message()
        task.batching.max_rows = 500
        created = await create(api, task)
        assert created.batching == task.batching
        await until(lambda: len(replicator.held) == 2)
        linger = duration_pb2.Duration(seconds=2)
        await api.tasks.UpdateTask(request("batching.linger", linger=linger))
        cleared = await api.tasks.UpdateTask(request("batching.max_rows"))
        assert cleared.task.batching == task_pb2.Batching(linger=linger)
        found = (await api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/copy"))).task
        assert found.batching == task_pb2.Batching(linger=linger)
        await until(
            lambda: any(
                assign.batching == task_pb2.Batching(linger=linger)
                for assign in replicator.held.values()
            )
        )
        whole = await api.tasks.UpdateTask(request("batching", max_bytes=1000))
        assert whole.task.batching == task_pb2.Batching(max_bytes=1000)
        for path, fields in (
            ("batching.max_rows", {"max_rows": -1}),
            ("batching.linger", {"linger": duration_pb2.Duration(seconds=3601)}),
        ):
            code, info = await refused(api.tasks.UpdateTask(request(path, **fields)))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert info.metadata["field"] == f"task.{path}"
    files = task_message("files")
    files.sink.files.uri = "file:///tmp/x"
    for path in ("max_bytes", "linger"):
        refused_task = task_pb2.Task()
        refused_task.CopyFrom(files)
        if path == "linger":
            refused_task.batching.linger.seconds = 1
        else:
            refused_task.batching.max_bytes = 1
        code, info = await refused(
            api.tasks.CreateTask(api_pb.CreateTaskRequest(task=refused_task))
        )
        assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_FOR_THIS_SINK")
        assert info.metadata["field"] == f"task.batching.{path}"


async def test_connections_decide_how_many_replicators_hold_a_task(tmp_path: Path) -> None:
    source = HandFedSource(collection(11, "a"), collection(12, "b"), collection(13, "c"))
    async with controller(tmp_path / "store.db", source) as api:
        task = task_message()
        task.limits.connections, task.limits.requests_in_flight = 1, 8

        def change(**fields: int) -> api_pb.UpdateTaskRequest:
            wish = task_pb2.Task(name="tasks/copy", limits=task_pb2.Limits(**fields))
            paths = [f"limits.{each}" for each in fields]
            return api_pb.UpdateTaskRequest(
                task=wish, update_mask=field_mask_pb2.FieldMask(paths=paths)
            )

        async with FakeReplicator(api, "one") as one, FakeReplicator(api, "two") as two:
            created = await create(api, task)
            assert created.limits == task.limits
            await until(lambda: 3 in (len(one.collections()), len(two.collections())))
            assert sorted((len(one.collections()), len(two.collections()))) == [0, 3]
            holder, other = (one, two) if one.collections() else (two, one)
            assert holder.limits[created.uid] == task_pb2.Limits(requests_in_flight=8)
            changed = await api.tasks.UpdateTask(change(connections=2))
            assert changed.task.limits.connections == 2
            holder.draining = True
            await until(lambda: len(other.collections()) == 3)
            for path, value in (("connections", -1), ("requests_in_flight", 100_001)):
                _, info = await refused(api.tasks.UpdateTask(change(**{path: value})))
                assert info.metadata["field"] == f"task.limits.{path}"
        postgres = sink_postgres_pb2.PostgresSink(host="h", database="d", user="u")
        for sink, connections, reason in (
            (
                task_pb2.Sink(kafka=sink_kafka_pb2.KafkaSink(brokers=["127.0.0.1:1"])),
                9,
                "NOT_FOR_THIS_SINK",
            ),
            (
                task_pb2.Sink(files=sink_file_pb2.FileSink(uri="file:///tmp/x")),
                9,
                "NOT_FOR_THIS_SINK",
            ),
            (
                task_pb2.Sink(postgres=postgres),
                3,
                "INVALID_FIELD",
            ),
        ):
            wrong = task_message("wrong")
            wrong.sink.CopyFrom(sink)
            wrong.limits.connections = connections
            _, info = await refused(api.tasks.CreateTask(api_pb.CreateTaskRequest(task=wrong)))
            assert (info.reason, info.metadata["field"]) == (reason, "task.limits.connections")


async def test_limits_are_shared_by_those_that_hold_collections(tmp_path: Path) -> None:
    source = HandFedSource(collection(11, "a"), collection(12, "b"), collection(13, "c"))
    async with controller(tmp_path / "store.db", source) as api:
        task = task_message()
        task.limits.rows_per_second, task.limits.bytes_per_second = 101, 1 << 20

        def limits(rows: int, size: int = 0) -> task_pb2.Limits:
            return task_pb2.Limits(rows_per_second=rows, bytes_per_second=size)

        def change(*paths: str, **fields: Any) -> api_pb.UpdateTaskRequest:
            wish = task_pb2.Task(name="tasks/copy", limits=task_pb2.Limits(**fields))
            return api_pb.UpdateTaskRequest(
                task=wish, update_mask=field_mask_pb2.FieldMask(paths=paths)
            )

        async with FakeReplicator(api, "one") as one, FakeReplicator(api, "two") as two:
            created = await create(api, task)
            assert created.limits == task.limits
            uid = created.uid
            half = limits(50, 1 << 19)
            await until(lambda: one.limits.get(uid) == two.limits.get(uid) == half)
            await until(one.collections)
            await until(two.collections)
            two.draining = True
            await until(lambda: one.limits[uid] == task.limits)
            await until(lambda: two.limits[uid] == limits(0))
            changed = await api.tasks.UpdateTask(change("limits.rows_per_second"))
            assert changed.task.limits == limits(0, 1 << 20)
            await until(lambda: one.limits[uid] == limits(0, 1 << 20))
            await api.tasks.UpdateTask(change("limits"))
            found = await api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/copy"))
            assert not found.task.HasField("limits")
            await until(lambda: one.limits[uid] == limits(0))
            _, info = await refused(
                api.tasks.UpdateTask(change("limits.bytes_per_second", bytes_per_second=-1))
            )
            assert info.metadata["field"] == "task.limits.bytes_per_second"


async def test_dead_letters_are_probed_and_reach_the_owner(api: Api) -> None:
    letters = dead_letters_pb2.DeadLetters(
        files=dead_letters_pb2.DeadLetterFiles(uri="file:///mnt/dead")
    )

    def request(**fields: Any) -> api_pb.UpdateTaskRequest:
        wish = task_pb2.Task(name="tasks/copy", **fields)
        mask = field_mask_pb2.FieldMask(paths=["dead_letters"])
        return api_pb.UpdateTaskRequest(task=wish, update_mask=mask)

    async with FakeReplicator(api, "a") as replicator:
        created = await create(api, task_message())
        assert not created.HasField("dead_letters")
        await until(lambda: len(replicator.held) == 2)
        assert not any(assign.HasField("dead_letters") for assign in replicator.held.values())
        probes = len(replicator.jobs)
        changed = await api.tasks.UpdateTask(request(dead_letters=letters))
        assert changed.task.dead_letters == letters
        (job,) = replicator.jobs[probes:]
        assert job.probe.dead_letters == letters
        assert job.probe.sink.WhichOneof("kind") is None
        await until(lambda: any(each.dead_letters == letters for each in replicator.held.values()))
        key = next(key for key in replicator.held if not key.endswith("metadata"))
        seq = await replicator.report(key, rows_inserted=5, rows_refused=3)
        await replicator.acked(key, seq)
        listing = api_pb.ListTaskCollectionsRequest(parent="tasks/copy")
        (shown,) = (await api.tasks.ListTaskCollections(listing)).collections
        assert shown.rows_refused == 3
        assert [c.type for c in shown.conditions] == ["DEAD_LETTERS"]
        assert "3 rows" in shown.conditions[0].message
        cleared = await api.tasks.UpdateTask(request())
        assert not cleared.task.HasField("dead_letters")
        bad = dead_letters_pb2.DeadLetters(files=dead_letters_pb2.DeadLetterFiles(uri="/mnt"))
        for wrong in (bad, dead_letters_pb2.DeadLetters()):
            code, info = await refused(api.tasks.UpdateTask(request(dead_letters=wrong)))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert info.metadata["field"].startswith("task.dead_letters")
        await api.tasks.ResyncCollection(
            api_pb.ResyncCollectionRequest(name="tasks/copy", collection="default.books")
        )
        await until(lambda: replicator.epoch_of("default.books") == 2)
        (shown,) = (await api.tasks.ListTaskCollections(listing)).collections
        assert (shown.rows_refused, shown.rows_inserted) == (0, 5)


async def test_what_is_not_there(api: Api) -> None:
    for call in (
        api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/no")),
        api.tasks.PauseTask(api_pb.PauseTaskRequest(name="tasks/no")),
        api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/no")),
        api.tasks.ListTaskCollections(api_pb.ListTaskCollectionsRequest(parent="tasks/no")),
        api.tasks.VerifyTask(api_pb.VerifyTaskRequest(name="tasks/no")),
        api.fleet.GetReplicator(fleet_service_pb2.GetReplicatorRequest(name="replicators/no")),
    ):
        code, _ = await refused(call)
        assert code is grpc.StatusCode.NOT_FOUND
    await api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/no", allow_missing=True))


async def test_a_thousand_tasks_are_listed_fast_and_in_pages(
    tmp_path: Path, source: HandFedSource
) -> None:
    store = await SqliteStore.open(tmp_path / "many.db")
    writes: dict[str, bytes | None] = {}
    for number in range(1000):
        label = {"kind": "odd" if number % 2 else "even"}
        task = task_message(f"t{number}", sink=f"s{number}:1", labels=label)
        writes[f"tasks/{number}"] = encode(
            TaskRecord(str(number), task_spec(task), probed=True, created=True, paused=True)
        )
    await store.commit(writes)
    await store.close()
    async with controller(tmp_path / "many.db", source) as api:
        await list_many(api)


async def list_many(api: Api) -> None:
    request = api_pb.ListTasksRequest(page_size=1000)
    await api.tasks.ListTasks(request)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        tasks = (await api.tasks.ListTasks(request)).tasks
        seconds.append(time.perf_counter() - begin)
    print(f"1,000 tasks listed in {min(seconds) * 1000:.0f} ms")
    assert len(tasks) == 1000
    names: list[str] = []
    token = ""
    while True:
        page = await api.tasks.ListTasks(
            api_pb.ListTasksRequest(page_size=70, page_token=token, labels={"kind": "odd"})
        )
        names += [task.name for task in page.tasks]
        token = page.next_page_token
        if not token:
            break
    assert len(names) == len(set(names)) == 500
    _, info = await refused(api.tasks.ListTasks(api_pb.ListTasksRequest(page_token="x")))
    assert info.metadata["field"] == "page_token"


async def test_watch_shows_the_snapshot_then_every_change(tmp_path: Path) -> None:
    source = HandFedSource()
    kind = api_pb.WatchTasksResponse
    async with controller(tmp_path / "store.db", source) as api:
        await create(api, task_message())
        watch = api.tasks.WatchTasks(api_pb.WatchTasksRequest())
        events = aiter(watch)
        first = await anext(events)
        assert (first.type, first.task.name) == (kind.TYPE_ADDED, "tasks/copy")
        bookmark = await anext(events)
        assert bookmark.type == kind.TYPE_BOOKMARK
        await api.tasks.PauseTask(api_pb.PauseTaskRequest(name="tasks/copy"))
        async for event in events:
            assert event.type == kind.TYPE_MODIFIED
            if event.task.state == task_pb2.TASK_STATE_PAUSED:
                break
        paused_at = event.revision
        watch.cancel()
        await api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/copy"))
        again = api.tasks.WatchTasks(api_pb.WatchTasksRequest(revision=paused_at))
        async for event in again:
            assert event.revision > paused_at
            if event.type == kind.TYPE_DELETED:
                break
        again.cancel()
    async with controller(tmp_path / "store.db", source) as api:
        old = api.tasks.WatchTasks(api_pb.WatchTasksRequest(revision=paused_at))
        code, info = await refused(old)
        assert (code, info.reason) == (grpc.StatusCode.OUT_OF_RANGE, "WATCH_TOO_OLD")


async def test_verify_waits_for_the_sink_then_compares(api: Api) -> None:
    async with FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        call = api.tasks.VerifyTask(api_pb.VerifyTaskRequest(name="tasks/copy"))
        stream = aiter(call)
        assert (await anext(stream)).progress.phase == "WAITING_FOR_SINK"
        await until(lambda: any(job.HasField("resolve") for job in replicator.jobs))
        assert not any(job.HasField("verify") for job in replicator.jobs)
        point = pb.VchannelReport(
            vchannel=assign.collection.vchannels[0].vchannel,
            read_from=b"p",
            resolved_ts=replicator.source_ts,
        )
        await replicator.report(assign.assignment_id, vchannels=[point])
        await until(lambda: any(job.HasField("verify") for job in replicator.jobs))
        job = next(job for job in replicator.jobs if job.HasField("verify"))
        assert job.verify.max_differences == 10
        assert [(t.source_database, t.sink_collection) for t in job.verify.targets] == [
            ("default", "books")
        ]
        result = verify_pb2.VerifyCollectionResult(
            collection="default.books", equal=True, rows_source=5, rows_sink=5
        )
        for update in (
            pb.VerifyUpdate(progress=verify_pb2.VerifyProgress(phase="COMPARING")),
            pb.VerifyUpdate(collection=result),
            pb.VerifyUpdate(done=pb.VerifyDone()),
        ):
            await replicator.say(job_update=pb.JobUpdate(job_id=job.job_id, verify=update))
        events = [event.WhichOneof("event") async for event in stream]
        assert events[-3:] == ["progress", "collection", "verdict"]


async def test_a_verdict_is_equal_only_when_everything_was_compared(api: Api) -> None:
    async with FakeReplicator(api, "a") as replicator:
        replicator.source_ts = 1
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        point = pb.VchannelReport(vchannel=assign.collection.vchannels[0].vchannel, resolved_ts=5)
        await replicator.report(assign.assignment_id, vchannels=[point])
        call = api.tasks.VerifyTask(api_pb.VerifyTaskRequest(name="tasks/copy"))
        await until(lambda: any(job.HasField("verify") for job in replicator.jobs))
        job = next(job for job in replicator.jobs if job.HasField("verify"))
        # A replicator that ends without having looked proves nothing.
        done = pb.VerifyUpdate(done=pb.VerifyDone())
        await replicator.say(job_update=pb.JobUpdate(job_id=job.job_id, verify=done))
        verdict = [event async for event in call][-1].verdict
        assert (verdict.equal, verdict.collections) == (False, 1)


async def test_verify_is_refused_where_it_could_never_end(api: Api) -> None:
    verify = api_pb.VerifyTaskRequest(name="tasks/copy")
    task = task_message()
    task.source.ClearField("milvus")
    await create(api, task)
    code, info = await refused(api.tasks.VerifyTask(verify))
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SOURCE_API_MISSING")
    await api.tasks.DeleteTask(api_pb.DeleteTaskRequest(name="tasks/copy"))
    await until(lambda: not api.running.loop.controller.world.tasks)
    await create(api, task_message())
    await until(lambda: any(api.running.loop.controller.world.collections.values()))
    code, info = await refused(api.tasks.VerifyTask(verify))
    assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_REPLICATOR")
    await api.tasks.PauseTask(api_pb.PauseTaskRequest(name="tasks/copy"))
    await until_task(api, "tasks/copy", task_pb2.TASK_STATE_PAUSED)
    code, info = await refused(api.tasks.VerifyTask(verify))
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TASK_PAUSED")


@pytest.mark.parametrize(
    ("sink", "holds"),
    [
        (task_pb2.Sink(files=sink_file_pb2.FileSink(uri="file:///rows")), False),
        (task_pb2.Sink(plugin=format_pb2.Plugin(name="other")), True),
    ],
    ids=["files", "a plugin that says so"],
)
async def test_positions_that_the_sink_holds_cannot_be_set(
    api: Api, sink: task_pb2.Sink, holds: bool
) -> None:
    async with FakeReplicator(api, "a") as replicator:
        replicator.holds_checkpoints = holds
        task = task_message()
        task.sink.CopyFrom(sink)
        await create(api, task)
        await until(lambda: "default.books" in replicator.collections())
        await api.tasks.PauseTask(api_pb.PauseTaskRequest(name="tasks/copy"))
        await until_task(api, "tasks/copy", task_pb2.TASK_STATE_PAUSED)
        await until(lambda: not replicator.collections())
        request = api_pb.SetTaskPositionsRequest(name="tasks/copy")
        request.at.FromSeconds(1)
        code, info = await refused(api.tasks.SetTaskPositions(request))
        assert (code, info.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "SINK_HOLDS_CHECKPOINTS",
        )
        assert info.metadata["field"] == "sink"


async def test_a_caller_that_leaves_ends_the_verify_job(api: Api) -> None:
    async with FakeReplicator(api, "a") as replicator:
        replicator.source_ts = 1
        await create(api, task_message())
        await until(lambda: "default.books" in replicator.collections())
        assign = replicator.collections()["default.books"]
        point = pb.VchannelReport(vchannel=assign.collection.vchannels[0].vchannel, resolved_ts=5)
        await replicator.report(assign.assignment_id, vchannels=[point])
        call = api.tasks.VerifyTask(api_pb.VerifyTaskRequest(name="tasks/copy"))
        await until(lambda: any(job.HasField("verify") for job in replicator.jobs))
        call.cancel()
        await until(lambda: replicator.cancelled)


async def test_the_fleet_is_shown(api: Api) -> None:
    async with FakeReplicator(api, "a") as replicator:
        await create(api, task_message())
        await until(lambda: len(replicator.held) == 2)
        request = fleet_service_pb2.ListReplicatorsRequest()
        (shown,) = (await api.fleet.ListReplicators(request)).replicators
        assert shown.name == "replicators/a"
        assert shown.assignments == 2
        assert shown.state == fleet_service_pb2.REPLICATOR_STATE_ALIVE
        listed = await api.fleet.ListAssignments(
            fleet_service_pb2.ListAssignmentsRequest(task="tasks/copy")
        )
        assert {a.collection for a in listed.assignments} == {"", "default.books"}
