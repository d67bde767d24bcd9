"""A message queue in a few lines: topics, readers that hear of things late, a log that forgets.

Law: what a reader is told is what `LogSource` promises and nothing more; it meets every entry once
and in order, or is told that it is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from milvus_cdc.errors import LogResetError, LogTruncatedError, RetryableError
from milvus_cdc.model import ms_to_tso
from milvus_cdc.source import LogEntry, LogLimits, LogRange, check_incarnation
from milvus_cdc.source.positions import Numbered, decode, encode

from tests.sim.clockwork import Clockwork, Loop
from tests.sim.network import Network, Server, remote

if TYPE_CHECKING:
    from tests.sim.source import Message

CALL_SECONDS = 10.0


@dataclass(slots=True)
class Topic:
    incarnation: bytes
    first: int = 0
    entries: list[LogEntry] = field(default_factory=list)
    stamps: list[tuple[str, int]] = field(default_factory=list)
    """Of each entry: vchannel ("" for ticks and drops) and timestamp; of one behind a tick that
    covers it, what comes next after that tick.
    """
    pending: list[tuple[int, list[Message]]] = field(default_factory=list)
    """Written by a user, on their way into the queue; what belongs together stays together."""
    readers: list[Reader] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.entries)


class Queue(Server):
    """The source's message queue."""

    def __init__(self, clockwork: Clockwork) -> None:
        super().__init__("queue")
        self.clockwork = clockwork
        self.topics: dict[str, Topic] = {}

    def append(self, pchannel: str, payload: bytes, vchannel: str, ts: int) -> None:
        topic = self.topics[pchannel]
        topic.entries.append(LogEntry(encode(topic.end), payload))
        topic.stamps.append((vchannel, ts))

    def tell(self, pchannel: str) -> None:
        """Readers hear of what was appended."""
        topic = self.topics[pchannel]
        for reader in topic.readers:
            reader.hear(topic.end)

    def forget(self, host: str) -> None:
        """Its process is no more."""
        for topic in self.topics.values():
            topic.readers = [reader for reader in topic.readers if reader.host != host]

    def before(self, pchannel: str, place: int, seconds: float) -> int:
        """The place so many seconds of the log earlier."""
        topic = self.topics[pchannel]
        at = min(place, topic.end - 1)
        if at < topic.first:
            return place
        since = topic.stamps[at - topic.first][1] - ms_to_tso(int(seconds * 1000))
        while at > topic.first and topic.stamps[at - topic.first][1] > since:
            at -= 1
        return min(at, place)

    def truncate(self, pchannel: str, first: int) -> None:
        topic = self.topics[pchannel]
        count = min(max(first - topic.first, 0), len(topic.entries))
        del topic.entries[:count], topic.stamps[:count]
        topic.first += count


class QueueClient(Numbered):
    """As a LogSource, for one process."""

    def __init__(self, network: Network, host: str, queue: Queue) -> None:
        self.network = network
        self.host = host
        self.queue = queue

    async def call(self, act: Callable[[], object]) -> object:
        try:
            return await remote(self.network, self.host, self.queue, act, CALL_SECONDS)
        except (ConnectionError, TimeoutError):
            raise RetryableError("QUEUE_UNREACHABLE", "the queue does not answer") from None

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> Reader:
        topic = await self._topic(pchannel)
        reader = Reader(self, pchannel, incarnation or topic.incarnation, decode(position))
        reader.check()
        topic.readers.append(reader)
        return reader

    async def log_range(self, pchannel: str) -> LogRange:
        topic = await self._topic(pchannel)
        return LogRange(encode(topic.first), encode(topic.end), topic.incarnation)

    async def limits(self, pchannel: str) -> LogLimits:
        return LogLimits(await self.log_range(pchannel), whole=False)

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        return (await self.log_range(pchannel)).first

    async def probe(self) -> None:
        await self.call(lambda: None)

    async def close(self) -> None:
        pass

    async def _topic(self, pchannel: str) -> Topic:
        topic = await self.call(lambda: self.queue.topics.get(pchannel))
        if not isinstance(topic, Topic):
            raise LogResetError(f"topic {pchannel} does not exist")
        return topic


class Reader:
    """As a LogReader: what was appended is seen a little later."""

    def __init__(self, client: QueueClient, pchannel: str, incarnation: bytes, at: int) -> None:
        self._client = client
        self._pchannel = pchannel
        self.incarnation = incarnation
        self._next = at
        self._topic = client.queue.topics[pchannel]
        self._visible = self._topic.end
        self._waiting: asyncio.Future[None] | None = None

    @property
    def host(self) -> str:
        return self._client.host

    def hear(self, end: int) -> None:
        network = self._client.network
        delay = network.delay(self._client.queue.name, self._client.host)
        network.clockwork.after(delay, self._come, end)

    def _come(self, end: int) -> None:
        self._visible = max(self._visible, end)
        if self._waiting is not None and not self._waiting.done() and self._reached:
            self._waiting.set_result(None)

    @property
    def _reached(self) -> bool:
        client = self._client
        return client.network.open(client.queue.name, client.host) and not client.queue.down

    def check(self) -> None:
        topic = self._topic
        check_incarnation(self._pchannel, self.incarnation, topic.incarnation)
        if self._next > topic.end:
            raise LogResetError(f"{self._pchannel}: {self._next} is beyond {topic.end}")
        if self._next < topic.first:
            raise LogTruncatedError(f"{self._pchannel}: {self._next}, the first is {topic.first}")

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        if self._next >= self._visible and self._reached and not loop.dead:
            self._waiting = loop.create_future()
            timer = loop.call_later(wait_seconds, _wake, self._waiting)
            try:
                await self._waiting
            finally:
                timer.cancel()
        if not self._reached:
            raise RetryableError("QUEUE_UNREACHABLE", "the queue does not answer")
        self.check()
        topic = self._topic
        taken: list[LogEntry] = []
        size = 0
        for entry in topic.entries[self._next - topic.first : self._visible - topic.first]:
            size += len(entry.payload)
            if taken and size > max_bytes:
                break
            taken.append(entry)
        self._next += len(taken)
        return taken

    async def close(self) -> None:
        if self in self._topic.readers:
            self._topic.readers.remove(self)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
