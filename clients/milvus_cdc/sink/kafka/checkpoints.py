"""Where the sink keeps what it knows of a collection: a record of the compacted checkpoint topic.

One record per task and collection, key `{task uid}/{collection id}`, value JSON: the owner's epoch,
whether its creation was told, and per vchannel `read_from` (base64) and `resolved_ts`. It is
written in the same transaction as rows, whole each time, so the last committed one is all there is
to know. Laws: an answer holds everything that was committed before the question; a collection's
records lie on one partition, chosen here.

Reading goes backwards in growing steps, because a collection that is written has its record near
the end; a transaction that a dead process left open holds readers back until its own collection is
opened again, or the broker gives it up.
"""

from __future__ import annotations

import base64
import threading
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from milvus_cdc.errors import BugError, RetryableError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.kafka_security import LibraryLog, Settings
from milvus_cdc.rows import Table
from milvus_cdc.sink.kafka.failures import translate
from milvus_cdc.sink.writer import Checkpoint

DEFAULT_TOPIC = "milvus-cdc-checkpoints"
PARTITIONS = 16
"""Of a topic that is made here."""
TOPIC_CONFIG = {
    "cleanup.policy": "compact",
    # Compaction never touches the newest segment: a small one keeps what a reader must pass small.
    "segment.bytes": str(16 * 1024 * 1024),
    "segment.ms": str(60 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.2",
}
FIRST_STEP = 256
"""Records before the end that are read first; then 16 times as many, and so on."""
STEP_FACTOR = 16
POLL_SECONDS = 0.2
POLL_RECORDS = 2_000

_OF_GROUPS = frozenset((KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError._MAX_POLL_EXCEEDED))
"""The client wants the name of a group and asks after it; none is joined, so no right is needed."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the sink holds about a collection."""

    epoch: int = 0
    announced: bool = False
    """That the collection was created has been told on the schema topic."""
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    """By vchannel."""

    def with_checkpoints(self, news: tuple[Checkpoint, ...]) -> Known:
        """Each vchannel's newest; none goes back."""
        merged = dict(self.checkpoints)
        for each in news:
            old = merged.get(each.vchannel)
            if old is None or old.resolved_ts <= each.resolved_ts:
                merged[each.vchannel] = each
        return Known(self.epoch, self.announced, merged)

    def encode(self, table: Table) -> bytes:
        return orjson.dumps(
            {
                "task": table.task,
                "collection": f"{table.source_database}.{table.source_collection}",
                "epoch": self.epoch,
                "announced": self.announced,
                "vchannels": {
                    name: {
                        "read_from": base64.b64encode(each.read_from).decode(),
                        "resolved_ts": each.resolved_ts,
                    }
                    for name, each in self.checkpoints.items()
                },
            }
        )

    @staticmethod
    def decode(value: bytes) -> Known:
        """Raises BugError."""
        try:
            stored = orjson.loads(value)
            return Known(
                stored["epoch"],
                stored["announced"],
                {
                    name: Checkpoint(name, base64.b64decode(each["read_from"]), each["resolved_ts"])
                    for name, each in stored["vchannels"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BugError(
                "CHECKPOINT_UNREADABLE",
                f"a record of the checkpoint topic is none of ours: {value[:80]!r} ({error!r})",
            ) from error


def key_of(table: Table) -> bytes:
    """Of its record."""
    return f"{table.task_uid}/{table.collection_id}".encode()


def partition_of(key: bytes, partitions: int) -> int:
    """Where the record lies."""
    return zlib.crc32(key) % partitions


class CheckpointReader:
    """One consumer for all collections, one question after the other. Blocks."""

    def __init__(self, settings: Settings, topic: str, brokers: str) -> None:
        self._topic = topic
        self._brokers = brokers
        self._fault = LastFault()
        self._settings = {
            **settings,
            "group.id": "milvus-cdc-reads-without-group",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "allow.auto.create.topics": False,
            "fetch.wait.max.ms": 50,
            "error_cb": self._fault,
            "logger": LibraryLog(),
        }
        self._consumer: Consumer | None = None
        self._lock = threading.Lock()

    def read(
        self, key: bytes, partition: int, ends: tuple[int, int], deadline: float
    ) -> Known | None:
        """The newest committed before offset `ends[1]`; None when there is none. `deadline`:
        `time.monotonic`. Raises RetryableError when a transaction in front of it stays open.
        """
        with self._lock:
            if self._consumer is None:
                self._consumer = Consumer(self._settings)
            try:
                return self._backwards(self._consumer, key, partition, ends, deadline)
            except KafkaException as error:
                raise translate(
                    error.args[0],
                    self._brokers,
                    f"reading topic {self._topic}",
                    self._fault.since(deadline - 60),
                ) from error

    def close(self) -> None:
        with self._lock:
            if self._consumer is not None:
                self._consumer.close()
                self._consumer = None

    def _backwards(
        self, consumer: Any, key: bytes, partition: int, ends: tuple[int, int], deadline: float
    ) -> Known | None:
        first, end = ends
        step = FIRST_STEP
        while first < end:
            start = max(first, end - step)
            newest = self._newest(consumer, key, partition, (start, end), deadline)
            if newest is not None:
                return Known.decode(newest) if newest else None
            if start == first:
                break
            step *= STEP_FACTOR
        return None

    def _newest(
        self, consumer: Any, key: bytes, partition: int, span: tuple[int, int], deadline: float
    ) -> bytes | None:
        """The last value of `key` in the span; empty for a tombstone, None when it is not there."""
        start, end = span
        newest: bytes | None = None
        consumer.assign([TopicPartition(self._topic, partition, start)])
        try:
            while True:
                if time.monotonic() > deadline:
                    raise RetryableError(
                        "SINK_TRANSACTION_OPEN",
                        f"Kafka at {self._brokers}: topic {self._topic} cannot be read to its end "
                        "yet; a transaction of a process that is gone may still be open",
                    )
                one = consumer.poll(POLL_SECONDS)
                if one is None:
                    continue
                for message in (one, *consumer.consume(POLL_RECORDS, timeout=0)):
                    error = message.error()
                    if error is not None and error.code() == KafkaError._PARTITION_EOF:
                        if message.offset() >= end:
                            return newest
                    elif error is not None and error.code() in _OF_GROUPS:
                        continue
                    elif error is not None:
                        raise KafkaException(error)
                    elif message.offset() >= end:
                        return newest
                    elif message.key() == key:
                        newest = message.value() or b""
        finally:
            consumer.unassign()
