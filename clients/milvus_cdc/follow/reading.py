"""Reads one pchannel for all followed shards in it.

Laws: each shard remembers the last entry it was given and takes only what lies beyond, so the one
reader may go back (for a shard that begins earlier, or to read again what a lane has forgotten)
without anything being left out or given twice. Trouble that may pass is told, and tried again with
a growing delay; any other error ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import structlog

from milvus_cdc.changes import op_of
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
from milvus_cdc.order.lane import Lane
from milvus_cdc.source import LogEntry, LogReader, LogSource, check_incarnation

log = structlog.get_logger()

READ_WAIT_SECONDS = 0.5
OPEN_SECONDS = 30.0
_FIRST_DELAY_SECONDS = 0.2
_MAX_DELAY_SECONDS = 5.0

Entry = tuple[Message, bytes, int]
"""A message, its position and order."""


@dataclass(slots=True, eq=False)
class Shard:
    """A vchannel that is read."""

    lane: Lane
    collection_id: int
    key_field_id: int
    position: bytes
    """Where a reader has to start for it, inclusive."""
    last_order: int
    """Entries up to here were given to it."""
    incarnation: bytes


class PchannelReading:
    """`may_read` says whether there is room; `on_read` is told when lanes may have something new,
    `on_trouble` when reading is interrupted, and with None that it works.
    """

    def __init__(
        self,
        source: LogSource,
        pchannel: str,
        *,
        read_bytes: int,
        may_read: Callable[[PchannelReading], bool],
        on_read: Callable[[PchannelReading], None],
        on_trouble: Callable[[str, RetryableError | None], None],
        on_failure: Callable[[CdcError], None],
    ) -> None:
        self.pchannel = pchannel
        self.shards: list[Shard] = []
        self.buffered_bytes = 0
        """Of what waits for its tick."""
        self._source = source
        self._read_bytes = read_bytes
        self._may_read = may_read
        self._on_read = on_read
        self._on_trouble = on_trouble
        self._on_failure = on_failure
        self._room = asyncio.Event()
        self._next_order = 0
        self._back = False
        """Somebody needs what lies before the reader."""
        self._task: asyncio.Task[None] | None = None

    def add(self, shard: Shard) -> None:
        self.shards.append(shard)
        self._back = self._back or shard.last_order + 1 < self._next_order
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=f"follow {self.pchannel}")
        self._room.set()

    def remove(self, collection_id: int) -> None:
        self.shards = [shard for shard in self.shards if shard.collection_id != collection_id]

    def wake(self) -> None:
        """There may be room."""
        self._room.set()

    @property
    def released_ts(self) -> int | None:
        """How far the one furthest behind has come; None when all have ended."""
        return min((s.lane.released_ts for s in self.shards if not s.lane.ended), default=None)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def account(self) -> None:
        self.buffered_bytes = sum([shard.lane.buffered_bytes for shard in self.shards])

    async def _run(self) -> None:
        failures = 0
        while self._reading():
            try:
                async for _ in self._read_on():
                    failures = 0
            except RetryableError as error:
                failures += 1
                log.warning(
                    "reading interrupted",
                    pchannel=self.pchannel,
                    reason=error.reason,
                    error=error.message,
                )
                self._on_trouble(self.pchannel, error)
                ceiling = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(failures, 10))
                await asyncio.sleep(ceiling * random.uniform(0.5, 1.0))
            except CdcError as error:
                self._on_failure(error)
                return
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # A client's own cancellation must not end the reading unseen.
                self._on_trouble(
                    self.pchannel,
                    RetryableError("QUEUE_UNREACHABLE", f"reading {self.pchannel} broke off"),
                )
                await asyncio.sleep(_FIRST_DELAY_SECONDS)
            except Exception as error:
                log.exception("reading failed unexpectedly", pchannel=self.pchannel)
                self._on_failure(BugError("READER_BUG", f"reading {self.pchannel}: {error!r}"))
                return

    def _reading(self) -> list[Shard]:
        return [shard for shard in self.shards if not shard.lane.ended]

    async def _read_on(self) -> AsyncIterator[None]:
        """One reader, from where somebody needs it, until one must begin earlier."""
        first = min(self._reading(), key=lambda shard: shard.last_order)
        self._back = False
        self._next_order = self._source.order(first.position)
        known = next((s.incarnation for s in self._reading() if s.incarnation), b"")
        reader = await self._open(first.position, known)
        try:
            while self._reading() and not self._back:
                for shard in self._reading():
                    check_incarnation(self.pchannel, shard.incarnation, reader.incarnation)
                    shard.incarnation = reader.incarnation
                if not self._may_read(self):
                    self._room.clear()
                    await self._room.wait()
                    continue
                entries = await reader.read(self._read_bytes, READ_WAIT_SECONDS)
                self._on_trouble(self.pchannel, None)
                if entries and not self._back:
                    self._deliver(entries)
                    self._on_read(self)
                    await asyncio.sleep(0)  # a log that is at hand must not keep the program out
                yield
        finally:
            with contextlib.suppress(CdcError, TimeoutError):
                async with asyncio.timeout(OPEN_SECONDS):
                    await reader.close()

    async def _open(self, position: bytes, incarnation: bytes) -> LogReader:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self._source.open(self.pchannel, position, incarnation)
        except TimeoutError as error:
            raise RetryableError(
                "QUEUE_UNREACHABLE", f"{self.pchannel} could not be opened in {OPEN_SECONDS:.0f} s"
            ) from error

    def _deliver(self, entries: list[LogEntry]) -> None:
        ticks: list[Entry] = []
        of_vchannel: dict[str, list[Entry]] = defaultdict(list)
        of_collection: dict[int, list[Entry]] = defaultdict(list)
        wanted = {shard.lane.vchannel for shard in self._reading()}
        for entry in entries:
            order = self._source.order(entry.position)
            message = self._decode(entry, order)
            match message:
                case Tick():
                    ticks.append((message, entry.position, order))
                case Delete(vchannel="") | DropCollection() | DropPartition():
                    of_collection[message.collection_id].append((message, entry.position, order))
                case Insert() | Delete() if message.vchannel in wanted:
                    of_vchannel[message.vchannel].append((message, entry.position, order))
                case _:
                    pass
        last = entries[-1].position
        self._next_order = self._source.order(last) + 1
        for shard in self._reading():
            rows = of_vchannel.get(shard.lane.vchannel, [])
            about = of_collection.get(shard.collection_id, [])
            if rows or about:
                self._feed(shard, sorted([*rows, *about, *ticks], key=lambda each: each[2]))
            else:
                self._feed(shard, ticks[-1:])  # the others would release nothing more
            self._move(shard, last)
        self.account()

    def _decode(self, entry: LogEntry, order: int) -> Message:
        try:
            return decode(entry)
        except CdcError as error:
            where = f"(topic {self.pchannel}, position {order})"
            raise type(error)(error.reason, f"{error.message} {where}") from error

    def _feed(self, shard: Shard, entries: Iterable[Entry]) -> None:
        lane = shard.lane
        for message, position, order in entries:
            if order <= shard.last_order:
                continue
            if isinstance(message, Tick):
                lane.tick(message.ts, position)
                continue
            if isinstance(message, Delete) and not message.vchannel:
                self._check_only_shard(shard)
            op = op_of(message, position, order, lane.vchannel, shard.key_field_id)
            if op is not None:
                lane.add(op)
            if lane.wants_reread:
                return

    def _move(self, shard: Shard, last: bytes) -> None:
        if (again := shard.lane.take_reread()) is not None:
            shard.position = again
            shard.last_order = self._source.order(again) - 1
        elif self._source.order(last) > shard.last_order:
            shard.position = last
            shard.last_order = self._source.order(last)
        self._back = self._back or shard.last_order + 1 < self._next_order

    def _check_only_shard(self, shard: Shard) -> None:
        if sum(each.collection_id == shard.collection_id for each in self.shards) > 1:
            raise UserError(
                "DELETE_WITHOUT_SHARD",
                f"topic {self.pchannel} holds several shards of collection {shard.collection_id}, "
                "and a delete of its source (Milvus 2.2) does not say of which; upgrade the source",
            )
