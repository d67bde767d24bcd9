"""Transactional producers: one per collection that writes, few connected at once.

A collection's transactional id is `milvus-cdc/{task uid}/{collection id}`, so whoever connects with
it ends what another process had under way and keeps it from committing ever after. Laws: a producer
is used by one transaction at a time; the one that has not been used for longest makes room for
another; a producer after an outcome that is not known, or after any error it cannot go on from, is
given up, and the next one for that collection starts by connecting anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException, Producer

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.kafka_security import LibraryLog, Settings
from milvus_cdc.sink.kafka.deliveries import Failure, HandingOver
from milvus_cdc.sink.kafka.failures import FENCED, translate

log = structlog.get_logger()

T = TypeVar("T")

DEFAULT_PRODUCERS = 16
ABORT_SECONDS = 2.0
ROOM_SECONDS = 0.05
PREFIX = "milvus-cdc/"


class Fenced(Exception):
    """Somebody else has connected with this transactional id."""


class TransactionalProducer:
    """One transactional id, connected. Everything blocks, and is called from one thread at a time.

    `broken` once it cannot be used any more; then only `close` is left.
    """

    def __init__(self, transactional_id: str, settings: Settings, brokers: str) -> None:
        self.transactional_id = transactional_id
        self.connected = False
        self.ready = False
        """Connected, and what is stored was read since; set by the owner."""
        self.broken = False
        self._brokers = brokers
        self._fault = LastFault()
        self._failure: Failure | None = None
        self._client = Producer(
            {
                **settings,
                "transactional.id": transactional_id,
                # A commit fails when a record did; only that record's own report is of interest.
                "delivery.report.only.error": True,
                "error_cb": self._fault,
                "logger": LibraryLog(),
            }
        )

    def connect(self, deadline: float) -> None:
        """Ends what others with this id have under way. Raises CdcError."""
        started = time.monotonic()
        while True:
            try:
                self._client.init_transactions(_left(deadline))
                self.connected = True
                return
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                self._client.poll(0)
                if reason.retriable() and time.monotonic() < deadline:
                    continue
                self.broken = True
                translated = translate(
                    reason,
                    self._brokers,
                    f"connecting as {self.transactional_id}",
                    self._fault.since(started),
                )
                if isinstance(translated, UnknownOutcomeError):
                    # Nothing was written, so there is nothing to be in doubt about.
                    translated = RetryableError(translated.reason, translated.message)
                raise translated from error

    def run(self, hand_over: Callable[[HandingOver], None], deadline: float) -> None:
        """One transaction: committed when this returns, aborted when it raises, except for
        UnknownOutcomeError. Raises CdcError, or Fenced.
        """
        started = time.monotonic()
        self._failure = None
        try:
            self._client.begin_transaction()
        except KafkaException as error:
            self.broken = True
            raise self._meaning(error.args[0], started) from error
        handing = HandingOver(self._client, self._report, self._make_room, deadline, self._brokers)
        try:
            hand_over(handing)
        except BaseException as error:
            self._abort()
            if isinstance(error, UnknownOutcomeError):
                raise RetryableError(error.reason, error.message) from error
            raise
        self._commit(deadline, started)

    def close(self) -> None:
        """Leaves nothing running; an open transaction is aborted by its successor or the broker."""
        with contextlib.suppress(KafkaException):
            self._client.purge()
            self._client.flush(0.5)
        # Destroyed with its last reference; `Producer.close` would first try to abort.
        del self._client

    def _commit(self, deadline: float, started: float) -> None:
        while True:
            try:
                self._client.commit_transaction(_left(deadline))
                return
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                self._client.poll(0)
                if reason.txn_requires_abort():
                    self._abort()
                    meaning = self._meaning(reason, started)
                    if isinstance(meaning, UnknownOutcomeError):
                        # Aborted, or fenced by the next one: in any case not committed.
                        meaning = RetryableError(meaning.reason, meaning.message)
                    raise meaning from error
                if reason.retriable() and time.monotonic() < deadline:
                    continue
                self.broken = True
                if reason.retriable():
                    fault = self._fault.since(started)
                    raise UnknownOutcomeError(
                        "SINK_TIMEOUT",
                        f"Kafka at {self._brokers} did not say in time whether the transaction "
                        f"was committed: {reason.str()}"
                        + (f" ({fault.str()})" if fault is not None else ""),
                    ) from error
                raise self._meaning(reason, started) from error

    def _abort(self) -> None:
        # librdkafka 2.16 has lost count of a partition's records after some aborts ("skipped
        # sequence numbers" in the next transaction, seen); starting anew is safe and rare.
        self.broken = True
        try:
            self._client.abort_transaction(ABORT_SECONDS)
        except KafkaException as error:
            log.debug("transaction not aborted", id=self.transactional_id, error=str(error))

    def _report(self, error: KafkaError | None, message: Any) -> None:
        # What is purged by an abort says nothing about why.
        if error is not None and self._failure is None and error.code() not in _PURGED:
            self._failure = Failure(error, message.topic(), message.key(), message.value())

    def _make_room(self) -> None:
        self._client.poll(ROOM_SECONDS)

    def _meaning(self, error: KafkaError, started: float) -> CdcError | Fenced:
        codes = {error.code()} | ({self._failure.error.code()} if self._failure else set())
        if codes & FENCED:
            self.broken = True
            return Fenced(error.str())
        if error.fatal():
            self.broken = True
        fault = self._fault.since(started)
        if self._failure is not None:
            return translate(self._failure.error, self._brokers, self._failure.what, fault)
        return translate(error, self._brokers, "committing a transaction", fault)


_PURGED = frozenset((KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT))


def _left(deadline: float) -> float:
    # 0 would mean for ever.
    return max(0.001, deadline - time.monotonic())


class Pool:
    """At most `size` producers."""

    def __init__(self, settings: Settings, brokers: str, size: int) -> None:
        self._settings = settings
        self._brokers = brokers
        self._size = size
        self._idle: OrderedDict[str, TransactionalProducer] = OrderedDict()
        """By transactional id; the one used last is last."""
        self._used = 0
        """Leased, or being closed."""
        self._room = asyncio.Condition()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="kafka transaction")
        self._closing: set[asyncio.Task[None]] = set()

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Commits wait for brokers, so they have threads of their own. Who is cancelled waits for
        its end all the same: a producer must not be given on while a thread is at it.
        """
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({running})
            raise

    @contextlib.asynccontextmanager
    async def lease(self, key: str, timeout_seconds: float) -> AsyncIterator[TransactionalProducer]:
        """The producer of a collection, perhaps a new one (not `ready`). Raises RetryableError when
        all are in use for so long.
        """
        transactional_id = PREFIX + key
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._reserve(transactional_id)
        except TimeoutError as error:
            raise RetryableError(
                "SINK_PRODUCERS_BUSY",
                f"all {self._size} transactional producers were in use for {timeout_seconds:.1f} "
                "s; raise sink.kafka.transactions.producers",
            ) from error
        producer = self._idle.pop(transactional_id, None)
        try:
            if producer is None:
                producer = TransactionalProducer(transactional_id, self._settings, self._brokers)
            yield producer
        except asyncio.CancelledError:
            # Nobody saw how it ended.
            if producer is not None:
                producer.broken = True
            raise
        finally:
            if producer is None or producer.broken or transactional_id in self._idle:
                self._retire(producer)
            else:
                self._idle[transactional_id] = producer
                self._used -= 1
                await self._tell()

    async def drop(self, key: str) -> None:
        """The collection is not written for now."""
        producer = self._idle.pop(PREFIX + key, None)
        if producer is not None:
            self._used += 1
            self._retire(producer)

    async def close(self) -> None:
        """Leases must have ended."""
        for producer in tuple(self._idle.values()):
            self._used += 1
            self._retire(producer)
        self._idle.clear()
        while self._closing:
            await asyncio.gather(*self._closing)
        self._threads.shutdown(wait=False)

    async def _reserve(self, transactional_id: str) -> None:
        async with self._room:
            while True:
                if transactional_id in self._idle:
                    self._used += 1
                    return
                if self._used + len(self._idle) < self._size:
                    self._used += 1
                    return
                if self._idle:
                    _, oldest = self._idle.popitem(last=False)
                    self._used += 1
                    self._retire(oldest)
                await self._room.wait()

    def _retire(self, producer: TransactionalProducer | None) -> None:
        """Its place is free when it is closed."""
        task = asyncio.create_task(self._close(producer))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, producer: TransactionalProducer | None) -> None:
        try:
            if producer is not None:
                await asyncio.to_thread(producer.close)
        finally:
            self._used -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._room:
            self._room.notify_all()
