"""Reads the Kafka topics of a source Milvus (`mq.type: kafka`).

Milvus writes everything to partition 0 and never uses transactions; a position is the offset. Laws:
no group is joined and nothing is committed; blocking calls of the client run in one thread per
reader; the client never chooses an offset by itself (`auto.offset.reset=error`); offsets follow one
another, a hole (compaction, deleted records) is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog
from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from milvus_cdc.errors import (
    CdcError,
    LogResetError,
    LogTruncatedError,
    RetryableError,
    UserError,
)
from milvus_cdc.source import (
    STREAMING_HEADER,
    TRACE_HEADER,
    KafkaConfig,
    LogEntry,
    LogLimits,
    LogRange,
    check_incarnation,
    positions,
)
from milvus_cdc.source.positions import decode, encode

log = structlog.get_logger()

T = TypeVar("T")

REQUEST_SECONDS = 5.0
POLL_SECONDS = 0.5
POLL_MESSAGES = 4096
CHECK_SECONDS = 5.0
"""How often a reader asks whether the topic still is the same one."""
SAMPLED_ENTRIES = 64
SAMPLED_BYTES = 256 * 1024
HELD_KIBIBYTES = 2048
"""What the client may hold ahead of a reader, besides one fetch."""

_DENIED = frozenset(
    (
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
    )
)
_NO_TOPIC = frozenset(
    (
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNKNOWN_TOPIC_ID,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    )
)
_OUT_OF_RANGE = frozenset((KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE))


class KafkaSource:
    """The queue of one source. Readers have a consumer each and share the answers to questions."""

    def __init__(self, config: KafkaConfig) -> None:
        self._brokers = ",".join(config.brokers)
        self._where = f"Kafka at {self._brokers}"
        self._admin: AdminClient | None = None
        self._admin_made = threading.Lock()
        self._limits_denied = False

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> KafkaReader:
        start = decode(position)
        found = await asyncio.to_thread(self.check, pchannel, start, incarnation)
        return KafkaReader(self, self._brokers, pchannel, start, found)

    async def log_range(self, pchannel: str) -> LogRange:
        def ask() -> LogRange:
            incarnation = self.check_topic(pchannel, b"")
            first, end = self._offsets(pchannel)
            return LogRange(encode(first), encode(end), incarnation)

        return await asyncio.to_thread(ask)

    async def limits(self, pchannel: str) -> LogLimits:
        """Kafka forgets whole segments, so an entry lives at least as long as the limits say. A
        broker does not tell how large a topic is: where its bytes are limited, some of the newest
        entries are read and counted uncompressed, which errs on the safe side.
        """
        found = await self.log_range(pchannel)
        try:
            max_age_ms, max_bytes = await asyncio.to_thread(self._retention, pchannel)
        except UserError as error:
            # Reading must not depend on a right that only looking at limits needs.
            if not self._limits_denied:
                log.warning("limits of topics are not known", reason=error.reason, error=str(error))
            self._limits_denied = True
            max_age_ms = max_bytes = 0
        return LogLimits(
            found,
            whole=decode(found.first) == 0,
            max_age_ms=max_age_ms,
            max_bytes=max_bytes,
            entry_bytes=await self._entry_bytes(pchannel, found) if max_bytes else 0,
        )

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        def ask() -> bytes:
            self.check_topic(pchannel, b"")
            partition = TopicPartition(pchannel, 0)
            with self._foreign_errors(pchannel):
                asked = {partition: OffsetSpec.for_timestamp(max(unix_ms, 0))}
                offset = _answer(
                    self._client().list_offsets(asked, request_timeout=REQUEST_SECONDS)
                )[partition].offset
            return encode(offset if offset >= 0 else self._offsets(pchannel)[1])

        return await asyncio.to_thread(ask)

    def order(self, position: bytes) -> int:
        return decode(position)

    def back(self, position: bytes, entries: int) -> bytes:
        return positions.back(position, entries)

    def text(self, position: bytes) -> str:
        return positions.text(position)

    async def probe(self) -> None:
        def ask() -> None:
            with self._foreign_errors():
                self._client().list_topics(timeout=REQUEST_SECONDS)

        await asyncio.to_thread(ask)

    async def close(self) -> None:
        self._admin = None

    def check(self, pchannel: str, wanted: int, incarnation: bytes) -> bytes:
        """Blocking: whether the topic is the incarnation that is meant, and holds offset `wanted`;
        which one it is.
        """
        found = self.check_topic(pchannel, incarnation)
        first, end = self._offsets(pchannel)
        if wanted > end:
            raise LogResetError(
                f"topic {pchannel} ends before offset {end}, position {wanted} lies beyond: "
                "it was deleted and made again, or lost its end; resync"
            )
        if wanted < first:
            raise LogTruncatedError(
                f"topic {pchannel} no longer holds offset {wanted}; "
                f"the first one still there is {first}"
            )
        return found

    def check_topic(self, pchannel: str, incarnation: bytes) -> bytes:
        """Blocking: whether the topic is the incarnation that is meant; which one it is.

        It is Kafka's topic id (KIP-516, brokers from 2.8 on); older ones have none.
        """
        with self._foreign_errors(pchannel):
            topics = self._client().describe_topics(
                TopicCollection([pchannel]), request_timeout=REQUEST_SECONDS
            )
            topic_id = _answer(topics)[pchannel].topic_id
        halves = (topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits())
        found = b"".join(half.to_bytes(8, "big", signed=True) for half in halves)
        found = found if any(found) else b""
        check_incarnation(pchannel, incarnation, found)
        return found

    def _offsets(self, pchannel: str) -> tuple[int, int]:
        partition = TopicPartition(pchannel, 0)
        with self._foreign_errors(pchannel):
            first, end = (
                _answer(
                    self._client().list_offsets({partition: spec}, request_timeout=REQUEST_SECONDS)
                )[partition].offset
                for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
            )
        if min(first, end) < 0:
            # So answers a broker that is starting and does not lead the partition yet.
            raise RetryableError(
                "QUEUE_UNREACHABLE",
                f"{self._where}: the ends of topic {pchannel} are not known yet",
            )
        return first, end

    def _retention(self, pchannel: str) -> tuple[int, int]:
        """Blocking: milliseconds and bytes, 0 for no limit."""
        resource = ConfigResource(ResourceType.TOPIC, pchannel)
        with self._foreign_errors(pchannel):
            asked = self._client().describe_configs([resource], request_timeout=REQUEST_SECONDS)
            entries = _answer(asked)[resource]
        values = {name: entry.value or "" for name, entry in entries.items()}
        if "delete" not in values.get("cleanup.policy", "delete"):
            return 0, 0
        age, size = (int(values.get(f"retention.{unit}") or -1) for unit in ("ms", "bytes"))
        return max(age, 0), max(size, 0)

    async def _entry_bytes(self, pchannel: str, found: LogRange) -> int:
        """Average size of the newest entries; 0 when there are none."""
        end = decode(found.end)
        start = max(decode(found.first), end - SAMPLED_ENTRIES)
        if start >= end:
            return 0
        reader = await self.open(pchannel, encode(start), found.incarnation)
        try:
            entries = await reader.read(SAMPLED_BYTES, REQUEST_SECONDS)
        finally:
            await reader.close()
        size = sum(len(entry.payload) for entry in entries)
        return -(-size // len(entries)) if entries else 0

    def _client(self) -> AdminClient:
        # Threads ask at the same time; a second client would be destroyed with its question open.
        with self._admin_made:
            if self._admin is None:
                # Nobody polls this client, so it must have nothing to say on its own.
                self._admin = AdminClient(_settings(self._brokers) | {"log_level": 0})
            return self._admin

    @contextlib.contextmanager
    def _foreign_errors(self, pchannel: str = "") -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            raise self.translate(error.args[0], pchannel) from error
        except (OSError, TimeoutError) as error:
            text = str(error) or type(error).__name__
            raise RetryableError("QUEUE_UNREACHABLE", f"{self._where}: {text}") from error

    def translate(self, error: KafkaError, pchannel: str) -> CdcError:
        where = self._where
        if error.code() in _DENIED:
            return UserError(
                "QUEUE_ACCESS_DENIED",
                f"{where} denies reading topic {pchannel or '(any)'}: {error.str()}",
                field="source.kafka",
            )
        if error.code() in _NO_TOPIC:
            return LogResetError(
                f"topic {pchannel} does not exist at {where}: it was deleted, or the task names "
                "another queue than the source writes to"
            )
        return RetryableError("QUEUE_UNREACHABLE", f"{where}: {error.str()}")


class KafkaReader:
    """One consumer assigned to partition 0; it reconnects by itself after a RetryableError."""

    def __init__(
        self, source: KafkaSource, brokers: str, pchannel: str, start: int, incarnation: bytes
    ) -> None:
        self._source = source
        self._brokers = brokers
        self._pchannel = pchannel
        self.incarnation = incarnation
        self._next = start
        """Offset the client must bring next."""
        self._entries: deque[LogEntry] = deque()
        self._window = 0
        self._handed = self._taken = 0
        """Bytes so far; the first is counted by the thread, the second by the loop."""
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"kafka {pchannel}", daemon=True)
        self._wanted = threading.Event()
        """Set: the thread fetches; cleared while it is ahead by half a window, and by an error."""
        self._closed = False
        self._consumer: Consumer | None = None
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._down = False
        self._late: CdcError | None = None

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        self._window = max_bytes
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        if not self._entries and self._error is None:
            self._arrived.clear()
            if not self._wanted.is_set():
                self._wanted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds):
                    await self._arrived.wait()
        # Nothing below waits: entries are taken only by a call that returns them.
        if not self._entries and self._error is not None:
            error = self._error
            if isinstance(error, RetryableError):
                # Said once; the next read tries again.
                self._error = None
            raise error
        return self._take(max_bytes)

    async def close(self) -> None:
        self._closed = True
        self._wanted.set()
        if self._loop is not None:
            await asyncio.to_thread(self._thread.join)

    def _accept(self, entries: list[LogEntry], error: BaseException | None) -> None:
        self._entries.extend(entries)
        if error is not None:
            self._error = error
        self._arrived.set()

    def _take(self, max_bytes: int) -> list[LogEntry]:
        taken: list[LogEntry] = []
        size = 0
        while self._entries:
            size += len(self._entries[0].payload)
            if taken and size > max_bytes:
                break
            taken.append(self._entries.popleft())
        self._taken += sum([len(entry.payload) for entry in taken])
        if not self._wanted.is_set() and self._error is None and not self._far_ahead():
            self._wanted.set()
        return taken

    def _far_ahead(self) -> bool:
        return self._handed - self._taken > self._window // 2

    # Everything below runs in the reader's thread.

    def _run(self) -> None:
        assert self._loop is not None
        while self._wanted.wait() and not self._closed:
            entries: list[LogEntry] = []
            failed: BaseException | None = None
            try:
                entries = self._fetch(POLL_SECONDS)
            except BaseException as error:
                failed = error
            self._handed += sum([len(entry.payload) for entry in entries])
            if failed is not None or self._far_ahead():
                self._wanted.clear()
                if self._closed or (failed is None and not self._far_ahead()):
                    self._wanted.set()  # what was asked for while it was being cleared
            if entries or failed is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._accept, entries, failed)
        self._consumer_lost()

    def _fetch(self, wait: float) -> list[LogEntry]:
        if self._late is not None:
            late = self._late
            if isinstance(late, RetryableError):
                self._late = None
            raise late
        consumer = self._consumer or self._assign()
        if self._down:
            self._source.check(self._pchannel, self._next, self.incarnation)
            self._down = False
        elif time.monotonic() >= self._check_at:
            self._source.check_topic(self._pchannel, self.incarnation)
            self._check_at = time.monotonic() + CHECK_SECONDS
        first = consumer.poll(wait)
        if first is None:
            return []
        entries: list[LogEntry] = []
        for message in (first, *consumer.consume(POLL_MESSAGES, timeout=0)):
            try:
                entries.append(self._entry(message))
            except CdcError as error:
                # What came before it is whole and goes out first.
                self._late = error
                break
        if self._late is not None and not entries:
            return self._fetch(0)
        return entries

    def _entry(self, message: Message) -> LogEntry:
        error = message.error()
        if error is not None:
            self._consumer_lost()
            if error.code() == KafkaError._LOG_TRUNCATION:
                raise LogResetError(
                    f"topic {self._pchannel} lost its end after offset {self._next}: {error.str()}"
                )
            if error.code() in _OUT_OF_RANGE or error.code() in _NO_TOPIC:
                self._source.check(self._pchannel, self._next, self.incarnation)
                raise RetryableError("QUEUE_UNREACHABLE", f"{self._pchannel}: {error.str()}")
            raise self._source.translate(error, self._pchannel)
        offset = message.offset()
        if offset != self._next:
            raise LogTruncatedError(
                f"topic {self._pchannel} no longer holds offset {self._next}: "
                f"offset {offset} follows its predecessor"
            )
        payload = message.value()
        self._next += 1
        headers = dict(message.headers() or ())
        trace = headers.get(TRACE_HEADER) or b""
        return LogEntry(
            encode(offset), payload or b"", STREAMING_HEADER in headers, trace.decode("latin-1")
        )

    def _assign(self) -> Consumer:
        def on_error(error: KafkaError) -> None:
            log.debug("kafka client", topic=self._pchannel, error=error.str())
            if error.code() in (KafkaError._ALL_BROKERS_DOWN, *_DENIED):
                self._down = True

        consumer = Consumer(
            _settings(self._brokers)
            | {
                # Demanded by the client; nothing joins it as long as partitions are assigned.
                "group.id": "milvus-cdc",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "allow.auto.create.topics": False,
                "isolation.level": "read_uncommitted",
                "check.crcs": True,
                "fetch.min.bytes": 1,
                "fetch.wait.max.ms": 500,
                "fetch.max.bytes": 1024 * 1024,
                "max.partition.fetch.bytes": 1024 * 1024,
                "queued.max.messages.kbytes": HELD_KIBIBYTES,
                "fetch.queue.backoff.ms": 5,
                "error_cb": on_error,
            },
            logger=_Log(self._pchannel),
        )
        consumer.assign([TopicPartition(self._pchannel, 0, self._next)])
        self._consumer = consumer
        return consumer

    def _consumer_lost(self) -> None:
        """The next fetch begins with a new consumer at the offset that is due."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()


class _Log:
    """Where the client's own log lines go; what matters of them also comes as an error."""

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def log(self, level: int, text: str, *args: Any) -> None:
        log.debug("kafka client", topic=self._topic, level=level, line=text % args)


def _settings(brokers: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": brokers,
        "client.id": "milvus-cdc",
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": 1000,
        "socket.keepalive.enable": True,
        "socket.timeout.ms": 10_000,
    }


def _answer(futures: Mapping[Any, Future[T]]) -> dict[Any, T]:
    return {key: future.result(REQUEST_SECONDS + 1) for key, future in futures.items()}
