"""The contract, as the author of the sink runs it."""

import json
import sqlite3
from contextlib import asynccontextmanager, closing

import pytest
from milvus_cdc.testing.writer_contract import WriterContract
from milvus_cdc_example.sqlite_sink import SqliteWriter, owner


class TestSqlite(WriterContract):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path):
        self.path = str(tmp_path / "rows.db")

    def make_writer(self):
        return SqliteWriter({"path": self.path})

    async def state(self, table):
        with closing(sqlite3.connect(self.path)) as db:
            if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'rows'").fetchone():
                return {}
            found = db.execute("SELECT key, doc FROM rows WHERE owner = ?", [owner(table)])
            return {key: json.loads(doc) for key, doc in found}

    @asynccontextmanager
    async def stalled(self, table):
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            yield
