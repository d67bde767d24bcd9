"""What every sink promises, one suite for the memory sink and a real Milvus."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.model import Carry, Index, Partition
from milvus_cdc.sink import Copies, Op, RowBatch, reconcile
from milvus_cdc.sink.differences import ObjectDifference, is_missing
from milvus_cdc.sink.memory_rows import decode_rows
from pymilvus.grpc_gen.schema_pb2 import DataType

from tests.contract.sink_bench import (
    SECONDS,
    Bench,
    MemoryBench,
    MilvusBench,
    ints,
    opened,
    plain,
    put,
    remove,
)
from tests.contract.sink_samples import (
    BITS,
    DIM,
    KEY,
    LOADED,
    META,
    NUMBER,
    PLAIN,
    SCALARS,
    TEXT_KEY,
    VECTOR,
    Field,
    Sample,
    flat_index,
    plain_rows,
)


@pytest.fixture(params=["memory", "milvus"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        memory = MemoryBench()
        await memory.sink.ensure_database(memory.database)
        yield memory
        return
    stack = request.getfixturevalue("nats_stack")
    milvus = MilvusBench(stack.addresses()["sink_uri"])
    await milvus.sink.ensure_database(milvus.database)
    yield milvus
    await milvus.clean()


# ---- rows


def every_type(keys: Sequence[Any]) -> list[dict[str, Any]]:
    edges = [0, -1, 1, 127, -128]
    floats = [0.0, -0.0, 1.5, float(np.float32(1e-45)), -3.4028234663852886e38]
    doubles = [0.0, -0.0, math.pi, 5e-324, -1.7976931348623157e308]
    texts = ["", "ascii", "ünïcödé \u2028 漢字 🎈", 'quo"te\\back', "new\nline\ttab\x01"]
    jsons = [
        {},
        {"a": [1, 2.5, None]},
        {"ö": "ß", "n": {"m": True}},
        {"l": [1, "x"]},
        {"big": 2**60},
    ]
    return [
        {
            "id": key,
            "yes": at % 2 == 0,
            "i8": edges[at % 5],
            "i16": edges[at % 5] * 256,
            "i32": edges[at % 5] * 2**24,
            "i64": edges[at % 5] * 2**56,
            "f": floats[at % 5],
            "d": doubles[at % 5],
            "s": texts[at % 5],
            "j": json.dumps(jsons[at % 5]).encode(),
            "ai": list(range(at % 4)),
            "as": [texts[(at + n) % 5] for n in range(at % 3)],
            "v": [floats[(at + n) % 5] for n in range(DIM)],
            "$meta": json.dumps({"extra": at, "é": texts[at % 5]}).encode(),
        }
        for at, key in enumerate(keys)
    ]


@pytest.mark.parametrize("kind", ["int key, float vector", "text key, binary vector"])
async def test_every_type_arrives_bit_for_bit_from_joined_chunks(bench: Bench, kind: str) -> None:
    text = kind.startswith("text")
    key, vector = (TEXT_KEY, BITS) if text else (KEY, VECTOR)
    sample = Sample(bench.database, "types", (key, *SCALARS, vector, META))
    keys: list[Any] = [n * 2**40 * (-1) ** n for n in range(15)]
    rows = every_type([f"k{key}é" for key in keys] if text else keys)
    if text:
        for at, row in enumerate(rows):
            row["v"] = bytes([at * 17 % 256])
    chunks = (
        sample.chunk(rows[:1]),
        sample.chunk(rows[:10], keep=range(1, 10)),
        sample.chunk(rows[10:]),
    )
    await opened(bench, sample.want())
    target = bench.sink.target(sample.want())
    await bench.sink.write(target, RowBatch(Op.INSERT, "_default", chunks), SECONDS)
    wanted = {row["id"]: row for chunk in chunks for row in decode_rows(chunk)}
    assert len(wanted) == 15
    assert await bench.rows(sample) == wanted
    assert await bench.count(sample) == 15


async def test_writes_of_a_key_take_effect_in_their_order(bench: Bench) -> None:
    sample = await plain(bench)
    await put(bench, sample, plain_rows([1, 2, 3], 1))
    await put(bench, sample, plain_rows([2, 4], 2), Op.UPSERT)
    await remove(bench, sample, ints(1, 2))
    await put(bench, sample, plain_rows([1], 3))
    await put(bench, sample, plain_rows([1], 4), Op.UPSERT)
    await remove(bench, sample, ints(4))
    rows = await bench.rows(sample)
    assert {key: row["n"] for key, row in rows.items()} == {1: 4, 3: 1}
    assert await bench.count(sample) == 2


async def test_a_replay_by_upsert_changes_nothing(bench: Bench) -> None:
    sample = await plain(bench)

    async def log(insert: Op) -> None:
        await put(bench, sample, plain_rows(range(50), 1), insert)
        await remove(bench, sample, ints(*range(0, 50, 3)))
        await put(bench, sample, plain_rows(range(0, 10), 2), Op.UPSERT)

    await log(Op.INSERT)
    before, count = await bench.rows(sample), await bench.count(sample)
    await log(Op.UPSERT)
    assert await bench.rows(sample) == before
    assert await bench.count(sample) == count == len(before)


async def test_a_plain_insert_of_a_key_that_is_there_doubles_it(bench: Bench) -> None:
    sample = await plain(bench)
    await put(bench, sample, plain_rows([1, 2]))
    await put(bench, sample, plain_rows([2, 3]))
    assert (len(await bench.rows(sample)), await bench.count(sample)) == (3, 4)
    await put(bench, sample, plain_rows([2]), Op.UPSERT)
    assert await bench.count(sample) == 3


@pytest.mark.parametrize("key", [KEY, TEXT_KEY], ids=["int key", "text key"])
async def test_it_tells_how_often_keys_are_there(bench: Bench, key: Field) -> None:
    sample = Sample(bench.database, "copies", (key, VECTOR, NUMBER), partitions=("_default", "p"))
    assert (await opened(bench, sample.want())).late_writes
    texts: list[Any] = ["", "a'b", 'q"', "\\", "ä", "f"]
    keys = texts if key is TEXT_KEY else [-(2**63), -1, 0, 7, 2**63 - 1, 8]
    elsewhere, deleted, once, doubled, last, _ = keys
    target = bench.sink.target(sample.want())
    assert await bench.sink.copies(target, "_default", keys) is None, "it is not loaded"
    await put(bench, sample, plain_rows(keys[:5]))
    await put(bench, sample, plain_rows([doubled]))
    await put(bench, sample, plain_rows([elsewhere]), partition="p")
    await remove(bench, sample, (deleted,) if key is TEXT_KEY else ints(deleted))
    loaded = sample.want(indexes=(flat_index(),), load=LOADED)
    await reconcile(bench.sink, loaded, Carry(schema=False))
    assert await bench.count(sample) == 6  # waits until it is loaded
    there = frozenset({elsewhere, once, doubled, last})
    assert await bench.sink.copies(target, "_default", keys) == Copies(5, there)
    assert await bench.sink.copies(target, "", keys) == Copies(6, there)
    in_p = await bench.sink.copies(target, "p", [elsewhere, once])
    assert in_p == Copies(1, frozenset({elsewhere}))


async def test_deletes_hit_exactly_the_keys_named(bench: Bench) -> None:
    sample = Sample(bench.database, "nasty", (TEXT_KEY, VECTOR, NUMBER))
    await opened(bench, sample.want())
    nasty = [
        "", " ", "'", '"', "\\", "\\\\", '\\"', "a'b", 'a"b', "a\\nb", "a\nb", "a\rb", "a\tb",
        "\x01", "\x7f", "%", "_", "a%", "[1]", "] or id != '", "id in ['x']", "{", "\u2028",
        "\u00a0", "ä", "a\u0308", "漢字", "🎈", "\ufeff", "null", "true", "0x1f", "\\u0041",
    ]  # fmt: skip
    near = [f"{key}x" for key in nasty] + ["A", "a", "ab", "anb", "\\u004"]
    await put(bench, sample, plain_rows([*nasty, *near]))
    await remove(bench, sample, tuple(nasty))
    assert set(await bench.rows(sample)) == set(near)
    await remove(bench, sample, tuple(near))
    assert await bench.count(sample) == 0


async def test_a_partition_key_collection_is_written_without_partitions(bench: Bench) -> None:
    tenant = Field("t", DataType.VarChar, partition_key=True, params={"max_length": "20"})
    names = tuple(f"_default_{n}" for n in range(4))
    sample = Sample(bench.database, "tenants", (KEY, VECTOR, tenant), partitions=names)
    await opened(bench, sample.want())
    rows = [{"id": n, "v": [0.0] * DIM, "t": f"tenant{n % 9}"} for n in range(30)]
    # The log's partition names are the source's own and mean nothing at the sink.
    await put(bench, sample, rows, partition="_default_3")
    await remove(bench, sample, ints(*range(10)), partition="_default_1")
    rows = [{"id": n, "v": [0.0] * DIM, "t": f"tenant{n % 9}"} for n in range(20, 30)]
    await put(bench, sample, rows, Op.UPSERT, partition="_default_0")
    assert await bench.count(sample) == 20
    assert set(await bench.rows(sample)) == set(range(10, 30))


async def test_a_write_without_time_left_is_not_sent(bench: Bench) -> None:
    sample = await plain(bench)
    target = bench.sink.target(sample.want())
    for seconds in (0.0, -1.0):
        with pytest.raises(RetryableError) as failed:
            await bench.sink.write(target, sample.batch(plain_rows([1])), seconds)
        assert not isinstance(failed.value, UnknownOutcomeError)
    assert await bench.count(sample) == 0


async def test_a_write_to_what_is_not_there_needs_a_person(bench: Bench) -> None:
    sample = await plain(bench)
    with pytest.raises(UserError) as failed:
        await put(bench, sample, plain_rows([1]), partition="nowhere")
    assert failed.value.reason == "SINK_PARTITION_MISSING"
    await bench.sink.drop_collection(sample.want(), sink_collection_id=0)
    with pytest.raises(UserError) as failed:
        await put(bench, sample, plain_rows([1]))
    assert failed.value.reason == "SINK_COLLECTION_MISSING"


# ---- collections


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ((KEY, VECTOR), "n"),
        ((*PLAIN, Field("more", DataType.Bool)), "more"),
        ((KEY, VECTOR, Field("n", DataType.Int32)), "n"),
        ((KEY, replace(VECTOR, params={"dim": "16"}), NUMBER), "v"),
        ((replace(TEXT_KEY, params={"max_length": "9"}), VECTOR, NUMBER), "id"),
        ((KEY, VECTOR, replace(NUMBER, partition_key=True)), "n"),
        ((*PLAIN, META), "$meta"),
    ],
)
async def test_a_schema_that_does_not_fit_names_the_field(
    bench: Bench, fields: tuple[Field, ...], blamed: str
) -> None:
    there = Sample(bench.database, "fits", fields)
    await opened(bench, there.want())
    with pytest.raises(UserError) as failed:
        await opened(bench, Sample(bench.database, "fits", PLAIN).want())
    assert (failed.value.reason, failed.value.field) == ("SCHEMA_MISMATCH", blamed)
    assert blamed in failed.value.message
    with pytest.raises(UserError):
        await opened(bench, Sample(bench.database, "fits", PLAIN).want(), adopt=True)


async def test_fields_in_another_order_fit(bench: Bench) -> None:
    await opened(bench, Sample(bench.database, "order", (VECTOR, NUMBER, KEY)).want())
    sample = Sample(bench.database, "order", PLAIN)
    await opened(bench, sample.want())
    await put(bench, sample, plain_rows([1, 2], 5))
    wanted = {row["id"]: row for row in decode_rows(sample.chunk(plain_rows([1, 2], 5)))}
    assert await bench.rows(sample) == wanted


async def test_rows_that_are_there_are_taken_over_only_on_demand(bench: Bench) -> None:
    sample = await plain(bench)
    first = await opened(bench, sample.want())
    assert not first.adopted
    await put(bench, sample, plain_rows([1]))
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want())
    assert failed.value.reason == "COLLECTION_EXISTS"
    adopted = await opened(bench, sample.want(), adopt=True)
    assert adopted.adopted
    assert adopted.sink_collection_id == first.sink_collection_id
    again = await opened(
        bench, sample.want(), opened=True, sink_collection_id=adopted.sink_collection_id
    )
    assert not again.adopted
    assert await bench.count(sample) == 1
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want())  # loaded by now
    assert failed.value.reason == "COLLECTION_EXISTS"


async def test_recreate_replaces_what_is_there(bench: Bench) -> None:
    other = Sample(bench.database, "plain", (KEY, VECTOR))
    before = await opened(bench, other.want(), recreate=True)
    sample = Sample(bench.database, "plain", PLAIN)
    after = await opened(bench, sample.want(), recreate=True)
    assert before.sink_collection_id != after.sink_collection_id
    assert not after.adopted
    await put(bench, sample, plain_rows([1]))
    await opened(bench, sample.want(), recreate=True)
    assert await bench.count(sample) == 0


async def test_an_opened_collection_is_never_made_anew_in_silence(bench: Bench) -> None:
    sample = await plain(bench)
    mine = (await opened(bench, sample.want())).sink_collection_id
    await bench.sink.drop_collection(sample.want(), sink_collection_id=mine)
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want(), opened=True, sink_collection_id=mine)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await opened(bench, sample.want())
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want(), opened=True, sink_collection_id=mine)
    assert failed.value.reason == "SINK_COLLECTION_REPLACED"


async def test_a_drop_leaves_a_successor_alone(bench: Bench) -> None:
    sample = await plain(bench)
    first = (await opened(bench, sample.want())).sink_collection_id
    second = (await opened(bench, sample.want(), recreate=True)).sink_collection_id
    await bench.sink.drop_collection(sample.want(), sink_collection_id=first)
    await put(bench, sample, plain_rows([1]))
    await bench.sink.drop_collection(sample.want(), sink_collection_id=second)
    await bench.sink.drop_collection(sample.want(), sink_collection_id=second)
    with pytest.raises(CdcError):
        await put(bench, sample, plain_rows([1]))


async def test_a_renamed_collection_keeps_its_rows_and_is_renamed_once(bench: Bench) -> None:
    sample, second = await plain(bench, "one"), await plain(bench, "two")
    here = bench.database
    await bench.sink.ensure_database(f"{here}_b")
    mine = (await opened(bench, sample.want())).sink_collection_id
    other = (await opened(bench, second.want())).sink_collection_id
    await put(bench, sample, plain_rows([1, 2]))
    await put(bench, second, plain_rows([3]))

    async def rename(to: Sample, before: tuple[str, str], collection_id: int = mine) -> None:
        await bench.sink.rename_collection(
            to.want(), renamed_from=before, sink_collection_id=collection_id
        )

    with pytest.raises(RetryableError) as refused:
        await rename(second, (here, "one"))
    assert refused.value.reason == "SINK_NAME_TAKEN"
    third, away = replace(sample, name="three"), replace(sample, database=f"{here}_b")
    for _ in range(2):
        await rename(third, (here, "one"))
    await put(bench, third, plain_rows([4]))
    assert set(await bench.rows(third)) == {1, 2, 4}
    # Its place is free for another; what is renamed is known by its id, not by its name.
    await rename(sample, (here, "two"), other)
    await rename(third, (here, "one"))
    assert set(await bench.rows(sample)) == {3}
    # Into another database and back. What has its name in another database is not there.
    there = replace(third, database=away.database)
    with pytest.raises(UserError) as failed:
        await opened(bench, there.want(), opened=True, sink_collection_id=mine)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await rename(away, (here, "three"))
    await rename(away, (here, "three"))
    await opened(bench, away.want(), opened=True, sink_collection_id=mine)
    with pytest.raises(UserError) as failed:
        await opened(bench, third.want(), opened=True, sink_collection_id=mine)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await rename(third, (away.database, "one"))
    assert set(await bench.rows(third)) == {1, 2, 4}
    await bench.sink.drop_collection(third.want(), sink_collection_id=mine)
    with pytest.raises(UserError) as failed:
        await rename(away, (here, "three"))
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await bench.sink.drop_database(away.database)


async def test_keys_of_an_auto_id_collection_survive(bench: Bench) -> None:
    sample = Sample(bench.database, "auto", (replace(KEY, auto_id=True), VECTOR, NUMBER))
    answer = await opened(bench, sample.want())
    assert [kind for kind, _ in answer.conditions] == ["AUTO_ID_KEYS"]
    keys = [470612237455720466, 470612237455720467]
    await put(bench, sample, plain_rows(keys))
    await put(bench, sample, plain_rows(keys), Op.UPSERT)
    assert set(await bench.rows(sample)) == set(keys)


async def test_partitions_come_and_go(bench: Bench) -> None:
    sample = Sample(bench.database, "parts", PLAIN, partitions=("_default", "p1", "gone"))
    await opened(bench, sample.want(dropped=("gone",)))
    assert await bench.partitions(sample) == {"_default", "p1"}
    for _ in range(2):
        await bench.sink.create_partition(sample.want(), "p2")
    await put(bench, sample, plain_rows([1]), partition="_default")
    await put(bench, sample, plain_rows([2]), partition="p1")
    await put(bench, sample, plain_rows([3, 4]), partition="p2")
    await remove(bench, sample, ints(1, 2, 3), partition="p2")
    assert set(await bench.rows(sample)) == {1, 2, 4}
    await remove(bench, sample, ints(1))
    for _ in range(2):
        await bench.sink.drop_partition(sample.want(), "p2")  # loaded where there is a load
    assert await bench.partitions(sample) == {"_default", "p1"}
    assert set(await bench.rows(sample)) == {2}
    await opened(bench, sample.want(), opened=True)
    assert await bench.partitions(sample) == {"_default", "p1", "gone"}
    await bench.sink.drop_collection(sample.want(), sink_collection_id=0)
    await bench.sink.drop_partition(sample.want(), "p1")


# ---- databases


async def test_databases_come_and_go(bench: Bench) -> None:
    name = f"{bench.database}_b"
    await asyncio.gather(*(bench.sink.ensure_database(name) for _ in range(8)))
    await bench.sink.ensure_database(name)
    await bench.sink.ensure_database("default")
    assert name in await bench.databases()
    sample = Sample(name, "plain", PLAIN)
    await opened(bench, sample.want())
    with pytest.raises(UserError) as failed:
        await bench.sink.drop_database(name)
    assert failed.value.reason == "SINK_DATABASE_NOT_EMPTY"
    await bench.sink.drop_collection(sample.want(), sink_collection_id=0)
    for _ in range(2):
        await bench.sink.drop_database(name)
    assert name not in await bench.databases()
    await bench.sink.drop_collection(sample.want(), sink_collection_id=0)
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want(), opened=True, sink_collection_id=3)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"


# ---- what is no row


def places(found: Sequence[ObjectDifference]) -> list[tuple[str, str, str]]:
    return [(each.action, each.kind, each.name) for each in found]


async def test_a_difference_is_named_until_it_is_mended_and_nothing_else_is_touched(
    bench: Bench,
) -> None:
    parts = ("_default", "p1", "p2")
    sample = Sample(bench.database, "drifting", PLAIN, partitions=parts)
    plainly = sample.want(properties=(("collection.ttl.seconds", "1000"),))
    await opened(bench, plainly)
    assert await bench.sink.diff(plainly, Carry()) == ()
    by_number = Index(2, "by_n", 102, "n", (("index_type", "STL_SORT"),), 1)
    want = replace(
        sample.want(indexes=(flat_index(), by_number), load=LOADED),
        properties=(("collection.ttl.seconds", "2000"), ("mmap.enabled", "true")),
        partitions=(*plainly.partitions[:2], Partition(60, "p3", 1)),
    )
    found = await bench.sink.diff(want, Carry())
    assert places(found) == [
        ("ALTER", "property", "collection.ttl.seconds"),
        ("CREATE", "property", "mmap.enabled"),
        ("CREATE", "partition", "p3"),
        ("DROP", "partition", "p2"),
        ("CREATE", "index", "of_v"),
        ("CREATE", "index", "by_n"),
        ("CREATE", "load", ""),
    ]
    assert all(each.collection == "drifting" and each.detail for each in found)
    assert await bench.sink.diff(want, Carry()) == found, "looking changes nothing"
    for at, each in enumerate(found):
        for _ in range(2):
            await bench.sink.repair(want, each)
        assert places(await bench.sink.diff(want, Carry())) == places(found[at + 1 :])
    # Back: an index of what is loaded, and a loaded partition.
    found = await bench.sink.diff(plainly, Carry())
    assert {("DROP", "index", "of_v"), ("DROP", "load", ""), ("DROP", "partition", "p3")} <= {
        *places(found)
    }
    await reconcile(bench.sink, plainly)
    assert await bench.sink.diff(plainly, Carry()) == ()


async def test_what_is_not_carried_is_not_compared(bench: Bench) -> None:
    sample = await plain(bench, "carried", partitions=("_default", "p1"))
    want = replace(
        sample.want(
            indexes=(flat_index(),), load=LOADED, properties=(("collection.ttl.seconds", "9"),)
        ),
        partitions=sample.want().partitions[:1],
    )
    every = {"property", "partition", "index", "load"}
    assert {d.kind for d in await bench.sink.diff(want, Carry())} == every
    for switch, kinds in (
        ("schema", {"property", "partition"}),
        ("index", {"index"}),
        ("load", {"load"}),
    ):
        found = await bench.sink.diff(want, replace(Carry(), **{switch: False}))
        assert {d.kind for d in found} == every - kinds


async def test_a_partition_that_is_being_dropped_is_not_surplus(bench: Bench) -> None:
    sample = await plain(bench, "dropping", partitions=("_default", "p1"))
    on_its_way = sample.want(dropped=("p1",))
    assert await bench.sink.diff(on_its_way, Carry()) == ()
    gone = replace(on_its_way, partitions=on_its_way.partitions[:1])
    assert places(await bench.sink.diff(gone, Carry())) == [("DROP", "partition", "p1")]


async def test_a_partition_key_collection_has_partitions_of_its_own(bench: Bench) -> None:
    tenant = Field("t", DataType.VarChar, partition_key=True, params={"max_length": "20"})
    names = tuple(f"_default_{n}" for n in range(4))
    sample = Sample(bench.database, "keyed", (KEY, VECTOR, tenant), partitions=names)
    await opened(bench, sample.want())
    fewer = Sample(bench.database, "keyed", (KEY, VECTOR, tenant), partitions=names[:2])
    assert await bench.sink.diff(fewer.want(), Carry()) == ()


async def test_a_collection_that_was_renamed_is_found_and_one_that_is_gone_is_never_made_anew(
    bench: Bench,
) -> None:
    sample = Sample(bench.database, "mine", PLAIN)
    want = sample.want()
    known = (await opened(bench, want)).sink_collection_id
    assert known
    other = replace(want, name="yours")
    await bench.sink.rename_collection(
        other, renamed_from=(want.database, want.name), sink_collection_id=known
    )
    found = await bench.sink.diff(want, Carry(), sink_collection_id=known)
    assert places(found) == [("ALTER", "collection", "yours")]
    with pytest.raises(UserError) as failed:
        await opened(bench, want, opened=True, sink_collection_id=known)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    for _ in range(2):
        await bench.sink.repair(want, found[0], sink_collection_id=known)
    assert await bench.sink.diff(want, Carry(), sink_collection_id=known) == ()

    await bench.sink.drop_collection(want, sink_collection_id=known)
    [gone] = await bench.sink.diff(want, Carry(), sink_collection_id=known)
    assert is_missing(gone)
    with pytest.raises(UserError) as failed:
        await bench.sink.repair(want, gone, sink_collection_id=known)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await opened(bench, want)
    [replaced] = await bench.sink.diff(want, Carry(), sink_collection_id=known)
    assert is_missing(replaced), "another of its name is not it"


async def test_without_leave_to_create_nothing_is_made(bench: Bench) -> None:
    sample = Sample(bench.database, "strange", PLAIN, partitions=("_default", "p1"))
    with pytest.raises(UserError) as failed:
        await opened(bench, sample.want(), create=False)
    assert failed.value.reason == "SINK_COLLECTION_MISSING"
    await plain(bench, "strange")
    assert (await opened(bench, sample.want(), create=False)).created_partitions == ()
    assert await bench.partitions(sample) == {"_default"}
    assert (await opened(bench, sample.want())).created_partitions == ("p1",)
