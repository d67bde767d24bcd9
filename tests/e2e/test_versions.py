"""Sinks and sources of other generations: what each holds is carried exactly, through a `kill -9`
of the replicator; what it cannot hold is refused by name before anything is made of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import DataType, MilvusClient

from tests.e2e.carries import Carries
from tests.e2e.load import SHAPES, Load, Shape, create_collection, make_row, new_key
from tests.e2e.pair import Pair, error_info
from tests.e2e.versions import Route
from tests.servers import EtcdServer, KafkaServer, MilvusLiteServer, MilvusServer, Stack

_BY_NAME = {shape.name: shape for shape in SHAPES}
_SCALARS = _BY_NAME["all_scalars"]
VERSION_SHAPES = {
    "Int64 keys": replace(_BY_NAME["int_keys"], partitions=()),
    "VarChar keys, dynamic fields": replace(_BY_NAME["text_keys"], plain_keys=True),
    "VarChar keys with quotes and control characters": _BY_NAME["text_keys"],
    "numbers, text, JSON": replace(
        _SCALARS, fields=tuple(f for f in _SCALARS.fields if f.dtype != DataType.ARRAY)
    ),
    "arrays": _SCALARS,
    "autoID": _BY_NAME["auto"],
    "binary vectors": _BY_NAME["binary"],
    "partition key": _BY_NAME["tenants"],
    "named partitions": _BY_NAME["int_keys"],
}
SINKS = ("Milvus 2.3.5", "Milvus 2.2.16", "milvus-lite 2.5.1", "milvus-lite 3.2.2")


@pytest.fixture(scope="module")
def sink(
    request: pytest.FixtureRequest,
    nats_stack: Stack,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MilvusServer | MilvusLiteServer]:
    folder = tmp_path_factory.mktemp("sink")
    match request.param:
        case "Milvus 2.3.5":
            yield nats_stack.sink
        case "Milvus 2.2.16":
            etcd: EtcdServer = nats_stack.etcd
            with MilvusServer(
                folder,
                etcd_endpoint=etcd.endpoint,
                root_path="old-sink",
                cluster="old-sink",
                version="2.2.16",
                name="old-sink",
            ) as milvus:
                yield milvus
        case "milvus-lite 2.5.1":
            with MilvusLiteServer(folder, "2.5.1") as lite:
                yield lite
        case _:
            with MilvusLiteServer(folder, "3.2.2") as lite:
                yield lite


def _shapes(prefix: str) -> dict[str, Shape]:
    return {
        what: replace(shape, name=f"{prefix}_{index}")
        for index, (what, shape) in enumerate(VERSION_SHAPES.items())
    }


def _check_validation(
    pair: Pair, sink: MilvusServer | MilvusLiteServer, version: str, prefix: str
) -> None:
    """What the sink cannot hold is named before anything is made."""
    task = pair.task(f"default.{prefix}_*", f"{prefix}.*")
    request = task_service_pb2.CreateTaskRequest(task=task, validate_only=True)
    if version == "Milvus 2.3.5":
        pair.tasks.CreateTask(request, timeout=60)
    else:
        with pytest.raises(grpc.RpcError) as refused:
            pair.tasks.CreateTask(request, timeout=60)
        assert error_info(refused.value).reason == "UNSUPPORTED_BY_SINK"
        assert prefix in str(refused.value.details())
    there = MilvusClient(uri=sink.uri).list_collections()
    assert not [name for name in there if name.startswith(prefix)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sink", SINKS, indirect=True)
def test_a_sink_gets_everything_it_can_hold_and_refuses_the_rest_by_name(
    nats_stack: Stack,
    sink: MilvusServer | MilvusLiteServer,
    tmp_path: Path,
    carries: Carries,
    request: pytest.FixtureRequest,
) -> None:
    version = request.node.callspec.params["sink"]
    prefix = "to_" + "".join(c if c.isalnum() else "_" for c in version)
    shapes = _shapes(prefix)
    load = Load(nats_stack.source.uri, "default", shapes=tuple(shapes.values()), pause_seconds=0.1)
    load.create()
    other = Load(nats_stack.source.uri, prefix, shapes=(VERSION_SHAPES["Int64 keys"],))
    other.create()
    route = Route(nats_stack.etcd, nats_stack.source, sink)
    with Pair(route, tmp_path) as pair:
        _check_validation(pair, sink, version, prefix)
        load.start()
        other.start()
        pair.create(f"default.{prefix}_*", f"{prefix}.*")
        names = {f"default.{shape.name}": what for what, shape in shapes.items()}
        names[f"{prefix}.{VERSION_SHAPES['Int64 keys'].name}"] = "databases"

        def decided() -> bool:
            states = {name: c.state for name, c in pair.collections().items()}
            wanted = (task_pb2.COLLECTION_STATE_RUNNING, task_pb2.COLLECTION_STATE_FAILED)
            return all(states.get(name) in wanted for name in names)

        pair.wait("every collection carried or refused", decided, seconds=180)
        time.sleep(2)
        pair.replicators[0].restart(hard=True)
        time.sleep(3)
        load.stop()
        other.stop()
        pair.wait("every collection carried or refused", decided, seconds=180)
        carried = []
        verdicts: dict[str, str] = {}
        for name, collection in pair.collections().items():
            if collection.state == task_pb2.COLLECTION_STATE_FAILED:
                assert collection.reason == "UNSUPPORTED_BY_SINK", collection
                assert name.split(".")[1] in collection.message or name.split(".")[0] in (
                    collection.message
                )
                verdicts[names[name]] = "refused"
            else:
                carried.append(name)
        assert pair.prove(*carried) > 100
        parted = shapes["named partitions"].name
        if f"default.{parted}" in carried:
            source = MilvusClient(uri=nats_stack.source.uri)
            source.release_partitions(parted, ["p1"])
            source.drop_partition(parted, "p1")
            there = MilvusClient(uri=sink.uri)
            pair.wait(
                "the partition's drop",
                lambda: "p1" not in there.list_partitions(parted),
                seconds=180,
            )
            pair.prove(f"default.{parted}")
        verdicts |= {names[name]: "yes" for name in carried}
        for what in (*VERSION_SHAPES, "databases"):
            carries.note(version, what, verdicts[what])
        results = pair.verify(*carried)
        unproved = any("DOUBLES_NOT_PROVED" in r.message for r in results)
        carries.note(version, "proof by `verify`", "but doubled keys" if unproved else "yes")
    carries.check(version)


@pytest.fixture(scope="module")
def old_source(
    kafka_available: None, nats_stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Route]:
    """Milvus 2.2.16, whose own queue nobody else can read, on Kafka; the sink is a 2.3.5."""
    folder = tmp_path_factory.mktemp("old-source")
    with (
        KafkaServer(folder / "kafka") as kafka,
        MilvusServer(
            folder / "milvus",
            etcd_endpoint=nats_stack.etcd.endpoint,
            root_path="old-source",
            cluster="old-source",
            mq="kafka",
            kafka_brokers=kafka.brokers,
            version="2.2.16",
            name="old-source",
        ) as source,
    ):
        yield Route(nats_stack.etcd, source, nats_stack.sink, kafka)


@pytest.mark.timeout(600)
@pytest.mark.kafka
def test_a_source_of_2_2_is_followed_through_ddl_and_a_kill(
    old_source: Route, tmp_path: Path
) -> None:
    rng = random.Random(3)
    shape = replace(_BY_NAME["int_keys"], name="from_2_2")
    text = replace(_BY_NAME["text_keys"], name="from_2_2_text")
    with Pair(old_source, tmp_path) as pair:
        source = MilvusClient(uri=old_source.source.uri)
        create_collection(source, shape)
        rows = [make_row(shape, rng, n) for n in range(400)]
        source.insert(shape.name, rows[:200])
        source.insert(shape.name, rows[200:], partition_name="p1")
        pair.create("default.from_2_2*")
        pair.wait_running(f"default.{shape.name}", seconds=120)
        source.delete(shape.name, filter=f"id in {list(range(0, 60))}")
        create_collection(source, text)
        keys = [new_key(text, rng, 1, n) for n in range(300)]
        source.insert(text.name, [make_row(text, rng, key) for key in keys])
        pair.wait_running(f"default.{text.name}", seconds=120)
        pair.replicators[0].restart(hard=True)
        source.insert(shape.name, [make_row(shape, rng, n) for n in range(1000, 1100)])
        # A partition goes, with its rows.
        # 2.2 releases no partition of a loaded collection.
        source.release_collection(shape.name)
        source.drop_partition(shape.name, "p1")
        source.load_collection(shape.name)
        sink = MilvusClient(uri=old_source.sink.uri)
        pair.wait(
            "the partition's drop",
            lambda: "p1" not in sink.list_partitions(shape.name),
            seconds=120,
        )
        assert pair.prove() == 540
        results = pair.verify()
        assert all("DOUBLES_NOT_PROVED" in result.message for result in results)
        assert sink.list_indexes(shape.name) == source.list_indexes(shape.name)
        # Dropped and made again under its name.
        source.drop_collection(shape.name)
        create_collection(source, shape)
        source.insert(shape.name, [make_row(shape, rng, n) for n in range(50)])

        def only_the_new_one() -> bool:
            return any(
                c.rows_inserted == 50 and name.endswith(shape.name)
                for name, c in pair.collections().items()
            )

        pair.wait("the new collection alone", only_the_new_one, seconds=120)
        assert pair.prove(f"default.{shape.name}") == 50
