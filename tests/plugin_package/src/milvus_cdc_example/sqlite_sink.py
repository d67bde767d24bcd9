"""Rows into a SQLite file, each as one JSON document: at least once, the newest state by key."""

import asyncio
import json
import sqlite3
import time
from contextlib import closing

from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.rows import ChangeOp
from milvus_cdc.sink.writer import Capabilities, Opened, Opening, SchemaChangeKind

# Another collection of the same name has another owner: it is kept apart.
SCHEMA = """CREATE TABLE IF NOT EXISTS rows
            (owner, name, part, key, doc, PRIMARY KEY (owner, key)) WITHOUT ROWID"""
PUT = "INSERT OR REPLACE INTO rows VALUES (?1, ?2, ?3, ?4, ?5)"
DELETE = "DELETE FROM rows WHERE owner = ?1 AND key = ?2 AND ?3 IN ('', part)"
FORGET = "DELETE FROM rows WHERE owner = ?1"
FORGET_PARTITION = "DELETE FROM rows WHERE owner = ?1 AND part = ?2"
RENAME = "UPDATE rows SET name = ?2 WHERE owner = ?1"


class SqliteWriter:
    CONFIG_SCHEMA = {
        "type": "object",
        "properties": {"path": {"type": "string", "pattern": "^/"}},
        "required": ["path"],
        "additionalProperties": False,
    }
    capabilities = Capabilities(rows_per_batch=5_000, in_flight=1)

    def __init__(self, config):
        self.path = config["path"]

    async def probe(self):
        return await self.run(lambda db: f"SQLite {sqlite3.sqlite_version}")

    def violations(self, tables):
        return []  # whatever Milvus has becomes JSON

    async def open(self, table, opening, epoch):
        if opening is Opening.RECREATE:
            await self.run(lambda db: db.execute(FORGET, [owner(table)]))
        return Opened()

    async def apply(self, change, timeout_seconds):
        table, kind = change.table, change.kind
        if kind is SchemaChangeKind.DROP_COLLECTION:
            query = FORGET, [owner(table)]
        elif kind is SchemaChangeKind.DROP_PARTITION:
            query = FORGET_PARTITION, [owner(table), change.partition]
        elif kind is SchemaChangeKind.RENAME_COLLECTION:
            query = RENAME, [owner(table), table.full_name]
        else:
            return  # a new partition needs nothing
        await self.run(lambda db: db.execute(*query), timeout_seconds)

    async def write(self, table, batch, timeout_seconds):
        def work(db):
            for changes in batch.changes:
                part, rows = changes.partition, changes.rows(table)
                keys = [row[table.key.name] for row in rows]
                if changes.op is ChangeOp.DELETE:
                    db.executemany(DELETE, [(owner(table), key, part) for key in keys])
                    continue
                docs = [json.dumps(row, default=bytes.hex) for row in rows]
                names = owner(table), table.full_name, part
                db.executemany(PUT, [(*names, *both) for both in zip(keys, docs, strict=True)])

        await self.run(work, timeout_seconds)

    async def release(self, table):
        pass

    async def close(self):
        pass

    async def run(self, work, seconds=10.0):
        """In a thread, as one transaction: when the time is over, it is done or undone."""
        return await asyncio.to_thread(self.transaction, work, seconds)

    def transaction(self, work, seconds):
        deadline = time.monotonic() + seconds
        try:
            with closing(sqlite3.connect(self.path, timeout=seconds)) as db, db:
                db.set_progress_handler(lambda: time.monotonic() > deadline, 1_000)
                db.execute(SCHEMA)
                result = work(db)
                if time.monotonic() > deadline:
                    raise RetryableError("SINK_TIMEOUT", "not written in time")
                return result
        except sqlite3.OperationalError as error:
            text = f"{self.path}: {error}"
            if error.sqlite_errorname == "SQLITE_CANTOPEN":
                where = "sink.plugin.config.path"
                raise UserError(
                    "SINK_FILE", f"{text}; is its folder there?", field=where
                ) from error
            raise RetryableError("SINK_BUSY", text) from error


def owner(table):
    return f"{table.task_uid}/{table.collection_id}"
