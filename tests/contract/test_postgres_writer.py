"""The PostgreSQL writer on a real server: what rows look like there, and in which order they
take effect.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from milvus_cdc.errors import BugError, RowRefusedError, UserError
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_postgres_pb2

from tests.contract.postgres_samples import (
    BEGIN,
    DIM,
    KEY,
    NUMBER,
    TEXT,
    TEXT_KEY,
    V1,
    V2,
    VECTOR,
    Database,
    gone,
    opened,
    plain,
    put,
    table_of,
    upto,
    write,
)
from tests.servers import PostgresServer
from tests.unit.format.tables import every_type

T = FieldType
SPARSEVEC = sink_postgres_pb2.POSTGRES_SPARSE_VECTORS_SPARSEVEC
STRIP = sink_postgres_pb2.POSTGRES_NUL_CHARACTERS_STRIP


# ---- values


def every_row(key: int, fill: random.Random) -> dict[str, Any]:
    """With the ends of each range now and then."""

    def number(bits: int) -> int:
        ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0)
        return fill.choice((*ends, fill.randrange(-100, 100)))

    def real(kind: type[np.floating[Any]]) -> float:
        return float(kind(fill.choice((0.0, -0.0, 1 / 3, 1e-30, math.inf, -math.inf, 5e30))))

    def text() -> str:
        return "".join(fill.choice("aé\u4e2d\U0001f600\\\"'\n\t,{}\x01") for _ in range(9))

    def some(make: Any) -> list[Any]:
        return [make() for _ in range(fill.choice((0, 1, 4)))]

    def small() -> float:
        return float(np.float16(fill.uniform(-5, 5)))

    json_text = json.dumps({"é": [text(), number(64), None, {"x": real(np.float64) > 0}]})
    return {
        "id": key,
        "a_bool": fill.random() < 0.5,
        "a_int8": number(8),
        "a_int16": number(16),
        "a_int32": number(32),
        "a_int64": number(64),
        "a_float": real(np.float32),
        "a_double": real(np.float64),
        "a_varchar": text(),
        "a_json": json_text,
        "some_bool": some(lambda: fill.random() < 0.5),
        "some_int8": some(lambda: number(8)),
        "some_int64": some(lambda: number(64)),
        "some_float": some(lambda: real(np.float32)),
        "some_double": some(lambda: real(np.float64)),
        "some_varchar": some(text),
        "floatvector": [float(np.float32(fill.uniform(-9, 9))) for _ in range(8)],
        "float16vector": [small() for _ in range(8)],
        "bfloat16vector": [fill.choice((0x3F80, 0xC049, 0x0001, 0x7F7F)) for _ in range(8)],
        "int8vector": [fill.choice((-128, 127, 3)) for _ in range(8)],
        "binaryvector": bytes([fill.randrange(256)]),
        "sparse": {fill.randrange(2**31): fill.uniform(0.1, 9) for _ in range(fill.randrange(4))},
        "$meta": json.dumps({"more": text()}),
    }


def bfloat16(word: int) -> float:
    return float(np.array([word << 16], np.uint32).view(np.float32)[0])


AS_HELD = """
SELECT id, a_bool, a_int8, a_int16, a_int32, a_int64, a_float, a_double, a_varchar, a_json,
       some_bool, some_int8, some_int64, some_float, some_double, some_varchar,
       floatvector::real[], float16vector::vector::real[], bfloat16vector::real[], int8vector,
       binaryvector::text, sparse, "$meta", _partition, _ts
  FROM "default".articles ORDER BY id"""


def as_read(cells: tuple[Any, ...]) -> list[Any]:
    """A `real` arrives as the shortest digits of a float32."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [float(np.float32(x)) for x in value]
        return None if value is None else float(np.float32(value))

    reals = {6, 13, 16, 17, 18}
    held = [short(cell) if at in reals else cell for at, cell in enumerate(cells)]
    held[21] = {key: short(value) for key, value in cells[21].items()}
    return held


def as_written(row: dict[str, Any]) -> list[Any]:
    held = dict(row)
    for name in ("a_json", "$meta"):
        held[name] = json.loads(row[name]) if row[name] is not None else None
    held["bfloat16vector"] = [bfloat16(x) for x in row["bfloat16vector"]]
    held["binaryvector"] = f"{row['binaryvector'][0]:08b}"
    held["sparse"] = {str(k): float(np.float32(v)) for k, v in row["sparse"].items()}
    return [*held.values(), "_default", BEGIN + 1]


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("merged", [False, True])
async def test_every_type_reads_back_equal(
    database: Database,
    writer: PostgresWriter,
    nulls: bool,
    merged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By COPY into the table itself and by the merge, at once and in slices."""
    if nulls:
        monkeypatch.setattr("milvus_cdc.sink.postgres.merging.SLICE_BYTES", 3000)
    table = every_type(nullable=nulls)
    fill = random.Random(7)
    rows = [every_row(key, fill) for key in range(60)]
    if nulls:
        for row in rows[::2]:
            for name in row:
                if name.startswith(("a_", "some_")):
                    row[name] = None
    await opened(writer, table)
    op = ChangeOp.UPDATE if merged else ChangeOp.CREATE
    await write(writer, table, put(table, rows, op=op))
    found = [as_read(cells) for cells in database.select(AS_HELD)]
    assert found == [as_written(row) for row in rows]


async def test_digits_of_json_numbers_stay(database: Database, writer: PostgresWriter) -> None:
    table = table_of(KEY, VECTOR, Field(102, "j", T.JSON))
    digits = '{"n": 12345678901234567890.12345678901234567890, "m": [1e300, NaN]}'
    await opened(writer, table)
    await write(writer, table, put(table, [{"id": 1, "v": [0.0] * DIM, "j": digits}]))
    [(text,)] = database.select('SELECT j::text FROM "default".articles')
    assert '"n": 12345678901234567890.12345678901234567890' in text
    assert json.loads(text)["m"] == [10**300, "NaN"]


async def test_sparse_vectors_as_sparsevec(database: Database) -> None:
    table = table_of(KEY, Field(101, "v", T.SPARSE_FLOAT_VECTOR))
    writer = database.writer(sparse_vectors=SPARSEVEC)
    await opened(writer, table)
    rows = [
        {"id": 1, "v": {0: 1.5, 7: 0.0, 999_999_999: 2.0}},
        {"id": 2, "v": {}},
        {"id": 3, "v": {7: 4.0}},
    ]
    await write(writer, table, put(table, rows))
    assert database.select('SELECT id, v::text FROM "default".articles ORDER BY id') == [
        (1, "{1:1.5,1000000000:2}/1000000000"),
        (2, "{}/1000000000"),
        (3, "{8:4}/1000000000"),
    ]
    for index in (1_000_000_000, 2**32 - 2):
        with pytest.raises(UserError, match=r"ROW_NOT_STORABLE.* key 5, field v"):
            await write(writer, table, put(table, [{"id": 5, "v": {index: 1.0}}]))
    await writer.close()


async def test_nearest_neighbours(database: Database, writer: PostgresWriter) -> None:
    """Also through an index that somebody made, which outlives a resync."""
    bits = Field(102, "b", T.BINARY_VECTOR, dim=16)
    half = Field(103, "h", T.FLOAT16_VECTOR, dim=2)
    table = table_of(KEY, VECTOR, bits, half)
    await opened(writer, table)
    database.execute('CREATE INDEX near ON "default".articles USING hnsw (v vector_l2_ops)')
    rows = [
        {"id": at, "v": [at, 0, 0, 0], "b": np.packbits([1] * at + [0] * (16 - at)).tobytes(),
         "h": [at / 4, 1.0]}
        for at in range(16)
    ]  # fmt: skip
    await write(writer, table, put(table, rows))
    near = 'SELECT id FROM "default".articles ORDER BY {} LIMIT 3'
    assert database.select(near.format("v <-> '[9.2,0,0,0]'")) == [(9,), (10,), (8,)]
    psql = near.format("v <-> '[9.2,0,0,0]'")
    assert database.server.psql(psql, database.name) == ["9", "10", "8"]
    assert database.select(near.format("b <~> B'1110000000000000', id")) == [(3,), (2,), (4,)]
    assert database.select(near.format("h <-> '[0.7,1]'")) == [(3,), (2,), (4,)]
    await opened(writer, table, Opening.RECREATE)
    assert database.select('SELECT count(*) FROM "default".articles') == [(0,)]
    assert database.select("SELECT count(*) FROM pg_indexes WHERE indexname = 'near'") == [(1,)]


@pytest.mark.parametrize(
    ("fields", "cell", "words"),
    [
        ((KEY, VECTOR, TEXT), {"s": "a\0b"}, "field s.*0x00.*nul_characters"),
        ((KEY, VECTOR, Field(103, "s", T.JSON)), {"s": '{"a": "\\u0000"}'}, "field s"),
        ((KEY, VECTOR, Field(103, "s", T.JSON)), {"s": "{broken"}, "field s.*json"),
        ((KEY, VECTOR), {"v": [1.0, math.nan, 0.0, 0.0]}, "field v.*NaN"),
        ((KEY, VECTOR), {"v": [1.0, math.inf, 0.0, 0.0]}, "field v.*infinite"),
        ((TEXT_KEY, VECTOR), {"id": "".join(map(chr, range(300, 4300)))}, "index row"),
    ],
)
async def test_a_row_that_cannot_be_held_is_named(
    database: Database,
    writer: PostgresWriter,
    fields: tuple[Field, ...],
    cell: dict[str, Any],
    words: str,
) -> None:
    table = table_of(*fields)
    keys = ["a", "b", "c"] if fields[0] is TEXT_KEY else [1, 2, 3]
    rows: list[dict[str, Any]] = [{"id": key, "v": [1.0] * DIM, "s": '"fine"'} for key in keys]
    rows[1] |= cell
    await opened(writer, table)
    for op in (ChangeOp.CREATE, ChangeOp.UPDATE):
        with pytest.raises(RowRefusedError, match=f"(?s)ROW_NOT_STORABLE.*{words}") as raised:
            await write(writer, table, put(table, rows, op=op), checkpoints=[upto(9)])
        # That of an index is not found while it is copied.
        assert raised.value.key in (rows[1]["id"], None)
        assert f"key {rows[1]['id']!r}"[:50] in raised.value.message
        assert len(raised.value.message) < 500
    assert database.select('SELECT count(*) FROM "default".articles') == [(0,)]
    assert (await writer.open(table, Opening.RESUME, 1)).checkpoints == ()


async def test_nul_characters_are_stripped_where_wished(database: Database) -> None:
    table = table_of(
        KEY, VECTOR, TEXT, Field(104, "j", T.JSON), Field(105, "a", T.ARRAY, element_type=T.VARCHAR)
    )
    writer = database.writer(nul_characters=STRIP)
    await opened(writer, table)
    row = {
        "id": 1,
        "v": [0.0] * DIM,
        "s": "a\0b\0",
        "j": r'{"x\u0000y": "\u0000\u0000é\\u0000\\\u0000"}',
        "a": ["\0", "z"],
    }
    await write(writer, table, put(table, [row, {**row, "id": 2, "s": "plain", "j": "{}"}]))
    found = database.select('SELECT s, j, a FROM "default".articles ORDER BY id')
    assert found == [("ab", {"xy": "é\\u0000\\"}, ["", "z"]), ("plain", {}, ["", "z"])]
    await writer.close()


# ---- order and effect

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("create", "update", "delete")),
        st.sampled_from(("p", "q")),
        st.booleans(),
        st.lists(st.integers(0, 7), min_size=1, max_size=5),
    ),
    max_size=24,
)


@pytest.mark.parametrize("key", [KEY, TEXT_KEY])
async def test_any_sequence_has_the_effect_of_its_changes_one_by_one(
    postgres_server: PostgresServer, key: Field
) -> None:
    database = Database.fresh(postgres_server)
    writer = database.writer()
    table = table_of(key, VECTOR, NUMBER)
    seen = 0

    @settings(
        max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(CHANGES, st.lists(st.integers(1, 8), min_size=24, max_size=24), st.data())
    def check(steps: list[Any], sizes: list[int], data: st.DataObject) -> None:
        nonlocal seen
        seen += 1
        asyncio_run(run(steps, sizes))

    async def run(steps: list[Any], sizes: list[int]) -> None:
        await opened(writer, table, Opening.RECREATE)
        model: dict[Any, tuple[int, str]] = {}
        changes: list[Changes] = []
        for at, (op, partition, anywhere, numbers) in enumerate(steps, start=1):
            keys: list[Any] = [str(x) for x in numbers] if key is TEXT_KEY else numbers
            if op == "delete":
                partition = "" if anywhere else partition
                changes.append(gone(keys, at=at, partition=partition))
                for each in keys:
                    if each in model and partition in ("", model[each][1]):
                        del model[each]
                continue
            kind = ChangeOp.CREATE if op == "create" else ChangeOp.UPDATE
            changes.append(put(table, plain(keys, at), op=kind, at=at, partition=partition))
            model |= {each: (at, partition) for each in keys}
        last = 0
        while changes:
            part, changes = changes[: sizes[last % 24]], changes[sizes[last % 24] :]
            last += 1
            await write(writer, table, *part, checkpoints=[upto(last)])
        found = database.select('SELECT id, n, _partition, _ts FROM "default".articles')
        assert {row[0]: row[1:] for row in found} == {
            each: (at, partition, BEGIN + at) for each, (at, partition) in model.items()
        }
        held = await opened(writer, table, Opening.RESUME)
        assert held == ({V1: upto(last)} if last else {})

    loop = asyncio.get_running_loop()

    def asyncio_run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(60)

    await asyncio.to_thread(check)
    assert seen >= 20
    await writer.close()


async def test_a_batch_is_seen_whole_or_not_at_all(
    database: Database, writer: PostgresWriter
) -> None:
    """A row replaced by delete and insert is never missing for a reader."""
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain(range(50))))
    stop = asyncio.Event()
    counts: set[int] = set()

    def look() -> None:
        with database.server.connect(database.name) as connection:
            while not stop.is_set():
                row = connection.execute('SELECT count(*) FROM "default".articles').fetchone()
                counts.add(row[0] if row else -1)

    reader = asyncio.create_task(asyncio.to_thread(look))
    for at in range(2, 30):
        changes = [gone(list(range(50)), at=at), put(table, plain(range(50), at), at=at)]
        await write(writer, table, *changes)
    stop.set()
    await reader
    assert counts == {50}


async def test_inserts_of_keys_that_are_there_replace_them(
    database: Database, writer: PostgresWriter
) -> None:
    """Milvus takes them, and a replay brings them."""
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1, 2, 3], 1)))
    await write(writer, table, put(table, plain([3, 4], 2), at=2))
    await write(writer, table, put(table, plain([4, 5, 5], 3), at=3))
    assert database.numbers() == {1: 1, 2: 1, 3: 2, 4: 3, 5: 3}


async def test_batches_larger_than_a_slice(database: Database, writer: PostgresWriter) -> None:
    """Encoded while others are sent; nulls and lengths differ from slice to slice."""
    wide = Field(101, "v", T.FLOAT_VECTOR, dim=1024)
    text = Field(103, "s", T.VARCHAR, nullable=True)
    table = table_of(KEY, wide, NUMBER, text)
    await opened(writer, table)
    count = 6_000
    rows = [
        {"id": at, "v": [float(at)] * 1024, "n": at, "s": None if at > 3000 else "x" * (at % 7)}
        for at in range(count)
    ]
    changes = put(table, rows)
    assert changes.arrow(table).nbytes > 20_000_000
    for op in (ChangeOp.CREATE, ChangeOp.UPDATE):
        await write(writer, table, Changes(**{**_parts(changes), "op": op}), timeout=60)
        [found] = database.select(
            "SELECT count(*), sum(n), count(s), sum(length(s)), sum((v::real[])[1024]::float8),"
            ' max(vector_dims(v)) FROM "default".articles'
        )
        lengths = sum(at % 7 for at in range(3001))
        assert found == (count, sum(range(count)), 3001, lengths, sum(range(count)), 1024)


def _parts(changes: Changes) -> dict[str, Any]:
    names = ("ts", "vchannel", "order", "partition", "num_rows", "columns")
    return {name: getattr(changes, name) for name in names}


async def test_empty_batches_and_checkpoints_alone(
    database: Database, writer: PostgresWriter
) -> None:
    table = table_of()
    assert await opened(writer, table) == {}
    await write(writer, table)
    await write(writer, table, put(table, []), gone([]))
    await write(writer, table, checkpoints=[upto(5), upto(6, b"\0\xff", V2)])
    assert await opened(writer, table, Opening.RESUME) == {V1: upto(5), V2: upto(6, b"\0\xff", V2)}
    await write(writer, table, checkpoints=[upto(9)])
    assert await opened(writer, table, Opening.RESUME) == {V1: upto(9), V2: upto(6, b"\0\xff", V2)}


async def test_writing_needs_an_opening(writer: PostgresWriter) -> None:
    table = table_of()
    with pytest.raises(BugError, match="NOT_OPEN"):
        await write(writer, table)
    await opened(writer, table)
    await writer.release(table)
    with pytest.raises(BugError, match="NOT_OPEN"):
        await write(writer, table)
