"""What a task's PostgreSQL is, and whether its user may do there what the sink does."""

from __future__ import annotations

from milvus_cdc.errors import UserError
from milvus_cdc.sink.postgres import tables
from milvus_cdc.sink.postgres.connections import Transaction
from milvus_cdc.sink.postgres.settings import FIELD, Settings

OLDEST = 13_00_00
"""The oldest version with everything used here (`gen_random_uuid`, trusted extensions)."""

_RIGHTS = """
SELECT has_database_privilege(current_database(), 'CREATE'),
       has_database_privilege(current_database(), 'TEMPORARY'),
       (SELECT has_schema_privilege(oid, 'CREATE, USAGE') FROM pg_namespace WHERE nspname = %s),
       current_setting('server_encoding'), pg_is_in_recovery(), current_setting('server_version')"""


async def look(t: Transaction, settings: Settings) -> str:
    """Versions for a person to read. Raises UserError naming the field."""
    row = await t.row(_RIGHTS, (settings.checkpoint_schema,))
    create, temporary, own_schema, encoding, _, version = row
    if t.session.connection.info.server_version < OLDEST:
        raise UserError(
            "SINK_VERSION",
            f"{settings.place} is PostgreSQL {version}, the sink needs 13 or newer",
            field=f"{FIELD}.host",
        )
    if encoding != "UTF8":
        raise UserError(
            "SINK_ENCODING",
            f"{settings.place} has the encoding {encoding}, which does not hold every string: make "
            "a database with  CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0",
            field=f"{FIELD}.database",
        )
    user, database = settings.connection["user"], settings.connection["dbname"]
    # Schemas that a person has prepared are enough; those of collections show when they are opened.
    if not create and not own_schema:
        raise UserError(
            "SINK_ACCESS_DENIED",
            f'{settings.place} may make no schema:  GRANT CREATE ON DATABASE "{database}" TO '
            f'"{user}"',
            field=f"{FIELD}.user",
        )
    if not temporary:
        raise UserError(
            "SINK_ACCESS_DENIED",
            f"{settings.place} may make no temporary table:  GRANT TEMPORARY ON DATABASE "
            f'"{database}" TO "{user}"',
            field=f"{FIELD}.user",
        )
    found = await tables.extension(t)
    if found is None and not await tables.may_create_extension(t):
        raise tables.no_pgvector()
    vector = f"pgvector {found[1]}" if found is not None else "pgvector not yet made"
    return f"PostgreSQL {version}, {vector}"
