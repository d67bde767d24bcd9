"""The `Writer` of PostgreSQL: who may write a collection, where, and how far it is."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from milvuscdc.v1 import sink_postgres_pb2
from psycopg import sql

from milvus_cdc.errors import BugError, UnknownOutcomeError, UserError
from milvus_cdc.rows import Changes, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.postgres import columns, probing, settings, tables
from milvus_cdc.sink.postgres.connections import Connections, Transaction
from milvus_cdc.sink.postgres.fencing import breaking_locks
from milvus_cdc.sink.postgres.ledger import (
    Ledger,
    Name,
    Record,
    described,
    fenced,
    missing,
    quoted,
)
from milvus_cdc.sink.postgres.merging import Merger
from milvus_cdc.sink.postgres.reduction import reduce
from milvus_cdc.sink.postgres.settings import FIELD
from milvus_cdc.sink.writer import (
    Batch,
    Capabilities,
    Checkpoint,
    Opened,
    Opening,
    SchemaChange,
    SchemaChangeKind,
)

T = TypeVar("T")

OPEN_SECONDS = 30.0
PROBE_SECONDS = 10.0
PARTITION_ROWS = 100_000
"""A dropped partition's rows go in transactions of as many: a late attempt is not for nothing."""


@dataclass
class _Open:
    """A collection that this process may write."""

    name: Name
    epoch: int
    merger: Merger
    known: set[str]
    """Tokens, one of which the last write has."""
    unknown: tuple[Batch, str] | None = None
    """A batch whose COMMIT went unanswered, and the token it was written with."""


class PostgresWriter:
    """See module docstring. `spec` and secrets are looked at now (UserError), nothing connects."""

    def __init__(self, spec: sink_postgres_pb2.PostgresSink, secrets: SecretResolver) -> None:
        self._settings = settings.read(spec, secrets)
        self._connections = Connections(self._settings)
        self._ledger = Ledger(self._settings.checkpoint_schema)
        self._open: dict[tuple[str, int], _Open] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            own_checkpoint=True,
            rows_per_batch=20_000,
            bytes_per_batch=16 * 1024 * 1024,
            divisible=True,
            in_flight=1,
        )

    async def probe(self) -> str:
        return await self._connections.run(
            f"looking at {self._settings.place}",
            time.monotonic() + PROBE_SECONDS,
            lambda t: probing.look(t, self._settings),
        )

    def violations(self, tables: Sequence[Table]) -> list[str]:
        return columns.violations(tables, self._settings)

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        if found := self.violations([table]):
            raise UserError("SINK_CANNOT_HOLD", "; ".join(found), field=FIELD)
        shape = columns.columns_of(table, self._settings)

        async def work(t: Transaction) -> tuple[Name, tuple[Checkpoint, ...], str]:
            await self._ledger.ensure(t)
            async with breaking_locks(t, self._connections):
                record = await self._ledger.find(t, table)
                if record is not None and record.epoch > epoch:
                    raise fenced(table, epoch, record.epoch)
                name = await self._opened(t, table, shape, opening, epoch, record)
            checkpoints = await self._ledger.checkpoints(t, table)
            return name, checkpoints, await self._ledger.last_write(t, table)

        deadline = time.monotonic() + OPEN_SECONDS
        name, checkpoints, last = await self._run(f"opening {table.full_name}", deadline, work)
        merger = Merger(table, shape, self._settings)
        self._open[_key(table)] = _Open(name, epoch, merger, {last})
        return Opened(checkpoints=checkpoints)

    async def _opened(
        self,
        t: Transaction,
        table: Table,
        shape: Sequence[columns.Column],
        opening: Opening,
        epoch: int,
        record: Record | None,
    ) -> Name:
        """The name of its table, which is there and in the ledger under this epoch."""
        name = self._name(table)
        if opening is Opening.RECREATE:
            return await self._recreated(t, table, shape, epoch, record)
        if record is None:
            if opening is Opening.RESUME:
                raise missing(table, f"{self._settings.checkpoint_schema} knows no table of it")
            await self._take_name(t, table, name, epoch)
            if (oid := await tables.exists(t, name)) is None:
                await tables.create(t, name, table, shape)
            else:
                await self._check_fits(t, oid, name, table, shape)
                if opening is Opening.NEW and not await tables.is_empty(t, name):
                    raise _exists(table, name, "holds rows")
            return name
        oid = await tables.exists(t, record.name)
        if oid is None and opening is Opening.RESUME:
            raise missing(table, f"there is no table {described(record.name)}")
        if oid is None:
            # Of an opening that nobody has heard of; what is in the log comes again.
            return await self._recreated(t, table, shape, epoch, record)
        await self._check_fits(t, oid, record.name, table, shape)
        if record.name != name:
            # Renamed, by the source or by the task, while nobody had it open.
            await self._check_vacant(t, table, name)
            await tables.rename(t, record.name, name)
        await self._ledger.update(t, table, name, epoch)
        return name

    async def _recreated(
        self,
        t: Transaction,
        table: Table,
        shape: Sequence[columns.Column],
        epoch: int,
        record: Record | None,
    ) -> Name:
        name = self._name(table)
        if record is None:
            await self._take_name(t, table, name, epoch)
        elif record.name != name:
            await self._check_vacant(t, table, name)
            await tables.drop(t, record.name)
        oid = await tables.exists(t, name)
        if oid is not None and not await tables.differences(t, oid, table, shape):
            # What a user has added (indexes, grants, views) outlives its rows.
            await tables.empty(t, name)
        else:
            await tables.drop(t, name)
            await tables.create(t, name, table, shape)
        await self._ledger.forget_checkpoints(t, table)
        await self._ledger.update(t, table, name, epoch)
        return name

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        table = change.table
        deadline = time.monotonic() + timeout_seconds
        doing = f"{change.kind.lower().replace('_', ' ')} of {table.full_name}"
        opened = self._open.get(_key(table))

        async def locked(t: Transaction) -> Record | None:
            await self._ledger.ensure(t)
            record = await self._ledger.find(t, table)
            if record is not None and opened is not None and record.epoch != opened.epoch:
                raise fenced(table, opened.epoch, record.epoch)
            return record

        async def drop(t: Transaction) -> None:
            if (record := await locked(t)) is not None:
                await tables.drop(t, record.name)
                await self._ledger.remove(t, table)

        async def rename(t: Transaction) -> Name | None:
            name = self._name(table)
            if (record := await locked(t)) is None:
                return None
            if record.name != name:
                await self._check_vacant(t, table, name)
                await tables.rename(t, record.name, name)
                await self._ledger.update(t, table, name, record.epoch)
            return name

        async def drop_rows(t: Transaction) -> int:
            if (record := await locked(t)) is None:
                return 0
            return await _delete_partition(t, record.name, change.partition)

        match change.kind:
            case SchemaChangeKind.DROP_COLLECTION:
                await self._run(doing, deadline, drop)
            case SchemaChangeKind.RENAME_COLLECTION:
                name = await self._run(doing, deadline, rename)
                if name is not None and opened is not None:
                    opened.name = name
            case SchemaChangeKind.DROP_PARTITION:
                while await self._run(doing, deadline, drop_rows) == PARTITION_ROWS:
                    pass
            case SchemaChangeKind.CREATE_PARTITION:
                pass

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        opened = self._open.get(_key(table))
        if opened is None:
            raise BugError("NOT_OPEN", f"{table.full_name} is written and was not opened")
        doing = f"writing {batch.num_rows} rows of {table.full_name}"
        reduced = await asyncio.to_thread(reduce, table, batch.changes)
        token = str(uuid.uuid4())

        async def work(t: Transaction) -> None:
            nonlocal token
            if opened.unknown is not None and _same(opened.unknown[0], batch):
                before = opened.unknown[1]
                if await self._ledger.last_write(t, table) == before:
                    # It was committed. The claim only says whether the collection is still ours.
                    token = before
                    await self._ledger.claim(t, table, opened.epoch, token, opened.known)
                    return
            await self._ledger.claim(t, table, opened.epoch, token, opened.known)
            await opened.merger.write(t, opened.name, reduced)
            await self._ledger.store(t, table, batch.checkpoints)

        try:
            await self._run(doing, deadline, work)
        except (UnknownOutcomeError, asyncio.CancelledError):
            # Cancelled while COMMIT was under way, it may be committed all the same.
            opened.unknown = (batch, token)
            opened.known.add(token)
            raise
        opened.unknown = None
        opened.known = {token}

    async def heartbeat(self, table: Table, resolved_ts: int) -> None:
        """Checkpoints tell it."""

    async def release(self, table: Table) -> None:
        self._open.pop(_key(table), None)

    async def close(self) -> None:
        await self._connections.close()
        self._open.clear()

    def _name(self, table: Table) -> Name:
        return self._settings.names(table.database, table.collection)

    async def _run(
        self, doing: str, deadline: float, work: Callable[[Transaction], Awaitable[T]]
    ) -> T:
        try:
            result = await self._connections.run(doing, deadline, work)
        except UserError:
            # The ledger's own tables may be what is gone.
            self._ledger.forget()
            raise
        self._ledger.made()
        return result

    async def _take_name(self, t: Transaction, table: Table, name: Name, epoch: int) -> None:
        await self._check_vacant(t, table, name)
        await self._ledger.enter(t, table, name, epoch)

    async def _check_vacant(self, t: Transaction, table: Table, name: Name) -> None:
        if owner := await self._ledger.owner(t, name):
            raise _exists(table, name, f"belongs to {owner}")

    async def _check_fits(
        self, t: Transaction, oid: int, name: Name, table: Table, shape: Sequence[columns.Column]
    ) -> None:
        if found := await tables.differences(t, oid, table, shape):
            raise UserError(
                "SCHEMA_MISMATCH",
                f"{described(name)} cannot hold the rows of {table.full_name}: "
                f"{'; '.join(found)}. Change or drop it, or change {FIELD}.table",
                field=f"{FIELD}.table",
            )


async def _delete_partition(t: Transaction, name: Name, partition: str) -> int:
    done = await t.execute(
        sql.SQL(
            "DELETE FROM {0} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {0} WHERE {1} = %s LIMIT {2}))"
        ).format(quoted(name), sql.Identifier(columns.PARTITION_COLUMN), PARTITION_ROWS),
        (partition,),
    )
    return done.rowcount


def _exists(table: Table, name: Name, why: str) -> UserError:
    return UserError(
        "COLLECTION_EXISTS",
        f"{described(name)} exists in PostgreSQL and {why}; drop it there, exclude "
        f"{table.full_name} from the task, change {FIELD}.schema or {FIELD}.table, or, where it is "
        "nobody else's, create the task with adoptExisting: true",
        field=f"{FIELD}.table",
    )


def _same(one: Batch, other: Batch) -> bool:
    def identity(changes: Changes) -> tuple[Any, ...]:
        return (changes.vchannel, changes.op, changes.ts, changes.order, changes.num_rows)

    return (
        one.checkpoints == other.checkpoints
        and len(one.changes) == len(other.changes)
        and all(identity(a) == identity(b) for a, b in zip(one.changes, other.changes, strict=True))
    )


def _key(table: Table) -> tuple[str, int]:
    return table.task_uid, table.collection_id
