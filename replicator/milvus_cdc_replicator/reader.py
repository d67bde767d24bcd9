"""One read of a pchannel for all who want it: cursors over the log, subscribers with a place of
their own.

Laws: a message is read and decoded once for all subscribers that are near each other. A subscriber
without room holds back a shared cursor only shortly; then it loses its place and is served again
from where it stopped by a cursor of its own, which melts into another when it catches up. Nothing
is ever left out: a subscriber remembers the last entry it was given, and takes only what lies
beyond; and it takes nothing from another incarnation of its topic.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
from milvus_cdc.codec.messages import (
    Delete,
    DropCollection,
    DropPartition,
    Insert,
    Message,
    Tick,
)
from milvus_cdc.codec.msgstream import decode
from milvus_cdc.errors import BugError, CdcError, RetryableError, UserError
from milvus_cdc.model import tso_to_ms
from milvus_cdc.source import LogEntry, LogReader, LogSource

from milvus_cdc_replicator.core.source_clock import SourceClock
from milvus_cdc_replicator.gate import boottime
from milvus_cdc_replicator.locating import newest_tick_ts
from milvus_cdc_replicator.metrics import BYTES_READ, READ_ERRORS

log = structlog.get_logger()

READ_BYTES = 2 * 1024 * 1024
"""Read ahead per cursor: memory that no budget counts."""
READ_WAIT_SECONDS = 0.5
SLOW_SECONDS = 1.0
"""How long a subscriber without room may hold back those that have some."""
NEAR_ENTRIES = 4_096
"""A cursor this close before a subscriber's place serves it instead of a new one."""
OPEN_SECONDS = 30.0
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class Item:
    """One decoded message and its place."""

    message: Message
    position: bytes
    order: int


@dataclass(slots=True, eq=False)
class Subscription:
    """One vchannel's wish to be read."""

    pchannel: str
    vchannel: str
    collection_id: int
    position: bytes
    """Where a reader has to start, inclusive."""
    last_order: int
    """Entries up to here were delivered."""
    deliver: Callable[[str, list[Item]], None]
    has_room: Callable[[], bool]
    on_error: Callable[[CdcError | None], None]
    """A RetryableError while reading is interrupted, None when it works again, any other error
    for good.
    """
    incarnation: bytes = b""
    """Of the topic that `position` belongs to; empty until a reader has told it."""
    interrupted: bool = False


@dataclass(slots=True, eq=False)
class _Cursor:
    start: bytes
    next_order: int
    incarnation: bytes
    opened: bool = False
    subscribers: list[Subscription] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def suits(self, incarnation: bytes) -> bool:
        """Whether it reads the topic that a subscriber, or another cursor, means."""
        return incarnation == self.incarnation or (self.opened and not incarnation)


class PchannelHub:
    """All reading of one pchannel."""

    def __init__(self, source: LogSource, pchannel: str, clock: SourceClock | None = None) -> None:
        """`clock` is shared by all pchannels of the source."""
        self._source = source
        self._pchannel = pchannel
        self._clock = clock or SourceClock()
        self._bytes_read = BYTES_READ.labels(pchannel)
        self._cursors: list[_Cursor] = []
        self._waiting: list[Subscription] = []
        self._room = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.end_order = -1
        """Order of the newest entry any cursor has read."""

    def order(self, position: bytes) -> int:
        """As LogSource.order."""
        return self._source.order(position)

    def subscribe(self, subscription: Subscription) -> None:
        self._waiting.append(subscription)
        self._place_waiting()

    def unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._waiting:
            self._waiting.remove(subscription)
        for cursor in list(self._cursors):
            if subscription in cursor.subscribers:
                cursor.subscribers.remove(subscription)
                if not cursor.subscribers:
                    self._retire(cursor)

    def wake(self) -> None:
        """Room has appeared somewhere."""
        self._room.set()
        if self._waiting:
            self._place_waiting()

    async def close(self) -> None:
        tasks = [cursor.task for cursor in self._cursors if cursor.task is not None]
        self._cursors.clear()
        self._waiting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _place_waiting(self) -> None:
        for subscription in list(self._waiting):
            if not subscription.has_room():
                continue
            self._waiting.remove(subscription)
            wanted = subscription.last_order + 1
            best = max(
                (
                    c
                    for c in self._cursors
                    if 0 <= wanted - c.next_order <= NEAR_ENTRIES
                    and c.suits(subscription.incarnation)
                ),
                key=lambda c: c.next_order,
                default=None,
            )
            if best is None:
                order = self._source.order(subscription.position)
                best = _Cursor(subscription.position, order, subscription.incarnation)
                self._cursors.append(best)
                best.subscribers.append(subscription)
                best.task = asyncio.create_task(self._run(best), name=f"read {self._pchannel}")
                best.task.add_done_callback(partial(self._ended, best))
            else:
                best.subscribers.append(subscription)
                subscription.incarnation = best.incarnation

    def _retire(self, cursor: _Cursor) -> None:
        if cursor in self._cursors:
            self._cursors.remove(cursor)
        if cursor.task is not None and cursor.task is not asyncio.current_task():
            cursor.task.cancel()

    async def _run(self, cursor: _Cursor) -> None:
        attempt = 0
        position = cursor.start
        await self._look_at_the_end()
        while cursor in self._cursors:
            reader: LogReader | None = None
            try:
                reader = await self._open(position, cursor.incarnation)
                cursor.incarnation, cursor.opened = reader.incarnation, True
                for subscription in cursor.subscribers:
                    subscription.incarnation = reader.incarnation
                while cursor in self._cursors:
                    await self._until_room(cursor)
                    if cursor not in self._cursors:
                        return
                    entries = await reader.read(READ_BYTES, READ_WAIT_SECONDS)
                    attempt = 0
                    if cursor not in self._cursors:
                        return  # another has taken over what it had; a client may keep a cancel
                    if entries:
                        self._deliver(cursor, entries)
                        position = entries[-1].position
                    self._recovered(cursor)
            except RetryableError as error:
                READ_ERRORS.labels(error.error_class).inc()
                self._interrupted(cursor, error)
                delay = BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)]
                attempt += 1
                await asyncio.sleep(delay)
            except (UserError, BugError) as error:
                READ_ERRORS.labels(error.error_class).inc()
                self._failed(cursor, error)
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.exception("reading failed unexpectedly", pchannel=self._pchannel)
                self._failed(cursor, BugError("READER_BUG", f"reading {self._pchannel}: {error!r}"))
                return
            finally:
                if reader is not None:
                    with contextlib.suppress(CdcError, TimeoutError):
                        async with asyncio.timeout(OPEN_SECONDS):
                            await reader.close()

    async def _look_at_the_end(self) -> None:
        """What time it is at the source: a reading that begins long ago learns it late. Who cannot
        look there will not be able to read either, and says why.
        """
        if not self._clock.known:
            with contextlib.suppress(CdcError, TimeoutError):
                async with asyncio.timeout(OPEN_SECONDS):
                    if newest := await newest_tick_ts(self._source, self._pchannel):
                        self._clock.tick_read(tso_to_ms(newest), boottime())

    async def _open(self, position: bytes, incarnation: bytes) -> LogReader:
        """Law: nothing waits for a queue without end and without a word."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self._source.open(self._pchannel, position, incarnation)
        except TimeoutError as error:
            raise RetryableError(
                "QUEUE_UNREACHABLE", f"{self._pchannel} could not be opened in {OPEN_SECONDS:.0f} s"
            ) from error

    async def _until_room(self, cursor: _Cursor) -> None:
        """Waits until somebody can take something; those who cannot for long lose their place."""
        deadline: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            full = [s for s in cursor.subscribers if not s.has_room()]
            if not full:
                return
            if len(full) == len(cursor.subscribers):
                deadline = None
                timeout = None
            else:
                deadline = loop.time() + SLOW_SECONDS if deadline is None else deadline
                timeout = deadline - loop.time()
                if timeout <= 0:
                    for subscription in full:
                        cursor.subscribers.remove(subscription)
                        self._waiting.append(subscription)
                    return
            self._room.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), timeout)

    def _deliver(self, cursor: _Cursor, entries: list[LogEntry]) -> None:
        order_of = self._source.order
        # After an interruption the reader begins again at the last entry delivered.
        first = min(cursor.next_order, order_of(entries[0].position))
        last = order_of(entries[-1].position)
        for other in list(self._cursors):
            near = other is not cursor and first <= other.next_order <= last + 1
            if near and cursor.suits(other.incarnation):
                for subscription in other.subscribers:
                    subscription.incarnation = cursor.incarnation
                cursor.subscribers.extend(other.subscribers)
                other.subscribers.clear()
                self._retire(other)
        by_vchannel: dict[str, list[Item]] = defaultdict(list)
        by_collection: dict[int, list[Item]] = defaultdict(list)
        ticks: list[Item] = []
        wanted = {s.vchannel for s in cursor.subscribers}
        size = 0
        for entry in entries:
            size += len(entry.payload)
            order = order_of(entry.position)
            try:
                message = decode(entry)
            except CdcError as error:
                raise type(error)(
                    error.reason,
                    f"{error.message} (topic {self._pchannel}, position {order})",
                ) from error
            match message:
                case Tick():
                    ticks.append(Item(message, entry.position, order))
                case Delete(vchannel=""):
                    by_collection[message.collection_id].append(
                        Item(message, entry.position, order)
                    )
                case Insert() | Delete():
                    if message.vchannel in wanted:
                        by_vchannel[message.vchannel].append(Item(message, entry.position, order))
                case DropCollection() | DropPartition():
                    by_collection[message.collection_id].append(
                        Item(message, entry.position, order)
                    )
                case _:
                    pass
        self._bytes_read.inc(size)
        if ticks and isinstance(newest := ticks[-1].message, Tick):
            self._clock.tick_read(tso_to_ms(newest.ts), boottime())
        cursor.next_order = last + 1
        self.end_order = max(self.end_order, last)
        for subscription in cursor.subscribers:
            items = by_vchannel.get(subscription.vchannel, [])
            drops = by_collection.get(subscription.collection_id)
            if drops or items:
                items = sorted([*items, *ticks, *(drops or ())], key=lambda item: item.order)
            else:
                items = ticks
            if subscription.last_order >= first:
                items = [item for item in items if item.order > subscription.last_order]
            if last > subscription.last_order:
                subscription.last_order = last
                subscription.position = entries[-1].position
            if items:
                subscription.deliver(subscription.vchannel, items)

    def _interrupted(self, cursor: _Cursor, error: RetryableError) -> None:
        log.warning(
            "reading interrupted", pchannel=self._pchannel, reason=error.reason, error=error.message
        )
        for subscription in cursor.subscribers:
            subscription.interrupted = True
            subscription.on_error(error)

    def _recovered(self, cursor: _Cursor) -> None:
        """For all that are here now, of whatever cursor they were when it was interrupted."""
        interrupted = [s for s in cursor.subscribers if s.interrupted]
        if interrupted:
            log.info("reading goes on", pchannel=self._pchannel)
        for subscription in interrupted:
            subscription.interrupted = False
            subscription.on_error(None)

    def _ended(self, cursor: _Cursor, _task: object) -> None:
        """Law: no cursor ends without a word. A client's own cancellation looks like ours; only
        what was retired was meant to end.
        """
        if cursor not in self._cursors:
            return
        reason = f"reading {self._pchannel} ended by itself and begins anew"
        self._interrupted(cursor, RetryableError("QUEUE_UNREACHABLE", reason))
        self._waiting.extend(cursor.subscribers)
        cursor.subscribers.clear()
        self._retire(cursor)

    def _failed(self, cursor: _Cursor, error: CdcError) -> None:
        """Law: whoever was to be reached only further on does not fail with the others; it begins
        where it stands, and learns there whether that can be read.
        """
        subscribers = list(cursor.subscribers)
        cursor.subscribers.clear()
        self._retire(cursor)
        for subscription in subscribers:
            if subscription.last_order >= cursor.next_order:
                self._waiting.append(subscription)
            else:
                subscription.on_error(error)
        self._place_waiting()
