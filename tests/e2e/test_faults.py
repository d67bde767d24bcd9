"""Bad input and broken surroundings: a clear word, nothing lost, and a way out."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import nats
import pytest
from milvus_cdc.etcd import EtcdClient, KeyRange, PutOp
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import DataType, FieldSchema, MilvusClient

from tests.contract.queues import KafkaQueue, NatsQueue
from tests.e2e.load import Shape, create_collection, make_row
from tests.e2e.pair import TASK, Pair, error_info
from tests.e2e.test_crashes import LOST_PEER
from tests.servers import Stack
from tests.servers.stack import SourceQueue

SIMPLE = Shape(
    "simple",
    (
        FieldSchema("id", DataType.INT64, is_primary=True),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=4),
    ),
)
FAILED = task_pb2.COLLECTION_STATE_FAILED


def source_with(stack: Stack, database: str, *names: str, rows: int = 50) -> MilvusClient:
    """A database at the source with simple collections of `rows` rows."""
    MilvusClient(uri=stack.source.uri).create_database(database)
    client = MilvusClient(uri=stack.source.uri, db_name=database)
    rng = random.Random(database)
    for name in names:
        shape = Shape(name, SIMPLE.fields)
        create_collection(client, shape)
        client.insert(name, [make_row(shape, rng, n) for n in range(rows)])
    return client


def sink_of(stack: Stack, database: str) -> MilvusClient:
    plain = MilvusClient(uri=stack.sink.uri)
    if database not in plain.list_databases():
        plain.create_database(database)
    return MilvusClient(uri=stack.sink.uri, db_name=database)


def test_one_collection_that_does_not_fit_fails_alone_and_retry_leads_out(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source_with(nats_stack, "fault_fit", "good", "misfit", "full")
    sink = sink_of(nats_stack, "fault_fit")
    wrong = Shape(
        "misfit",
        (SIMPLE.fields[0], FieldSchema("vector", DataType.FLOAT_VECTOR, dim=8)),
    )
    create_collection(sink, wrong)
    full = Shape("full", SIMPLE.fields)
    create_collection(sink, full)
    sink.insert("full", [make_row(full, random.Random(1), 9_999)])
    with Pair(nats_stack, tmp_path) as pair:
        pair.create("fault_fit.*")
        pair.wait_running("fault_fit.good")
        pair.wait(
            "two failed",
            lambda: [c.state for c in pair.collections().values()].count(FAILED) == 2,
        )
        assert pair.prove("fault_fit.good") == 50
        misfit = pair.collections()["fault_fit.misfit"]
        assert misfit.reason == "SCHEMA_MISMATCH"
        assert "'vector'" in misfit.message
        assert "dim" in misfit.message
        assert pair.collections()["fault_fit.full"].reason == "COLLECTION_EXISTS"
        assert sink.query("full", "id == 9999", output_fields=["id"]), "what was there is untouched"

        sink.drop_collection("misfit")
        sink.drop_collection("full")
        pair.tasks.RetryTask(task_service_pb2.RetryTaskRequest(name=TASK))
        pair.wait_running("fault_fit.good", "fault_fit.misfit", "fault_fit.full")
        assert pair.prove() == 150
        pair.quiet('"event": "collection failed"', "SCHEMA_MISMATCH", "COLLECTION_EXISTS")


def test_adopting_what_is_there_ends_equal_for_the_rows_of_the_source(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source_with(nats_stack, "fault_adopt", "simple")
    sink = sink_of(nats_stack, "fault_adopt")
    create_collection(sink, SIMPLE)
    rng = random.Random("other values")
    sink.insert("simple", [make_row(SIMPLE, rng, n) for n in range(25)])
    with Pair(nats_stack, tmp_path) as pair:
        task = pair.task("fault_adopt.*")
        task.adopt_existing = True
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task))
        pair.wait_running("fault_adopt.simple")
        assert pair.prove() == 50
        assert pair.collections()["fault_adopt.simple"].rows_inserted == 0, "adopted means upserts"


def test_a_sink_collection_dropped_by_hand_is_said_and_resync_fills_it_anew(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source = source_with(nats_stack, "fault_gone", "simple")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create("fault_gone.*")
        pair.wait_running("fault_gone.simple")
        assert pair.prove() == 50
        sink_of(nats_stack, "fault_gone").drop_collection("simple")
        source.insert("simple", [make_row(SIMPLE, random.Random(3), 777)])
        pair.wait(
            "failed", lambda: pair.collections()["fault_gone.simple"].state == FAILED, seconds=30
        )
        assert pair.collections()["fault_gone.simple"].reason == "SINK_COLLECTION_MISSING"
        pair.tasks.ResyncCollection(
            task_service_pb2.ResyncCollectionRequest(name=TASK, collection="fault_gone.simple")
        )
        pair.wait_running("fault_gone.simple")
        assert pair.prove() == 51
        pair.quiet('"event": "collection failed"', "SINK_COLLECTION_MISSING")


def test_pause_and_resume_lose_and_double_nothing(nats_stack: Stack, tmp_path: Path) -> None:
    source = source_with(nats_stack, "fault_pause", "simple")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create("fault_pause.*")
        pair.wait_running("fault_pause.simple")
        key = 1_000
        for _ in range(3):
            source.insert(
                "simple", [make_row(SIMPLE, random.Random(key), key + n) for n in range(20)]
            )
            pair.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=TASK))
            pair.wait("paused", lambda: pair.get().state == task_pb2.TASK_STATE_PAUSED)
            key += 100
            source.insert(
                "simple", [make_row(SIMPLE, random.Random(key), key + n) for n in range(20)]
            )
            pair.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=TASK))
            pair.wait_running("fault_pause.simple")
            key += 100
        assert pair.prove() == 50 + 6 * 20
        pair.quiet()


def test_latest_takes_only_what_comes_after(nats_stack: Stack, tmp_path: Path) -> None:
    source = source_with(nats_stack, "fault_latest", "simple")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create("fault_latest.*", latest=True)
        pair.wait_running("fault_latest.simple")
        source.insert("simple", [make_row(SIMPLE, random.Random(5), n) for n in range(500, 510)])
        pair.wait("ten rows", lambda: pair.collections()["fault_latest.simple"].rows_inserted == 10)
        [result] = pair.verify("fault_latest.simple")
        assert (result.rows_source, result.rows_sink, result.missing) == (60, 10, 50)
        assert not result.equal


async def test_a_log_that_no_longer_reaches_back_fails_at_once_and_names_what_is_left(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source_with(nats_stack, "fault_log", "simple")
    channels = MilvusClient(uri=nats_stack.source.uri, db_name="fault_log")
    described = channels.describe_collection("simple")
    assert described
    connection = await nats.connect(nats_stack.source.nats_url)
    stream = connection.jetstream()
    with Pair(nats_stack, tmp_path) as pair:
        # Every topic loses its oldest messages, as retention would do it.
        for info in await stream.streams_info():
            if "rootcoord-dml" in str(info.config.name):
                await stream.purge_stream(str(info.config.name), seq=info.state.last_seq)
        await connection.close()
        pair.create("fault_log.*")
        pair.wait("failed", lambda: [c.state for c in pair.collections().values()] == [FAILED])
        [collection] = pair.collections().values()
        assert collection.reason == "LOG_TRUNCATED"
        assert any(character.isdigit() for character in collection.message)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mq", ["natsmq", pytest.param("kafka", marks=pytest.mark.kafka)])
async def test_a_topic_made_again_while_no_replicator_runs_is_noticed(
    request: pytest.FixtureRequest, nats_stack: Stack, tmp_path: Path, mq: SourceQueue
) -> None:
    if mq == "kafka":
        request.getfixturevalue("kafka_available")
    # A source of its own: one whose topic was deleted is of no use to anybody.
    alone = Stack(tmp_path / "stack", mq=mq, sink=nats_stack.sink)
    with alone as stack, Pair(stack, tmp_path) as pair:
        source_with(stack, "fault_reset", "simple")
        pair.create("fault_reset.*")
        pair.wait_running("fault_reset.simple")
        assert pair.prove() == 50
        [vchannel] = pair.collections()["fault_reset.simple"].vchannels
        topic = vchannel.vchannel.rpartition("_")[0]
        [replicator] = pair.replicators
        replicator.stop()

        queue = (KafkaQueue if mq == "kafka" else NatsQueue)(stack, topic)
        first = (await queue.source.log_range(topic)).first
        reader = await queue.source.open(topic, first)
        payloads: list[bytes] = []
        while entries := await reader.read(1 << 20, 1.0):
            payloads += [entry.payload for entry in entries]
            if len(payloads) > 200:
                break
        await reader.close()
        await queue.delete()
        await queue.create()
        # Longer than the old one, and every message decodes: only the topic itself is another.
        await queue.append(*payloads * 5)
        await queue.source.close()

        replicator.start()
        collection = "fault_reset.simple"
        pair.wait("failed", lambda: pair.collections()[collection].state == FAILED)
        assert pair.collections()[collection].reason == "LOG_RESET"
        assert topic in pair.collections()[collection].message
        # Nor is its beginning in the new topic: nothing is given up for it at the sink.
        before = pair.collections()[collection].epoch
        pair.tasks.ResyncCollection(
            task_service_pb2.ResyncCollectionRequest(name=TASK, collection=collection)
        )
        pair.wait("tried again", lambda: pair.collections()[collection].epoch > before)
        pair.wait("failed", lambda: pair.collections()[collection].state == FAILED)
        assert pair.collections()[collection].reason == "LOG_RESET"
        sink = sink_of(stack, "fault_reset")
        assert sink.query("simple", "", output_fields=["count(*)"]) == [{"count(*)": 50}]
        pair.quiet('"event": "collection failed"', "LOG_RESET", *LOST_PEER)


@pytest.mark.timeout(200)
async def test_a_wiped_source_etcd_empties_no_sink(nats_stack: Stack, tmp_path: Path) -> None:
    source_with(nats_stack, "fault_wipe", "one", "two")
    etcd = EtcdClient([nats_stack.etcd.endpoint])
    root = nats_stack.source.root_path
    listing = await etcd.list(KeyRange.prefix(f"{root}/"))
    copies = [
        PutOp("copied" + item.key.removeprefix(root), item.value)
        for item in listing.kvs
        if "/meta/" in item.key or "/kv/" in item.key
    ]
    for start in range(0, len(copies), 100):
        await etcd.txn([], copies[start : start + 100])
    with Pair(nats_stack, tmp_path) as pair:
        task = pair.task("fault_wipe.*")
        task.source.etcd.root_path = "copied"
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task))
        pair.wait_running("fault_wipe.one", "fault_wipe.two")
        await etcd.delete(KeyRange.prefix("copied/"))
        pair.wait("the task failed", lambda: pair.get().state == task_pb2.TASK_STATE_FAILED)
        assert pair.get().reason.startswith("SOURCE_"), pair.get()
        await asyncio.sleep(3)
        sink = sink_of(nats_stack, "fault_wipe")
        assert sorted(sink.list_collections()) == ["one", "two"], "nothing was dropped"
    await etcd.close()


def refused(call: object) -> tuple[grpc.StatusCode, str, str]:
    """Status, reason and field of an API error."""
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    info = error_info(caught.value)
    assert info.domain == "milvuscdc.io"
    return caught.value.code(), info.reason, info.metadata.get("field", "")


def test_bad_requests_are_refused_with_a_reason_and_store_nothing(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source_with(nats_stack, "fault_input", "simple")
    with Pair(nats_stack, tmp_path) as pair:

        def create(task: task_pb2.Task, **options: object) -> object:
            request = task_service_pb2.CreateTaskRequest(task=task, **options)  # type: ignore[arg-type]
            return lambda: pair.tasks.CreateTask(request, timeout=30)

        invalid = grpc.StatusCode.INVALID_ARGUMENT
        task = pair.task("fault_input.*")
        task.source.ClearField("nats")
        assert refused(create(task)) == (invalid, "INVALID_FIELD", "task.source.queue")
        task = pair.task("no dot here")
        code, reason, field = refused(create(task))
        assert (code, reason) == (invalid, "INVALID_FIELD")
        assert field.startswith("task.selection.include")
        task = pair.task()
        assert refused(create(task))[2].startswith("task.selection.include")
        task = pair.task("fault_input.*", name="tasks/UPPER")
        assert refused(create(task))[2] == "task.name"
        task = pair.task("fault_input.*")
        task.sink.milvus.uri = nats_stack.source.uri
        assert refused(create(task))[1] == "SINK_IS_SOURCE"
        task = pair.task("fault_input.*")
        task.sink.milvus.uri = "http://127.0.0.1:1"
        code, reason, field = refused(create(task, validate_only=True))
        assert (reason, field) == ("SINK_UNAVAILABLE", "task.sink.milvus")
        task = pair.task("fault_input.*")
        task.sink.milvus.token.env = "HOME"
        assert refused(create(task, validate_only=True))[1] == "SECRET_NOT_ALLOWED"
        assert not pair.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks

        pair.create("fault_input.*")
        other = pair.task("fault_*.simple", name="tasks/other")
        assert refused(create(other))[1] == "SINK_OVERLAP"
        stale = task_service_pb2.PauseTaskRequest(name=TASK, etag="stale")
        assert refused(lambda: pair.tasks.PauseTask(stale))[:2] == (
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
        )
        unknown = task_service_pb2.GetTaskRequest(name="tasks/unknown")
        assert refused(lambda: pair.tasks.GetTask(unknown))[0] is grpc.StatusCode.NOT_FOUND
        update = task_service_pb2.UpdateTaskRequest(task=pair.task("fault_input.*"))
        update.task.sink.milvus.uri = "http://127.0.0.1:2"
        update.update_mask.paths.append("sink")
        assert refused(lambda: pair.tasks.UpdateTask(update))[1] == "FIELD_IMMUTABLE"
        assert len(pair.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks) == 1


def test_the_same_request_id_makes_one_task(nats_stack: Stack, tmp_path: Path) -> None:
    with Pair(nats_stack, tmp_path) as pair:
        request = task_service_pb2.CreateTaskRequest(
            task=pair.task("fault_twice.*"), request_id="3d0b1c84-6f0a-4d0c-9a54-0d6f1b3a7c11"
        )
        first = pair.tasks.CreateTask(request, timeout=30).task
        pair.controller.restart(hard=True)
        assert pair.tasks.CreateTask(request, timeout=30).task.uid == first.uid
        request.task.selection.include.append("more.*")
        with pytest.raises(grpc.RpcError) as caught:
            pair.tasks.CreateTask(request, timeout=30)
        assert error_info(caught.value).reason == "REQUEST_ID_REUSED"
