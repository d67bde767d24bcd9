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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import structlog
from confluent_kafka import (
    KafkaError,
    KafkaException,
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
from milvus_cdc.kafka_codes import NO_RIGHT, NO_TOPIC
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source import (
    KafkaConfig,
    LogLimits,
    LogRange,
    check_incarnation,
)
from milvus_cdc.source.kafka_client import Access, Terms
from milvus_cdc.source.kafka_reader import KafkaReader
from milvus_cdc.source.positions import Numbered, decode, encode

log = structlog.get_logger()

REQUEST_SECONDS = 5.0
POLL_SECONDS = 0.2
_NO_ANSWER = frozenset((KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN))
SAMPLED_ENTRIES = 64
SAMPLED_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Admin:
    client: AdminClient
    terms: Terms


class KafkaSource(Numbered):
    """The queue of one source. Readers have a consumer each and share the answers to questions."""

    def __init__(self, config: KafkaConfig, secrets: SecretResolver | None = None) -> None:
        self._access = Access(config, secrets)
        self._where = self._access.where
        self._admin: _Admin | None = None
        self._admin_made = threading.Lock()
        self._limits_denied = False

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> KafkaReader:
        start = decode(position)
        found = await asyncio.to_thread(self.check, pchannel, start, incarnation)
        return KafkaReader(self, self._access, pchannel, start, found)

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
            asked = {partition: OffsetSpec.for_timestamp(max(unix_ms, 0))}
            offset = self._ask(
                pchannel, lambda admin: admin.list_offsets(asked, request_timeout=REQUEST_SECONDS)
            )[partition].offset
            return encode(offset if offset >= 0 else self._offsets(pchannel)[1])

        return await asyncio.to_thread(ask)

    async def probe(self) -> None:
        def ask() -> None:
            self._ask(
                "",
                lambda admin: {"": admin.describe_cluster(request_timeout=REQUEST_SECONDS)},
            )

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
        topics = TopicCollection([pchannel])
        topic_id = self._ask(
            pchannel, lambda admin: admin.describe_topics(topics, request_timeout=REQUEST_SECONDS)
        )[pchannel].topic_id
        halves = (topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits())
        found = b"".join(half.to_bytes(8, "big", signed=True) for half in halves)
        found = found if any(found) else b""
        check_incarnation(pchannel, incarnation, found)
        return found

    def _offsets(self, pchannel: str) -> tuple[int, int]:
        partition = TopicPartition(pchannel, 0)

        def offset(spec: OffsetSpec) -> int:
            answers = self._ask(
                pchannel,
                lambda admin: admin.list_offsets(
                    {partition: spec}, request_timeout=REQUEST_SECONDS
                ),
            )
            return int(answers[partition].offset)

        first, end = offset(OffsetSpec.earliest()), offset(OffsetSpec.latest())
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
        entries = self._ask(
            pchannel,
            lambda admin: admin.describe_configs([resource], request_timeout=REQUEST_SECONDS),
        )[resource]
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

    def _ask(
        self, pchannel: str, question: Callable[[AdminClient], Mapping[Any, Future[Any]]]
    ) -> dict[Any, Any]:
        """Blocking: the answers, by what was asked for."""
        admin = self._connected()
        with self._foreign_errors(admin, pchannel):
            deadline = time.monotonic() + REQUEST_SECONDS + 1
            admin.client.poll(0)  # what it has to say, and new tokens, wait for somebody who asks
            futures = question(admin.client)
            return {key: self._wait(admin, future, deadline) for key, future in futures.items()}

    def _wait(self, admin: _Admin, future: Future[Any], deadline: float) -> Any:
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(POLL_SECONDS)
            # The library goes on trying with a login that is refused until time runs out.
            self._raise_refusal(admin)
            if time.monotonic() >= deadline:
                raise TimeoutError

    def _raise_refusal(self, admin: _Admin) -> None:
        admin.client.poll(0)
        refusal = admin.terms.fault.refusal(time.monotonic() - REQUEST_SECONDS)
        if refusal is not None:
            with self._admin_made:
                if self._admin is admin:
                    self._admin = None
            raise self._access.refused(admin.terms, refusal)

    def _connected(self) -> _Admin:
        # Threads ask at the same time; a second client would be destroyed with its question open.
        with self._admin_made:
            if self._admin is None:
                terms = self._access.terms()
                # Its log lines need somebody who polls, which only a question does.
                client = self._access.made(AdminClient, terms, log_level=0)
                self._admin = _Admin(client, terms)
            return self._admin

    @contextlib.contextmanager
    def _foreign_errors(self, admin: _Admin, pchannel: str) -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            self._raise_refusal(admin)
            raise self.translate(error.args[0], pchannel, admin.terms) from error
        except (OSError, TimeoutError) as error:
            text = self._access.with_fault(str(error) or type(error).__name__, admin.terms)
            raise RetryableError("QUEUE_UNREACHABLE", f"{self._where}: {text}") from error

    def translate(self, error: KafkaError, pchannel: str, terms: Terms) -> CdcError:
        where = self._where
        if error.code() in NO_RIGHT:
            return UserError(
                "QUEUE_ACCESS_DENIED",
                f"{where} denies reading topic {pchannel or '(any)'}: {error.str()}",
                field="source.kafka",
            )
        if error.code() in NO_TOPIC:
            return LogResetError(
                f"topic {pchannel} does not exist at {where}: it was deleted, or the task names "
                "another queue than the source writes to"
            )
        text = error.str()
        if error.code() in _NO_ANSWER:
            text = self._access.with_fault(text, terms)
        return RetryableError("QUEUE_UNREACHABLE", f"{where}: {text}")
