"""Names that change: renames at the source under load, in chains, rings and across databases, into
and out of a selection, names mapped by rules, and our services killed around each.
"""

from __future__ import annotations

import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import CollectionSchema, DataType, FieldSchema, MilvusClient

from tests.e2e.pair import TASK, Pair, error_info
from tests.servers import Stack

DIM = 8
LOST_PEER = (r"stream to the controller lost", r"controller not reachable", r"replicator", r"lease")


class Source:
    """One database of the source. `write` keeps writing to a collection, whatever it is called."""

    def __init__(self, stack: Stack, database: str) -> None:
        self.uri = stack.source.uri
        self.database = database
        MilvusClient(uri=self.uri).create_database(database)
        self.client = MilvusClient(uri=self.uri, db_name=database)

    def create(self, name: str, rows: int = 100, first: int = 0) -> None:
        schema = CollectionSchema(
            [
                FieldSchema("id", DataType.INT64, is_primary=True),
                FieldSchema("text", DataType.VARCHAR, max_length=100),
                FieldSchema("vector", DataType.FLOAT_VECTOR, dim=DIM),
            ]
        )
        self.client.create_collection(name, schema=schema)
        params = self.client.prepare_index_params()
        params.add_index("vector", index_type="FLAT", metric_type="L2")
        self.client.create_index(name, params)
        self.client.load_collection(name)
        self.insert(name, rows, first)

    def insert(self, name: str, rows: int, first: int = 0) -> None:
        if rows:
            self.client.insert(name, [row(n, name) for n in range(first, first + rows)])

    def rename(self, old: str, new: str, database: str = "") -> None:
        self.client.rename_collection(old, new, database)

    def drop(self, name: str) -> None:
        self.client.drop_collection(name)

    def names(self) -> set[str]:
        return set(self.client.list_collections())


def row(key: int, text: str) -> dict[str, Any]:
    rng = random.Random(key)
    return {"id": key, "text": text, "vector": [rng.random() for _ in range(DIM)]}


class Writer:
    """Inserts, upserts and deletes without a pause, under the name that `named` says; keys are its
    own.
    """

    def __init__(self, uri: str, database: str, name: str, first: int) -> None:
        self.place = (database, name)
        self._uri = uri
        self._first = first
        self._stop = threading.Event()
        self.acknowledged = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._drive, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _drive(self) -> None:
        rng = random.Random(self._first)
        step = 0
        clients: dict[str, MilvusClient] = {}
        try:
            while not self._stop.is_set():
                step += 1
                rows = [row(self._first + step * 100 + n, f"step {step}") for n in range(20)]
                again = self._first + rng.randint(1, step) * 100
                calls = [
                    ("insert", {"data": rows}),
                    ("upsert", {"data": [row(again + n, f"again {step}") for n in range(5)]}),
                    ("delete", {"ids": [again + 7, again + 8]}),
                ]
                for method, arguments in calls:
                    self._call(clients, method, arguments)
                self.acknowledged += len(rows)
                self._stop.wait(0.02)
        except BaseException as error:
            self.error = error

    def _call(self, clients: dict[str, MilvusClient], method: str, arguments: Any) -> None:
        deadline = time.monotonic() + 20
        while True:
            database, name = self.place
            if database not in clients:
                clients[database] = MilvusClient(uri=self._uri, db_name=database)
            try:
                getattr(clients[database], method)(name, **arguments)
            except Exception:
                # Renamed in between: it is not there under this name, so nothing was written.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str:
    name = str(request.node.originalname)
    return "names_" + name.removeprefix("test_")[:40].rstrip("_")


def sink_names(stack: Stack, database: str) -> set[str]:
    client = MilvusClient(uri=stack.sink.uri)
    if database not in client.list_databases():
        return set()
    return set(MilvusClient(uri=stack.sink.uri, db_name=database).list_collections())


def at_sink(pair: Pair, name: str = TASK) -> dict[str, str]:
    """Names at the sink by names at the source."""
    return {
        source: f"{c.sink_database}.{c.sink_collection}"
        for source, c in pair.collections(name).items()
    }


def wait_names(pair: Pair, wanted: dict[str, str], seconds: float = 60) -> None:
    pair.wait(f"names {wanted}", lambda: at_sink(pair) == wanted, seconds)


def same(database: str, *names: str) -> dict[str, str]:
    return {f"{database}.{name}": f"{database}.{name}" for name in names}


@pytest.mark.timeout(400)
def test_renames_under_load_and_across_databases(
    nats_stack: Stack, tmp_path: Path, database: str
) -> None:
    source = Source(nats_stack, database)
    other = f"{database}_2"
    MilvusClient(uri=source.uri).create_database(other)
    source.create("a")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{database}*.*")
        pair.wait_running(f"{database}.a")
        with Writer(source.uri, database, "a", 1_000_000) as writer:
            time.sleep(2)
            source.rename("a", "b")
            writer.place = (database, "b")
            wait_names(pair, same(database, "b"))
            time.sleep(1)
            source.rename("b", "c", other)
            writer.place = (other, "c")
            wait_names(pair, same(other, "c"))
            time.sleep(1)
        pair.wait_running(f"{other}.c")
        assert pair.prove() > writer.acknowledged / 2
        assert sink_names(nats_stack, database) == set()
        assert sink_names(nats_stack, other) == {"c"}
        # The database that it has left can go.
        MilvusClient(uri=source.uri).drop_database(database)
        sink = MilvusClient(uri=nats_stack.sink.uri)
        pair.wait("the old database goes", lambda: database not in sink.list_databases())
        pair.quiet()


@pytest.mark.timeout(400)
def test_chain_ring_and_a_name_that_becomes_free(
    nats_stack: Stack, tmp_path: Path, database: str
) -> None:
    source = Source(nats_stack, database)
    for number, name in enumerate(("a", "b", "c")):
        source.create(name, rows=50 + number, first=number * 1_000)
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{database}.*")
        pair.wait_running(*same(database, "a", "b", "c"))
        # A chain: everything moves up by one.
        source.rename("c", "d")
        source.rename("b", "c")
        source.rename("a", "b")
        for number, name in enumerate(("b", "c", "d")):
            source.insert(name, 10, first=number * 1_000 + 500)
        wait_names(pair, same(database, "b", "c", "d"))
        assert pair.prove() == 50 + 51 + 52 + 30
        # A ring of two, and one of three.
        for ring in (("b", "c"), ("b", "c", "d")):
            source.rename(ring[-1], "aside")
            for old, new in reversed(list(pairwise(ring))):
                source.rename(old, new)
            source.rename("aside", ring[0])
            for number, name in enumerate(ring):
                source.insert(name, 10, first=10_000 * len(ring) + number * 1_000)
            wait_names(pair, same(database, "b", "c", "d"))
            pair.wait(
                "no rename is left",
                lambda: not any(c.conditions for c in pair.collections().values()),
            )
            pair.prove()
        # The name of one that is dropped.
        source.drop("b")
        source.rename("c", "b")
        source.create("c", rows=5, first=70_000)
        source.insert("b", 10, first=80_000)
        wait_names(pair, same(database, "b", "c", "d"))
        pair.wait_running(*same(database, "b", "c", "d"))
        pair.prove()
        assert sink_names(nats_stack, database) == {"b", "c", "d"} == source.names()
        pair.quiet()


@pytest.mark.timeout(400)
def test_renamed_out_of_and_into_the_selection(
    nats_stack: Stack, tmp_path: Path, database: str
) -> None:
    source = Source(nats_stack, database)
    source.create("in_1", rows=40)
    source.create("out_2", rows=30)
    with Pair(nats_stack, tmp_path) as pair:
        # LATEST speaks of what is selected when the task is created.
        pair.create(f"{database}.in_*", latest=True)
        pair.wait_running(f"{database}.in_1")
        source.insert("in_1", 25, first=500)
        pair.wait(
            "the rows since", lambda: pair.collections()[f"{database}.in_1"].rows_inserted == 25
        )
        source.rename("in_1", "out_1")
        pair.wait("it is let go", lambda: not pair.collections())
        [condition] = pair.get().conditions
        assert condition.type == "COLLECTION_LEFT_SELECTION"
        assert f"{database}.out_1" in condition.message
        assert f"{database}.in_1" in condition.message
        source.insert("out_1", 7, first=900)
        # Another one comes in: from its beginning.
        source.rename("out_2", "in_2")
        source.insert("in_2", 5, first=700)
        pair.wait_running(f"{database}.in_2")
        assert pair.prove() == 35
        assert sink_names(nats_stack, database) == {"in_1", "in_2"}
        pair.quiet("renamed out of the selection")


@pytest.mark.timeout(400)
def test_names_by_rules(nats_stack: Stack, tmp_path: Path, database: str) -> None:
    source = Source(nats_stack, database)
    source.create("orders", rows=40)
    source.create("tmp_x", rows=20, first=100)
    with Pair(nats_stack, tmp_path) as pair:
        task = pair.task(f"{database}*.*")
        for old, new in (
            (f"{database}.tmp_*", f"{database}_scratch.*"),
            (f"{database}*.*", f"mirror_{database}*.m_*"),
        ):
            task.rename.append(task_pb2.NameRule(**{"from": old, "to": new}))
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=30)
        assert list(pair.get().rename) == list(task.rename)
        mirror = f"mirror_{database}"
        wanted = {
            f"{database}.orders": f"{mirror}.m_orders",
            f"{database}.tmp_x": f"{database}_scratch.x",
        }
        wait_names(pair, wanted)
        pair.wait_running(*wanted)
        assert pair.prove() == 60
        assert [r.rows_source for r in pair.verify(f"{database}.tmp_x")] == [20]
        # From one rule to the other, and within one.
        source.rename("tmp_x", "kept")
        source.rename("orders", "orders_2")
        source.insert("kept", 3, first=400)
        wait_names(
            pair,
            {
                f"{database}.kept": f"{mirror}.m_kept",
                f"{database}.orders_2": f"{mirror}.m_orders_2",
            },
        )
        assert pair.prove() == 63
        # A database comes and goes as the rule for all of it says.
        client = MilvusClient(uri=source.uri)
        sink = MilvusClient(uri=nats_stack.sink.uri)
        client.create_database(f"{database}_more")
        pair.wait("it comes", lambda: f"{mirror}_more" in sink.list_databases())
        client.drop_database(f"{database}_more")
        pair.wait("it goes", lambda: f"{mirror}_more" not in sink.list_databases())
        for name in ("kept", "orders_2"):
            source.drop(name)
        pair.wait("they are dropped", lambda: not pair.collections())
        assert sink_names(nats_stack, mirror) == set()
        pair.quiet()


@pytest.mark.timeout(300)
def test_rules_that_cannot_be_meant_are_refused_before_anything_is_done(
    nats_stack: Stack, tmp_path: Path, database: str
) -> None:
    with Pair(nats_stack, tmp_path) as pair:
        for rules, reason, field in (
            ((("shop.a", "shop.b"),), "NAME_COLLISION", "task.rename[0]"),
            ((("x.y", "x.z"), ("shop.*", "shop.all")), "NAME_COLLISION", "task.rename[1]"),
            ((("shop.a", "shop.*"),), "RENAME_INVALID", "task.rename[0]"),
            ((("shop.a", "shop.a-b"),), "SINK_NAME_INVALID", "task.rename[0]"),
        ):
            task = pair.task("shop.*", "x.*")
            task.rename.extend(task_pb2.NameRule(**{"from": a, "to": b}) for a, b in rules)
            with pytest.raises(grpc.RpcError) as refused:
                pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=30)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            info = error_info(refused.value)
            assert (info.reason, info.metadata["field"]) == (reason, field)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "who",
    ["both", *(pytest.param(who, marks=pytest.mark.soak) for who in ("controller", "replicator"))],
)
def test_killed_around_renames(nats_stack: Stack, tmp_path: Path, database: str, who: str) -> None:
    database = f"{database}_{who}"
    source = Source(nats_stack, database)
    rng = random.Random(who)
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        source.create(name, first=number * 1_000)
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create(f"{database}.*")
        pair.wait_running(*same(database, *names))
        with Writer(source.uri, database, "a", 1_000_000) as writer:
            for turn in range(4):
                # a -> new name -> b's place, b -> a's: a ring with a load on one of them.
                at = writer.place[1]
                other = "b" if at == "a" else "a"
                source.rename(at, "aside")
                source.rename(other, at)
                source.rename("aside", other)
                writer.place = (database, other)
                source.rename("c" if turn % 2 == 0 else "c2", "c2" if turn % 2 == 0 else "c")
                time.sleep(rng.uniform(0.0, 1.0))
                if who in ("controller", "both"):
                    pair.controller.restart(hard=True)
                if who in ("replicator", "both"):
                    for process in pair.replicators:
                        process.restart(hard=True)
                time.sleep(rng.uniform(0.0, 3.0))
        wait_names(pair, same(database, "a", "b", "c"), seconds=120)
        pair.wait_running(*same(database, "a", "b", "c"), seconds=120)
        pair.wait(
            "no rename is left",
            lambda: not any(c.conditions for c in pair.collections().values()),
        )
        assert pair.prove() > 300
        assert sink_names(nats_stack, database) == {"a", "b", "c"} == source.names()
        pair.quiet(*LOST_PEER, r'"event": "retrying', "reading interrupted", "stream ended")
