"""Restore into a sink in memory: which rows arrive, in which requests, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.cli.main import main
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.model import Collection
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType
from milvus_cdc.rows import table_of as table_from
from milvus_cdc.sink import CollectionTarget, Op, RowBatch
from milvus_cdc.sink.files import restoring
from milvus_cdc.sink.files.restoring import Progress, restore
from milvus_cdc.sink.writer import SchemaChangeKind

from tests.unit.format import tables
from tests.unit.sink.files.samples import (
    KEY,
    PLAIN,
    batch,
    change,
    gone,
    history_of,
    opened,
    plain,
    put,
    table_of,
)

TABLE = table_of()
K = SchemaChangeKind


class FakeSink:
    """Keeps what it is asked for; fails as told."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.calls: list[tuple[Any, ...]] = []
        self.batches: list[RowBatch] = []
        self.want: Collection | None = None

    async def ensure_database(self, database: str) -> None:
        self.calls.append(("database", database))

    async def open_collection(self, want: Collection, **options: Any) -> None:
        self.want = want
        self.calls.append(("open", options["adopt"], options["recreate"], options["opened"]))

    async def create_partition(self, want: Collection, partition: str) -> None:
        self.calls.append(("partition", partition))

    async def flush(self, want: Collection) -> None:
        self.calls.append(("flush",))

    def target(self, want: Collection) -> CollectionTarget:
        fields = table_from(want).fields
        return CollectionTarget("", "", "id", any(field.partition_key for field in fields))

    async def write(self, target: CollectionTarget, rows: RowBatch, timeout_seconds: float) -> None:
        self.batches.append(rows)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure

    def rows(self) -> dict[tuple[str, Any], dict[str, Any]]:
        """By partition and key, those of the requests that succeeded last."""
        assert self.want is not None
        table = table_from(self.want)
        found = {}
        for each in self.batches:
            [chunk] = each.chunks
            changes = Changes(
                ChangeOp.CREATE, 1, "", 0, each.partition, chunk.num_rows, chunk.columns
            )
            for row in changes.rows(table):
                found[each.partition, row["id"]] = row
        return found


async def files(folder: Path, table: Any, *batches: Any) -> None:
    writer = await opened(folder, table)
    for each in batches:
        await writer.write(table, each, 20)
    await writer.close()


async def test_rows_arrive_in_their_partitions(tmp_path: Path) -> None:
    await files(
        tmp_path,
        TABLE,
        batch(put(TABLE, plain([1, 2]), 1, partition="p"), put(TABLE, plain([3]), 2)),
        batch(put(TABLE, plain([1], n=9), 3, op=ChangeOp.UPDATE, partition="p"), gone([3], 4)),
    )
    sink, told = FakeSink(), list[Progress]()
    done = await restore(history_of(tmp_path), sink, "db", "new", told=told.append)  # type: ignore[arg-type]
    assert done == Progress(2, 2)
    assert told[0] == Progress(0, 2)
    assert told[-1] == done
    assert sink.calls == [("database", "db"), ("open", False, False, False), ("flush",)]
    assert {key: row["n"] for key, row in sink.rows().items()} == {("p", 1): 9, ("p", 2): 0}
    assert {each.op for each in sink.batches} == {Op.INSERT}
    assert sink.want is not None
    assert (sink.want.database, sink.want.name) == ("db", "new")
    assert [each.name for each in sink.want.partitions] == ["_default", "p"]
    # As of before the delete.
    earlier = FakeSink()
    await restore(history_of(tmp_path, at=2), earlier, "db", "new")  # type: ignore[arg-type]
    assert {key: row["n"] for key, row in earlier.rows().items()} == {
        ("p", 1): 0,
        ("p", 2): 0,
        ("_default", 3): 0,
    }


async def test_every_type_and_dynamic_fields(tmp_path: Path) -> None:
    table = tables.every_type(nullable=True)
    rows = [tables.row(at) for at in range(5)]
    await files(tmp_path, table, batch(put(table, rows, 1)))
    sink = FakeSink()
    await restore(history_of(tmp_path), sink, "db", "new")  # type: ignore[arg-type]
    wanted = put(table, rows, 1).rows(table)
    assert sorted(sink.rows().values(), key=lambda row: row["id"]) == wanted


async def test_partition_keys_name_no_partition(tmp_path: Path) -> None:
    tenant = Field(103, "tenant", FieldType.INT64, partition_key=True)
    table = table_of(*PLAIN, tenant)
    rows = [{**row, "tenant": row["id"] % 3} for row in plain(range(9))]
    # The log may name the partition that Milvus chose.
    await files(tmp_path, table, batch(put(table, rows, 1, partition="_default_3"), gone([4], 2)))
    sink = FakeSink()
    await restore(history_of(tmp_path), sink, "db", "new")  # type: ignore[arg-type]
    assert {key for key in sink.rows()} == {("", at) for at in range(9) if at != 4}
    assert sink.want is not None
    assert sink.want.partitions == ()


async def test_large_requests_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_REQUEST_BYTES", 2000)
    monkeypatch.setattr(restoring, "_HELD_BYTES", 5000)
    names = [f"p{at}" for at in range(4)]
    changes = [
        put(TABLE, plain(range(30 * at, 30 * at + 30)), 1 + at, partition=names[at % 4])
        for at in range(20)
    ]
    await files(tmp_path, TABLE, batch(*changes[:10]), batch(*changes[10:]))
    sink = FakeSink()
    await restore(history_of(tmp_path), sink, "db", "new", memory_bytes=10_000)  # type: ignore[arg-type]
    assert len(sink.rows()) == 600
    assert sum(each.num_rows for each in sink.batches) == 600
    assert 10 <= len(sink.batches) <= 30


async def test_what_may_be_written_is_written_again_as_an_upsert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_PAUSE_SECONDS", 0.001)
    await files(tmp_path, TABLE, batch(put(TABLE, plain([1, 2]), 1)))
    sink = FakeSink(RetryableError("A", ""), UnknownOutcomeError("B", ""), RetryableError("C", ""))
    assert await restore(history_of(tmp_path), sink, "db", "new") == Progress(2, 2)  # type: ignore[arg-type]
    assert [each.op for each in sink.batches] == [Op.INSERT, Op.INSERT, Op.UPSERT, Op.UPSERT]
    down = FakeSink(*[RetryableError("A", "")] * 99)
    with pytest.raises(RetryableError):
        await restore(history_of(tmp_path), down, "db", "new")  # type: ignore[arg-type]
    beside = FakeSink()
    await restore(history_of(tmp_path), beside, "db", "new", into_existing=True)  # type: ignore[arg-type]
    assert beside.calls[1] == ("open", True, False, False)
    assert {each.op for each in beside.batches} == {Op.UPSERT}


async def test_a_dropped_collection(tmp_path: Path) -> None:
    writer = await opened(tmp_path, TABLE)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 10)
    await writer.apply(change(K.DROP_COLLECTION, TABLE, at=9), 10)
    await writer.close()
    sink = FakeSink()
    with pytest.raises(UserError, match="COLLECTION_DROPPED"):
        await restore(history_of(tmp_path), sink, "db", "new")  # type: ignore[arg-type]
    assert sink.calls == []
    await restore(history_of(tmp_path, at=8), sink, "db", "new")  # type: ignore[arg-type]
    assert len(sink.rows()) == 1


# ---- the command, as far as it needs no Milvus


def run(*arguments: str) -> int:
    return main(["restore", "--uri", "http://127.0.0.1:1", *arguments])


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    asyncio.run(files(tmp_path, TABLE, batch(put(TABLE, plain([1, 2]), 1), gone([1], 2))))
    source = ["--from", tmp_path.as_uri(), "--collection"]
    assert run(*source, "default.articles", "--dry-run", "-o", "json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["changes"] == 3
    assert shown["target"] == "default.articles"
    assert shown["completeUpTo"].startswith("2025-11-21T")
    assert run(*source, "articles", "--dry-run", "--to", "x.y", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)["target"] == "x.y"
    assert run(*source, "nothing", "--dry-run") == 2
    assert "default.articles" in capsys.readouterr().err
    assert run(*source, "articles", "--at", "soon", "--dry-run") == 2
    assert run(*source, "articles", "--at", "2099-01-01T00:00:00Z", "--dry-run") == 3
    assert "NOT_COMPLETE" in capsys.readouterr().err
    assert run("--from", "ftp://x", "--collection", "articles") == 2
    assert run(*source, "articles") == 4
    assert "error: " in capsys.readouterr().err


def test_several_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    async def make() -> None:
        for at in (7, 8, 9):
            table = table_of(KEY, PLAIN[1], PLAIN[2], collection_id=at, task_uid=f"u{at}")
            await files(tmp_path, table, batch(put(table, plain(range(at)), 1)))
            if at != 9:
                writer = await opened(tmp_path, table)
                await writer.apply(change(K.DROP_COLLECTION, table), 10)
                await writer.close()

    asyncio.run(make())
    source = ["--from", tmp_path.as_uri(), "--collection", "articles", "--dry-run", "-o", "json"]
    assert run(*source) == 0
    assert json.loads(capsys.readouterr().out)["collectionId"] == "9"
    assert run(*source, "--collection-id", "8") == 0
    assert json.loads(capsys.readouterr().out)["changes"] == 8
    assert run(*source, "--collection-id", "5") == 2
