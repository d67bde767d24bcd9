"""Hands records to a producer of librdkafka and hears what became of them.

Laws: records go out in the order given; a record without a key goes nowhere (its place would be
random); a full queue is waited for, never past the deadline; nothing of a batch is forgotten: it
is finished when every record of it that was handed over has its report, and not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message

from milvus_cdc.errors import BugError, CdcError, UnknownOutcomeError
from milvus_cdc.format import Record
from milvus_cdc.sink.kafka.failures import TOO_LARGE, RecordTooLargeError, translate
from milvus_cdc.sink.kafka.headers import Headers

ANY_PARTITION = -1
"""The partitioner decides."""
SHOWN_KEY_BYTES = 80

Report = Callable[[KafkaError | None, Message], None]


class Failure:
    """The first record of a batch that was not delivered."""

    __slots__ = ("error", "key", "size", "topic")

    def __init__(
        self, error: KafkaError, topic: str, key: bytes | None, value: bytes | None
    ) -> None:
        self.error = error
        self.topic = topic
        self.key = key or b""
        self.size = len(self.key) + len(value or b"")

    @property
    def what(self) -> str:
        """For `failures.translate`."""
        text = f"writing to topic {self.topic}"
        if self.error.code() in TOO_LARGE:
            key = self.key[:SHOWN_KEY_BYTES].decode(errors="backslashreplace")
            text += f" the record with the key {key} ({self.size:,} bytes without headers)"
        return text


class Delivery:
    """What became of one batch. Reports come in one thread, records are handed over in another."""

    __slots__ = ("_expected", "_finished", "_loop", "_reported", "failure", "report")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._finished = loop.create_future()
        self._reported = 0
        self._expected = -1
        self.failure: Failure | None = None
        self.report: Report = self._report

    def handed_over(self, records: int) -> None:
        """No more will come than these."""
        self._expected = records
        # The last report may have come before this was known.
        if self._reported == records:
            self._finish()

    async def finished(self, timeout_seconds: float) -> bool:
        """Whether every report has come."""
        done, _ = await asyncio.wait({self._finished}, timeout=timeout_seconds)
        return bool(done)

    def _report(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and self.failure is None:
            self.failure = Failure(error, message.topic(), message.key(), message.value())
        self._reported += 1
        if self._reported == self._expected:
            self._finish()

    def _finish(self) -> None:
        def finish() -> None:
            if not self._finished.done():
                self._finished.set_result(None)

        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody waits
            self._loop.call_soon_threadsafe(finish)


class HandingOver:
    """Gives the records of one batch to a producer; blocks while its queue is full."""

    def __init__(
        self,
        producer: Any,
        report: Report,
        make_room: Callable[[], object],
        deadline: float,
        brokers: str,
    ) -> None:
        """`deadline`: `time.monotonic` after which nothing more is handed over; it may be brought
        forward.
        """
        self._produce = producer.produce
        self._report = report
        self._make_room = make_room
        self.deadline = deadline
        self._brokers = brokers
        self.count = 0
        """Records that were handed over so far, also when this ended with an error."""

    def records(
        self, topic: str, records: Iterable[Record], headers: Headers, *, tombstones: bool
    ) -> None:
        """`tombstones`: each record with a value is followed by one without. Raises CdcError."""
        produce, report = self._produce, self._report
        own: tuple[tuple[str, bytes], ...] = ()
        all_headers = headers
        if time.monotonic() > self.deadline:
            raise self._late(topic)
        for record in records:
            key, value = record.key, record.value
            if key is None:
                raise BugError(
                    "RECORD_WITHOUT_KEY",
                    f"the format gave a record for topic {topic} no key; without one its place "
                    "among the changes of its row would be lost",
                )
            if record.headers is not own:
                own = record.headers
                all_headers = [*headers, *own]
            try:
                produce(topic, value, key, ANY_PARTITION, report, None, 0, all_headers)
            except BufferError:
                self._wait(topic, value, key, ANY_PARTITION, all_headers)
            except KafkaException as error:
                raise self._refused(error, topic, key, value) from error
            self.count += 1
            if tombstones and value is not None:
                self.one(topic, None, key, all_headers)

    def one(
        self,
        topic: str,
        value: bytes | None,
        key: bytes,
        headers: Headers,
        partition: int = ANY_PARTITION,
    ) -> None:
        """Raises CdcError."""
        try:
            self._produce(topic, value, key, partition, self._report, None, 0, headers)
        except BufferError:
            self._wait(topic, value, key, partition, headers)
        except KafkaException as error:
            raise self._refused(error, topic, key, value) from error
        self.count += 1

    def _wait(
        self, topic: str, value: bytes | None, key: bytes, partition: int, headers: Headers
    ) -> None:
        while time.monotonic() < self.deadline:
            self._make_room()
            try:
                self._produce(topic, value, key, partition, self._report, None, 0, headers)
            except BufferError:
                continue
            except KafkaException as error:
                raise self._refused(error, topic, key, value) from error
            return
        raise self._late(topic)

    def _late(self, topic: str) -> CdcError:
        return UnknownOutcomeError(
            "SINK_TIMEOUT",
            f"Kafka at {self._brokers} takes no more records for topic {topic} in time",
        )

    def _refused(
        self, error: KafkaException, topic: str, key: bytes, value: bytes | None
    ) -> CdcError:
        failure = Failure(error.args[0], topic, key, value)
        refused = translate(failure.error, self._brokers, failure.what)
        if isinstance(refused, RecordTooLargeError):
            # A broker refuses what it was sent together: only here it is this record.
            refused.record = failure.key, failure.size
        return refused
