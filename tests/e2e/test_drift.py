"""What others change at the sink is mended or told; what the source changes is carried, whoever
dies in between.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import DataType, FieldSchema, MilvusClient, MilvusException
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from tests.e2e.load import Shape, create_collection, make_row
from tests.e2e.metadata import differences, snapshot
from tests.e2e.pair import TASK, Pair
from tests.e2e.test_crashes import LOST_PEER
from tests.e2e.versions import Route
from tests.servers import MilvusLiteServer, Stack
from tests.servers.services import ReplicatorProcess

SHAPE = Shape(
    "things",
    (
        FieldSchema("id", DataType.INT64, is_primary=True),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=4),
        FieldSchema("number", DataType.INT64),
        FieldSchema("other", DataType.INT64),
    ),
)
TTL, MMAP = "collection.ttl.seconds", "mmap.enabled"
EVERY_SECONDS = 3
ROWS = 60


def drifting(stack: Stack | Route, folder: Path, **settings: Any) -> Pair:
    """A pair whose replicator looks at the sink often."""
    pair = Pair(stack, folder, replicators=0)
    pair.replicators = [
        ReplicatorProcess(
            folder,
            pair.controller.address,
            "replicator-0",
            **{"reconcileSeconds": EVERY_SECONDS, **settings},
        )
    ]
    return pair


class Side:
    """One Milvus, in one database."""

    def __init__(self, uri: str, database: str) -> None:
        self.uri = uri
        self.database = database
        self.client = MilvusClient(uri=uri, db_name=database)

    def alter(self, name: str = "things", **properties: str) -> None:
        pairs = [common_pb2.KeyValuePair(key=k, value=v) for k, v in properties.items()]
        request = milvus_pb2.AlterCollectionRequest(
            db_name=self.database, collection_name=name, properties=pairs
        )
        # By hand: pymilvus of today looks for what 2.3 does not have.
        with milvus_channel(self.uri) as stub:
            status = stub.AlterCollection(request, timeout=20)
        assert status.error_code == 0, status

    def index(self, field: str, index_type: str, name: str) -> None:
        """Returns at once: somebody may drop it again before it is built."""
        request = milvus_pb2.CreateIndexRequest(
            db_name=self.database,
            collection_name="things",
            field_name=field,
            index_name=name,
            extra_params=[common_pb2.KeyValuePair(key="index_type", value=index_type)],
        )
        with milvus_channel(self.uri) as stub:
            status = stub.CreateIndex(request, timeout=20)
        assert status.error_code == 0, status


@contextmanager
def milvus_channel(uri: str) -> Iterator[Any]:
    with grpc.insecure_channel(uri.removeprefix("http://")) as channel:
        yield milvus_pb2_grpc.MilvusServiceStub(channel)


def make_source(stack: Stack, database: str, *names: str) -> Side:
    MilvusClient(uri=stack.source.uri).create_database(database)
    side = Side(stack.source.uri, database)
    rng = random.Random(database)
    for name in names or ("things",):
        shape = Shape(name, SHAPE.fields)
        create_collection(side.client, shape)
        for partition in ("red", "blue"):
            side.client.create_partition(name, partition)
        rows = [make_row(shape, rng, n) for n in range(ROWS)]
        for at, partition in enumerate(("_default", "red", "blue")):
            side.client.insert(name, rows[at::3], partition_name=partition)
    return side


def same(stack: Stack, database: str) -> Callable[[], bool]:
    def check() -> bool:
        return not left(stack, database)

    return check


def left(stack: Stack, database: str) -> list[str]:
    try:
        source, sink = (snapshot(each.uri, [database]) for each in (stack.source, stack.sink))
    except RuntimeError as error:
        return [str(error)]  # a server that is loading may refuse a question
    return differences(source, sink)


def command(pair: Pair, *args: str) -> tuple[int, str]:
    """Exit code and output of `milvus-cdc`."""
    done = subprocess.run(
        [sys.executable, "-m", "milvus_cdc.cli.main", *args],
        env={**os.environ, "MILVUS_CDC_CONTROLLER": pair.controller.address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def diff(pair: Pair) -> set[tuple[str, str, str]]:
    """(action, kind, name) as `task diff` tells them."""
    code, said = command(pair, "task", "diff", TASK, "-o", "json")
    events = [json.loads(line) for line in said.splitlines() if line.strip()]
    found = {
        (e["difference"]["action"].removeprefix("ACTION_"), e["difference"]["kind"],
         e["difference"].get("name", ""))
        for e in events
        if "difference" in e
    }  # fmt: skip
    assert code == (1 if found else 0), said
    return found


def set_drift(pair: Pair, drift: task_pb2.Drift.ValueType) -> None:
    pair.tasks.UpdateTask(
        task_service_pb2.UpdateTaskRequest(
            task=task_pb2.Task(name=TASK, drift=drift),
            update_mask=field_mask_pb2.FieldMask(paths=["drift"]),
        ),
        timeout=20,
    )


def conditions(pair: Pair, name: str) -> dict[str, str]:
    return {c.type: c.message for c in pair.collections()[name].conditions}


def meddle(sink: Side) -> None:
    """Everything that a person with a shell might do to a sink, but renames."""
    client = sink.client

    def while_released(what: Callable[[], object]) -> None:
        # Somebody loads it again and again.
        for _ in range(20):
            client.release_collection("things")
            try:
                what()
                return
            except MilvusException as error:
                if "release" not in str(error):
                    raise
        raise AssertionError("never released for long enough")

    while_released(lambda: client.drop_index("things", "by_number"))
    sink.index("other", "STL_SORT", "of_somebody")
    client.create_partition("things", "of_somebody")
    while_released(lambda: client.drop_partition("things", "blue"))
    sink.alter(**{TTL: "77", MMAP: "true"})
    client.release_collection("things")


MEDDLED = {
    ("CREATE", "index", "by_number"),
    ("DROP", "index", "of_somebody"),
    ("DROP", "partition", "of_somebody"),
    ("CREATE", "partition", "blue"),
    ("ALTER", "property", TTL),
    ("DROP", "property", MMAP),
    ("CREATE", "load", ""),
}


@pytest.mark.timeout(240)
def test_what_somebody_changes_at_the_sink_is_mended(nats_stack: Stack, tmp_path: Path) -> None:
    source = make_source(nats_stack, "drift_mend")
    source.client.release_collection("things")
    source.index("number", "STL_SORT", "by_number")
    source.client.load_collection("things")
    source.alter(**{TTL: "864000"})
    with drifting(nats_stack, tmp_path) as pair:
        pair.create("drift_mend.*")
        pair.wait_running("drift_mend.things")
        pair.wait("as at the source", same(nats_stack, "drift_mend"))
        assert pair.prove() == ROWS
        assert diff(pair) == set()

        sink = Side(nats_stack.sink.uri, "drift_mend")
        meddle(sink)

        # What cannot be deleted at 2.3 gets the value that is as good as none.
        def mended() -> bool:
            lines = left(nats_stack, "drift_mend")
            return not [line for line in lines if MMAP not in line]

        pair.wait("mended", mended)
        pair.wait("nothing left", lambda: diff(pair) == set())
        # The partition is back and its rows are not: that is said until they are.
        assert "blue" in conditions(pair, "drift_mend.things")["PARTITION_EMPTIED"]
        [replicator] = pair.replicators
        replicator.kill()
        replicator.start()
        pair.wait_running("drift_mend.things")
        assert "PARTITION_EMPTIED" in conditions(pair, "drift_mend.things")
        pair.tasks.ResyncCollection(
            task_service_pb2.ResyncCollectionRequest(name=TASK, collection="drift_mend.things")
        )
        pair.wait(
            "filled anew",
            lambda: "PARTITION_EMPTIED" not in conditions(pair, "drift_mend.things"),
        )
        pair.wait("as at the source", same(nats_stack, "drift_mend"))
        assert pair.prove() == ROWS

        # Renamed by hand: found by its id, and rows that came meanwhile arrive.
        sink.client.rename_collection("things", "mine_now")
        source.client.insert("things", [make_row(SHAPE, random.Random(7), 5_000)])
        pair.wait("renamed back", same(nats_stack, "drift_mend"))
        pair.wait_running("drift_mend.things")
        assert pair.prove() == ROWS + 1
        pair.quiet(*LOST_PEER)


@pytest.mark.timeout(240)
def test_drift_is_told_and_left_alone_while_the_source_is_followed(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source = make_source(nats_stack, "drift_tell")
    source.client.release_collection("things")
    source.index("number", "STL_SORT", "by_number")
    source.client.load_collection("things")
    source.alter(**{TTL: "864000"})
    collection = "drift_tell.things"
    with drifting(nats_stack, tmp_path) as pair:
        pair.create("drift_tell.*")
        pair.wait_running(collection)
        pair.wait("as at the source", same(nats_stack, "drift_tell"))
        assert command(pair, "task", "update", TASK, "--drift", "report")[0] == 0
        assert pair.get().drift == task_pb2.DRIFT_REPORT
        sink = Side(nats_stack.sink.uri, "drift_tell")
        meddle(sink)
        pair.wait("told", lambda: "DRIFT" in conditions(pair, collection))
        assert diff(pair) == MEDDLED
        # A new owner does not take it for what the source changed.
        for process in (pair.controller, *pair.replicators):
            process.kill()
            process.start()
        pair.wait("told again", lambda: "DRIFT" in conditions(pair, collection))
        # What the source changes is carried nevertheless.
        source.client.create_partition("things", "green")
        source.client.insert(
            "things", [make_row(SHAPE, random.Random(8), 6_000)], partition_name="green"
        )
        source.client.release_collection("things")
        source.client.drop_index("things", "by_number")
        source.index("number", "STL_SORT", "second")
        pair.wait("a new index", lambda: "second" in sink.client.list_indexes("things"))
        assert {"red", "green", "of_somebody"} <= set(sink.client.list_partitions("things"))
        assert "blue" not in sink.client.list_partitions("things")
        assert "of_somebody" in sink.client.list_indexes("things")
        told = diff(pair)
        assert {d for d in told if d[1] != "load"} == {
            d for d in MEDDLED if d[1] != "load" and d[2] != "by_number"
        }
        source.client.load_collection("things")
        assert command(pair, "task", "update", TASK, "--drift", "repair")[0] == 0
        pair.wait("mended", lambda: diff(pair) == set())
        pair.wait("no longer told", lambda: "DRIFT" not in conditions(pair, collection))
        pair.quiet(*LOST_PEER, "REPLICATOR_LOST")


@pytest.mark.timeout(180)
def test_properties_arrive_though_the_metadata_hides_them(
    nats_stack: Stack, tmp_path: Path
) -> None:
    source = make_source(nats_stack, "drift_props")
    # Looked at once an hour: what arrives in seconds arrives because of the change.
    with drifting(nats_stack, tmp_path, reconcileSeconds=3600) as pair:
        pair.create("drift_props.*")
        pair.wait_running("drift_props.things")
        pair.wait("as at the source", same(nats_stack, "drift_props"))
        for change in ({TTL: "1000000"}, {MMAP: "true"}, {TTL: "2000000", MMAP: "false"}):
            source.alter(**change)
            pair.wait(f"{change} at the sink", same(nats_stack, "drift_props"), seconds=20)
        assert pair.prove() == ROWS
        pair.quiet()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("drift", "victim"),
    [
        ("repair", "replicator"),
        ("report", "controller"),
        pytest.param("repair", "controller", marks=pytest.mark.soak),
        pytest.param("report", "replicator", marks=pytest.mark.soak),
    ],
)
def test_changes_arrive_once_whoever_is_killed(
    nats_stack: Stack, tmp_path: Path, victim: str, drift: str
) -> None:
    database = f"drift_kill_{victim}_{drift}"
    source = make_source(nats_stack, database)
    rng = random.Random(victim)
    with drifting(nats_stack, tmp_path) as pair:
        task = pair.task(f"{database}.*")
        task.drift = task_pb2.Drift.Value(f"DRIFT_{drift.upper()}")
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=30)
        pair.wait_running(f"{database}.things")
        pair.wait("as at the source", same(nats_stack, database))
        process = pair.controller if victim == "controller" else pair.replicators[0]

        def change(number: int) -> None:
            source.client.release_collection("things")
            if number:
                source.client.drop_index("things", f"n{number - 1}")
            source.index("number", "STL_SORT", f"n{number}")
            source.alter(**{TTL: str(1_000_000 + number)})
            source.client.create_partition("things", f"p{number}")
            if number % 3:
                source.client.load_collection("things")

        for number in range(4):
            if number % 2:
                process.kill()  # it never hears of the change before it begins anew
                change(number)
                process.start()
            else:
                change(number)
                # Somewhere between the wish, what the sink does, and the note of it.
                pair.wait("any moment", lambda: rng.random() < 0.4)
                process.kill()
                process.start()
            pair.wait(f"change {number}", same(nats_stack, database), seconds=90)
        pair.wait("nothing to do", lambda: diff(pair) == set())
        assert "DRIFT" not in conditions(pair, f"{database}.things")
        assert "PARTITION_EMPTIED" not in conditions(pair, f"{database}.things")


@pytest.mark.timeout(240)
def test_an_index_that_the_sink_does_not_know_stops_nothing_else(
    nats_stack: Stack, tmp_path: Path
) -> None:
    client = MilvusClient(uri=nats_stack.source.uri)
    source = Side(nats_stack.source.uri, "default")
    # milvus-lite has no partitions: one and the same shape without any.
    for name in ("things", "other_things"):
        shape = Shape(name, SHAPE.fields)
        create_collection(client, shape)
        client.insert(name, [make_row(shape, random.Random(name), n) for n in range(ROWS)])
    client.release_collection("things")
    source.index("number", "STL_SORT", "by_number")
    client.load_collection("things")
    with MilvusLiteServer(tmp_path / "lite", "2.5.1") as lite:
        route = Route(nats_stack.etcd, nats_stack.source, lite, nats_stack.kafka)
        with drifting(route, tmp_path) as pair:
            pair.create("default.things", "default.other_things")

            def told() -> bool:
                found = pair.collections().get("default.things", task_pb2.TaskCollection())
                return (
                    found.state == task_pb2.COLLECTION_STATE_RETRYING
                    and found.reason == "UNSUPPORTED_BY_SINK"
                    and "by_number" in found.message
                )

            pair.wait("the refusal is told", told)
            pair.wait_running("default.other_things")
            client.insert("things", [make_row(SHAPE, random.Random(9), 9_000)])
            assert pair.prove() == 2 * ROWS + 1
            sink = MilvusClient(uri=lite.uri)
            assert "vector" in " ".join(sink.list_indexes("things"))
            assert diff(pair) == {("CREATE", "index", "by_number")}
            # Gone at the source: nothing is in the way any more.
            client.release_collection("things")
            client.drop_index("things", "by_number")
            client.load_collection("things")
            pair.wait_running("default.things")
            assert diff(pair) == set()
            pair.quiet("UNSUPPORTED_BY_SINK")
    for name in ("things", "other_things"):
        client.drop_collection(name)


@pytest.mark.timeout(300)
def test_what_is_not_carried_stays_as_it_is_at_the_sink(nats_stack: Stack, tmp_path: Path) -> None:
    source = make_source(nats_stack, "drift_carry")
    collection = "drift_carry.things"
    with drifting(nats_stack, tmp_path) as pair:
        task = pair.task("drift_carry.*")
        task.carry.schema = False
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=30)
        failed = task_pb2.COLLECTION_STATE_FAILED
        pair.wait("not there", lambda: [c.state for c in pair.collections().values()] == [failed])
        assert pair.collections()[collection].reason == "SINK_COLLECTION_MISSING"
        MilvusClient(uri=nats_stack.sink.uri).create_database("drift_carry")
        sink = Side(nats_stack.sink.uri, "drift_carry")
        create_collection(sink.client, SHAPE)
        sink.client.release_collection("things")
        sink.client.create_partition("things", "red")
        sink.client.create_partition("things", "blue")
        assert command(pair, "task", "retry", TASK)[0] == 0
        pair.wait_running(collection)
        assert pair.prove() == ROWS
        sink.client.create_partition("things", "of_somebody")
        time.sleep(2 * EVERY_SECONDS)
        assert "of_somebody" in sink.client.list_partitions("things")
        assert diff(pair) == set()

        switches = ("--carry", "schema=true", "--carry", "index=false", "--carry", "load=false")
        assert command(pair, "task", "update", TASK, *switches)[0] == 0
        pair.wait(
            "the schema is carried now",
            lambda: "of_somebody" not in sink.client.list_partitions("things"),
        )
        source.client.release_collection("things")
        source.index("number", "STL_SORT", "by_number")
        source.client.create_partition("things", "green")
        source.client.insert(
            "things", [make_row(SHAPE, random.Random(1), 7_000)], partition_name="green"
        )
        pair.wait("a partition", lambda: "green" in sink.client.list_partitions("things"))
        assert "by_number" not in sink.client.list_indexes("things")
        pair.wait("rows", lambda: pair.collections()[collection].rows_inserted == ROWS + 1)

        # Without rows a drop is as exact as ever.
        assert command(pair, "task", "update", TASK, "--carry", "rows=false")[0] == 0
        assert not pair.get().carry.rows
        pair.wait_running(collection)
        source.client.insert("things", [make_row(SHAPE, random.Random(2), 8_000)])
        source.client.drop_partition("things", "green")
        pair.wait("dropped", lambda: "green" not in sink.client.list_partitions("things"))
        pair.wait("told", lambda: "ROWS_LEFT_OUT" in conditions(pair, collection))
        assert pair.collections()[collection].rows_inserted == ROWS + 1
        code, said = command(pair, "task", "update", TASK, "--carry", "rwos=true")
        assert code == 2, said
        pair.quiet('"event": "collection failed"', "SINK_COLLECTION_MISSING")
