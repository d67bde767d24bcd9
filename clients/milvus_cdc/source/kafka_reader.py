"""Reads one Kafka topic of a source Milvus, in a thread of its own.

Laws: no group is joined and nothing is committed; the client never chooses an offset by itself
(`auto.offset.reset=error`); offsets follow one another, a hole (compaction, deleted records) is an
error.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from milvus_cdc.errors import CdcError, LogResetError, LogTruncatedError, RetryableError, UserError
from milvus_cdc.kafka_codes import AUTHENTICATION, NO_RIGHT, NO_TOPIC
from milvus_cdc.source import STREAMING_HEADER, TRACE_HEADER, LogEntry
from milvus_cdc.source.kafka_client import (
    OUT_OF_RANGE,
    Access,
    ClientLog,
    Terms,
)
from milvus_cdc.source.positions import encode
from milvus_cdc.source.read_ahead import ReadAhead

if TYPE_CHECKING:
    from milvus_cdc.source.kafka import KafkaSource

log = structlog.get_logger()

POLL_SECONDS = 0.5
POLL_MESSAGES = 4096
CHECK_SECONDS = 5.0
"""How often a reader asks whether the topic still is the same one."""
REFUSED_SECONDS = 30.0
"""Refused twice within so long, with nothing read in between, is refused."""
_NO_GROUP = KafkaError.GROUP_AUTHORIZATION_FAILED
HELD_KIBIBYTES = 2048
"""What the client may hold ahead of a reader, besides one fetch."""


class KafkaReader:
    """One consumer assigned to partition 0; it reconnects by itself after a RetryableError."""

    def __init__(
        self, source: KafkaSource, access: Access, pchannel: str, start: int, incarnation: bytes
    ) -> None:
        self._source = source
        self._access = access
        self._terms: Terms | None = None
        """Of the consumer."""
        self._pchannel = pchannel
        self.incarnation = incarnation
        self._next = start
        """Offset the client must bring next."""
        self._ahead = ReadAhead(
            f"kafka {pchannel}", partial(self._fetch, POLL_SECONDS), self._consumer_lost
        )
        self._consumer: Consumer | None = None
        self._check_at = time.monotonic() + CHECK_SECONDS
        self._heard_at = 0.0
        self._down = False
        self._late: CdcError | None = None

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        return await self._ahead.read(max_bytes, wait_seconds)

    async def close(self) -> None:
        await self._ahead.close()

    # Everything below runs in the reader's thread.

    def _fetch(self, wait: float) -> list[LogEntry]:
        if self._late is not None:
            late = self._late
            if isinstance(late, RetryableError):
                self._late = None
            raise late
        if self._down:
            self._look_at_connection()
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
            # The client looks for the coordinator of the group that it must name and never joins.
            if message.error() is not None and message.error().code() == _NO_GROUP:
                continue
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
            if error.code() in OUT_OF_RANGE or error.code() in NO_TOPIC:
                self._source.check(self._pchannel, self._next, self.incarnation)
                raise RetryableError("QUEUE_UNREACHABLE", f"{self._pchannel}: {error.str()}")
            terms = self._terms
            assert terms is not None
            raise self._source.translate(error, self._pchannel, terms)
        offset = message.offset()
        if offset != self._next:
            raise LogTruncatedError(
                f"topic {self._pchannel} no longer holds offset {self._next}: "
                f"offset {offset} follows its predecessor"
            )
        payload = message.value()
        self._next += 1
        self._heard_at = time.monotonic()
        headers = dict(message.headers() or ())
        trace = headers.get(TRACE_HEADER) or b""
        return LogEntry(
            encode(offset), payload or b"", STREAMING_HEADER in headers, trace.decode("latin-1")
        )

    def _assign(self) -> Consumer:
        terms = self._access.terms()

        def on_error(error: KafkaError) -> None:
            log.debug("kafka client", topic=self._pchannel, error=error.str())
            terms.fault(error)
            if error.code() in (KafkaError._ALL_BROKERS_DOWN, *AUTHENTICATION, *NO_RIGHT):
                self._down = True

        consumer = self._access.made(
            partial(Consumer, logger=ClientLog(self._pchannel)),
            terms,
            **{
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
        )
        self._terms = terms
        consumer.assign([TopicPartition(self._pchannel, 0, self._next)])
        self._consumer = consumer
        return consumer

    def _look_at_connection(self) -> None:
        """Raises when the brokers refuse us; a rotated secret or certificate is taken up."""
        terms = self._terms
        if terms is None or self._consumer is None:
            return
        if refusal := terms.fault.refusal(max(time.monotonic() - REFUSED_SECONDS, self._heard_at)):
            self._consumer_lost()
            raise self._access.refused(terms, refusal)
        # A secret that cannot be read now is no reason to give up what may come back by itself.
        with contextlib.suppress(UserError):
            if self._access.changed(terms):
                self._consumer_lost()

    def _consumer_lost(self) -> None:
        """The next fetch begins with a new consumer at the offset that is due."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()
