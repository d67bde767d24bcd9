"""The sink's own tables: which table is whose, who may write it, and what is in it.

`collections` has a row per collection of a task: its table, the epoch of its owner, and the token
of the last write. Whoever changes anything of a collection locks that row first, and with it knows
that no older owner has a transaction open. `checkpoints` has a row per vchannel.

Laws: everything here happens within the transaction of what it is about; an epoch never goes back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from psycopg import sql

from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.rows import Table
from milvus_cdc.sink.postgres.connections import Transaction
from milvus_cdc.sink.postgres.settings import FIELD
from milvus_cdc.sink.writer import Checkpoint

Name = tuple[str, str]
"""Schema and table."""

_TABLES = """
CREATE TABLE IF NOT EXISTS {collections} (
  task_uid text NOT NULL,
  collection_id bigint NOT NULL,
  schema_name text NOT NULL,
  table_name text NOT NULL,
  epoch bigint NOT NULL,
  last_write uuid,
  opened_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (task_uid, collection_id),
  UNIQUE (schema_name, table_name)
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS {checkpoints} (
  task_uid text NOT NULL,
  collection_id bigint NOT NULL,
  vchannel text NOT NULL,
  read_from bytea NOT NULL,
  resolved_ts bigint NOT NULL,
  PRIMARY KEY (task_uid, collection_id, vchannel),
  FOREIGN KEY (task_uid, collection_id) REFERENCES {collections} ON DELETE CASCADE
) WITH (fillfactor = 50)"""


def quoted(name: Name) -> sql.Identifier:
    return sql.Identifier(*name)


def described(name: Name) -> str:
    return ".".join(name)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of an opened collection."""

    name: Name
    epoch: int


async def ensure_schema(t: Transaction, schema: str) -> None:
    """Asks for the right to make it only where it is not there."""
    if await t.row("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)) is None:
        await t.execute("SELECT pg_advisory_xact_lock(hashtext('milvus_cdc schema'))")
        await t.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))


class Ledger:
    """The two tables in one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._collections = sql.Identifier(schema, "collections")
        self._checkpoints = sql.Identifier(schema, "checkpoints")
        self._made = False

    async def ensure(self, t: Transaction) -> None:
        """Makes them; a user without the right to is fine when they are there."""
        if self._made:
            return
        there = await t.row(
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname IN ('collections', 'checkpoints')",
            (self.schema,),
        )
        if there[0] < 2:
            await ensure_schema(t, self.schema)
            # IF NOT EXISTS alone lets two at once collide.
            await t.execute("SELECT pg_advisory_xact_lock(hashtext('milvus_cdc ledger'))")
            await t.execute(
                sql.SQL(_TABLES).format(
                    collections=self._collections,
                    checkpoints=self._checkpoints,
                )
            )

    def made(self) -> None:
        """The transaction of `ensure` was committed."""
        self._made = True

    def forget(self) -> None:
        """They may be gone."""
        self._made = False

    async def find(self, t: Transaction, table: Table) -> Record | None:
        """Locks the collection's row until the transaction ends."""
        row = await t.row(
            sql.SQL(
                "SELECT schema_name, table_name, epoch FROM {}"
                " WHERE task_uid = %s AND collection_id = %s FOR UPDATE"
            ).format(self._collections),
            (table.task_uid, table.collection_id),
        )
        return None if row is None else Record((row[0], row[1]), row[2])

    async def owner(self, t: Transaction, name: Name) -> str:
        """For a message: which collection of which task has that table; empty when none has."""
        row = await t.row(
            sql.SQL(
                "SELECT task_uid, collection_id FROM {} WHERE schema_name = %s AND table_name = %s"
            ).format(self._collections),
            name,
        )
        return "" if row is None else f"collection {row[1]} of the task with uid {row[0]}"

    async def enter(self, t: Transaction, table: Table, name: Name, epoch: int) -> None:
        """A new row; waits for a transaction that enters the same one."""
        done = await t.execute(
            sql.SQL(
                "INSERT INTO {} (task_uid, collection_id, schema_name, table_name, epoch)"
                " VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
            ).format(self._collections),
            (table.task_uid, table.collection_id, *name, epoch),
        )
        if not done.rowcount:
            raise RetryableError(
                "SINK_NAME_TAKEN", f"another process opens {described(name)} at the same moment"
            )

    async def update(self, t: Transaction, table: Table, name: Name, epoch: int) -> None:
        await t.execute(
            sql.SQL(
                "UPDATE {} SET schema_name = %s, table_name = %s, epoch = %s"
                " WHERE task_uid = %s AND collection_id = %s"
            ).format(self._collections),
            (*name, epoch, table.task_uid, table.collection_id),
        )

    async def remove(self, t: Transaction, table: Table) -> None:
        """With its checkpoints."""
        await t.execute(
            sql.SQL("DELETE FROM {} WHERE task_uid = %s AND collection_id = %s").format(
                self._collections
            ),
            (table.task_uid, table.collection_id),
        )

    async def claim(
        self, t: Transaction, table: Table, epoch: int, token: str, known: Collection[str]
    ) -> None:
        """Locks the collection's row for a write. Raises when it is not this owner's any more, or
        its last write was none of the `known` tokens.
        """
        done = await t.execute(
            sql.SQL(
                "UPDATE {} SET last_write = %s"
                " WHERE task_uid = %s AND collection_id = %s AND epoch = %s"
                " AND coalesce(last_write::text, '') = ANY(%s)"
            ).format(self._collections),
            (token, table.task_uid, table.collection_id, epoch, list(known)),
        )
        if done.rowcount:
            return
        record = await self.find(t, table)
        if record is None:
            raise missing(table, f"{self.schema}.collections knows no table of it any more")
        if record.epoch != epoch:
            raise fenced(table, epoch, record.epoch)
        raise UserError(
            "SINK_PUT_BACK",
            f"{table.full_name} does not have what was written last: the database was put back to "
            "an older state; `milvus-cdc task resync` brings the collection anew",
            field=FIELD,
        )

    async def last_write(self, t: Transaction, table: Table) -> str:
        """Token of the last write that was committed; waits for one that is under way."""
        row = await t.row(
            sql.SQL(
                "SELECT last_write::text FROM {}"
                " WHERE task_uid = %s AND collection_id = %s FOR UPDATE"
            ).format(self._collections),
            (table.task_uid, table.collection_id),
        )
        return (row[0] or "") if row is not None else ""

    async def checkpoints(self, t: Transaction, table: Table) -> tuple[Checkpoint, ...]:
        done = await t.execute(
            sql.SQL(
                "SELECT vchannel, read_from, resolved_ts FROM {}"
                " WHERE task_uid = %s AND collection_id = %s ORDER BY vchannel"
            ).format(self._checkpoints),
            (table.task_uid, table.collection_id),
        )
        return tuple(Checkpoint(row[0], bytes(row[1]), row[2]) for row in await done.fetchall())

    async def store(self, t: Transaction, table: Table, checkpoints: Sequence[Checkpoint]) -> None:
        if not checkpoints:
            return
        await t.execute(
            sql.SQL(
                "INSERT INTO {} (task_uid, collection_id, vchannel, read_from, resolved_ts)"
                " SELECT %s, %s, * FROM unnest(%s::text[], %s::bytea[], %s::bigint[])"
                " ON CONFLICT (task_uid, collection_id, vchannel) DO UPDATE"
                " SET read_from = EXCLUDED.read_from, resolved_ts = EXCLUDED.resolved_ts"
            ).format(self._checkpoints),
            (
                table.task_uid,
                table.collection_id,
                [each.vchannel for each in checkpoints],
                [each.read_from for each in checkpoints],
                [each.resolved_ts for each in checkpoints],
            ),
        )

    async def forget_checkpoints(self, t: Transaction, table: Table) -> None:
        await t.execute(
            sql.SQL("DELETE FROM {} WHERE task_uid = %s AND collection_id = %s").format(
                self._checkpoints
            ),
            (table.task_uid, table.collection_id),
        )


def missing(table: Table, why: str) -> UserError:
    return UserError(
        "SINK_COLLECTION_MISSING",
        f"{table.full_name} is gone from PostgreSQL: {why}; `milvus-cdc task resync` fills it anew",
        field=FIELD,
    )


def fenced(table: Table, epoch: int, newer: int) -> RetryableError:
    return RetryableError(
        "SINK_FENCED",
        f"{table.full_name} was opened with epoch {newer}, this owner has {epoch}: another "
        "replicator writes it now, or the controller's state was set back to an older one",
    )
