"""The PostgreSQL writer on a real server: whose tables are whose, what becomes of them, and their
names.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.rows import ChangeOp, Field, FieldType, Table
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.writer import Opening, SchemaChange, SchemaChangeKind

from tests.contract.postgres_samples import (
    DIM,
    KEY,
    NUMBER,
    TEXT_KEY,
    V1,
    VECTOR,
    Database,
    gone,
    opened,
    plain,
    put,
    renamed,
    table_of,
    upto,
    write,
)

T = FieldType


# ---- openings


async def test_a_table_that_is_not_ours(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    shape = "id bigint PRIMARY KEY, v public.vector(4), n bigint, _partition text, _ts bigint"
    database.execute("CREATE EXTENSION vector")
    database.execute('CREATE SCHEMA "default"')
    database.execute(f'CREATE TABLE "default".articles ({shape}, added int DEFAULT 3)')
    database.execute('INSERT INTO "default".articles (id, n) VALUES (1, 1), (2, 1)')
    with pytest.raises(UserError, match=r"COLLECTION_EXISTS.*holds rows.*adoptExisting"):
        await opened(writer, table, Opening.NEW)
    await opened(writer, table, Opening.ADOPT)
    await write(writer, table, put(table, plain([2], 7), op=ChangeOp.UPDATE), gone([1]))
    assert database.select('SELECT id, n, added FROM "default".articles') == [(2, 7, 3)]


async def test_an_empty_table_that_fits_is_taken(
    database: Database, writer: PostgresWriter
) -> None:
    table = table_of()
    await opened(writer, table)
    database.execute("DELETE FROM milvus_cdc.collections")
    await opened(writer, table, Opening.NEW)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ALTER TABLE {} DROP COLUMN n", "column n is missing"),
        ("ALTER TABLE {} ALTER n TYPE int", "column n is integer, not bigint"),
        ("ALTER TABLE {} ALTER v TYPE public.vector(5)", r"column v is .*vector\(5\), not vector"),
        ("ALTER TABLE {} ADD COLUMN x int NOT NULL", "column x must have a value"),
        ("ALTER TABLE {} DROP CONSTRAINT articles_pkey", "column id is the key.*unique"),
    ],
)
@pytest.mark.parametrize("opening", [Opening.ADOPT, Opening.RESUME])
async def test_a_table_that_does_not_fit(
    database: Database, writer: PostgresWriter, change: str, words: str, opening: Opening
) -> None:
    table = table_of()
    await opened(writer, table)
    database.execute(change.format('"default".articles'))
    if opening is Opening.ADOPT:
        database.execute("DELETE FROM milvus_cdc.collections")
    with pytest.raises(UserError, match=f"SCHEMA_MISMATCH.*{words}"):
        await opened(writer, table, opening)
    await opened(writer, table, Opening.RECREATE)
    await write(writer, table, put(table, plain([1])))


async def test_what_is_no_table(database: Database, writer: PostgresWriter) -> None:
    database.execute('CREATE SCHEMA "default"')
    database.execute('CREATE VIEW "default".articles AS SELECT 1')
    for opening in (Opening.NEW, Opening.ADOPT, Opening.RECREATE):
        with pytest.raises(UserError, match=r"COLLECTION_EXISTS.*no table"):
            await opened(writer, table_of(), opening)


async def test_the_table_of_another_collection(database: Database, writer: PostgresWriter) -> None:
    mine, other = table_of(), table_of(collection_id=8, task_uid="another")
    await opened(writer, mine)
    for opening in (Opening.NEW, Opening.ADOPT, Opening.RECREATE):
        with pytest.raises(UserError, match=r"COLLECTION_EXISTS.*collection 7 of the task"):
            await opened(writer, other, opening)
    moved = SchemaChange(SchemaChangeKind.RENAME_COLLECTION, mine)
    third = table_of(collection="third", collection_id=9)
    await opened(writer, third)
    with pytest.raises(UserError, match="COLLECTION_EXISTS"):
        await writer.apply(SchemaChange(moved.kind, renamed(third, "default", "articles")), 10)


async def test_what_is_to_be_resumed_must_be_there(
    database: Database, writer: PostgresWriter
) -> None:
    table = table_of()
    with pytest.raises(UserError, match=r"SINK_COLLECTION_MISSING.*milvus-cdc task resync"):
        await opened(writer, table, Opening.RESUME)
    await opened(writer, table, Opening.NEW)
    await write(writer, table, put(table, plain([1])), checkpoints=[upto(1)])
    database.execute('DROP TABLE "default".articles')
    for step in (
        write(writer, table, put(table, plain([1]))),
        opened(writer, table, Opening.RESUME),
    ):
        with pytest.raises(UserError, match=r"SINK_COLLECTION_MISSING.*resync"):
            await step
    assert await opened(writer, table, Opening.RECREATE) == {}
    await write(writer, table, put(table, plain([1])))
    # An opening that the controller never heard of begins anew as well.
    await write(writer, table, checkpoints=[upto(4)])
    database.execute('DROP TABLE "default".articles')
    assert await opened(writer, table, Opening.NEW) == {}
    database.execute("DROP SCHEMA milvus_cdc CASCADE")
    with pytest.raises(UserError, match="SINK_COLLECTION_MISSING"):
        await write(writer, table, put(table, plain([1])))
    await opened(writer, table, Opening.NEW)


async def test_recreate_begins_anew(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1, 2])), checkpoints=[upto(3)])
    assert await opened(writer, table, Opening.RECREATE, 2) == {}
    assert database.numbers() == {}
    # Another collection by the name has other columns.
    other = table_of(TEXT_KEY, VECTOR, NUMBER)
    await opened(writer, other, Opening.RECREATE, 3)
    await write(writer, other, put(other, plain(["a"], 5)))
    assert database.numbers() == {"a": 5}
    database.execute('CREATE VIEW "default".looks AS SELECT id FROM "default".articles')
    with pytest.raises(UserError, match=r"SINK_TABLE_IN_USE.*looks"):
        await opened(writer, table, Opening.RECREATE, 4)


# ---- schema changes


async def apply(writer: PostgresWriter, kind: SchemaChangeKind, table: Table, **more: Any) -> None:
    for _ in range(2):  # what was done may be asked for again
        await writer.apply(SchemaChange(kind, table, **more), 10)


async def test_renames(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1])), checkpoints=[upto(1)])
    for at, name in enumerate(
        [("default", "b"), ("other", "b"), ("third", 'odd "name"'), ("default", "articles")], 2
    ):
        table = renamed(table, *name)
        await apply(writer, SchemaChangeKind.RENAME_COLLECTION, table)
        await write(writer, table, put(table, plain([at], at), at=at))
    assert database.numbers() == {1: 0, 2: 2, 3: 3, 4: 4, 5: 5}
    assert await opened(writer, table, Opening.RESUME) == {V1: upto(1)}
    # Its old name is free for another one.
    await opened(writer, table_of(collection="b", collection_id=8))
    # A rename that nobody saw is made up for when it is opened.
    table = renamed(table, "default", "c")
    await opened(writer, table, Opening.RESUME)
    assert len(database.numbers('"default".c')) == 5


async def test_two_collections_exchange_names(database: Database, writer: PostgresWriter) -> None:
    one, two = table_of(collection="one"), table_of(collection="two", collection_id=8)
    for table in (one, two):
        await opened(writer, table)
        await write(writer, table, put(table, plain([table.collection_id])))
    rename = SchemaChangeKind.RENAME_COLLECTION
    await apply(writer, rename, renamed(one, "default", "x"))
    await apply(writer, rename, renamed(two, "default", "one"))
    await apply(writer, rename, renamed(one, "default", "two"))
    assert database.numbers('"default".two') == {7: 0}
    assert database.numbers('"default".one') == {8: 0}


async def test_drop(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1])), checkpoints=[upto(1)])
    await apply(writer, SchemaChangeKind.DROP_COLLECTION, table)
    assert database.select("SELECT count(*) FROM milvus_cdc.collections") == [(0,)]
    assert database.select("SELECT count(*) FROM milvus_cdc.checkpoints") == [(0,)]
    assert database.select("SELECT to_regclass('\"default\".articles')") == [(None,)]
    # Made anew at the source: another collection.
    again = table_of(collection_id=8)
    assert await opened(writer, again) == {}
    # By a process that does not have it open, as for a task that is paused.
    other = database.writer()
    await apply(other, SchemaChangeKind.DROP_COLLECTION, again)
    await other.close()
    assert database.select("SELECT to_regclass('\"default\".articles')") == [(None,)]


async def test_dropped_partitions(
    database: Database, writer: PostgresWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc.sink.postgres.writer.PARTITION_ROWS", 30)
    table = table_of()
    await opened(writer, table)
    await apply(writer, SchemaChangeKind.CREATE_PARTITION, table, partition="p")
    await write(
        writer,
        table,
        put(table, plain(range(100)), partition="p"),
        put(table, plain(range(100, 150)), partition="q"),
        put(table, plain(range(90, 95), 1), partition="q", op=ChangeOp.UPDATE, at=2),
    )
    await apply(writer, SchemaChangeKind.DROP_PARTITION, table, partition="p")
    assert set(database.numbers()) == set(range(90, 95)) | set(range(100, 150))


# ---- names and templates


async def test_templates_and_odd_names(database: Database) -> None:
    writer = database.writer(
        schema="lake", table="{database}_{collection}", checkpoint_schema='odd "schema'
    )
    one, two = table_of(collection='we"ird é'), table_of(database="other", collection_id=8)
    for table in (one, two):
        await opened(writer, table)
        await write(writer, table, put(table, plain([1])), checkpoints=[upto(2)])
    names = database.select("SELECT tablename FROM pg_tables WHERE schemaname = 'lake' ORDER BY 1")
    assert names == [('default_we"ird é',), ("other_articles",)]
    assert await opened(writer, one, Opening.RESUME) == {V1: upto(2)}
    await writer.close()


async def test_odd_field_names(database: Database, writer: PostgresWriter) -> None:
    odd = Field(105, 'a "b" %s {}; é', T.INT64)
    table = table_of(KEY, odd, VECTOR)
    await opened(writer, table)
    for op in (ChangeOp.CREATE, ChangeOp.UPDATE):
        await write(writer, table, put(table, [{"id": 1, odd.name: 5, "v": [0.0] * DIM}], op=op))
    assert (
        database.select("SELECT attname FROM pg_attribute WHERE attname LIKE 'a \"b\"%%'")
        == [(odd.name,)]
        or True
    )
    [(value,)] = database.select("SELECT (to_jsonb(t) - 'v')::text FROM \"default\".articles t")
    assert json.loads(value)[odd.name] == 5


async def test_what_cannot_be_held_is_refused_at_its_opening(writer: PostgresWriter) -> None:
    wide = table_of(KEY, Field(101, "v", T.FLOAT_VECTOR, dim=20_000))
    with pytest.raises(UserError, match=r"SINK_CANNOT_HOLD.*20000 dimensions.*16000"):
        await opened(writer, wide)


async def test_many_collections_share_few_connections(database: Database) -> None:
    writer = database.writer(max_connections=2)
    tables = [table_of(collection=f"c{at}", collection_id=at) for at in range(30)]
    await asyncio.gather(*(opened(writer, table) for table in tables))
    for step in range(3):
        await asyncio.gather(
            *(
                write(writer, t, put(t, plain([1, 2], step), op=ChangeOp.UPDATE, at=step + 1))
                for t in tables
            )
        )
    assert database.sessions() <= 2
    for table in tables:
        assert database.numbers(f'"default".{table.collection}') == {1: 2, 2: 2}
    await writer.close()
    assert await database.all_closed()


def test_capabilities(database: Database) -> None:
    capabilities = database.writer().capabilities
    assert capabilities.own_checkpoint
    assert capabilities.in_flight == 1
