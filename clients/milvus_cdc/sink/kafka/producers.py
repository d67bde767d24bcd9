"""Records at least once: idempotent producers that all collections of a sink share.

Laws: `send` returns when the brokers have acknowledged every record (`acks=all`) and raises
otherwise, never later than its time; a record that was not acknowledged is not tried any longer
than that. Encoding and handing over happen in worker threads, reports in one thread per producer,
so the event loop sees nothing of a row.

The library's time limit is fixed when a producer is made, so there is one for each of a few limits
(`settings.message_timeout_ms`); a replicator's writes have the same limit but for short leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, Producer

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.kafka_security import LibraryLog, Settings
from milvus_cdc.sink.kafka.deliveries import Delivery, HandingOver
from milvus_cdc.sink.kafka.failures import translate
from milvus_cdc.sink.kafka.settings import message_timeout_ms

POLL_SECONDS = 0.25
ROOM_SECONDS = 0.005
"""Between two looks whether a full queue has room again."""

HandOver = Callable[[HandingOver], None]


class Producers:
    """One sink's; connected at the first record."""

    def __init__(self, settings: Settings, brokers: str) -> None:
        self._settings = settings
        self._brokers = brokers
        self._by_limit: dict[int, _Producer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def send(
        self, hand_over: HandOver, timeout_seconds: float, ordered: asyncio.Lock | None = None
    ) -> None:
        """`hand_over` runs in a thread; who holds `ordered` has all of its records handed over
        before the next one begins. Raises CdcError.
        """
        started = time.monotonic()
        limit = message_timeout_ms(timeout_seconds)
        producer = self._get(limit)
        delivery = Delivery(asyncio.get_running_loop())
        # Whatever is handed over by then has its whole limit left.
        latest = started + timeout_seconds - limit / 1000
        handing = HandingOver(
            producer.client, delivery.report, producer.make_room, latest, self._brokers
        )
        sending = asyncio.create_task(
            self._send(hand_over, handing, delivery, ordered, started + timeout_seconds)
        )
        try:
            raised, finished = await asyncio.shield(sending)
        except asyncio.CancelledError:
            # Who is told to stop must not be gone while records of his are still on their way:
            # another owner's newer ones could come before them.
            handing.deadline = 0.0
            while not sending.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({sending})
            raise
        failure = delivery.failure
        if failure is not None and failure.error.code() == KafkaError._FATAL:
            self._discard(limit, producer)
        if raised is not None:
            raise raised
        fault = producer.fault.since(started)
        if failure is not None:
            raise translate(failure.error, self._brokers, failure.what, fault)
        if not finished:
            raise UnknownOutcomeError(
                "SINK_TIMEOUT",
                f"Kafka at {self._brokers} did not acknowledge everything within "
                f"{timeout_seconds:.1f} s" + (f" ({fault.str()})" if fault is not None else ""),
            )

    async def _send(
        self,
        hand_over: HandOver,
        handing: HandingOver,
        delivery: Delivery,
        ordered: asyncio.Lock | None,
        end: float,
    ) -> tuple[CdcError | None, bool]:
        """What stopped the handing over, and whether all that was handed over has its report."""
        raised: CdcError | None = None
        async with ordered or asyncio.Lock():
            try:
                await asyncio.to_thread(hand_over, handing)
            except CdcError as error:
                raised = error
            finally:
                delivery.handed_over(handing.count)
        return raised, await delivery.finished(end - time.monotonic())

    def offer(self, topic: str, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """One record that may as well be lost; no waiting."""
        producer = self._get(message_timeout_ms(8.0))
        try:
            producer.client.produce(topic, value, key, headers=headers)
        except BufferError as error:
            raise RetryableError("SINK_BUSY", "the producer's queue is full") from error
        except KafkaException as error:
            raise translate(error.args[0], self._brokers, f"writing to topic {topic}") from error

    async def close(self) -> None:
        """Nothing is left running; what was not acknowledged may or may not be written."""
        for limit, producer in tuple(self._by_limit.items()):
            self._discard(limit, producer)
        while self._closing:
            await asyncio.gather(*self._closing)

    def _get(self, limit: int) -> _Producer:
        found = self._by_limit.get(limit)
        if found is None:
            settings = {**self._settings, "message.timeout.ms": limit}
            found = self._by_limit[limit] = _Producer(settings)
        return found

    def _discard(self, limit: int, producer: _Producer) -> None:
        if self._by_limit.get(limit) is producer:
            del self._by_limit[limit]
            task = asyncio.create_task(asyncio.to_thread(producer.close))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Producer:
    """The library's client, and the thread that hears its reports."""

    def __init__(self, settings: Settings) -> None:
        self.fault = LastFault()
        self.client = Producer({**settings, "error_cb": self.fault, "logger": LibraryLog()})
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kafka reports", daemon=True)
        self._thread.start()

    def make_room(self) -> None:
        """Waits a moment for reports to come in."""
        time.sleep(ROOM_SECONDS)

    def close(self) -> None:
        """Blocks. Everybody who waits hears that his records were given up."""
        self.client.purge()
        self.client.flush(1.0)
        self._closed = True
        self._thread.join()
        self.client.close()

    def _run(self) -> None:
        while not self._closed:
            self.client.poll(POLL_SECONDS)
