"""A log source in memory, for tests: what a real queue does to a reader, on demand.

Law: it keeps the seam's contract, proved by the same suite as the real queues.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from milvus_cdc.errors import LogResetError, LogTruncatedError, RetryableError
from milvus_cdc.source import LogEntry, LogLimits, LogRange, check_incarnation
from milvus_cdc.source.positions import Numbered, decode, encode


@dataclass(slots=True)
class _Topic:
    incarnation: bytes
    first: int = 0
    entries: list[LogEntry] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    """When each was appended, Unix milliseconds."""
    max_age_ms: int = 0
    max_bytes: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def end(self) -> int:
        return self.first + len(self.entries)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class MemorySource(Numbered):
    """Topics that a test appends to, truncates, deletes and makes again."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}
        self._incarnations = 0
        self._down = False

    def append(
        self,
        pchannel: str,
        payload: bytes,
        *,
        streaming: bool = False,
        at_ms: int = 0,
        traceparent: str = "",
    ) -> bytes:
        """Appends one entry (at `at_ms`, else now), making the topic when it is missing; its
        position.
        """
        topic = self._topics.get(pchannel) or self.create(pchannel)
        position = encode(topic.end)
        topic.entries.append(LogEntry(position, payload, streaming, traceparent))
        topic.times_ms.append(at_ms or int(time.time() * 1000))
        topic.notify()
        return position

    def create(self, pchannel: str, *, max_age_ms: int = 0, max_bytes: int = 0) -> _Topic:
        """The limits are told, not kept: only `truncate` forgets anything."""
        self._incarnations += 1
        topic = self._topics[pchannel] = _Topic(
            encode(self._incarnations), max_age_ms=max_age_ms, max_bytes=max_bytes
        )
        return topic

    def truncate(self, pchannel: str, first: bytes) -> None:
        """Forgets everything before `first`."""
        topic = self._topics[pchannel]
        count = min(max(decode(first) - topic.first, 0), len(topic.entries))
        del topic.entries[:count]
        del topic.times_ms[:count]
        topic.first += count

    def delete(self, pchannel: str) -> None:
        self._topics.pop(pchannel).notify()

    def set_down(self, down: bool) -> None:
        """While down, everything raises RetryableError; the log stays."""
        self._down = down
        for topic in self._topics.values():
            topic.notify()

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> MemoryReader:
        topic = self._topic(pchannel)
        reader = MemoryReader(self, pchannel, incarnation or topic.incarnation, decode(position))
        reader.check(topic)
        return reader

    async def log_range(self, pchannel: str) -> LogRange:
        topic = self._topic(pchannel)
        return LogRange(encode(topic.first), encode(topic.end), topic.incarnation)

    async def limits(self, pchannel: str) -> LogLimits:
        topic = self._topic(pchannel)
        size = sum(len(entry.payload) for entry in topic.entries)
        return LogLimits(
            await self.log_range(pchannel),
            whole=topic.first == 0,
            max_age_ms=topic.max_age_ms,
            max_bytes=topic.max_bytes,
            entry_bytes=-(-size // len(topic.entries)) if topic.entries else 0,
        )

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        topic = self._topic(pchannel)
        later = (n for n, at_ms in enumerate(topic.times_ms) if at_ms >= unix_ms)
        return encode(topic.first + next(later, len(topic.entries)))

    async def probe(self) -> None:
        self._check_up()

    async def close(self) -> None:
        pass

    def _check_up(self) -> None:
        if self._down:
            raise RetryableError("QUEUE_UNREACHABLE", "the queue in memory is down")

    def _topic(self, pchannel: str) -> _Topic:
        self._check_up()
        topic = self._topics.get(pchannel)
        if topic is None:
            raise LogResetError(f"topic {pchannel} does not exist")
        return topic


class MemoryReader:
    def __init__(self, source: MemorySource, pchannel: str, incarnation: bytes, start: int) -> None:
        self._source = source
        self._pchannel = pchannel
        self.incarnation = incarnation
        self._next = start

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        deadline = asyncio.get_running_loop().time() + wait_seconds
        while True:
            topic = self._source._topic(self._pchannel)
            self.check(topic)
            if entries := self._take(topic, max_bytes):
                return entries
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0:
                return []
            try:
                await asyncio.wait_for(topic.changed.wait(), remaining)
            except TimeoutError:
                return []

    async def close(self) -> None:
        pass

    def check(self, topic: _Topic) -> None:
        check_incarnation(self._pchannel, self.incarnation, topic.incarnation)
        if self._next > topic.end:
            raise LogResetError(f"{self._pchannel}: {self._next} is beyond the end {topic.end}")
        if self._next < topic.first:
            raise LogTruncatedError(
                f"{self._pchannel} no longer holds {self._next}; its first is {topic.first}"
            )

    def _take(self, topic: _Topic, max_bytes: int) -> list[LogEntry]:
        taken: list[LogEntry] = []
        size = 0
        for entry in topic.entries[self._next - topic.first :]:
            size += len(entry.payload)
            if taken and size > max_bytes:
                break
            taken.append(entry)
        self._next += len(taken)
        return taken
