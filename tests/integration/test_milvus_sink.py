"""The Milvus sink on real servers: what only Milvus has, and what happens when it fails."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from milvus_cdc.catalog import CatalogueWatcher, Layout
from milvus_cdc.errors import RetryableError, RowRefusedError, UnknownOutcomeError, UserError
from milvus_cdc.etcd import EtcdClient
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.model import Carry, Collection, Index, Load, LoadKind
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, RowBatch, reconcile
from milvus_cdc.sink.differences import Action
from milvus_cdc.sink.milvus import MilvusSink
from pymilvus import DataType
from pymilvus import MilvusClient as UserClient
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2
from pymilvus.grpc_gen.schema_pb2 import DataType as FieldType

from tests.contract.sink_samples import (
    DIM,
    KEY,
    LOADED,
    META,
    PLAIN,
    VECTOR,
    Field,
    Sample,
    flat_index,
    plain_rows,
)
from tests.integration.tcp_proxy import TcpProxy
from tests.servers import EtcdServer, MilvusServer, Stack

SECONDS = 20.0
NOT_LOADED, LOADED_STATE = 1, 3


@dataclass(frozen=True)
class Milvus:
    """A database of one's own at the sink, the sink under test and a plain client."""

    uri: str
    database: str
    sink: MilvusSink
    client: MilvusClient

    async def call(self, method: str, **fields: Any) -> Any:
        request = getattr(milvus_pb2, f"{method}Request")(db_name=self.database, **fields)
        return await self.client.call(method, request, timeout=60)

    async def open(self, want: Collection, **how: Any) -> Any:
        options = {"opened": False, "adopt": False, "recreate": False, "sink_collection_id": 0}
        return await self.sink.open_collection(want, **(options | how))

    async def put(self, sample: Sample, keys: range, op: Op = Op.INSERT, **how: Any) -> None:
        batch = sample.batch(plain_rows(keys), op=op, **how)
        await self.sink.write(self.sink.target(sample.want()), batch, SECONDS)

    async def indexes(self, name: str) -> dict[str, dict[str, str]]:
        request = milvus_pb2.DescribeIndexRequest(db_name=self.database, collection_name=name)
        try:
            answer = await self.client.ask("DescribeIndex", request)
        except Refusal as refusal:
            if refusal.code != 700:
                raise
            return {}
        return {
            each.index_name: {pair.key: pair.value for pair in each.params}
            for each in answer.index_descriptions
        }

    async def load_state(self, name: str, *partitions: str) -> int:
        names = {"collection_name": name, "partition_names": partitions}
        return int((await self.call("GetLoadState", **names)).state)

    async def until_loaded(self, name: str, *partitions: str) -> None:
        async with asyncio.timeout(60):
            state = await self.load_state(name, *partitions)
            while state != LOADED_STATE:
                await asyncio.sleep(0.1)
                state = await self.load_state(name, *partitions)

    async def count(self, sample: Sample) -> int:
        await reconcile(self.sink, sample.want(indexes=(flat_index(),), load=LOADED))
        await self.until_loaded(sample.name)
        answer = await self.call(
            "Query",
            collection_name=sample.name,
            output_fields=["count(*)"],
            consistency_level=common_pb2.Strong,
        )
        return int(answer.fields_data[0].scalars.long_data.data[0])


@pytest.fixture
async def milvus(nats_stack: Stack) -> AsyncIterator[Milvus]:
    uri = nats_stack.addresses()["sink_uri"]
    made = Milvus(uri, f"sink_{uuid.uuid4().hex[:8]}", MilvusSink(uri), MilvusClient(uri))
    await made.sink.ensure_database(made.database)
    yield made
    for name in (await made.call("ShowCollections")).collection_names:
        await made.call("DropCollection", collection_name=name)
    await made.sink.drop_database(made.database)
    await made.sink.close()
    await made.client.close()


async def plain(milvus: Milvus, name: str = "plain", **about: Any) -> Sample:
    sample = Sample(milvus.database, name, PLAIN, **about)
    await milvus.open(sample.want())
    return sample


# ---- schema, indexes, load


async def test_a_collection_is_created_as_the_source_has_it(milvus: Milvus) -> None:
    tenant = Field("t", FieldType.VarChar, partition_key=True, params={"max_length": "20"})
    names = tuple(f"_default_{n}" for n in range(7))
    sample = Sample(milvus.database, "whole", (KEY, VECTOR, tenant, META), names, shards=3)
    properties = (("collection.ttl.seconds", "86400"), ("replicate.id", "source"))
    want = sample.want(properties=properties, description="of fish")
    await milvus.open(replace(want, consistency_level=2))
    there = await milvus.call("DescribeCollection", collection_name="whole")
    assert there.schema.description == "of fish"
    assert there.shards_num == 3
    assert there.num_partitions == 7
    assert there.consistency_level == 2
    assert {p.key: p.value for p in there.properties} == {"collection.ttl.seconds": "86400"}
    assert there.schema.enable_dynamic_field
    assert [field.name for field in there.schema.fields] == ["id", "v", "t"]


async def source_collections(stack: Stack, database: str) -> dict[str, Collection]:
    at = stack.addresses()
    async with EtcdClient([at["etcd_endpoint"]]) as client:
        catalogue = await CatalogueWatcher(client, Layout(at["source_root_path"])).read()
    return {each.name: each for each in catalogue.collections if each.database == database}


def source_indexes() -> dict[str, tuple[int, dict[str, Any]]]:
    floats, bits = DataType.FLOAT_VECTOR, DataType.BINARY_VECTOR
    hnsw = {"M": 8, "efConstruction": 64}
    return {
        "flat": (floats, {"index_type": "FLAT", "metric_type": "L2", "index_name": "custom"}),
        "ivf": (floats, {"index_type": "IVF_FLAT", "metric_type": "IP", "params": {"nlist": 64}}),
        "hnsw": (floats, {"index_type": "HNSW", "metric_type": "COSINE", "params": hnsw}),
        "auto": (floats, {"index_type": "AUTOINDEX", "metric_type": "L2"}),
        "binary": (
            bits,
            {"index_type": "BIN_IVF_FLAT", "metric_type": "JACCARD", "params": {"nlist": 8}},
        ),
        "bin_flat": (bits, {"index_type": "BIN_FLAT", "metric_type": "HAMMING"}),
    }


@pytest.fixture
def source_database(nats_stack: Stack) -> Iterator[tuple[str, UserClient]]:
    uri, database = nats_stack.addresses()["source_uri"], f"sink_{uuid.uuid4().hex[:8]}"
    UserClient(uri).create_database(database)
    client = UserClient(uri, db_name=database)
    yield database, client
    for name in client.list_collections():
        client.drop_collection(name)
    client.drop_database(database)


async def test_indexes_of_a_real_source_are_made_once(
    nats_stack: Stack, milvus: Milvus, source_database: tuple[str, UserClient]
) -> None:
    database, client = source_database
    for name, (vector, index) in source_indexes().items():
        schema = UserClient.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("v", vector, dim=32)
        schema.add_field("s", DataType.VARCHAR, max_length=64)
        schema.add_field("n", DataType.INT64)
        client.create_collection(name, schema=schema)
        params = client.prepare_index_params()
        params.add_index("v", **index)
        params.add_index("s", index_name="my_s", index_type="Trie")
        params.add_index("n", index_type="STL_SORT")
        client.create_index(name, params)
    wanted = await source_collections(nats_stack, database)
    assert set(wanted) == set(source_indexes())
    for name, want in wanted.items():
        here = replace(want, database=milvus.database, load=LOADED)
        assert len(here.indexes) == 3
        await milvus.open(here)
        await reconcile(milvus.sink, here)
        made = await milvus.indexes(name)
        assert set(made) == {index.name for index in here.indexes}
        user_index = source_indexes()[name][1]
        vector_index = next(index.name for index in here.indexes if index.field_name == "v")
        assert made[vector_index]["index_type"] == user_index["index_type"]
        assert made[vector_index]["metric_type"] == user_index["metric_type"]
        assert await milvus.sink.diff(here, Carry()) == ()
        assert await milvus.indexes(name) == made


async def test_a_changed_index_is_replaced_under_load(milvus: Milvus) -> None:
    sample = await plain(milvus)
    await milvus.put(sample, range(10))
    flat = flat_index()
    await reconcile(milvus.sink, sample.want(indexes=(flat,), load=LOADED))
    await milvus.until_loaded("plain")
    more = Index(2, "on_n", 102, "n", (("index_type", "STL_SORT"),), 1)
    both = sample.want(indexes=(flat, more), load=LOADED)
    [lacking] = await milvus.sink.diff(both, Carry())
    assert (lacking.action, lacking.kind, lacking.name) == (Action.CREATE, "index", "on_n")
    assert await reconcile(milvus.sink, both) == ()
    assert await milvus.load_state("plain") == LOADED_STATE  # a new one does not stop serving
    ivf = replace(
        flat, params=(("index_type", "IVF_FLAT"), ("metric_type", "L2"), ("params", '{"nlist":4}'))
    )
    await reconcile(milvus.sink, sample.want(indexes=(ivf,), load=LOADED))
    assert {name: p["index_type"] for name, p in (await milvus.indexes("plain")).items()} == {
        "of_v": "IVF_FLAT"
    }
    await milvus.until_loaded("plain")
    await reconcile(milvus.sink, sample.want())
    assert await milvus.indexes("plain") == {}
    assert await milvus.load_state("plain") == NOT_LOADED


async def test_load_follows_the_source(milvus: Milvus) -> None:
    sample = await plain(milvus, partitions=("_default", "p1", "p2"))
    index = (flat_index(),)
    some = Load(LoadKind.PARTITIONS, (51,), 1)
    await reconcile(milvus.sink, sample.want(indexes=index, load=some))
    await milvus.until_loaded("plain", "p1")
    assert await milvus.load_state("plain", "p2") == NOT_LOADED
    others = Load(LoadKind.PARTITIONS, (50, 52), 1)
    await reconcile(milvus.sink, sample.want(indexes=index, load=others))
    await milvus.until_loaded("plain", "p2")
    await milvus.until_loaded("plain", "_default")
    assert await milvus.load_state("plain", "p1") == NOT_LOADED
    # Milvus calls it loaded already; two replicas are more than one node can hold.
    every = Load(LoadKind.COLLECTION, (), 2)
    await reconcile(milvus.sink, sample.want(indexes=index, load=every))
    await milvus.until_loaded("plain", "p1")
    await reconcile(milvus.sink, sample.want(indexes=index, load=every))
    await reconcile(milvus.sink, sample.want(indexes=index))
    assert await milvus.load_state("plain") == NOT_LOADED
    await reconcile(milvus.sink, sample.want(indexes=index, load=every))
    await milvus.until_loaded("plain", "_default", "p1", "p2")


async def test_the_last_loaded_partition_can_be_dropped(milvus: Milvus) -> None:
    sample = await plain(milvus, partitions=("_default", "p1"))
    index = (flat_index(),)
    only = Load(LoadKind.PARTITIONS, (51,), 1)
    await reconcile(milvus.sink, sample.want(indexes=index, load=only))
    await milvus.until_loaded("plain", "p1")
    await milvus.sink.drop_partition(sample.want(), "p1")
    shown = await milvus.call("ShowPartitions", collection_name="plain")
    assert list(shown.partition_names) == ["_default"]
    await reconcile(milvus.sink, sample.want(indexes=index, dropped=("p1",), load=only))


async def test_rows_of_an_unloaded_partition_are_not_overlooked(milvus: Milvus) -> None:
    sample = await plain(milvus, partitions=("_default", "p1"))
    await milvus.put(sample, range(3), partition="p1")
    only = Load(LoadKind.PARTITIONS, (50,), 1)
    await reconcile(milvus.sink, sample.want(indexes=(flat_index(),), load=only))
    await milvus.until_loaded("plain", "_default")
    with pytest.raises(UserError) as failed:
        await milvus.open(sample.want())
    assert failed.value.reason == "COLLECTION_EXISTS"
    target = milvus.sink.target(sample.want())
    await milvus.sink.write(target, DeleteBatch("", np.arange(3)), SECONDS)
    assert await milvus.count(sample) == 0
    assert not (await milvus.open(sample.want())).adopted


async def test_a_name_that_is_an_alias_is_left_alone(milvus: Milvus) -> None:
    sample = await plain(milvus, "other")
    await milvus.call("CreateAlias", collection_name="other", alias="plain")
    wanted = Sample(milvus.database, "plain", PLAIN).want()
    for how in ({}, {"adopt": True}, {"recreate": True}):
        with pytest.raises(UserError) as failed:
            await milvus.open(wanted, **how)
        assert failed.value.reason == "SINK_NAME_IS_ALIAS"
    with pytest.raises(UserError):
        await milvus.sink.drop_collection(wanted, sink_collection_id=0)
    await milvus.open(sample.want())
    await milvus.call("DropAlias", alias="plain")


# ---- failures


async def test_a_write_whose_answer_is_lost_may_have_happened(milvus: Milvus) -> None:
    sample = await plain(milvus)
    await milvus.put(sample, range(10))
    async with TcpProxy(milvus.uri.removeprefix("http://")) as proxy:
        sink = MilvusSink(f"http://{proxy.address}")
        target = sink.target(sample.want())
        await sink.probe()
        proxy.swallowing = True
        late = sample.batch(plain_rows(range(10, 20)))
        with pytest.raises(UnknownOutcomeError) as failed:
            await sink.write(target, late, 1.5)
        assert failed.value.reason == "SINK_TIMEOUT"
        writing = asyncio.create_task(
            sink.write(target, sample.batch(plain_rows(range(20, 30))), SECONDS)
        )
        await asyncio.sleep(0.5)
        proxy.cut()
        with pytest.raises(UnknownOutcomeError) as failed:
            await writing
        assert failed.value.reason == "SINK_UNAVAILABLE"
        await sink.close()
    assert await milvus.count(sample) == 30
    await milvus.put(sample, range(10, 30), Op.UPSERT)
    assert await milvus.count(sample) == 30


async def test_a_write_that_found_no_server_did_not_happen() -> None:
    async with TcpProxy("127.0.0.1:1") as closed:
        address = closed.address
    sink = MilvusSink(f"http://{address}")
    sample = Sample("default", "plain", PLAIN)
    target = sink.target(sample.want())
    with pytest.raises(RetryableError) as failed:
        await sink.write(target, sample.batch(plain_rows([1])), 5.0)
    assert failed.value.reason == "SINK_UNAVAILABLE"
    assert not isinstance(failed.value, UnknownOutcomeError)
    with pytest.raises(RetryableError):
        await sink.probe()
    await sink.close()


async def test_a_stalled_call_ends_at_its_deadline(milvus: Milvus) -> None:
    sample = await plain(milvus)
    async with TcpProxy(milvus.uri.removeprefix("http://")) as proxy:
        sink = MilvusSink(f"http://{proxy.address}")
        await sink.probe()
        proxy.swallowing = True
        target = sink.target(sample.want())
        with pytest.raises(UnknownOutcomeError):
            await sink.write(target, sample.batch(plain_rows(range(3))), 1.0)
        with pytest.raises(UnknownOutcomeError):
            await sink.write(target, DeleteBatch("", np.arange(3)), 1.0)
        await sink.close()


class GuardedServer(MilvusServer):
    """With authorization, and limits low enough to be met."""

    def _answers(self) -> bool:
        header = (("authorization", base64.b64encode(b"root:Milvus").decode()),)
        with grpc.insecure_channel(self.address) as channel:
            try:
                reply = milvus_pb2_grpc.MilvusServiceStub(channel).ShowCollections(
                    milvus_pb2.ShowCollectionsRequest(), timeout=5, metadata=header
                )
            except grpc.RpcError:
                return False
        return bool(reply.status.code == 0)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    settings = {
        "common": {"security": {"authorizationEnabled": True}},
        "quotaAndLimits": {"enabled": True, "dml": {"enabled": True, "insertRate": {"max": 1}}},
        "rootCoord": {"maxDatabaseNum": 2},
        "proxy": {"grpc": {"serverMaxRecvSize": 1 << 19}},
    }
    with (
        EtcdServer(folder / "etcd") as etcd,
        GuardedServer(
            folder / "milvus",
            etcd_endpoint=etcd.endpoint,
            root_path="guarded",
            cluster="guarded",
            settings=settings,
            name="guarded",
        ) as server,
    ):
        yield server


async def test_tokens_and_rights(guarded: MilvusServer) -> None:
    for token in (None, "root:wrong", "nobody:Milvus"):
        sink = MilvusSink(guarded.uri, token)
        with pytest.raises(UserError) as failed:
            await sink.probe()
        assert failed.value.reason == "SINK_UNAUTHENTICATED"
        assert failed.value.field == "sink.milvus.token"
        assert "wrong" not in failed.value.message
        await sink.close()
    root = MilvusSink(guarded.uri, "root:Milvus")
    assert (await root.probe()).startswith("v2.3.5")
    await root.ensure_database("granted")
    sample = Sample("default", "rights", PLAIN)
    options = {"opened": False, "adopt": False, "recreate": False, "sink_collection_id": 0}
    await root.open_collection(sample.want(), **options)  # type: ignore[arg-type]
    password = base64.b64encode(b"passw0rd").decode()
    async with MilvusClient(guarded.uri, "root:Milvus") as client:
        await client.call(
            "CreateCredential",
            milvus_pb2.CreateCredentialRequest(username="reader", password=password),
        )
    reader = MilvusSink(guarded.uri, "reader:passw0rd")
    target = reader.target(sample.want())
    with pytest.raises(UserError) as failed:
        await reader.write(target, sample.batch(plain_rows([1])), SECONDS)
    assert failed.value.reason == "SINK_PERMISSION_DENIED"
    await reader.ensure_database("granted")  # it is there: no right needed
    with pytest.raises(UserError) as failed:
        await reader.ensure_database("another")
    assert failed.value.reason == "SINK_PERMISSION_DENIED"
    await _grant(guarded.uri, "granted", "reader")
    inner = Sample("granted", "rights", PLAIN)
    await root.open_collection(inner.want(), **options)  # type: ignore[arg-type]
    target = reader.target(inner.want())
    async with asyncio.timeout(30):
        while not await _taken(reader, target, inner.batch(plain_rows([1]))):
            await asyncio.sleep(0.2)  # grants take a moment
    await root.ensure_database("second")
    with pytest.raises(UserError) as failed:
        await root.ensure_database("third")
    assert failed.value.reason == "SINK_LIMIT"
    await reader.close()
    await root.close()


async def _grant(uri: str, database: str, user: str) -> None:
    """The right to insert into every collection of one database, and no other."""
    async with MilvusClient(uri, "root:Milvus") as client:
        role = milvus_pb2.RoleEntity(name="writer")
        await client.call("CreateRole", milvus_pb2.CreateRoleRequest(entity=role))
        await client.call(
            "OperateUserRole", milvus_pb2.OperateUserRoleRequest(username=user, role_name="writer")
        )
        entity = milvus_pb2.GrantEntity(
            role=role,
            object=milvus_pb2.ObjectEntity(name="Collection"),
            object_name="*",
            db_name=database,
            grantor=milvus_pb2.GrantorEntity(privilege=milvus_pb2.PrivilegeEntity(name="Insert")),
        )
        await client.call("OperatePrivilege", milvus_pb2.OperatePrivilegeRequest(entity=entity))


async def _taken(sink: MilvusSink, target: CollectionTarget, batch: RowBatch) -> bool:
    try:
        await sink.write(target, batch, SECONDS)
    except UserError as error:
        if error.reason != "SINK_PERMISSION_DENIED":
            raise
        return False
    return True


async def test_limits_of_size_and_rate(guarded: MilvusServer) -> None:
    sink = MilvusSink(guarded.uri, "root:Milvus")
    sample = Sample("default", "limits", PLAIN)
    options = {"opened": False, "adopt": False, "recreate": True, "sink_collection_id": 0}
    await sink.open_collection(sample.want(), **options)  # type: ignore[arg-type]
    target = sink.target(sample.want())
    # About 1 MB where a message may have half of it: it goes in parts, each row once.
    batch = sample.batch(plain_rows(range(22_000)))
    await sink.write(target, batch, SECONDS)
    statistics = milvus_pb2.GetCollectionStatisticsRequest(collection_name="limits")
    async with MilvusClient(guarded.uri, "root:Milvus") as client:
        flushed = await client.call(
            "Flush", milvus_pb2.FlushRequest(collection_names=["limits"]), timeout=60
        )
        state = milvus_pb2.GetFlushStateRequest(
            segmentIDs=flushed.coll_segIDs["limits"].data,
            flush_ts=flushed.coll_flush_ts["limits"],
            collection_name="limits",
        )
        done = await client.call("GetFlushState", state)
        while not done.flushed:
            await asyncio.sleep(0.1)
            done = await client.call("GetFlushState", state)
        stats = (await client.call("GetCollectionStatistics", statistics)).stats
        assert {pair.key: pair.value for pair in stats}["row_count"] == "22000"

    async def write_often(what: RowBatch) -> None:
        for _ in range(20):
            await sink.write(target, what, SECONDS)

    with pytest.raises(RetryableError) as failed:
        await write_often(batch)
    assert failed.value.reason == "SINK_RATE_LIMITED"
    # Parts of the batch may be there already; a single message is refused as a whole.
    small = sample.batch(plain_rows(range(9_000)))
    with pytest.raises(RetryableError) as failed:
        await write_often(small)
    assert failed.value.reason == "SINK_RATE_LIMITED"
    assert not isinstance(failed.value, UnknownOutcomeError)
    wide = Sample("default", "wide", (KEY, VECTOR, Field("j", FieldType.JSON)))
    await sink.open_collection(wide.want(), **options)  # type: ignore[arg-type]
    row = {"id": 1, "v": [0.0] * DIM, "j": b'{"x": "' + b"x" * 600_000 + b'"}'}
    with pytest.raises(RowRefusedError) as refused:
        await sink.write(sink.target(wide.want()), wide.batch([row]), SECONDS)
    assert refused.value.reason == "SINK_ROW_TOO_LARGE"
    await sink.close()


async def test_what_a_server_refuses_for_good_needs_a_person(milvus: Milvus) -> None:
    text = Field("s", FieldType.VarChar, params={"max_length": "5"})
    await milvus.open(Sample(milvus.database, "short", (KEY, VECTOR, text)).want())
    longer = Sample(
        milvus.database, "short", (KEY, VECTOR, replace(text, params={"max_length": "50"}))
    )
    target = milvus.sink.target(longer.want())
    row = {"id": 1, "v": [0.0] * DIM, "s": "too long for it"}
    with pytest.raises(RowRefusedError) as unfit:
        await milvus.sink.write(target, longer.batch([row]), SECONDS)
    assert unfit.value.reason == "SINK_REFUSED"
    with pytest.raises(UserError) as failed:
        await milvus.open(replace(longer.want(), name="bad name!"))
    assert failed.value.reason == "SINK_REFUSED"


def test_schema_types_are_those_of_pymilvus() -> None:
    # The sink loads Milvus' protos without pymilvus; both must be the same classes.
    from milvus_cdc import milvus_protos

    assert milvus_protos.schema_pb2 is schema_pb2
