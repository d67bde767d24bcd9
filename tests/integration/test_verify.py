"""The comparison on two real Milvus servers."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from milvus_cdc.milvus_client import MilvusClient as PlainClient
from milvus_cdc.verify import (
    CollectionResult,
    Difference,
    DifferenceKind,
    MilvusReads,
    Progress,
    Target,
    verify_collection,
)
from pymilvus import DataType, MilvusClient

from tests.servers import Stack

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
NASTY = [
    "",
    " ",
    '"quoted"',
    "it's",
    "back\\slash",
    "\\",
    '\\"',
    "\\n",
    "new\nline",
    "tab\t",
    "\x01",
    "\x7f",
    "\u2028",
    "%",
    "per%cent_",
    "é",
    "日本",
    "🙂",
    "\uffff",
    "\U0010ffff",
    "{x}",
    "\\u0041",
]


@dataclass
class Pair:
    """The same database on both clusters."""

    database: str
    source: MilvusClient
    sink: MilvusClient
    source_reads: MilvusReads
    sink_reads: MilvusReads
    events: list[Progress | Difference] = field(default_factory=list)

    def create(self, schema: Any, name: str = "c", *, load: bool = True, **options: Any) -> None:
        for client in (self.source, self.sink):
            client.create_collection(name, schema=schema, **options)
            params = client.prepare_index_params()
            for f in schema.fields:
                if f.dtype == DataType.BINARY_VECTOR:
                    params.add_index(f.name, index_type="BIN_FLAT", metric_type="HAMMING")
                elif f.dtype == DataType.FLOAT_VECTOR:
                    params.add_index(f.name, index_type="FLAT", metric_type="L2")
            client.create_index(name, params)
            if load:
                client.load_collection(name)

    def insert(self, rows: list[dict[str, Any]], name: str = "c", partition: str = "") -> None:
        for client in (self.source, self.sink):
            client.insert(name, rows, partition_name=partition)

    async def verify(self, name: str = "c", **options: Any) -> CollectionResult:
        async def on_event(event: Progress | Difference) -> None:
            self.events.append(event)

        self.events.clear()
        options.setdefault("patience_seconds", 0.5)
        return await verify_collection(
            self.source_reads,
            self.sink_reads,
            Target(self.database, name, self.database, name),
            on_event=on_event,
            **options,
        )

    def named(self, kind: DifferenceKind) -> list[str]:
        return [e.key for e in self.events if isinstance(e, Difference) and e.kind == kind]


def _client(uri: str, database: str) -> MilvusClient:
    first = MilvusClient(uri=uri)
    first.create_database(database)
    first.close()
    return MilvusClient(uri=uri, db_name=database)


def _drop(uri: str, client: MilvusClient, database: str) -> None:
    for name in client.list_collections():
        client.drop_collection(name)
    client.close()
    last = MilvusClient(uri=uri)
    last.drop_database(database)
    last.close()


@pytest.fixture
async def pair(nats_stack: Stack) -> AsyncIterator[Pair]:
    at = nats_stack.addresses()
    database = f"verify_{uuid.uuid4().hex[:8]}"
    source, sink = _client(at["source_uri"], database), _client(at["sink_uri"], database)
    async with (
        PlainClient(at["source_uri"], who="source") as source_plain,
        PlainClient(at["sink_uri"]) as sink_plain,
    ):
        yield Pair(database, source, sink, MilvusReads(source_plain), MilvusReads(sink_plain))
    _drop(at["source_uri"], source, database)
    _drop(at["sink_uri"], sink, database)


def _schema(key: DataType = DataType.INT64, *, dynamic: bool = False) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=dynamic)
    options = {"max_length": 200} if key == DataType.VARCHAR else {}
    schema.add_field("id", key, is_primary=True, **options)
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=4)
    return schema


def _row(key: int | str, x: float = 1.0) -> dict[str, Any]:
    return {"id": key, "v": [x, 2.0, 3.0, 4.0]}


def _rows(keys: Any) -> list[dict[str, Any]]:
    return [_row(key) for key in keys]


def _chunks(keys: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


async def test_equal_over_segments_shards_and_extreme_keys(pair: Pair) -> None:
    pair.create(_schema(), num_shards=2)
    dice = random.Random(1)
    keys = sorted({dice.randrange(INT64_MIN + 2, INT64_MAX) for _ in range(3000)})
    keys += [INT64_MIN, INT64_MIN + 1, INT64_MAX]
    for client in (pair.source, pair.sink):
        dice.shuffle(keys)
        for n, chunk in enumerate(_chunks(keys, 800)):
            client.insert("c", _rows(chunk))
            if n < 2:
                client.flush("c")
    result = await pair.verify(page_bytes=8192)
    assert result.equal, result
    assert result.rows_source == result.rows_sink == len(keys)
    assert result.doubled == result.source_doubled == 0
    # Milvus 2.3 never returns the largest key from a query; the result says so.
    assert result.rows_compared == len(keys) - 1
    assert str(INT64_MAX) in result.message
    assert {e.phase for e in pair.events if isinstance(e, Progress)} == {"COMPARING"}

    pair.sink.delete("c", filter=f"id == {INT64_MAX}")
    result = await pair.verify()
    assert (result.equal, result.missing) == (False, 1)
    assert pair.named(DifferenceKind.MISSING) == [str(INT64_MAX)]


async def test_missing_and_extra_keys_are_counted_and_some_named(pair: Pair) -> None:
    pair.create(_schema())
    pair.source.insert("c", _rows(range(1000)))
    pair.sink.insert("c", _rows(range(500, 1700)))
    result = await pair.verify(page_bytes=4096, max_differences=3)
    assert not result.equal
    assert (result.missing, result.extra, result.different) == (500, 700, 0)
    assert (result.rows_source, result.rows_sink, result.rows_compared) == (1000, 1200, 500)
    assert pair.named(DifferenceKind.MISSING) == ["0", "1", "2"]
    assert len(pair.named(DifferenceKind.EXTRA)) == 3


async def test_one_side_empty(pair: Pair) -> None:
    pair.create(_schema())
    assert (await pair.verify()).equal
    pair.source.insert("c", _rows(range(10)))
    result = await pair.verify()
    assert (result.equal, result.missing) == (False, 10)


def _wide_schema() -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("flag", DataType.BOOL)
    schema.add_field("i8", DataType.INT8)
    schema.add_field("i16", DataType.INT16)
    schema.add_field("i32", DataType.INT32)
    schema.add_field("i64", DataType.INT64)
    schema.add_field("f32", DataType.FLOAT)
    schema.add_field("f64", DataType.DOUBLE)
    schema.add_field("text", DataType.VARCHAR, max_length=100)
    schema.add_field("doc", DataType.JSON)
    schema.add_field("tags", DataType.ARRAY, element_type=DataType.INT64, max_capacity=8)
    schema.add_field(
        "words", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=8, max_length=20
    )
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=4)
    return schema


def _wide_row(key: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": key,
        "flag": True,
        "i8": -8,
        "i16": -16,
        "i32": -32,
        "i64": INT64_MIN,
        "f32": -0.5,
        "f64": 0.1,
        "text": '日本 "x"',
        "doc": {"a": [1, {"b": None}], "c": True},
        "tags": [1, -2, 3],
        "words": ["a", ""],
        "v": [1.0, 2.0, 3.0, 4.0],
        "extra": {"n": 1},
    }
    return row | changes


CHANGES: dict[str, Any] = {
    "flag": False,
    "i8": 8,
    "i16": 16,
    "i32": 32,
    "i64": INT64_MAX,
    "f32": struct.unpack("<f", struct.pack("<I", 0xBF000001))[0],
    "f64": 0.1 + 2**-56,
    "text": "日本 'x'",
    "doc": {"a": [1, {"b": 0}], "c": True},
    "tags": [1, -2],
    "words": ["a", " "],
    "v": [1.0, 2.0, 3.0, -4.0],
    "extra": {"n": True},
}


async def test_a_changed_bit_in_any_field_is_found_and_the_field_named(pair: Pair) -> None:
    pair.create(_wide_schema())
    same = [_wide_row(key) for key in range(100, 200)]
    pair.insert(same)
    names = list(CHANGES)
    pair.source.insert("c", [_wide_row(n) for n in range(len(names))])
    pair.sink.insert("c", [_wide_row(n, **{f: CHANGES[f]}) for n, f in enumerate(names)])
    result = await pair.verify(max_differences=100)
    assert (result.different, result.missing, result.extra) == (len(names), 0, 0)
    found = {e.key: e.fields for e in pair.events if isinstance(e, Difference)}
    want = {str(n): (("$meta" if f == "extra" else f),) for n, f in enumerate(names)}
    assert found == want


async def test_binary_vectors_are_compared_bit_for_bit(pair: Pair) -> None:
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("bits", DataType.BINARY_VECTOR, dim=16)
    pair.create(schema)
    pair.insert([{"id": n, "bits": bytes([n, 1])} for n in range(50)])
    assert (await pair.verify()).equal
    pair.sink.upsert("c", [{"id": 7, "bits": bytes([7, 3])}])
    result = await pair.verify()
    assert (result.equal, result.different) == (False, 1)
    assert pair.named(DifferenceKind.DIFFERENT) == ["7"]


async def test_json_is_compared_by_value(pair: Pair) -> None:
    pair.create(_wide_schema())
    pair.source.insert("c", [_wide_row(1, doc={"a": 1, "b": [1.5]}, x=1, y=2)])
    pair.sink.insert("c", [_wide_row(1, y=2, x=1, doc={"b": [1.5], "a": 1})])
    assert (await pair.verify()).equal


async def test_doubled_keys_at_the_sink_are_counted_and_named(pair: Pair) -> None:
    pair.create(_schema(), num_shards=2)
    pair.insert(_rows(range(2000)))
    pair.sink.flush("c")
    pair.sink.insert("c", _rows([7, 7, 1500, *range(900, 960)]))
    result = await pair.verify(page_bytes=4096, max_differences=5)
    assert not result.equal
    assert (result.missing, result.extra, result.different) == (0, 0, 0)
    assert (result.doubled, result.source_doubled) == (63, 0)
    assert result.rows_sink - result.rows_source == 63
    assert result.rows_compared == 2000
    assert pair.named(DifferenceKind.DOUBLED) == ["7", "900", "901", "902", "903"]


async def test_keys_doubled_alike_on_both_sides_are_equal_and_reported(pair: Pair) -> None:
    pair.create(_schema())
    pair.insert(_rows([*range(100), *([5] * 40)]))
    result = await pair.verify(page_bytes=1024)
    assert result.equal, result
    assert (result.doubled, result.source_doubled) == (0, 40)
    assert "SOURCE_DUPLICATE_KEYS" in result.message
    assert result.rows_compared == 100
    assert not pair.named(DifferenceKind.DOUBLED)

    # The copies of key 5 fill a whole page; what lies behind them is compared all the same.
    pair.sink.upsert("c", [_row(60, 9.0)])
    result = await pair.verify(page_bytes=1024)
    assert (result.different, pair.named(DifferenceKind.DIFFERENT)) == (1, ["60"])


async def test_varchar_keys_of_any_text(pair: Pair) -> None:
    pair.create(_schema(DataType.VARCHAR), num_shards=2)
    keys = NASTY + [f"k{n}" for n in range(600)]
    random.Random(2).shuffle(keys)
    for chunk in _chunks(keys, 200):
        pair.insert(_rows(chunk))
        pair.source.flush("c")
    result = await pair.verify(page_bytes=1024)
    assert result.equal, result
    assert result.rows_compared == len(keys)

    for key in NASTY:
        pair.sink.delete("c", filter=f"id in [{json.dumps(key, ensure_ascii=False)}]")
    result = await pair.verify(page_bytes=1024, max_differences=100)
    assert sorted(pair.named(DifferenceKind.MISSING)) == sorted(NASTY)


async def test_rows_in_the_wrong_partition_are_found(pair: Pair) -> None:
    pair.create(_schema())
    for client in (pair.source, pair.sink):
        client.create_partition("c", "p1")
    pair.insert(_rows(range(100)), partition="p1")
    pair.insert(_rows(range(100, 150)))
    assert (await pair.verify()).equal
    pair.source.insert("c", _rows([500]), partition_name="p1")
    pair.sink.insert("c", _rows([500]))
    result = await pair.verify()
    assert (result.missing, result.extra) == (1, 1)
    places = {(e.kind, e.partition) for e in pair.events if isinstance(e, Difference)}
    assert places == {(DifferenceKind.MISSING, "p1"), (DifferenceKind.EXTRA, "_default")}


async def test_a_partition_of_one_side_only_is_a_mismatch(pair: Pair) -> None:
    pair.create(_schema())
    pair.source.create_partition("c", "p1")
    result = await pair.verify()
    assert (result.equal, result.reason) == (False, "PARTITION_MISMATCH")
    assert "p1" in result.message


async def test_partition_key_collections_are_compared_as_a_whole(pair: Pair) -> None:
    schema = _schema()
    schema.add_field("tenant", DataType.VARCHAR, max_length=20, is_partition_key=True)
    pair.create(schema, num_partitions=4)
    rows = [_row(key) | {"tenant": f"t{key % 9}"} for key in range(300)]
    pair.insert(rows)
    assert (await pair.verify()).equal
    pair.sink.upsert("c", [rows[3] | {"v": [9.0, 9.0, 9.0, 9.0]}])
    result = await pair.verify()
    assert (result.different, result.missing, result.extra) == (1, 0, 0)


async def test_nothing_is_loaded_for_a_comparison(pair: Pair) -> None:
    pair.create(_schema(), load=False)
    pair.source.load_collection("c")
    result = await pair.verify()
    assert (result.equal, result.reason) == (False, "NOT_LOADED")
    assert "sink" in result.message
    pair.sink.load_collection("c")
    for client in (pair.source, pair.sink):
        client.create_partition("c", "p1")
    pair.insert(_rows(range(5)))
    pair.insert(_rows(range(10, 15)), partition="p1")
    pair.source.release_partitions("c", ["p1"])
    result = await pair.verify()
    assert (result.equal, result.reason) == (False, "NOT_LOADED")
    assert "p1" in result.message
    assert "source" in result.message
    assert result.rows_compared == 5
    assert pair.source.get_load_state("c", partition_name="p1")["state"].name == "NotLoad"


async def test_other_shapes_are_refused(pair: Pair) -> None:
    assert (await pair.verify("nowhere")).reason == "COLLECTION_NOT_FOUND"
    pair.source.create_collection("c", schema=_schema())
    other = _schema()
    other.add_field("n", DataType.INT64)
    pair.sink.create_collection("c", schema=other)
    result = await pair.verify()
    assert (result.equal, result.reason) == (False, "SCHEMA_MISMATCH")
    assert "field n" in result.message


async def test_rows_still_on_their_way_are_waited_for(pair: Pair) -> None:
    pair.create(_schema())
    pair.insert(_rows(range(1000)))
    pair.source.upsert("c", [_row(key, 7.0) for key in range(10)])
    pair.source.insert("c", _rows(range(1000, 1010)))
    pair.source.delete("c", ids=[500, 501])

    async def follow() -> None:
        await asyncio.sleep(1.5)
        pair.sink.upsert("c", [_row(key, 7.0) for key in range(10)])
        pair.sink.insert("c", _rows(range(1000, 1010)))
        pair.sink.delete("c", ids=[500, 501])

    follower = asyncio.create_task(follow())
    result = await pair.verify(patience_seconds=10.0)
    await follower
    assert result.equal, result
    assert "RECHECKING" in {e.phase for e in pair.events if isinstance(e, Progress)}


async def test_a_collection_under_writes_ends_equal(pair: Pair) -> None:
    pair.create(_schema(), num_shards=2)
    pair.insert(_rows(range(3000)))
    running = True

    async def write() -> None:
        dice = random.Random(3)
        last: list[dict[str, Any]] = []
        while running:
            batch = [_row(key, dice.random()) for key in dice.sample(range(3000), 20)]
            await asyncio.to_thread(pair.source.upsert, "c", batch)
            if last:
                await asyncio.to_thread(pair.sink.upsert, "c", last)
            last = batch
            await asyncio.sleep(0.05)
        if last:
            await asyncio.to_thread(pair.sink.upsert, "c", last)

    writer = asyncio.create_task(write())
    result = await pair.verify(page_bytes=2048, patience_seconds=10.0)
    running = False
    await writer
    assert (result.missing, result.extra, result.doubled) == (0, 0, 0), result
    assert result.equal, result
