"""The seam to a source's message queue: positions, entries, readers.

A pchannel is one topic of the queue. A position is the queue's message id exactly as Milvus stores
it in etcd (NATS: stream sequence, Kafka: offset, both 8 bytes little-endian; Pulsar:
`MessageIdData`) and is opaque to everyone else. So is an incarnation, which tells a topic from
another one made later under the same name: a position means something in its own incarnation only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from milvuscdc.v1 import secret_pb2, sink_kafka_pb2, task_pb2, tls_pb2

from milvus_cdc.errors import LogResetError

STREAMING_HEADER = "_v"
"""A message's header that only Milvus' streaming service (2.6) writes."""
TRACE_HEADER = "traceparent"
"""A message's header with the trace context of the request that wrote it."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One message of a pchannel."""

    position: bytes
    payload: bytes
    streaming: bool = False
    """It carries the `_v` header of Milvus' streaming service (2.6), whose format differs."""
    traceparent: str = ""
    """W3C trace context of the request that wrote it, where Milvus left one (all but ticks)."""


@dataclass(frozen=True, slots=True)
class LogRange:
    """What a pchannel holds: `first` is its oldest message, `end` where the next will be."""

    first: bytes
    end: bytes
    incarnation: bytes = b""
    """Empty when the queue does not tell topics of one name apart."""


@dataclass(frozen=True, slots=True)
class LogLimits:
    """What makes a queue forget a pchannel's oldest entries; 0 = there is no such limit."""

    range: LogRange
    whole: bool
    """Nothing was forgotten yet: `range.first` is the first entry there ever was."""
    max_age_ms: int = 0
    max_bytes: int = 0
    max_entries: int = 0
    entry_bytes: int = 0
    """Average size of an entry as the queue counts it; 0 = not known."""


class LogReader(Protocol):
    """Reads one pchannel in order; a hole raises LogTruncatedError or LogResetError, and so does
    another incarnation of the topic.

    After a RetryableError the next read goes on where the last one stopped; opening a new reader
    serves as well. After any other error it is of no more use.
    """

    @property
    def incarnation(self) -> bytes:
        """Of the topic it reads; empty when the queue does not tell."""
        ...

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        """At least one entry if any arrives within `wait_seconds`, else an empty list.

        Returns what is there at once and stops near `max_bytes` of payload (one entry may exceed
        it). Entries not yet asked for are not held in memory beyond about `max_bytes`. Cancel-safe:
        an entry is either returned or read again by the next call.
        """
        ...

    async def close(self) -> None: ...


class LogSource(Protocol):
    """A connection to one source's queue, shared by its readers. Errors: milvus_cdc.errors only."""

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> LogReader:
        """A reader whose first entry is the one at `position` (inclusive; at the end it waits).

        `incarnation` is that of the topic in which the position was taken; empty = unknown, any
        will do. Raises LogTruncatedError (naming the first position still there) when the log
        begins later, LogResetError when `position` is beyond the end or the topic is missing or of
        another incarnation, RetryableError when the queue is not reachable.
        """
        ...

    async def log_range(self, pchannel: str) -> LogRange:
        """Raises LogResetError when the topic does not exist."""
        ...

    async def limits(self, pchannel: str) -> LogLimits:
        """Raises LogResetError when the topic does not exist."""
        ...

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        """Position of the first entry that the queue took at `unix_ms` (by its own clock, Unix
        milliseconds) or later; the log's end when there is none. Raises LogResetError when the
        topic does not exist.
        """
        ...

    def order(self, position: bytes) -> int:
        """A number that sorts positions of one pchannel; entries in a row may leave numbers out.
        Raises BugError BAD_POSITION for bytes that are no position of this queue.
        """
        ...

    def back(self, position: bytes, entries: int) -> bytes:
        """A place at least so many entries earlier; it may lie before the log's first one."""
        ...

    def behind(self, earlier: bytes, later: bytes) -> int:
        """How many entries lie from one place up to another, so far as is known without asking."""
        ...

    def text(self, position: bytes) -> str:
        """As the queue's own tools show it."""
        ...

    async def probe(self) -> None:
        """Connects, or raises what is wrong."""
        ...

    async def close(self) -> None: ...


def check_incarnation(topic: str, wanted: bytes, found: bytes) -> None:
    """Raises LogResetError when both are known and differ."""
    if wanted and found and wanted != found:
        raise LogResetError(
            f"topic {topic} was deleted and made again: what followed the position went with the "
            "old one. Make the collection anew at the source, or copy it by other means and follow "
            "it with a new task (start: {latest: {}}, adoptExisting: true)"
        )


@dataclass(frozen=True, slots=True)
class NatsConfig:
    """Where a NATS is, and how to connect: see `NatsQueue` of task.proto. At most one way to log
    in; who has any needs a SecretResolver.
    """

    url: str
    tls: tls_pb2.Tls | None = field(default=None, hash=False)
    token: secret_pb2.Secret | None = field(default=None, hash=False)
    username: str = ""
    password: secret_pb2.Secret | None = field(default=None, hash=False)
    credentials_file: str = ""
    nkey_seed: secret_pb2.Secret | None = field(default=None, hash=False)
    tls_handshake_first: bool = False


@dataclass(frozen=True, slots=True)
class KafkaConfig:
    brokers: tuple[str, ...]
    security: sink_kafka_pb2.KafkaSecurity | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class PulsarConfig:
    """`tenant` and `namespace` as Milvus has them; without `admin_url` less can be told. Who has
    `oauth` needs a SecretResolver.
    """

    service_url: str
    admin_url: str = ""
    tenant: str = "public"
    namespace: str = "default"
    tls: tls_pb2.Tls | None = field(default=None, hash=False)
    oauth: task_pb2.PulsarOauth | None = field(default=None, hash=False, repr=False)
    """Where tokens come from, in place of `token`."""
    token_from: str = ""
    """Where the token comes from: configurations that differ in it are different ones."""
    token: Callable[[], str] | None = field(default=None, compare=False)
    """Asked at each connection, so that a new token needs no restart."""
    held: bool = False
    """A durable subscription keeps what was not read, whatever the namespace retains."""

    @property
    def login_field(self) -> str:
        """Where in a task the login stands; empty when there is none."""
        if self.oauth is not None:
            return "source.pulsar.oauth"
        if self.token is not None:
            return "source.pulsar.token"
        with_certificate = self.tls is not None and self.tls.certificate_file
        return "source.pulsar.tls" if with_certificate else ""


QueueConfig = NatsConfig | KafkaConfig | PulsarConfig
