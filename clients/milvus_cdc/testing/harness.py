"""What an author tells the contract about a sink, and what its tests share.

Law: a test judges a sink only by what its writers answer and by what an independent reader finds at
the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import pytest

from milvus_cdc.errors import RetryableError
from milvus_cdc.rows import ChangeOp, Changes, Field, Table
from milvus_cdc.sink.writer import (
    Batch,
    Checkpoint,
    Opening,
    SchemaChange,
    SchemaChangeKind,
    Writer,
)
from milvus_cdc.testing import samples
from milvus_cdc.testing.samples import Key, Row

GRACE_SECONDS = 2.0
"""By how much an attempt may miss its deadline, on a machine that does other things."""

State = dict[Key, Row]


@dataclass(frozen=True, slots=True)
class Seen:
    """One change as a reader of a log finds it."""

    key: Key
    row: Row | None
    """None: the key was deleted."""


class Harness:
    """The hooks. `make_writer`, and one of `state` and `history`, must be there."""

    forgets = True
    """What goes at the source goes at the destination: rows of dropped partitions and collections,
    and those of before a resync. False for a log, which keeps what was.
    """
    seconds = 20.0
    """Time that a write gets when time is not what is tested."""
    cuts: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    """Seconds after which writes are cut. Some should end before, some after the rows are there."""

    def make_writer(self) -> Writer:
        """A writer to the destination of this test, as another process would have it: it shares
        nothing with those made before.
        """
        raise NotImplementedError

    async def state(self, table: Table) -> State:
        """The rows of the collection that a reader finds, who is no part of the sink, by key; each
        with the fields of `table`, vectors as lists. Empty where there is no such collection.
        """
        seen = await self.history(table)
        if seen is None:
            raise NotImplementedError("a contract needs state() or history()")
        state: State = {}
        for each in seen:
            if each.row is None:
                state.pop(each.key, None)
            else:
                state[each.key] = each.row
        return state

    async def history(self, table: Table) -> list[Seen] | None:
        """Every change that a reader finds, those of one key in order; None where only the newest
        state is kept.
        """
        return None

    def stalled(self, table: Table) -> AbstractAsyncContextManager[None]:
        """While in it, the destination answers nothing about this collection."""
        pytest.skip("stalled() is not given")

    async def put_foreign(self, table: Table) -> None:
        """Something of somebody else is where this collection would be, with at least one row. As
        it stands: the collection of another task.
        """
        async with self.writer() as writer:
            await writer.open(table, Opening.NEW, 1)
            await self.write(writer, table, [samples.put(table, [samples.row(1, 1)], 1)])

    # ---- what the tests share

    def table(self, key: Field = samples.KEY, name: str = "") -> Table:
        """A collection that no other test has."""
        return samples.table(name or f"c{uuid.uuid4().hex[:12]}", key=key)

    @contextlib.asynccontextmanager
    async def writer(self) -> AsyncIterator[Writer]:
        writer = self.make_writer()
        try:
            yield writer
        finally:
            await writer.close()

    async def write(
        self,
        writer: Writer,
        table: Table,
        changes: Iterable[Changes],
        *checkpoints: Checkpoint,
        timeout: float | None = None,
    ) -> None:
        """One attempt. With `own_checkpoint` it says how far each vchannel is after it."""
        batch = self.batch(writer, changes, *checkpoints)
        await writer.write(table, batch, self.seconds if timeout is None else timeout)

    def batch(self, writer: Writer, changes: Iterable[Changes], *checkpoints: Checkpoint) -> Batch:
        given = tuple(changes)
        if not writer.capabilities.own_checkpoint:
            return Batch(given)
        ends: Mapping[str, int] = {each.vchannel: each.order for each in given}
        return Batch(given, checkpoints or tuple(samples.reached(at, v) for v, at in ends.items()))

    async def insist(self, writer: Writer, table: Table, changes: Iterable[Changes]) -> None:
        """As the replicator does: the same batch again until it is durable."""
        batch = self.batch(writer, changes)
        deadline = time.monotonic() + 3 * self.seconds
        while True:
            try:
                await writer.write(table, batch, self.seconds)
                return
            except RetryableError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def attempt(
        self, writer: Writer, table: Table, changes: Iterable[Changes], seconds: float
    ) -> bool:
        """A write that may be cut by its timeout: whether it returned. It ends in time."""
        started = time.monotonic()
        try:
            await self.write(writer, table, changes, timeout=seconds)
            done = True
        except RetryableError:
            done = False
        took = time.monotonic() - started
        assert took < seconds + GRACE_SECONDS, f"an attempt of {seconds} s took {took:.1f} s"
        return done

    async def apply(
        self,
        writer: Writer,
        kind: SchemaChangeKind,
        table: Table,
        *,
        partition: str = "",
        renamed_from: tuple[str, str] = ("", ""),
    ) -> None:
        """Twice: what was done may be asked for again."""
        change = SchemaChange(kind, table, partition, renamed_from)
        for _ in range(2):
            await writer.apply(change, self.seconds)


def rows(table: Table, keys: Iterable[int], n: int) -> list[Row]:
    """A row of each key, in the type of the collection's key."""
    return [samples.row(key_of(table, key), n, None if n % 3 == 0 else f"é {n}") for key in keys]


def key_of(table: Table, number: int) -> Key:
    """Text keys have what breaks quoting."""
    return number if table.key == samples.KEY else f"k{number}'\"\\ é\n{{}}%s"


def as_state(of: Iterable[Row]) -> State:
    return {row["id"]: row for row in of}


def values(seen: Iterable[Seen]) -> dict[Key, list[int | None]]:
    """`n` of each change by key, in order; None for a delete."""
    found: dict[Key, list[int | None]] = {}
    for each in seen:
        found.setdefault(each.key, []).append(None if each.row is None else each.row["n"])
    return found


UPDATE, CREATE, DELETE = ChangeOp.UPDATE, ChangeOp.CREATE, ChangeOp.DELETE
