"""What readers find after ordinary lives of a collection: rows, replays, owners, schema changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from google.protobuf import duration_pb2
from milvus_cdc.errors import BugError, RetryableError, UserError
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Field, FieldType
from milvus_cdc.sink.files import places
from milvus_cdc.sink.files.chain import Chain
from milvus_cdc.sink.files.reading import find_collections
from milvus_cdc.sink.writer import Batch, Checkpoint, Opening, SchemaChangeKind

from tests.unit.sink.files.samples import (
    BEGIN,
    PLAIN,
    TEXT_KEY,
    V1,
    V2,
    VECTOR,
    batch,
    change,
    events,
    gone,
    history_of,
    numbers,
    opened,
    plain,
    put,
    renamed,
    store_of,
    table_of,
    upto,
    writer_for,
)

TABLE = table_of()
K = SchemaChangeKind


def visible(folder: Path) -> list[Path]:
    """What a glob of an analyst finds."""
    return sorted(folder.glob("**/*.parquet"))


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


async def test_rows_are_there_when_a_write_returns(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1, 2], n=5), 3), gone([2, 9], 4)), 10)
    assert events(history_of(tmp_path)) == [
        ("CREATE", 1, 3),
        ("CREATE", 2, 3),
        ("DELETE", 2, 4),
        ("DELETE", 9, 4),
    ]
    assert numbers(history_of(tmp_path)) == {1: 5}
    # By path alone, as Hive, DuckDB and pyarrow read it.
    [file] = visible(tmp_path)
    assert str(file.relative_to(tmp_path)).startswith(
        "default/articles-7/generation-0001/change_date=2025-11-21/part-000000000002-1-"
    )
    found = ds.dataset(tmp_path / "default/articles-7/generation-0001", partitioning="hive")
    assert found.count_rows() == 4
    [entry] = history_of(tmp_path).files
    assert (entry.entry.rows, entry.entry.deletes) == (4, 2)
    assert (entry.entry.min_ts, entry.entry.max_ts) == (BEGIN + 3, BEGIN + 4)
    assert entry.entry.bytes == file.stat().st_size
    await writer.close()


async def test_checkpoints_come_back_as_they_were(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, Batch((), (upto(5), upto(7, V2))), 10)
    await writer.write(TABLE, Batch((put(TABLE, plain([1]), 9),), (upto(9),)), 10)
    await writer.close()
    again = writer_for(tmp_path)
    answer = await again.open(TABLE, Opening.RESUME, 2)
    assert set(answer.checkpoints) == {upto(9), upto(7, V2)}
    assert history_of(tmp_path).complete_ts == BEGIN + 7
    await again.close()


async def test_a_day_of_the_source_is_a_folder(tmp_path: Path) -> None:
    day = ms_to_tso(86_400_000)
    writer = await opened(tmp_path, TABLE)
    await writer.write(
        TABLE,
        batch(
            put(TABLE, plain([1], n=1), 1),
            put(TABLE, plain([1], n=2), day, op=ChangeOp.UPDATE),
            put(TABLE, plain([1], n=3), day + 1, op=ChangeOp.UPDATE),
        ),
        10,
    )
    assert [path.parent.name for path in visible(tmp_path)] == [
        "change_date=2025-11-21",
        "change_date=2025-11-22",
    ]
    assert numbers(history_of(tmp_path)) == {1: 3}
    await writer.close()


async def test_a_replay_changes_nothing(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    first = batch(put(TABLE, plain([1, 2]), 1), gone([1], 1, vchannel=V2), upto_at=1)
    # Nothing says so far that the delete in the other vchannel, and what is beyond 1, is written.
    beyond = Batch((put(TABLE, plain([3]), 5), gone([3], 5)), (upto(4),))
    await writer.write(TABLE, first, 10)
    await writer.write(TABLE, beyond, 10)
    before = events(history_of(tmp_path))
    await writer.write(TABLE, first, 10)
    await writer.write(TABLE, beyond, 10)
    assert history_of(tmp_path).links[-1].checkpoints == (upto(4),)
    await writer.close()
    again = await opened(tmp_path, TABLE, Opening.RESUME, 2)
    merged = Batch((*first.changes, *beyond.changes, put(TABLE, plain([4]), 5, vchannel=V2)))
    await again.write(TABLE, merged, 10)
    assert events(history_of(tmp_path)) == [*before, ("CREATE", 4, 5)]
    await again.close()


async def test_nothing_new_is_no_manifest(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    [found] = find_collections(store_of(tmp_path))
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    await writer.write(TABLE, Batch(()), 10)
    [same] = find_collections(store_of(tmp_path))
    assert same.head == found.head
    await writer.close()


async def test_time_passes_where_no_rows_come(tmp_path: Path) -> None:
    interval = duration_pb2.Duration(nanos=100_000_000)
    writer = await opened(tmp_path, TABLE, rotate_interval=interval)
    assert writer.capabilities.linger_seconds == 0.1
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    await writer.heartbeat(TABLE, BEGIN + 5)
    assert history_of(tmp_path).complete_ts == BEGIN + 1
    with pytest.raises(UserError, match="NOT_COMPLETE"):
        history_of(tmp_path, at=5)
    for at in range(6, 600):
        await asyncio.sleep(0.01)
        await writer.heartbeat(TABLE, BEGIN + at)
        if history_of(tmp_path).complete_ts > BEGIN + 1:
            break
    assert numbers(history_of(tmp_path, at=5)) == {1: 0}
    # Seldom: one so far, however often time was told.
    assert len(history_of(tmp_path).links) == 3
    # And with the next rows for nothing.
    await writer.heartbeat(TABLE, BEGIN + 1000)
    await writer.write(TABLE, batch(put(TABLE, plain([2]), 1001)), 10)
    assert history_of(tmp_path).complete_ts == BEGIN + 1001
    assert history_of(tmp_path).links[-1].told_ts == BEGIN + 1000
    await writer.close()


# ---- owners


async def test_a_new_owner_stops_the_old_one(tmp_path: Path) -> None:
    old = await opened(tmp_path, TABLE, epoch=1)
    await old.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    new = await opened(tmp_path, TABLE, Opening.RESUME, epoch=2)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.write(TABLE, batch(put(TABLE, plain([2]), 2)), 10)
    # It has taken its file away again, and stays out.
    assert len(visible(tmp_path)) == 1
    await new.write(TABLE, batch(put(TABLE, plain([2], n=8), 2)), 10)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.write(TABLE, batch(put(TABLE, plain([2]), 2)), 10)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.apply(change(K.DROP_PARTITION, TABLE, "p"), 10)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.open(TABLE, Opening.RESUME, 1)
    assert numbers(history_of(tmp_path)) == {1: 0, 2: 8}
    await old.close()
    await new.close()


async def test_new_takes_over_what_is_its_own_only(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    # The owner ended before anybody heard that it had begun.
    again = writer_for(tmp_path)
    assert (await again.open(TABLE, Opening.NEW, 2)).checkpoints == (upto(1),)
    other = table_of(task_uid="uid-2")
    stranger = writer_for(tmp_path)
    with pytest.raises(UserError, match="COLLECTION_EXISTS") as raised:
        await stranger.open(other, Opening.NEW, 1)
    assert raised.value.field == "sink.files.uri"
    # Taken over with what it holds.
    assert (await stranger.open(other, Opening.ADOPT, 1)).checkpoints == (upto(1),)
    with pytest.raises(UserError, match="SINK_COLLECTION_REPLACED"):
        await again.open(TABLE, Opening.RESUME, 3)
    for each in (writer, again, stranger):
        await each.close()


async def test_files_that_are_gone_are_not_begun_anew(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    with pytest.raises(UserError, match="SINK_COLLECTION_MISSING"):
        await writer.open(TABLE, Opening.RESUME, 2)
    with pytest.raises(BugError, match="NOT_OPEN"):
        await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    assert everything(tmp_path) == []
    missing = writer_for(tmp_path / "not" / "mounted")
    for attempt in (missing.probe(), missing.open(TABLE, Opening.NEW, 1)):
        with pytest.raises(UserError, match="FOLDER_MISSING"):
            await attempt
    await writer.close()
    await missing.close()


async def test_recreate_begins_a_generation_and_leaves_readers_alone(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1, 2]), 1)), 10)
    reading = history_of(tmp_path)
    answer = await writer.open(TABLE, Opening.RECREATE, 2)
    assert answer.checkpoints == ()
    # Once more, after a crash before anybody heard of it.
    await writer.open(TABLE, Opening.RECREATE, 2)
    await writer.write(TABLE, batch(put(TABLE, plain([3]), 1)), 10)
    assert numbers(history_of(tmp_path)) == {3: 0}
    assert numbers(reading) == {1: 0, 2: 0}
    [found] = find_collections(store_of(tmp_path))
    assert found.head.generation == 2
    assert numbers(found.history(generation=1)) == {1: 0, 2: 0}
    await writer.close()


# ---- schema changes


async def test_a_dropped_partition_takes_the_rows_before_it(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    rows = [put(TABLE, plain([1]), 1, partition="p"), put(TABLE, plain([2]), 2, partition="q")]
    await writer.write(TABLE, batch(*rows), 10)
    for _ in range(2):
        await writer.apply(change(K.DROP_PARTITION, TABLE, "p", 5), 10)
    await writer.write(TABLE, batch(put(TABLE, plain([3]), 7, partition="q")), 10)
    assert numbers(history_of(tmp_path)) == {2: 0, 3: 0}
    assert history_of(tmp_path).partitions == ("q",)
    # One of the same name again.
    await writer.apply(change(K.CREATE_PARTITION, TABLE, "p", 8), 10)
    await writer.apply(change(K.CREATE_PARTITION, TABLE, "empty", 8), 10)
    await writer.write(TABLE, batch(put(TABLE, plain([4]), 9, partition="p")), 10)
    assert numbers(history_of(tmp_path)) == {2: 0, 3: 0, 4: 0}
    assert history_of(tmp_path).partitions == ("empty", "p", "q")
    assert len(history_of(tmp_path).events) == 3
    # Before the drop they were there.
    assert numbers(history_of(tmp_path, at=4)) == {1: 0, 2: 0}
    assert history_of(tmp_path, at=4).partitions == ("p", "q")
    assert numbers(history_of(tmp_path, at=5)) == {2: 0}
    await writer.close()


async def test_a_dropped_collection_can_be_read_as_of_before(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    await writer.release(TABLE)
    # By a process that has not opened it; and again.
    for _ in range(2):
        await writer.apply(change(K.DROP_COLLECTION, TABLE, at=9), 10)
    assert history_of(tmp_path).dropped
    assert numbers(history_of(tmp_path)) == {}
    assert numbers(history_of(tmp_path, at=8)) == {1: 0}
    assert len(history_of(tmp_path).events) == 1
    # One that never had files.
    await writer.apply(change(K.DROP_COLLECTION, table_of(collection="other")), 10)
    await writer.close()


async def test_a_renamed_collection_is_found_under_its_new_name(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    now = renamed(TABLE, "shop", "_the/new name")
    old_name = ("default", "articles")
    for _ in range(2):
        await writer.apply(change(K.RENAME_COLLECTION, now, at=3, renamed_from=old_name), 10)
    await writer.write(now, batch(put(now, plain([2]), 4)), 10)
    await writer.close()
    again = await opened(tmp_path, now, Opening.RESUME, 2)
    await again.write(now, batch(put(now, plain([3]), 5)), 10)
    assert numbers(history_of(tmp_path)) == {1: 0, 2: 0, 3: 0}
    assert history_of(tmp_path).name == ("shop", "_the/new name")
    assert history_of(tmp_path, at=2).name == ("default", "articles")
    assert (tmp_path / "shop" / "%5Fthe%2Fnew%20name-7" / places.LOCATION).exists()
    # And back.
    old = change(K.RENAME_COLLECTION, TABLE, at=6, renamed_from=(now.database, now.collection))
    await again.release(now)
    await again.apply(old, 10)
    await again.open(TABLE, Opening.RESUME, 3)
    await again.write(TABLE, batch(put(TABLE, plain([4]), 7)), 10)
    assert len(numbers(history_of(tmp_path))) == 4
    await again.close()


async def test_a_field_that_is_added_is_null_before(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    wider = table_of(*PLAIN, Field(103, "s", FieldType.VARCHAR, nullable=True, max_length=9))
    await writer.write(wider, batch(put(wider, [{**plain([2])[0], "s": "x"}], 2)), 10)
    state = history_of(tmp_path).state()
    assert dict(zip(state["id"].to_pylist(), state["s"].to_pylist(), strict=True)) == {
        1: None,
        2: "x",
    }
    await writer.close()


# ---- names, configuration, many manifests


async def test_a_column_of_ours_is_no_field(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    table = table_of(*PLAIN, Field(103, "_ts", FieldType.INT64))
    [text] = writer.violations([TABLE, table])
    assert "default.articles" in text
    assert "'_ts'" in text
    with pytest.raises(UserError, match="UNSUPPORTED_BY_SINK"):
        await writer.open(table, Opening.NEW, 1)
    assert writer.violations([table_of(TEXT_KEY, VECTOR)]) == []
    await writer.close()


async def test_probe_leaves_nothing(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    assert str(tmp_path) in await writer.probe()
    assert everything(tmp_path) == []
    await writer.close()


def test_names() -> None:
    names = ["a", "A", "_a", ".a", "..", "a/b", "a b", "é", "a%2Fb", "~", "x" * 255, "x" * 254]
    folders = [places.collection_folder(name, name, 7) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        database, _, collection = folder.partition("/")
        assert "/" not in collection
        assert len(collection.encode()) < 200
        assert database[0] not in "._"
        assert places.is_collection_folder(collection)
    assert places.collection_folder("", "c", 7) == "default/c-7"


@pytest.mark.parametrize("uri", ["file://host/x", "s3://", "ftp://x/y", "/x"])
def test_addresses(uri: str) -> None:
    from milvus_cdc.sink.files.opening import open_store

    with pytest.raises(UserError, match="URI_INVALID"):
        open_store(uri)


async def test_many_manifests_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milvus_cdc.sink.files.chain.FOLD", 5)
    monkeypatch.setattr("milvus_cdc.sink.files.chain.KEEP", 4)
    monkeypatch.setattr("milvus_cdc.sink.files.publishing.FOLD", 5)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    writer = await opened(tmp_path, TABLE)
    store = store_of(tmp_path)
    chain = Chain(store, "default/articles-7")
    for at in range(1, 100):
        if at % 20 == 0:
            # Another process goes on, which has read none of them.
            await writer.close()
            writer = await opened(tmp_path, TABLE, Opening.RESUME, at)
        changes = (put(TABLE, plain([at]), at),) if at % 10 == 0 else ()
        await writer.write(TABLE, Batch(changes, (Checkpoint(V1, b"x", BEGIN + at),)), 10)
        listing = chain.listing()
        assert len(listing.loose) <= 4 + 2 * 5
        assert not listing.surplus
        assert [each.number for each in chain.read_all()] == list(range(1, listing.newest + 1))
    assert len(chain.listing().folded) <= 4 + 10
    assert (1, 25) in chain.listing().folded
    assert sorted(numbers(history_of(tmp_path))) == list(range(10, 100, 10))
    assert [each.number for each in chain.read_all(60)] == list(
        range(60, chain.listing().newest + 1)
    )
    # A crash between folding and removing; a stranger's late link in the place of a folded one.
    store.put("default/articles-7/_manifests/000000000003.json", b"not even json")
    assert len(list(chain.read_all())) == chain.listing().newest
    chain.fold()
    assert not chain.listing().surplus
    (tmp_path / "default/articles-7/_manifests").joinpath(
        f"{chain.listing().newest - 1:012d}.json"
    ).unlink()
    with pytest.raises(UserError, match="MANIFEST_MISSING"):
        list(chain.read_all())
    await writer.close()
