"""What belongs to no rows: aliases, roles and flushes of one real Milvus at another."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
from milvus_cdc.catalog.layout import TOMBSTONE
from milvus_cdc.etcd import EtcdClient, KeyRange
from milvuscdc.v1 import task_service_pb2
from pymilvus import MilvusClient, MilvusException
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from tests.e2e.load import SHAPES, create_collection, make_row
from tests.e2e.pair import Pair
from tests.servers import Stack
from tests.servers.services import ReplicatorProcess

SHAPE = SHAPES[0]
TOKEN = "root:Milvus"
"""Milvus 2.3.5 grants nothing to callers without a name, even where nobody has to log in."""


class Ends:
    """One database of one's own, at both ends."""

    def __init__(self, stack: Stack) -> None:
        self.database = f"meta_{uuid.uuid4().hex[:8]}"
        MilvusClient(uri=stack.source.uri).create_database(self.database)
        self.source = MilvusClient(uri=stack.source.uri, db_name=self.database)
        self._stack = stack
        self._sink_uri = stack.sink.uri
        self._sink_stub = milvus_pb2_grpc.MilvusServiceStub(
            grpc.insecure_channel(stack.sink.address)
        )
        self._rng = random.Random(1)

    @property
    def sink(self) -> MilvusClient:
        return MilvusClient(uri=self._sink_uri, db_name=self.database)

    def make(self, name: str, rows: int = 10, first: int = 0) -> None:
        create_collection(self.source, replace(SHAPE, name=name))
        self.add(name, rows, first)

    def add(self, name: str, rows: int, first: int = 0) -> None:
        self.source.insert(name, [make_row(SHAPE, self._rng, first + n) for n in range(rows)])

    def target(self, alias: str) -> str:
        """What the alias stands for at the sink; empty when there is none."""
        # pymilvus asks in the default database, whatever the client's is.
        request = milvus_pb2.DescribeAliasRequest(db_name=self.database, alias=alias)
        return str(self._sink_stub.DescribeAlias(request, timeout=10).collection)

    def stands_for(self, alias: str, name: str) -> bool:
        return self.target(alias) == name

    def history(self, alias: str) -> list[str]:
        """What was ever written of the alias at the sink: "there", or "gone"."""

        async def listed() -> list[tuple[int, bytes]]:
            prefix = f"{self._stack.sink.root_path}/meta/snapshots/root-coord/database/aliases/"
            async with EtcdClient([self._stack.etcd.url]) as client:
                kvs = (await client.list(KeyRange.prefix(prefix))).kvs
            return [
                (int(kv.key.rpartition("_ts")[2]), kv.value)
                for kv in kvs
                if kv.key.rpartition("/")[2].startswith(f"{alias}_ts")
            ]

        versions = sorted(asyncio.run(listed()))
        return ["gone" if value == TOMBSTONE else "there" for _, value in versions]

    def names(self) -> set[str]:
        return set(self.sink.list_collections())


@pytest.fixture
def ends(nats_stack: Stack) -> Ends:
    return Ends(nats_stack)


@contextmanager
def reader(ends: Ends, alias: str) -> Iterator[list[str]]:
    """Asks the sink for the alias without a pause; the names it got, "" where it got none."""
    seen: list[str] = []
    over = threading.Event()

    def poll() -> None:
        last = False
        while not last:
            last = over.is_set()  # once more after the end: what it waited for was just seen
            name = ends.target(alias)
            if not seen or seen[-1] != name:
                seen.append(name)
            time.sleep(0.005)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_an_alias_comes_switches_without_a_gap_and_goes(
    nats_stack: Stack, tmp_path: Path, ends: Ends
) -> None:
    live = f"live_of_{ends.database}"
    ends.make("blue")
    ends.source.create_alias("blue", live)
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{ends.database}.*")
        pair.wait("the alias", lambda: ends.target(live) == "blue")
        ends.make("green", 50)
        with reader(ends, live) as seen:
            ends.source.alter_alias("green", live)
            pair.wait("the switch", lambda: ends.target(live) == "green")
        assert seen == ["blue", "green"]
        # A gap may be too short to be met: the switch was one change at the sink.
        assert ends.history(live) == ["there", "there"]
        ends.source.drop_collection("blue")
        pair.wait("the drop", lambda: ends.names() == {"green"})
        assert ends.target(live) == "green"
        ends.source.drop_alias(live)
        pair.wait("no alias", lambda: ends.target(live) == "")
        assert ends.names() == {"green"}
        assert pair.prove() == 50
        pair.quiet()


def test_names_move_between_aliases_and_collections(
    nats_stack: Stack, tmp_path: Path, ends: Ends
) -> None:
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{ends.database}.*")
        for name in ("one", "two"):
            ends.make(name)
        for alias, name in (("a", "one"), ("b", "two")):
            ends.source.create_alias(name, alias)
        pair.wait("aliases", lambda: [ends.target(x) for x in "ab"] == ["one", "two"])
        # Two names swapped.
        ends.source.alter_alias("two", "a")
        ends.source.alter_alias("one", "b")
        pair.wait("the swap", lambda: [ends.target(x) for x in "ab"] == ["two", "one"])
        # An alias in the place of a collection.
        ends.source.drop_alias("b")
        ends.source.drop_collection("one")
        ends.source.create_alias("two", "one")
        pair.wait("the alias instead", lambda: ends.target("one") == "two")
        assert ends.names() == {"two"}
        # A collection in the place of an alias.
        ends.source.drop_alias("one")
        ends.make("one", 30)
        pair.wait("the collection again", lambda: ends.names() == {"one", "two"})
        # A rename takes the alias along.
        ends.source.rename_collection("two", "three")
        pair.wait("the rename", lambda: ends.target("a") == "three")
        assert pair.prove() == 40
        pair.quiet()


@pytest.mark.parametrize("victim", ["controller", "replicator"])
def test_a_switch_survives_a_kill(
    nats_stack: Stack, tmp_path: Path, ends: Ends, victim: str
) -> None:
    for name in ("blue", "green"):
        ends.make(name)
    ends.source.create_alias("blue", "live")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{ends.database}.*")
        pair.wait("the alias", lambda: ends.target("live") == "blue")
        process = pair.controller if victim == "controller" else pair.replicators[0]
        with reader(ends, "live") as seen:
            for name in ("green", "blue", "green"):
                ends.source.alter_alias(name, "live")
                process.kill()
                process.start()
                pair.wait(f"live is {name}", partial(ends.stands_for, "live", name))
        assert seen == ["blue", "green", "blue", "green"]
        ends.source.drop_alias("live")
        process.kill()
        process.start()
        pair.wait("no alias", lambda: ends.target("live") == "")


def test_what_somebody_changes_at_the_sink_is_mended(
    nats_stack: Stack, tmp_path: Path, ends: Ends
) -> None:
    for name in ("blue", "green"):
        ends.make(name)
    ends.source.create_alias("blue", "live")
    pair = Pair(nats_stack, tmp_path)
    pair.replicators = [
        ReplicatorProcess(tmp_path, pair.controller.address, "replicator-0", reconcileSeconds=5)
    ]
    with pair:
        pair.create(f"{ends.database}.*")
        pair.wait("the alias", lambda: ends.target("live") == "blue")
        ends.sink.create_alias("green", "strangers")
        ends.sink.drop_alias("live")
        pair.wait("it is back", lambda: ends.target("live") == "blue")
        ends.sink.alter_alias("green", "live")
        pair.wait("it is right again", lambda: ends.target("live") == "blue")
        # What no task manages stays.
        assert ends.target("strangers") == "green"


def test_a_drop_waits_for_the_alias(nats_stack: Stack, tmp_path: Path, ends: Ends) -> None:
    ends.make("old")
    ends.source.create_alias("old", "live")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{ends.database}.*")
        pair.wait("the alias", lambda: ends.target("live") == "old")
        with reader(ends, "live") as seen:
            ends.make("new", 20)
            ends.source.alter_alias("new", "live")
            ends.source.drop_collection("old")
            pair.wait("only the new one", lambda: ends.names() == {"new"})
        assert seen == ["old", "new"]
        assert ends.target("live") == "new"
        pair.quiet()


def test_roles_follow_and_a_missing_user_is_asked_for(
    nats_stack: Stack, tmp_path: Path, ends: Ends
) -> None:
    mark = uuid.uuid4().hex[:8]
    role, user = f"reader_{mark}", f"ann_{mark}"
    source = MilvusClient(uri=nats_stack.source.uri, token=TOKEN)
    sink = MilvusClient(uri=nats_stack.sink.uri, token=TOKEN)
    ends.make("books")
    source.create_role(role)
    source.create_user(user, "secret12")
    source.grant_role(user, role)
    source.grant_privilege(role, "Collection", "Search", "books", ends.database)
    source.grant_privilege(role, "Collection", "Insert", "elsewhere", "default")

    def grants() -> set[tuple[str, str]]:
        client = MilvusClient(uri=nats_stack.sink.uri, token=TOKEN, db_name=ends.database)
        try:
            found = client.describe_role(role)["privileges"]
        except MilvusException:
            return set()
        return {(each["object_name"], each["privilege"]) for each in found}

    with Pair(nats_stack, tmp_path) as pair:
        task = pair.task(f"{ends.database}.*")
        task.carry.rbac = True
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60)

        def needed() -> list[str]:
            return [c.message for c in pair.get().conditions if c.type == "CREDENTIAL_NEEDED"]

        # A grant on what the task does not follow is not given.
        pair.wait("the grant", lambda: grants() == {("books", "Search")})
        pair.wait("the question", lambda: any(user in message for message in needed()))
        assert any(
            f"sink create-user --uri {nats_stack.sink.uri} --user {user}" in m for m in needed()
        )
        sink.create_user(user, "another12")
        pair.wait("the member", lambda: role in sink.describe_user(user).get("roles", ()))
        pair.wait("no question", lambda: not any(user in message for message in needed()))
        source.grant_privilege(role, "Collection", "Query", "books", ends.database)
        pair.wait("another", lambda: grants() == {("books", "Search"), ("books", "Query")})
        source.revoke_privilege(role, "Collection", "Search", "books", ends.database)
        pair.wait("one less", lambda: grants() == {("books", "Query")})
        # Removal: what we gave goes, what others gave stays.
        sink.create_role(f"own_{mark}")
        source.revoke_privilege(role, "Collection", "Query", "books", ends.database)
        source.revoke_privilege(role, "Collection", "Insert", "elsewhere", "default")
        source.revoke_role(user, role)
        source.drop_role(role)
        pair.wait("no role", lambda: role not in sink.list_roles())
        assert f"own_{mark}" in sink.list_roles()
        assert user in sink.list_users()
        pair.quiet()


def test_a_flush_at_the_source_flushes_the_sink(
    nats_stack: Stack, tmp_path: Path, ends: Ends
) -> None:
    ends.make("books")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{ends.database}.*")
        pair.wait_running(f"{ends.database}.books")
        assert pair.prove() == 10
        ends.add("books", 25, first=100)
        ends.source.flush("books")
        pair.wait("flushed rows", lambda: _flushed_rows(ends.sink, "books") == 35, 90)
        pair.quiet()


def _flushed_rows(client: MilvusClient, name: str) -> int:
    """Rows in sealed segments."""
    return int(client.get_collection_stats(name)["row_count"])
