"""Transactions that an older owner of a collection left open are ended.

A process that was frozen, or whose host is gone, can hold the collection's row for as long as its
connection seems alive. Whoever opens the collection has a right to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg

from milvus_cdc.errors import CdcError
from milvus_cdc.sink.postgres.connections import Connections, Transaction

PATIENCE_SECONDS = 2.0
"""A transaction of an owner that still runs is over sooner than this, as a rule."""

_END_BLOCKERS = """
SELECT pg_terminate_backend(a.pid)
  FROM unnest(pg_blocking_pids(%s)) AS blocking (pid) JOIN pg_stat_activity a USING (pid)
 WHERE a.usename = current_user AND a.application_name = current_setting('application_name')"""


@asynccontextmanager
async def breaking_locks(t: Transaction, connections: Connections) -> AsyncIterator[None]:
    """While the body waits for a lock that another of our connections holds, that one is ended."""
    watch = asyncio.create_task(_watch(t, connections))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait({watch})


async def _watch(t: Transaction, connections: Connections) -> None:
    waiting = t.session.connection.info.backend_pid
    await asyncio.sleep(PATIENCE_SECONDS)
    # What goes wrong here shows as the time-out of what waits.
    with contextlib.suppress(CdcError, psycopg.Error, OSError):
        connection = await connections.connect(t.deadline)
        try:
            while time.monotonic() < t.deadline:
                await connection.execute(_END_BLOCKERS, (waiting,))
                await asyncio.sleep(PATIENCE_SECONDS)
        finally:
            await connection.close()
