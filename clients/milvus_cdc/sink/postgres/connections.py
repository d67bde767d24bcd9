"""Few connections for many collections, and transactions that end before their deadline.

Laws: never more connections than allowed, one more only to end what an older owner left open; work
that is not over by its deadline, or is cancelled, loses its connection at once and with it whatever
was not committed; `close` leaves none. Only transactions are run here, each within one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError
from milvus_cdc.sink.postgres import failures
from milvus_cdc.sink.postgres.settings import FIELD, Settings

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]

# Durable means durable, whatever the role or the database defaults to; a transaction that nobody
# goes on with holds its locks no longer than this; who left is noticed during a long statement.
_SESSION = """
SELECT set_config('synchronous_commit', 'on', false)
 WHERE current_setting('synchronous_commit') = 'off';
SET client_min_messages = warning;
SET idle_in_transaction_session_timeout = '60s'"""
_NOTICE_LOSS = "SET client_connection_check_interval = '2s'"
_NOTICES_LOSS = 14_00_00


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A connection and what it has at the server."""

    connection: Connection
    stages: list[str] = field(default_factory=list)
    """Its temporary tables, oldest first. A failed transaction ends the session, so these are."""


class Transaction:
    """What runs within one BEGIN and COMMIT."""

    def __init__(self, session: Session, deadline: float) -> None:
        self.session = session
        self.cursor = session.connection.cursor()
        self.deadline = deadline
        self.begun = False
        self.committing = False
        self.committed = False

    async def begin(self) -> None:
        milliseconds = max(1, int((self.deadline - time.monotonic()) * 1000))
        await self.cursor.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL statement_timeout = {milliseconds};"
            f"SET LOCAL lock_timeout = {milliseconds}"
        )
        self.begun = True

    async def execute(self, query: str | sql.Composable, values: Any = None) -> psycopg.AsyncCursor:
        return await self.cursor.execute(query, values)  # type: ignore[arg-type]

    async def row(self, query: str | sql.Composable, values: Any = None) -> Any:
        """The first row, None without one."""
        return await (await self.execute(query, values)).fetchone()

    async def commit(self) -> None:
        self.committing = True
        await self.cursor.execute("COMMIT")
        if self.cursor.statusmessage != "COMMIT":
            self.committing = False
            raise RetryableError("SINK_ERROR", "the server rolled the transaction back")
        self.committed = True


class Connections:
    """See module docstring. Of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.max_connections)
        self._idle: list[Session] = []
        self._used: set[Session] = set()
        self._closed = False

    async def run(
        self, doing: str, deadline: float, work: Callable[[Transaction], Awaitable[T]]
    ) -> T:
        """`work` in a transaction, then committed; `deadline` on `time.monotonic()`.

        Raises what `failures` makes of an error; whatever it is, nothing is committed then, unless
        it is UnknownOutcomeError.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._slots.acquire()
        except TimeoutError:
            raise RetryableError(
                "SINK_TIMEOUT",
                f"{doing}: all {self._settings.max_connections} connections were busy; "
                f"{FIELD}.max_connections allows more",
            ) from None
        try:
            while True:
                if self._closed:
                    raise RetryableError("SINK_CLOSED", f"{doing}: the sink is being closed")
                reused = bool(self._idle)
                session = self._idle.pop() if reused else Session(await self.connect(deadline))
                transaction = Transaction(session, deadline)
                try:
                    return await self._guarded(doing, transaction, work)
                except RetryableError:
                    # It ended while it was idle: nothing was asked of it yet.
                    if reused and not transaction.begun and time.monotonic() < deadline:
                        continue
                    raise
        finally:
            self._slots.release()

    async def connect(self, deadline: float) -> Connection:
        """A connection of its own, which the caller closes."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                connection = await psycopg.AsyncConnection.connect(
                    **self._settings.connection,  # type: ignore[arg-type]
                    password=self._settings.password() or "",
                    autocommit=True,
                    prepare_threshold=None,
                )
                try:
                    await connection.execute(_SESSION)
                    if connection.info.server_version >= _NOTICES_LOSS:
                        await connection.execute(_NOTICE_LOSS)
                except BaseException:
                    _cut(connection)
                    await connection.close()
                    raise
        except TimeoutError as error:
            late = TimeoutError("no answer in time")
            raise failures.of_connecting(late, self._settings) from error
        except (psycopg.Error, OSError) as error:
            raise failures.of_connecting(error, self._settings) from error
        return connection

    async def close(self) -> None:
        """Work that is under way fails."""
        self._closed = True
        for session in tuple(self._used):
            _cut(session.connection)
        while self._idle:
            await self._idle.pop().connection.close()

    async def _guarded(
        self, doing: str, transaction: Transaction, work: Callable[[Transaction], Awaitable[T]]
    ) -> T:
        session = transaction.session
        self._used.add(session)
        whole = asyncio.ensure_future(_whole(transaction, work))
        late = False
        try:
            # The driver's own cancellation waits for the server: the socket is cut instead.
            left = max(0.0, transaction.deadline - time.monotonic())
            done, _ = await asyncio.wait({whole}, timeout=left)
            if not done:
                late = True
                _cut(session.connection)
            return await whole
        except asyncio.CancelledError:
            _cut(session.connection)
            await asyncio.wait({whole})
            raise
        except (psycopg.Error, OSError) as error:
            raise _named(error, doing, late=late, committing=transaction.committing) from error
        finally:
            self._used.discard(session)
            if transaction.committed and not self._closed:
                self._idle.append(session)
            else:
                await _dispose(session.connection)


async def _whole(transaction: Transaction, work: Callable[[Transaction], Awaitable[T]]) -> T:
    await transaction.begin()
    result = await work(transaction)
    await transaction.commit()
    return result


def _named(error: Exception, doing: str, *, late: bool, committing: bool) -> CdcError:
    if not late:
        return failures.of_statement(error, doing, committing=committing)
    if committing:
        return UnknownOutcomeError("SINK_TIMEOUT", f"{doing}: no answer to COMMIT in time")
    return RetryableError("SINK_TIMEOUT", f"{doing}: not done in time, nothing was written")


def _cut(connection: Connection) -> None:
    """Whoever waits for the server hears at once that it is gone, and so does the server."""
    with contextlib.suppress(psycopg.Error, OSError):
        with socket.socket(fileno=os.dup(connection.pgconn.socket)) as other:
            other.shutdown(socket.SHUT_RDWR)


async def _dispose(connection: Connection) -> None:
    # Without a word of goodbye to a server that may not listen.
    _cut(connection)
    with contextlib.suppress(psycopg.Error):
        await connection.close()
