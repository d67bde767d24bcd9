"""What one assignment does at its sink: writes and schema changes, each repeated until it is done,
told to stop, or refused.

Laws: nothing starts without the lease. A write whose outcome is unknown is repeated as an upsert.
Trouble is visible for as long as it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from milvus_cdc.changes import changes_of
from milvus_cdc.dead_letters import Place, letters_of
from milvus_cdc.errors import (
    CdcError,
    RetryableError,
    RowRefusedError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.order.ops import LogOp
from milvus_cdc.rows import Table
from milvus_cdc.sink import CollectionTarget, Sink
from milvuscdc.v1 import task_pb2

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.convert import Converter
from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import Halted
from milvus_cdc_replicator.pacing import Pacer, Places

RESTORES_MAX = 3
_AWAY = frozenset({"SINK_UNAVAILABLE"})
_RESTORABLE = frozenset({"SINK_COLLECTION_MISSING", "SINK_PARTITION_MISSING"})
RATE_LIMITED_SECONDS = 5.0
"""So long after a write has waited for the task's limits the collection counts as held back."""
LETTERS_SECONDS = 8.0
RETRY_BACKOFF_SECONDS = (0.1, 0.3, 1.0, 2.0, 5.0)


class Troubles:
    """What is in the way now, by place; the first is shown."""

    def __init__(self, log: Any, changed: Callable[[], None]) -> None:
        self._log = log
        self._changed = changed
        self._now: dict[str, CdcError] = {}

    def bind(self, log: Any) -> None:
        """Speaks through another log from now on."""
        self._log = log

    @property
    def first(self) -> CdcError | None:
        return next(iter(self._now.values()), None)

    def add(self, where: str, error: CdcError) -> None:
        news = where not in self._now
        self._now[where] = error
        if news:
            self._log.warning("retrying", where=where, reason=error.reason, error=error.message)
            self._changed()
        # Its traceback would keep the request alive, megabytes each.
        error.__traceback__ = error.__cause__ = error.__context__ = None

    def clear(self, where: str) -> None:
        if self._now.pop(where, None) is not None:
            self._log.info("recovered", where=where)
            self._changed()


def look_again() -> None:
    """An event that makes the owner look again."""


def _insert(write: Write) -> bool:
    return write.kind is WriteKind.INSERT


class SinkWork:
    """Bound to one sink, one collection and one order to halt."""

    def __init__(
        self,
        sink: Sink,
        target: CollectionTarget,
        spec: task_pb2.Sink,
        task: str,
        *,
        converter: Converter,
        gate: WriteGate,
        pacer: Pacer,
        letters: Callable[[], Place | None],
        table: Callable[[], Table],
        divisible: Callable[[], bool],
        refused: Callable[[int], None],
        halt: asyncio.Event,
        troubles: Troubles,
        restore: Callable[[], Awaitable[bool]],
        reconnected: Callable[[], None],
    ) -> None:
        """`restore` brings a missing collection or partition back and says if it could;
        `reconnected` hears that a sink that was away answers again. `letters`: where refused rows
        go, described by `table`; `divisible`: a part of a write may be written alone;
        `refused` hears how many rows are dead letters now.
        """
        self._sink = sink
        self._target = target
        self._spec = spec
        self._task = task
        self._collection = f"{target.database}.{target.collection}"
        self._converter = converter
        self._gate = gate
        self._pacer = pacer
        self._letters = letters
        self._table = table
        self._divisible = divisible
        self._refused = refused
        self._refusing = converter.refusing
        self._pacing = 0
        """Writes and openings that wait for the task's limits."""
        self._paced_at = float("-inf")
        self._halt = halt
        self._troubles = troubles
        self._restore = restore
        self._reconnected = reconnected
        self._away = False

    async def write(self, write: Write) -> bool:
        """True when it is durable, its refused rows as dead letters; False when told to stop
        before. Raises UserError, BugError.
        """
        if not await self._admitted(write):
            return False
        kind = await self._write(write, write, as_upsert=False)
        if kind is None:
            return False
        self._answered()
        rows = write.rows - sum(op.rows for op in write.refused)
        metrics.ROWS_WRITTEN.labels(self._task, self._collection, kind).inc(rows)
        metrics.BYTES_WRITTEN.labels(self._task, self._collection).inc(write.size)
        return True

    async def _write(self, write: Write, whole: Write, *, as_upsert: bool) -> WriteKind | None:
        """`write`: the whole, or a part of it while refused rows are looked for. As what it was
        written; None when told to stop before.
        """
        batch = self._converter.batch(write, as_upsert=as_upsert)
        kind = WriteKind.UPSERT if as_upsert and _insert(write) else write.kind
        where = f"write {write.write_id}"
        attempt = restored = 0
        while True:
            try:
                async with (
                    self._place(self._pacer.requests),
                    self._gate.slot(self._spec, self._halt) as timeout,
                ):
                    started = time.perf_counter()
                    await self._sink.write(self._target, batch, timeout)
                    took = time.perf_counter() - started
                    metrics.WRITE_SECONDS.labels(kind).observe(took)
                break
            except Halted:
                return None  # the next owner reads it again
            except RetryableError as error:
                metrics.WRITE_ERRORS.labels(self._task, error.error_class, error.reason).inc()
                if isinstance(error, UnknownOutcomeError) and _insert(write):
                    kind = WriteKind.UPSERT
                    batch = self._converter.batch(write, as_upsert=True)
                self._away |= error.reason in _AWAY
                self._troubles.add(where, error)
                await self.backoff(attempt)
                attempt += 1
            except RowRefusedError as error:
                metrics.WRITE_ERRORS.labels(self._task, error.error_class, error.reason).inc()
                place = self._letters()
                if place is None:
                    raise
                places = self._refusing.named(write, error)
                if not places:
                    if write.rows < 2 or not self._divisible():
                        raise
                    self._troubles.clear(where)
                    for part in self._refusing.parts(write):
                        if await self._write(part, whole, as_upsert=True) is None:
                            return None
                    return kind
                rest, taken = self._refusing.without(write, places)
                if not await self._set_aside(place, taken, error):
                    return None
                whole.refused += taken
                if not rest.ops and not rest.marks:
                    break
                write = rest
                batch = self._converter.batch(write, as_upsert=True)
                kind = WriteKind.UPSERT if _insert(write) else write.kind
            except CdcError as error:
                metrics.WRITE_ERRORS.labels(self._task, error.error_class, error.reason).inc()
                restored += 1
                if restored > RESTORES_MAX or not await self._restored(error):
                    raise
                if _insert(write):
                    # An earlier part of the same write may be there.
                    kind = WriteKind.UPSERT
                    batch = self._converter.batch(write, as_upsert=True)
        self._troubles.clear(where)
        return kind

    async def _set_aside(self, place: Place, rows: list[LogOp], error: RowRefusedError) -> bool:
        """Durable as letters; False when told to stop before."""
        table, attempt = self._table(), 0
        letters = [
            letter
            for op in rows
            for letter in letters_of(table, changes_of(op), error.reason, error.message)
        ]
        while not self._halt.is_set():
            try:
                await place.put(letters, LETTERS_SECONDS)
            except RetryableError as trouble:
                self._troubles.add("dead letters", trouble)
                await self.backoff(attempt)
                attempt += 1
                continue
            self._troubles.clear("dead letters")
            metrics.DEAD_LETTERS.labels(self._task, self._collection, error.reason).inc(
                len(letters)
            )
            self._refused(len(letters))
            return True
        return False

    @property
    def rate_limited(self) -> bool:
        """Something waits for the task's limits, or did a moment ago."""
        return self._pacing > 0 or time.monotonic() - self._paced_at < RATE_LIMITED_SECONDS

    async def _admitted(self, write: Write) -> bool:
        """Once the task's limits allow it; False when told to stop before. Before it has taken
        anything that others need: a slot, or a part of the lease.
        """
        if self._pacer.free(write.rows, write.size):
            return True
        with self._held_back():
            try:
                await self._pacer.wait(self._task, write.rows, write.size, self._halt)
            except Halted:
                return False
        return True

    @contextlib.asynccontextmanager
    async def _place(self, places: Places) -> AsyncIterator[None]:
        """One of those that the task's limits allow; raises Halted."""
        if not places.free():
            with self._held_back():
                await places.wait(self._task, self._halt)
        try:
            yield
        finally:
            places.give_back()

    @contextlib.contextmanager
    def _held_back(self) -> Iterator[None]:
        self._pacing += 1
        try:
            yield
        finally:
            self._pacing -= 1
            self._paced_at = time.monotonic()

    @property
    def target(self) -> CollectionTarget:
        return self._target

    def retarget(self, target: CollectionTarget) -> None:
        """The collection has another name; nothing may be in flight."""
        self._target = target
        self._collection = f"{target.database}.{target.collection}"

    async def attempt(self, what: str, call: Callable[[], Awaitable[None]]) -> bool:
        """One try of an idempotent call that may have to wait for others; False when it failed, and
        is to be tried again, or when told to stop before.
        """
        try:
            async with self._gate.ddl(self._halt):
                await call()
        except Halted:
            return False
        except RetryableError as error:
            self._troubles.add(what, error)
            return False
        self._troubles.clear(what)
        return True

    async def open(self, call: Callable[[], Awaitable[None]]) -> bool:
        """As `ddl`, in turn with the others that begin at this sink."""

        @contextlib.asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            async with self._place(self._pacer.openings), self._gate.opening(self._spec):
                yield

        return await self.ddl("open", call, turn)

    async def ddl(
        self,
        what: str,
        call: Callable[[], Awaitable[None]],
        turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    ) -> bool:
        """Repeats an idempotent call until it succeeds; False when told to stop before."""
        attempt = restored = 0
        while True:
            try:
                async with turn(), self._gate.ddl(self._halt):
                    await call()
            except Halted:
                return False
            except RetryableError as error:
                self._away |= error.reason in _AWAY
                self._troubles.add(what, error)
                await self.backoff(attempt)
                attempt += 1
            except UserError as error:
                restored += 1
                if restored > RESTORES_MAX or not await self._restored(error):
                    raise
            else:
                self._troubles.clear(what)
                self._answered()
                return True

    async def _restored(self, error: CdcError) -> bool:
        return error.reason in _RESTORABLE and await self._restore()

    def _answered(self) -> None:
        if self._away:
            self._away = False
            self._reconnected()

    async def backoff(self, attempt: int) -> None:
        """Grows, with jitter; cut short by the order to halt."""
        delay = RETRY_BACKOFF_SECONDS[min(attempt, len(RETRY_BACKOFF_SECONDS) - 1)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._halt.wait(), delay * (0.5 + random.random()))
