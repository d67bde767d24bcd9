"""Reads one stream of the NATS JetStream that Milvus embeds.

Laws: messages are pulled, never pushed (a push subscription drops what its client cannot hold, and
only logs it); at most about the `max_bytes` of a read is held ahead; sequences follow one another,
a hole is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from milvus_cdc.errors import BugError, CdcError, LogTruncatedError, RetryableError
from milvus_cdc.source import STREAMING_HEADER, TRACE_HEADER, LogEntry
from milvus_cdc.source.nats_connection import (
    API_SECONDS,
    Connection,
    stream_info,
)
from milvus_cdc.source.nats_stream import check_stream
from milvus_cdc.source.positions import decode, encode

if TYPE_CHECKING:
    from milvus_cdc.source.nats import NatsSource

log = structlog.get_logger()

PULL_SECONDS = 10.0
"""How long the server holds a pull open."""
PULL_MESSAGES = 4096
LEAST_PULL_BYTES = 64 * 1024
CONSUMER_IDLE_SECONDS = 60.0
"""The server forgets a consumer nobody pulled from for this long; a reader then makes a new one."""
SILENT_SECONDS = 45.0
"""The server ends every pull within `PULL_SECONDS`: a reader that hears nothing for this long is
stuck, wherever in the client that may be.
"""


class NatsReader:
    """One pull consumer. After a RetryableError the next read connects again where it stopped."""

    def __init__(self, source: NatsSource, pchannel: str, start: int, incarnation: bytes) -> None:
        self._source = source
        self._pchannel = pchannel
        self.next = start
        """Sequence of the next entry to be returned."""
        self.incarnation = incarnation
        self._entries: deque[LogEntry] = deque()
        self._held = 0
        self._window = 0
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._error: CdcError | None = None
        self._pump: asyncio.Task[None] | None = None
        self._heard_at = 0.0

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        self._window = max_bytes
        self._wanted.set()
        if self._pump is None:
            self.heard()
            self._pump = asyncio.create_task(self._run(), name=f"pull {self._pchannel}")
        if not self._entries and self._error is None:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await self._arrived.wait()
        # Nothing below waits: entries are taken only by a call that returns them.
        if not self._entries:
            self._raise_error()
            self._raise_silence()
        return self._take(max_bytes)

    async def close(self) -> None:
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
        self._entries.clear()

    def heard(self) -> None:
        """The server has said something."""
        self._heard_at = asyncio.get_running_loop().time()

    def _raise_silence(self) -> None:
        silent = asyncio.get_running_loop().time() - self._heard_at
        if silent > SILENT_SECONDS and self._pump is not None:
            self._pump.cancel()
            self._pump = None
            raise RetryableError(
                "QUEUE_UNREACHABLE", f"no answer about {self._pchannel} for {silent:.0f} s"
            )

    def _take(self, max_bytes: int) -> list[LogEntry]:
        taken: list[LogEntry] = []
        size = 0
        while self._entries:
            length = len(self._entries[0].payload)
            if taken and size + length > max_bytes:
                break
            size += length
            taken.append(self._entries.popleft())
        if taken:
            self._held -= size
            self.next = decode(taken[-1].position) + 1
            self._wanted.set()
            self.heard()  # nobody pulled while these waited
        return taken

    def _raise_error(self) -> None:
        error = self._error
        if error is None:
            return
        if isinstance(error, RetryableError):
            # Said once; the next read tries again.
            self._error = None
            self._pump = None
        raise error

    async def _run(self) -> None:
        try:
            connection = await self._source.connect()
            try:
                await self._follow(connection)
            finally:
                await connection.close()
        except CdcError as error:
            self._error = error
        except Exception as error:
            log.exception("reading failed unexpectedly", stream=self._pchannel)
            self._error = BugError("READER_BUG", f"reading {self._pchannel}: {error!r}")
        finally:
            if self._error is None and self._pump is asyncio.current_task():
                # `close` takes the pump before it cancels it: the client did this by itself.
                self._error = RetryableError(
                    "QUEUE_UNREACHABLE", f"the client gave up reading {self._pchannel}"
                )
            self._arrived.set()

    async def _follow(self, connection: Connection) -> None:
        """Pulls from one consumer after another until the connection breaks."""
        barren = 0
        while True:
            # `next` counts what was returned, the queue holds what follows it.
            start = max(self.next + len(self._entries), 1)
            info = await stream_info(connection, self._pchannel)
            check_stream(self._pchannel, info, start, self.incarnation)
            consumer = _Consumer(self, connection, self._pchannel, start)
            try:
                await consumer.pull_until_lost()
            finally:
                await consumer.drop()
            barren = 0 if consumer.expected > start else barren + 1
            if consumer.hole and consumer.expected == start:
                raise LogTruncatedError(
                    f"stream {self._pchannel} no longer holds sequence {start}; "
                    f"the first one after it is {consumer.hole}"
                )
            if barren > 3:
                raise RetryableError(
                    "QUEUE_UNREACHABLE",
                    f"the consumer on stream {self._pchannel} is lost again and again: "
                    f"{consumer.lost}",
                )

    def accept(self, entry: LogEntry) -> None:
        self._entries.append(entry)
        self._held += len(entry.payload)
        self.heard()
        self._arrived.set()

    async def room(self) -> int:
        """Bytes that the next pull may bring, once half of the window is free."""
        while not self._window or self._held > self._window // 2:
            self._wanted.clear()
            await self._wanted.wait()
        return max(self._window // 2, LEAST_PULL_BYTES)


class _Consumer:
    """An ephemeral consumer of ours and the pulls on it."""

    def __init__(
        self, reader: NatsReader, connection: Connection, pchannel: str, start: int
    ) -> None:
        self._reader = reader
        self._connection = connection
        self._pchannel = pchannel
        self.expected = start
        self.lost = ""
        """Why it can be used no more."""
        self.hole = 0
        """Sequence that came instead of the expected one."""
        self._name = ""
        self._pending = 0
        self._delivered = False
        self._too_large = False
        self._changed = asyncio.Event()

    async def pull_until_lost(self) -> None:
        client = await self._connection.get()
        self._connection.on_changed = self._changed.set
        with self._connection.errors(self._pchannel):
            info = await client.jetstream(timeout=API_SECONDS).add_consumer(
                self._pchannel,
                ConsumerConfig(
                    deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=self.expected,
                    ack_policy=AckPolicy.NONE,
                    inactive_threshold=CONSUMER_IDLE_SECONDS,
                    mem_storage=True,
                ),
            )
            self._name = info.name
            inbox = client.new_inbox()
            subscription = await client.subscribe(
                inbox, cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0
            )
            try:
                while not self.lost:
                    await self._pull(client, inbox)
            finally:
                with contextlib.suppress(nats.errors.Error):
                    await subscription.unsubscribe()

    async def _pull(self, client: Client, inbox: str) -> None:
        room = await self._reader.room()
        request: dict[str, int] = {"expires": int(PULL_SECONDS * 1e9)}
        if self._too_large:
            # The next message alone exceeds what a pull may bring: it comes on its own.
            request["batch"] = 1
        else:
            request |= {"batch": PULL_MESSAGES, "max_bytes": room}
        self._pending = request["batch"]
        self._delivered = self._too_large = False
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._pchannel}.{self._name}"
        await client.publish(subject, json.dumps(request).encode(), reply=inbox)
        # The server ends every pull; when it does not, the consumer is gone.
        try:
            async with asyncio.timeout(PULL_SECONDS + API_SECONDS):
                while self._pending and not self.lost:
                    self._connection.raise_denied()
                    if not self._connection.up:
                        raise nats.errors.ConnectionClosedError
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self.lost = "the server answers no pull"

    async def _receive(self, message: Msg) -> None:
        headers = message.headers
        if headers is not None and (status := headers.get("Status")) and not message.data:
            self._status(status, headers.get("Description") or "")
            return
        if self.lost:
            return
        sequence = _sequence(message.reply)
        if sequence != self.expected:
            self.hole = sequence
            self.lost = f"sequence {sequence} came instead of {self.expected}"
            self._changed.set()
            return
        self.expected += 1
        self._delivered = True
        self._reader.accept(
            LogEntry(
                encode(sequence),
                message.data,
                headers is not None and STREAMING_HEADER in headers,
                headers.get(TRACE_HEADER, "") if headers is not None else "",
            )
        )
        self._pending -= 1
        if not self._pending:
            self._changed.set()

    def _status(self, status: str, description: str) -> None:
        self._reader.heard()
        match status:
            case "100":
                return
            case "404" | "408":
                self._pending = 0
            case "409" if "MaxBytes" in description:
                self._pending = 0
                self._too_large = not self._delivered
            case _:
                # Consumer deleted (with its stream, or for idleness), leader changed, shutdown.
                self.lost = f"{status} {description}"
        self._changed.set()

    async def drop(self) -> None:
        """Only a courtesy: the server forgets idle consumers by itself."""
        if self._name and self._connection.up:
            client = await self._connection.get()
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                await client.publish(f"$JS.API.CONSUMER.DELETE.{self._pchannel}.{self._name}", b"")


def _sequence(reply: str) -> int:
    """Stream sequence from a delivered message's reply subject.

    `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`; with
    domain and account after `ACK`, and perhaps a token at the end, from nats-server 2.8 on.
    """
    tokens = reply.split(".")
    return int(tokens[5] if len(tokens) == 9 else tokens[7])
