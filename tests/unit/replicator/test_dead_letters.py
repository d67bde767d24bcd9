"""Rows that the sink will never take, on a task with a place for them: they are there, the others
are at the sink, and nothing is passed before both are so.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.changes import changes_of, op_of
from milvus_cdc.codec.columns import key_values
from milvus_cdc.codec.messages import Delete, Insert
from milvus_cdc.dead_letters import Letter, Place
from milvus_cdc.dead_letters.opening import open_place
from milvus_cdc.errors import RetryableError, RowRefusedError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.order.ops import LogOp
from milvus_cdc.rows import ChangeOp, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc.sink.memory_writer import DESTINATIONS, MemoryWriter
from milvus_cdc.sink.writer import Batch, Capabilities
from milvus_cdc.sink.writer_sink import Origin, WriterSink
from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.refusing import Refusing
from milvuscdc.v1 import dead_letters_pb2

from tests.unit.replicator.test_runner import START, Bench, failure, insert, tick, until

BAD = 1000
"""Keys from here on are refused."""


class Picky(MemoryWriter):
    """All or nothing, and nothing with a bad key; says which as `names` tells."""

    def __init__(self, names: str, *, own_checkpoint: bool, divisible: bool) -> None:
        self.place = uuid.uuid4().hex
        super().__init__({"destination": self.place, "own_checkpoint": own_checkpoint})
        self._names = names
        in_flight = 1 if own_checkpoint else 4
        self._capabilities = Capabilities(
            own_checkpoint=own_checkpoint, divisible=divisible, in_flight=in_flight
        )

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        for index, changes in enumerate(batch.changes):
            if changes.op is ChangeOp.DELETE:
                continue
            for row, key in enumerate(list(changes.keys(table))):
                if key >= BAD:
                    error = RowRefusedError("TOO_BAD", f"the row {key} is bad")
                    if self._names == "row":
                        error.rows = ((index, row),)
                    if self._names == "key":
                        error.key = int(key)
                    raise error
        await super().write(table, batch, timeout_seconds)


class HeldPlace:
    """Takes nothing while `away`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.away = False

    async def put(self, letters: Sequence[Letter], timeout_seconds: float) -> None:
        if self.away:
            raise RetryableError("DEAD_LETTERS_AWAY", "the mount is gone")
        await self.place.put(letters, timeout_seconds)


class Letters:
    """A runner with a place, and what is read at both ends."""

    def __init__(self, folder: Path, kind: str, *, wanted: bool = True) -> None:
        self.folder = folder
        self.bench = bench = Bench()
        spec = dead_letters_pb2.DeadLetters(
            files=dead_letters_pb2.DeadLetterFiles(uri=folder.as_uri())
        )
        self.place = HeldPlace(open_place(spec, SecretResolver(env_prefix="X_")))
        bench.connections.dead_letters = lambda _: self.place  # type: ignore[attr-defined]
        assignment = replace(
            bench.runner.assignment,
            dead_letters=spec if wanted else None,
            source_database="default",
            source_collection="books",
        )
        bench.runner.assignment = assignment
        bench.runner._object.update(assignment)
        self.writer: Picky | None = None
        if kind == "milvus":

            async def refuse(_target: CollectionTarget, batch: RowBatch | DeleteBatch) -> None:
                if isinstance(batch, RowBatch):
                    for chunk in batch.chunks:
                        keys = key_values(chunk.columns[0])
                        kept = range(chunk.num_rows) if chunk.keep is None else chunk.keep
                        if any(int(keys[row]) >= BAD for row in kept):
                            raise RowRefusedError("SINK_REFUSED", "a row is bad")

            bench.sink.before_write = refuse
        else:
            names, _, atomic = kind.partition(" ")
            self.writer = Picky(names, own_checkpoint=bool(atomic), divisible=atomic == "divisible")
            origin = Origin("tasks/t", "uid", "default", "books", 3)
            sink = WriterSink(self.writer, lambda: origin)
            bench.connections._sink = sink  # type: ignore[assignment]

    def keys(self) -> set[int]:
        """At the sink."""
        if self.writer is None:
            return {row["id"] for row in self.bench.sink.rows("default", "c")}
        (held_there,) = DESTINATIONS[self.writer.place].collections.values()
        return {int(key) for key in held_there.rows}

    def read(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in sorted(self.folder.rglob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]


@asynccontextmanager
async def running(folder: Path, kind: str, **options: Any) -> AsyncIterator[Letters]:
    letters = Letters(folder, kind, **options)
    await letters.bench.start()
    try:
        yield letters
    finally:
        await letters.bench.runner.stop()
        await letters.bench.connections.close()
        assert (letters.bench.budget.held, letters.bench.budget.writable) == (0, 0)


KINDS = (
    "milvus", "unknown", "row", "key", "row atomic", "key atomic", "unknown divisible",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_refused_rows_are_letters_and_the_others_at_the_sink(
    kind: str, tmp_path: Path
) -> None:
    async with running(tmp_path, kind) as letters:
        bench = letters.bench
        bench.append(
            insert(START + 1, [1, 2, 1001, 3]),
            insert(START + 2, [1002]),
            insert(START + 3, [4, 5, 6, 7, 8]),
            insert(START + 4, [9, 1003, 1004], "y"),
            tick(START + 9),
        )
        await until(lambda: bench.resolved_ts == START + 9)
        assert letters.keys() == set(range(1, 10))
        found = {each["key"]: each for each in letters.read()}
        assert sorted(found) == [1001, 1002, 1003, 1004]
        letter = found[1003]
        assert letter["row"] == {"id": 1003, "text": "y"}
        assert letter["reason"] == ("SINK_REFUSED" if kind == "milvus" else "TOO_BAD")
        assert (letter["task"], letter["op"]) == ("tasks/t", "CREATE")
        assert (letter["database"], letter["collection"]) == ("default", "books")
        assert (letter["sink_database"], letter["sink_collection"]) == ("default", "c")
        assert letter["ts"] == START + 4
        report = bench.runner.report()
        assert report.state == "RUNNING"
        counters = report.counters
        assert (counters.rows_refused, counters.rows_inserted) == (4, 9)
        if letters.writer is not None and " " in kind:
            (held,) = DESTINATIONS[letters.writer.place].collections.values()
            assert [each.resolved_ts for each in held.checkpoints.values()] == [START + 9]


@pytest.mark.parametrize("kind", [*KINDS, "unknown atomic"])
async def test_without_a_place_or_a_way_to_find_them_the_collection_stops(
    kind: str, tmp_path: Path
) -> None:
    wanted = kind == "unknown atomic"
    async with running(tmp_path, kind, wanted=wanted) as letters:
        letters.bench.append(insert(START + 1, [1, 1001, 2]), tick(START + 9))
        report = await failure(letters.bench)
        assert report.reason in ("TOO_BAD", "SINK_REFUSED")
        assert report.lanes[0].resolved_ts < START + 1
        assert letters.read() == []


async def test_nothing_is_passed_while_the_place_is_away(tmp_path: Path) -> None:
    async with running(tmp_path, "row atomic") as letters:
        bench = letters.bench
        letters.place.away = True
        bench.append(insert(START + 1, [1, 1001]), tick(START + 9))
        await until(lambda: bench.runner.report().reason == "DEAD_LETTERS_AWAY")
        assert bench.runner.report().state == "RETRYING"
        assert bench.resolved_ts < START + 1
        assert letters.keys() == set()
        letters.place.away = False
        await until(lambda: bench.resolved_ts == START + 9)
        assert letters.keys() == {1}
        assert [each["key"] for each in letters.read()] == [1001]
        assert bench.runner.report().state == "RUNNING"


async def test_a_stop_does_not_wait_for_the_place(tmp_path: Path) -> None:
    async with running(tmp_path, "unknown") as letters:
        letters.place.away = True
        letters.bench.append(insert(START + 1, [1, 1001]), tick(START + 9))
        await until(lambda: letters.bench.runner.report().reason == "DEAD_LETTERS_AWAY")
        async with asyncio.timeout(2):
            await letters.bench.runner.stop()
        assert letters.bench.resolved_ts < START + 1, "the next owner meets the row again"


async def test_a_place_that_is_given_later_lets_the_next_attempt_pass(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    async with running(folder, "row") as letters:
        folder.rmdir()
        letters.bench.append(insert(START + 1, [1001]), tick(START + 9))
        report = await failure(letters.bench)
        assert report.reason == "FOLDER_MISSING"
        assert "dead letters" in report.message


# ---- taking writes apart


def _insert(order: int, keys: list[int]) -> LogOp:
    ids = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    ids.scalars.long_data.data.extend(keys)
    message = Insert("v", 7, 70, "p", order, len(keys), (ids.SerializeToString(),), order, 100)
    op = op_of(message, b"", order, "v", 100)
    assert op is not None
    return op


def _delete(order: int, keys: list[int]) -> LogOp:
    op = op_of(
        Delete("v", 7, 70, "p", order, np.array(keys, np.int64), order, 100), b"", order, "v", 100
    )
    assert op is not None
    return op


def _keys(ops: list[LogOp]) -> list[tuple[ChangeOp, int]]:
    """Each row and key in order."""
    found = []
    for op in ops:
        changes = changes_of(op)
        keys = changes.delete_keys
        if keys is None:
            keys = key_values(changes.columns[0])
        assert len(keys) == op.rows == changes.num_rows
        assert op.keys() == frozenset(int(key) for key in keys)
        found += [(changes.op, int(key)) for key in keys]
    return found


OPS = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


def _write(ops: list[tuple[bool, list[int]]]) -> Write:
    write = Write(1, WriteKind.CHANGES, "")
    for order, (deletes, keys) in enumerate(ops):
        write.append(_delete(order, keys) if deletes else _insert(order, keys))
    return write


@given(OPS)
def test_parts_are_the_whole_in_order(ops: list[tuple[bool, list[int]]]) -> None:
    write = _write(ops)
    if write.rows < 2:
        return
    first, second = Refusing(100).parts(write)
    assert first.rows == write.rows // 2
    assert first.rows + second.rows == write.rows
    assert _keys(first.ops) + _keys(second.ops) == _keys(write.ops)


@given(OPS, st.data())
def test_what_is_taken_out_and_what_is_left_are_the_whole(
    ops: list[tuple[bool, list[int]]], data: st.DataObject
) -> None:
    write, refusing = _write(ops), Refusing(100)
    places = [(at, row) for at, (_, keys) in enumerate(ops) for row in range(len(keys))]
    error = RowRefusedError("R", "m", rows=tuple(data.draw(st.lists(st.sampled_from(places)))))
    named = refusing.named(write, error)
    assert all(not ops[at][0] for at, _ in named), "a delete is never taken out"
    rest, taken = refusing.without(write, named)
    assert [key for _, key in _keys(taken)] == [ops[at][1][row] for at, row in named]
    left = [ops[at][1][row] for at, row in places if (at, row) not in named]
    assert [key for _, key in _keys(rest.ops)] == left
    assert rest.rows + len(taken) == write.rows


@given(OPS, st.integers(0, 9))
def test_a_key_names_its_newest_row(ops: list[tuple[bool, list[int]]], key: int) -> None:
    write = _write(ops)
    named = Refusing(100).named(write, RowRefusedError("R", "m", key=key))
    rows = [
        (at, row)
        for at, (deletes, keys) in enumerate(ops)
        if not deletes
        for row, each in enumerate(keys)
        if each == key
    ]
    alone = write.rows == 1 and not ops[0][0]
    assert named == (rows[-1:] or ([(0, 0)] if alone else []))
