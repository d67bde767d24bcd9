"""Sinks and sources of other generations: what each holds is carried exactly, through a `kill -9`
of the replicator; what it cannot hold is refused by name before anything is made of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from milvuscdc.v1 import task_pb2
from pymilvus import DataType

from tests.e2e.carries import Carries
from tests.e2e.load import SHAPES, Load, Shape
from tests.e2e.pair import Pair
from tests.e2e.versions import Route
from tests.servers import EtcdServer, MilvusLiteServer, MilvusServer, Stack

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
        load.start()
        other.start()
        pair.create(f"default.{prefix}_*", f"{prefix}.*")
        names = {f"default.{shape.name}": what for what, shape in shapes.items()}
        names[f"{prefix}.{VERSION_SHAPES['Int64 keys'].name}"] = "databases"

        def decided() -> bool:
            states = {name: c.state for name, c in pair.collections().items()}
            wanted = (task_pb2.COLLECTION_STATE_RUNNING, task_pb2.COLLECTION_STATE_FAILED)
            return all(states.get(name) in wanted for name in names)

        pair.wait("every collection carried or refused", decided)
        time.sleep(2)
        pair.replicators[0].restart(hard=True)
        time.sleep(3)
        load.stop()
        other.stop()
        pair.wait("every collection carried or refused", decided)
        carried = []
        for name, collection in pair.collections().items():
            if collection.state == task_pb2.COLLECTION_STATE_FAILED:
                assert collection.reason == "UNSUPPORTED_BY_SINK", collection
                assert name.split(".")[1] in collection.message or name.split(".")[0] in (
                    collection.message
                )
                carries.note(version, names[name], "refused")
            else:
                carried.append(name)
        assert pair.prove(*carried) > 500
        for name in carried:
            carries.note(version, names[name], "yes")
        results = pair.verify(*carried)
        unproved = any("DOUBLES_NOT_PROVED" in r.message for r in results)
        carries.note(version, "proof by `verify`", "but doubled keys" if unproved else "yes")
    carries.check(version)
