"""A real source's metadata, seen through its etcd as people change it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from milvus_cdc.catalog import CatalogueWatcher, Layout, judge, learn
from milvus_cdc.errors import CdcError
from milvus_cdc.etcd import EtcdClient
from milvus_cdc.model import (
    Catalogue,
    Collection,
    LoadKind,
    ObjectState,
    RoleGrant,
    tso_to_ms,
)
from pymilvus import DataType, MilvusClient
from pymilvus.grpc_gen import schema_pb2

from tests.servers import Stack


@dataclass(frozen=True)
class Source:
    stack: Stack
    database: str
    client: MilvusClient

    def create(self, name: str, *, shards: int = 1) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
        schema.add_field("title", DataType.VARCHAR, max_length=64)
        self.client.create_collection(name, schema=schema, num_shards=shards)

    def index(self, name: str, field: str, **params: object) -> None:
        index = self.client.prepare_index_params()
        index.add_index(field, index_name=f"of_{field}", **params)
        self.client.create_index(name, index)

    def find(self, catalogue: Catalogue, name: str) -> Collection | None:
        wanted = f"{self.database}.{name}"
        return next((each for each in catalogue.collections if each.full_name == wanted), None)


@pytest.fixture
def source(nats_stack: Stack) -> Iterator[Source]:
    database = f"catalog_{uuid.uuid4().hex[:8]}"
    uri = nats_stack.source.uri
    MilvusClient(uri=uri).create_database(database)
    client = MilvusClient(uri=uri, db_name=database)
    yield Source(nats_stack, database, client)
    for name in client.list_collections():
        client.release_collection(name)
        client.drop_collection(name)
    client.drop_database(database)


@pytest.fixture
async def watcher(source: Source) -> AsyncIterator[CatalogueWatcher]:
    async with EtcdClient([source.stack.etcd.url]) as client:
        yield CatalogueWatcher(client, Layout(source.stack.source.root_path))


async def when(
    catalogues: AsyncGenerator[Catalogue | CdcError, None], true: Callable[[Catalogue], bool]
) -> Catalogue:
    """The first catalogue that shows it; the test's own time limit ends a wait in vain."""
    async for each in catalogues:
        assert isinstance(each, Catalogue), each
        if true(each):
            return each
    raise AssertionError("the watch ended")


async def test_a_collection_from_creation_to_drop(
    source: Source, watcher: CatalogueWatcher
) -> None:
    async with aclosing(watcher.watch()) as catalogues:
        first = await when(catalogues, lambda _: True)
        assert judge(None, first) is None
        assert source.database in {each.name for each in first.databases}

        await asyncio.to_thread(source.create, "books", shards=2)
        made = await when(catalogues, lambda now: source.find(now, "books") is not None)
        books = source.find(made, "books")
        assert books is not None
        schema = schema_pb2.CollectionSchema.FromString(books.schema)
        assert [each.name for each in schema.fields] == [
            "RowID",
            "Timestamp",
            "id",
            "vector",
            "title",
            "$meta",
        ]
        described = await asyncio.to_thread(source.client.describe_collection, "books")
        assert books.collection_id == described["collection_id"]
        assert books.shards == len(books.vchannels) == 2
        assert all(each.vchannel.startswith(each.pchannel) for each in books.vchannels)
        # A sequence in a NATS stream, 8 bytes.
        assert {len(each.start_position) for each in books.vchannels} == {8}
        assert [each.name for each in books.partitions] == ["_default"]
        known = learn(made, {books.collection_id})

        await asyncio.to_thread(source.client.create_partition, "books", "old")
        await asyncio.to_thread(source.client.drop_partition, "books", "old")

        def partition_dropped(now: Catalogue) -> bool:
            found = source.find(now, "books")
            assert found is not None
            return any(each.state is ObjectState.DROPPED for each in found.partitions)

        now = await when(catalogues, partition_dropped)
        found = source.find(now, "books")
        assert found is not None
        old = found.partitions[1]
        assert (old.name, old.drop_ts > old.create_ts) == ("old", True)

        await asyncio.to_thread(source.client.rename_collection, "books", "tomes")
        now = await when(catalogues, lambda now: source.find(now, "tomes") is not None)
        assert source.find(now, "books") is None

        await asyncio.to_thread(source.client.drop_collection, "tomes")

        def dropped(now: Catalogue) -> bool:
            found = source.find(now, "tomes")
            return found is not None and found.state is ObjectState.DROPPED

        last = await when(catalogues, dropped)
        found = source.find(last, "tomes")
        assert found is not None
        assert found.drop_ts > found.create_ts == books.create_ts
        assert {each.state for each in found.partitions} == {ObjectState.DROPPED}
        assert judge(known, last) is None


async def test_indexes_and_load_as_they_were_asked_for(
    source: Source, watcher: CatalogueWatcher
) -> None:
    await asyncio.to_thread(source.create, "books")
    source.client.create_partition("books", "new")
    source.index("books", "vector", index_type="IVF_FLAT", metric_type="L2", params={"nlist": 16})
    source.index("books", "title", index_type="Trie")
    source.client.load_partitions("books", ["new"])
    books = source.find(await watcher.read(), "books")
    assert books is not None
    assert [(each.name, each.field_name, dict(each.params)) for each in books.indexes] == [
        (
            "of_vector",
            "vector",
            {"index_type": "IVF_FLAT", "metric_type": "L2", "nlist": "16"},
        ),
        ("of_title", "title", {"index_type": "Trie"}),
    ]
    assert books.load.kind is LoadKind.PARTITIONS
    assert books.load.partition_ids == (books.partitions[1].partition_id,)
    assert books.load.replicas == 1

    source.client.release_collection("books")
    source.client.drop_index("books", "of_vector")
    source.index("books", "vector", index_type="AUTOINDEX", metric_type="IP")
    source.client.load_collection("books")
    books = source.find(await watcher.read(), "books")
    assert books is not None
    assert [dict(each.params) for each in books.indexes if each.field_name == "vector"] == [
        {"index_type": "AUTOINDEX", "metric_type": "IP"}
    ]
    assert (books.load.kind, books.load.partition_ids) == (LoadKind.COLLECTION, ())

    source.client.release_collection("books")
    books = source.find(await watcher.read(), "books")
    assert books is not None
    assert books.load.kind is LoadKind.NONE


async def test_the_clock_is_the_source_s(source: Source, watcher: CatalogueWatcher) -> None:
    await asyncio.to_thread(source.create, "books")
    now = await watcher.read()
    books = source.find(now, "books")
    assert books is not None
    # The saved clock is the end of a reserved span of a few seconds.
    assert 0 < tso_to_ms(now.tso) - tso_to_ms(books.create_ts) < 60_000


async def test_a_wrong_root_path_is_doubted(source: Source, watcher: CatalogueWatcher) -> None:
    known = learn(await watcher.read(), ())
    async with EtcdClient([source.stack.etcd.url]) as client:
        elsewhere = CatalogueWatcher(client, Layout("nowhere"))
        for trusted in (None, known):
            objection = judge(trusted, await elsewhere.read())
            assert objection is not None
            assert objection.doubt == "SOURCE_METADATA_MISSING"
        sibling = CatalogueWatcher(client, Layout(source.stack.sink.root_path))
        objection = judge(known, await sibling.read())
        assert objection is not None
        assert objection.doubt == "SOURCE_IDENTITY_CHANGED"


async def test_aliases_as_they_move(source: Source, watcher: CatalogueWatcher) -> None:
    for name in ("blue", "green"):
        await asyncio.to_thread(source.create, name)

    def target(now: Catalogue) -> str:
        for alias in now.aliases:
            if (alias.database, alias.name) == (source.database, "live"):
                (found,) = (c for c in now.collections if c.collection_id == alias.collection_id)
                assert alias.alter_ts > found.create_ts
                return found.name
        return ""

    async with aclosing(watcher.watch()) as catalogues:
        await asyncio.to_thread(source.client.create_alias, "blue", "live")
        first = await when(catalogues, lambda now: target(now) == "blue")
        await asyncio.to_thread(source.client.alter_alias, "green", "live")
        second = await when(catalogues, lambda now: target(now) == "green")
        assert _alias_ts(second, source) > _alias_ts(first, source)
        await asyncio.to_thread(source.client.drop_alias, "live")
        await when(catalogues, lambda now: target(now) == "")


def _alias_ts(now: Catalogue, source: Source) -> int:
    return next(each.alter_ts for each in now.aliases if each.database == source.database)


async def test_roles_and_what_they_may_do(source: Source, watcher: CatalogueWatcher) -> None:
    role, user = f"role_{uuid.uuid4().hex[:8]}", f"user_{uuid.uuid4().hex[:8]}"
    client = MilvusClient(uri=source.stack.source.uri, token="root:Milvus")
    grant = RoleGrant(role, "Collection", "books", source.database, "Insert")
    async with aclosing(watcher.watch()) as catalogues:
        await asyncio.to_thread(client.create_role, role)
        await when(catalogues, lambda now: role in now.rbac.roles)
        await asyncio.to_thread(client.create_user, user, "secret12")
        await when(catalogues, lambda now: user in now.rbac.users)
        await asyncio.to_thread(client.grant_role, user, role)
        await when(catalogues, lambda now: (user, role) in now.rbac.members)
        give = (role, "Collection", "Insert", "books", source.database)
        await asyncio.to_thread(client.grant_privilege, *give)
        await when(catalogues, lambda now: grant in now.rbac.grants)
        await asyncio.to_thread(client.revoke_privilege, *give)
        await when(catalogues, lambda now: grant not in now.rbac.grants)
        await asyncio.to_thread(client.drop_user, user)
        await asyncio.to_thread(client.drop_role, role)
        last = await when(catalogues, lambda now: role not in now.rbac.roles)
        assert user not in last.rbac.users
        assert (user, role) not in last.rbac.members
