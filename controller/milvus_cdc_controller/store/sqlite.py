"""The embedded store: one SQLite file, held exclusively, written by one thread.

Laws: `synchronous=FULL`: a commit that returned survives a power cut. The file stays locked while
it is open, so a second controller on it fails at its start.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from milvus_cdc.errors import RetryableError, UserError

from milvus_cdc_controller.store import LeadershipLost

_T = TypeVar("_T")


class SqliteStore:
    """Opened with `open`. All calls run in its own thread, one after the other."""

    certain = True

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread
        self.incarnation = 0

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Creates the file when it is missing. Raises UserError STORE_IN_USE, STORE_UNUSABLE."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        try:
            connection = await _run(thread, lambda: _connect(path))
        except sqlite3.Error as error:
            thread.shutdown()
            if "locked" in str(error):
                raise UserError(
                    "STORE_IN_USE",
                    f"{path} is held by another controller; stop it, or give this one its own file "
                    "(several controllers on one store need etcd).",
                    field="store.sqlite.path",
                ) from error
            raise UserError(
                "STORE_UNUSABLE", f"{path}: {error}", field="store.sqlite.path"
            ) from error
        except OSError as error:
            thread.shutdown()
            raise UserError(
                "STORE_UNUSABLE", f"{path}: {error}", field="store.sqlite.path"
            ) from error
        store = cls(connection, thread)
        store.incarnation = await _run(thread, lambda: _begin(connection))
        return store

    async def lost(self) -> LeadershipLost:
        # The file's lock is the process' own: it cannot be lost.
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def load(self) -> dict[str, bytes]:
        def read() -> dict[str, bytes]:
            rows = self._connection.execute("SELECT key, value FROM records ORDER BY key")
            return {str(key): bytes(value) for key, value in rows}

        return await self._call(read)

    async def commit(self, writes: Mapping[str, bytes | None]) -> None:
        items = list(writes.items())

        def write() -> None:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                for key, value in items:
                    if value is None:
                        self._connection.execute("DELETE FROM records WHERE key = ?", (key,))
                    else:
                        self._connection.execute(
                            "INSERT INTO records (key, value) VALUES (?, ?) "
                            "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                            (key, value),
                        )

        await self._call(write)

    async def close(self) -> None:
        await _run(self._thread, self._connection.close)
        self._thread.shutdown()

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            return await _run(self._thread, work)
        except sqlite3.Error as error:
            raise RetryableError("STORE_UNAVAILABLE", f"SQLite: {error}") from error


async def _run(thread: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(thread, work)


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB NOT NULL) "
            "WITHOUT ROWID"
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL)"
        )
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _begin(connection: sqlite3.Connection) -> int:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO counters VALUES ('incarnation', 1) "
            "ON CONFLICT (name) DO UPDATE SET value = value + 1"
        )
    row = connection.execute("SELECT value FROM counters WHERE name = 'incarnation'").fetchone()
    return int(row[0])
