"""Tables of collections: made, compared, emptied, renamed, dropped.

Laws: everything happens within one transaction; nothing that depends on a table (a view, a foreign
key) is dropped with it; indexes and columns that a user has added are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from milvus_cdc.errors import UserError
from milvus_cdc.rows import Table
from milvus_cdc.sink.postgres.columns import Column
from milvus_cdc.sink.postgres.connections import Transaction
from milvus_cdc.sink.postgres.ledger import Name, described, ensure_schema, quoted
from milvus_cdc.sink.postgres.settings import FIELD

HALFVEC_SINCE = (0, 7)
_TABLE_KINDS = ("r", "p")

_SHAPE = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod),
       a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = ''
  FROM pg_attribute a
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped"""
_UNIQUE = """
SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
 WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
   AND i.indnkeyatts = 1 AND a.attname = %s"""
_EXTENSION = """
SELECT n.nspname, e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname = 'vector'"""


async def exists(t: Transaction, name: Name) -> int | None:
    """The table's oid. Raises UserError COLLECTION_EXISTS when something else has the name."""
    row = await t.row(
        "SELECT c.oid, c.relkind::text"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s",
        name,
    )
    if row is None:
        return None
    if row[1] not in _TABLE_KINDS:
        raise UserError(
            "COLLECTION_EXISTS",
            f"{described(name)} exists in PostgreSQL and is no table (relkind {row[1]}); rename or "
            f"drop it, or change {FIELD}.table",
            field=f"{FIELD}.table",
        )
    return int(row[0])


async def differences(
    t: Transaction, oid: int, table: Table, columns: Sequence[Column]
) -> list[str]:
    """What keeps the rows out of that table, each text naming its column."""
    done = await t.execute(_SHAPE, (oid,))
    there = {row[0]: (row[1], row[2]) for row in await done.fetchall()}
    found = []
    for column in columns:
        if column.name not in there:
            found.append(f"column {column.name} is missing ({column.sql_type})")
            continue
        kind = there[column.name][0]
        # An extension's type may come with the schema that the extension is in.
        plain = kind.rsplit(".", 1)[-1] if column.pgvector else kind
        if plain != column.sql_type:
            found.append(f"column {column.name} is {kind}, not {column.sql_type}")
    ours = {column.name for column in columns}
    found += [
        f"column {name} must have a value, and rows bring none"
        for name, (_, needed) in there.items()
        if needed and name not in ours
    ]
    if not found and await t.row(_UNIQUE, (oid, table.key.name)) is None:
        found.append(f"column {table.key.name} is the key and has no unique index of its own")
    return found


async def is_empty(t: Transaction, name: Name) -> bool:
    return await t.row(sql.SQL("SELECT 1 FROM {} LIMIT 1").format(quoted(name))) is None


async def create(t: Transaction, name: Name, table: Table, columns: Sequence[Column]) -> None:
    """With its schema."""
    await ensure_schema(t, name[0])
    kinds = await types(t, columns)
    definitions = [
        sql.SQL("{} {}").format(sql.Identifier(column.name), kind)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    await t.execute(
        sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(
            quoted(name), sql.SQL(", ").join(definitions), sql.Identifier(table.key.name)
        )
    )


async def types(t: Transaction, columns: Sequence[Column]) -> list[sql.Composable]:
    """As a statement names them. Makes the extension where it is needed and may be made."""
    wanted = {column.pgvector for column in columns} - {""}
    schema = await _extension(t, wanted) if wanted else ""
    return [
        sql.SQL("{}.{}").format(sql.Identifier(schema), sql.SQL(column.sql_type))
        if column.pgvector
        else sql.SQL(column.sql_type)
        for column in columns
    ]


async def drop(t: Transaction, name: Name) -> None:
    await t.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(quoted(name)))


async def empty(t: Transaction, name: Name) -> None:
    """At once, however many rows it has; its indexes stay."""
    await t.execute(sql.SQL("TRUNCATE {}").format(quoted(name)))


async def rename(t: Transaction, old: Name, new: Name) -> None:
    """Raises UserError COLLECTION_EXISTS when the name is taken."""
    if old == new:
        return
    if await exists(t, new) is not None:
        raise UserError(
            "COLLECTION_EXISTS",
            f"{described(old)} is to become {described(new)}, which exists in PostgreSQL; rename "
            "or drop that one",
            field=f"{FIELD}.table",
        )
    if old[0] != new[0]:
        await ensure_schema(t, new[0])
        await _move(t, old, new)
    elif old[1] != new[1]:
        await t.execute(
            sql.SQL("ALTER TABLE {} RENAME TO {}").format(quoted(old), sql.Identifier(new[1]))
        )


async def _move(t: Transaction, old: Name, new: Name) -> None:
    """To another schema. Neither of them may have the other's name in the meantime."""
    now = old
    if old[1] != new[1]:
        row = await t.row("SELECT 'milvus_cdc_' || replace(gen_random_uuid()::text, '-', '')")
        now = (old[0], row[0])
        await t.execute(
            sql.SQL("ALTER TABLE {} RENAME TO {}").format(quoted(old), sql.Identifier(now[1]))
        )
    await t.execute(
        sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(quoted(now), sql.Identifier(new[0]))
    )
    if now[1] != new[1]:
        moved = (new[0], now[1])
        await t.execute(
            sql.SQL("ALTER TABLE {} RENAME TO {}").format(quoted(moved), sql.Identifier(new[1]))
        )


async def extension(t: Transaction) -> tuple[str, str] | None:
    """Schema and version of pgvector in this database."""
    row = await t.row(_EXTENSION)
    return None if row is None else (row[0], row[1])


async def may_create_extension(t: Transaction) -> bool:
    """The server has pgvector, and this user may make it: as superuser, or it is trusted."""
    row = await t.row(
        "SELECT bool_or(rolsuper OR v.trusted"
        " AND has_database_privilege(current_database(), 'CREATE'))"
        " FROM pg_available_extension_versions v, pg_roles r"
        " WHERE v.name = 'vector' AND r.rolname = current_user"
    )
    return bool(row[0])


def no_pgvector() -> UserError:
    return UserError(
        "PGVECTOR_MISSING",
        "the database has no pgvector: install it at the server (package postgresql-NN-pgvector), "
        "then let a superuser run  CREATE EXTENSION vector  in this database",
        field=f"{FIELD}.database",
    )


async def _extension(t: Transaction, wanted: set[str]) -> str:
    found = await extension(t)
    if found is None:
        if not await may_create_extension(t):
            raise no_pgvector()
        # Two at once collide in spite of IF NOT EXISTS.
        await t.execute("SELECT pg_advisory_xact_lock(hashtext('milvus_cdc pgvector'))")
        row = await t.row("SELECT coalesce(current_schema(), 'public')")
        await t.execute(
            sql.SQL("CREATE EXTENSION IF NOT EXISTS vector SCHEMA {}").format(
                sql.Identifier(row[0])
            )
        )
        found = await extension(t)
        assert found is not None
    schema, version = found
    known = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if wanted - {"vector"} and known < HALFVEC_SINCE:
        raise UserError(
            "PGVECTOR_TOO_OLD",
            f"halfvec and sparsevec need pgvector 0.7, the database has {version}: install a newer "
            "one at the server, then  ALTER EXTENSION vector UPDATE",
            field=f"{FIELD}.database",
        )
    return schema
