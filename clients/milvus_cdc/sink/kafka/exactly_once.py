"""Rows and checkpoint in one transaction: a `read_committed` consumer sees each change once.

How one owner follows another, for a collection:

1. connecting with the collection's transactional id ends what the last owner had under way;
2. the collection's record is then read from the checkpoint topic: nothing can be added to what is
   seen there but by us, or by someone who connects after us;
3. a higher epoch in it than ours: somebody newer owns the collection, so we stop (SINK_FENCED);
4. ours is written, and each batch of rows together with its checkpoints.

Any transaction of ours was preceded by 2 and 3 on the same connection. So although a replaced
owner that was merely slow may connect once more, it finds the newer epoch and writes nothing; the
newer one, whose connection that has cost, connects again, finds its own epoch and goes on.

The same path mends a commit whose outcome is not known: connecting anew decides it, the record says
how, and rows that are at or below their vchannel's stored `resolved_ts` are not written again.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import structlog
from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.kafka_security import Settings
from milvus_cdc.rows import Changes, Table
from milvus_cdc.sink.kafka.broker import Brokers
from milvus_cdc.sink.kafka.checkpoints import (
    DEFAULT_TOPIC,
    PARTITIONS,
    TOPIC_CONFIG,
    CheckpointReader,
    Known,
    key_of,
    partition_of,
)
from milvus_cdc.sink.kafka.deliveries import HandingOver
from milvus_cdc.sink.kafka.settings import FIELD
from milvus_cdc.sink.kafka.transactions import (
    DEFAULT_PRODUCERS,
    Fenced,
    Pool,
    TransactionalProducer,
)
from milvus_cdc.sink.writer import Batch, Opened, Opening

log = structlog.get_logger()

OPEN_SECONDS = 30.0
"""Of every step of an opening."""

HandRows = Callable[[HandingOver, tuple[Changes, ...]], None]
HandEvent = Callable[[HandingOver], None]


class _Owned:
    """A collection that this process writes."""

    def __init__(self, key: bytes, epoch: int) -> None:
        self.key = key
        self.epoch = epoch
        self.known = Known(epoch)
        self.fenced = False
        self.lock = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.key.decode()


class ExactlyOnce:
    """One sink's collections."""

    def __init__(
        self, spec: sink_kafka_pb2.KafkaSink, client: Settings, producer: Settings, brokers: Brokers
    ) -> None:
        transactions = spec.transactions
        self.topic = transactions.checkpoint_topic or DEFAULT_TOPIC
        self.field = f"{FIELD}.transactions.checkpoint_topic"
        self._creation = sink_kafka_pb2.KafkaTopicCreation(
            partitions=PARTITIONS,
            replication_factor=transactions.replication_factor,
            config=TOPIC_CONFIG,
        )
        self._brokers = brokers
        self._pool = Pool(producer, brokers.names, transactions.producers or DEFAULT_PRODUCERS)
        self._reader = CheckpointReader(client, self.topic, brokers.names)
        self._partitions = 0
        self._owned: dict[bytes, _Owned] = {}

    async def probe(self) -> None:
        """Raises when transactions, or the checkpoint topic, are out of reach."""
        await self._brokers.probe_topic(self.topic, self.field, self._creation)
        await self._check_policy()
        deadline = time.monotonic() + OPEN_SECONDS
        # Several may probe at once, and must not fence each other.
        name = f"probe/{uuid.uuid4().hex}"
        async with self._pool.lease(name, OPEN_SECONDS) as producer:
            await self._pool.in_thread(lambda: producer.connect(deadline))
        await self._pool.drop(name)

    async def open(self, table: Table, opening: Opening, epoch: int, created: HandEvent) -> Opened:
        """`created` hands over the news that the collection was created, when it was not told."""
        owned = _Owned(key_of(table), epoch)
        before = self._owned.get(owned.key)
        if before is not None:
            before.fenced = True
            await self._pool.drop(before.name)
        await self._ready_topic()
        # First of all, and not waiting for anybody: it ends the last owner's transaction, for which
        # others may be waiting as we may be for theirs.
        async with self._pool.lease(owned.name, OPEN_SECONDS) as producer:
            await self._connect(producer, time.monotonic() + OPEN_SECONDS)
        await self._read(owned, time.monotonic() + OPEN_SECONDS)
        self._owned[owned.key] = owned
        async with owned.lock:
            return await self._take(owned, table, opening, created)

    async def write(
        self, table: Table, batch: Batch, timeout_seconds: float, hand_rows: HandRows
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        owned = self._owned[key_of(table)]
        async with owned.lock, self._pool.lease(owned.name, timeout_seconds) as producer:
            await self._own(owned, producer, deadline)
            changes = tuple(c for c in batch.changes if not _stored(owned.known, c))
            known = owned.known.with_checkpoints(batch.checkpoints)
            if len(changes) < len(batch.changes):
                log.info(
                    "already written",
                    collection=table.full_name,
                    rows=batch.num_rows - sum(c.num_rows for c in changes),
                )
            if not changes and known == owned.known:
                return

            def hand_over(handing: HandingOver) -> None:
                hand_rows(handing, changes)
                self._hand_record(handing, owned, known, table)

            await self._transaction(owned, producer, hand_over, deadline)
            owned.known = known

    async def release(self, table: Table) -> None:
        owned = self._owned.pop(key_of(table), None)
        if owned is not None:
            async with owned.lock:
                await self._pool.drop(owned.name)

    async def close(self) -> None:
        await self._pool.close()
        await asyncio.to_thread(self._reader.close)

    async def _take(
        self, owned: _Owned, table: Table, opening: Opening, created: HandEvent
    ) -> Opened:
        deadline = time.monotonic() + OPEN_SECONDS
        async with self._pool.lease(owned.name, OPEN_SECONDS) as producer:
            producer.ready = False
            await self._own(owned, producer, deadline)
            recreate = opening is Opening.RECREATE
            known = Known(owned.epoch) if recreate else replace(owned.known, epoch=owned.epoch)
            tell = opening is not Opening.RESUME and not known.announced

            def hand_over(handing: HandingOver) -> None:
                if tell:
                    created(handing)
                self._hand_record(handing, owned, known, table)

            known = replace(known, announced=True)
            await self._transaction(owned, producer, hand_over, deadline)
            owned.known = known
        return Opened(tuple(known.checkpoints.values()))

    def _hand_record(self, handing: HandingOver, owned: _Owned, known: Known, table: Table) -> None:
        partition = partition_of(owned.key, self._partitions)
        handing.one(self.topic, known.encode(table), owned.key, [], partition)

    async def _transaction(
        self,
        owned: _Owned,
        producer: TransactionalProducer,
        hand_over: Callable[[HandingOver], None],
        deadline: float,
    ) -> None:
        try:
            await self._pool.in_thread(lambda: producer.run(hand_over, deadline))
        except Fenced as error:
            # Looked at without connecting: a newer owner would lose its connection.
            await self._read(owned, deadline)
            raise RetryableError(
                "SINK_TRANSACTION_LOST", f"Kafka ended a transaction of {owned.name}: {error}"
            ) from error

    async def _own(self, owned: _Owned, producer: TransactionalProducer, deadline: float) -> None:
        """Whoever comes back from here on a `ready` producer may write."""
        if owned.fenced:
            raise _fenced(owned)
        if producer.ready:
            return
        await self._connect(producer, deadline)
        await self._read(owned, deadline)
        producer.ready = True

    async def _connect(self, producer: TransactionalProducer, deadline: float) -> None:
        if not producer.connected:
            await self._pool.in_thread(lambda: producer.connect(deadline))

    async def _read(self, owned: _Owned, deadline: float) -> None:
        """What is committed by now becomes what is known. Raises SINK_FENCED."""
        partition = partition_of(owned.key, self._partitions)
        ends = await self._brokers.ends(self.topic, partition)
        known = await asyncio.to_thread(self._reader.read, owned.key, partition, ends, deadline)
        if known is None:
            return  # never written, or somebody emptied the topic: what we wrote still holds
        if known.epoch > owned.epoch:
            owned.known = known
            owned.fenced = True
            raise _fenced(owned)
        owned.known = replace(known, epoch=owned.epoch)

    async def _ready_topic(self) -> None:
        if not self._partitions:
            partitions = await self._brokers.ensure_as(self.topic, self.field, self._creation)
            await self._check_policy()
            self._partitions = partitions

    async def _check_policy(self) -> None:
        """A topic that forgets by time or size would forget how far collections are."""
        policy = await self._brokers.policy(self.topic)
        if policy not in ("", TOPIC_CONFIG["cleanup.policy"]):
            raise UserError(
                "SINK_CHECKPOINT_TOPIC",
                f"topic {self.topic} has cleanup.policy={policy} and would lose checkpoints: set "
                "it to compact, or name another topic",
                field=self.field,
            )


def _stored(known: Known, changes: Changes) -> bool:
    checkpoint = known.checkpoints.get(changes.vchannel)
    return checkpoint is not None and changes.ts <= checkpoint.resolved_ts


def _fenced(owned: _Owned) -> CdcError:
    return RetryableError(
        "SINK_FENCED",
        f"another replicator owns {owned.name} by now (epoch {owned.known.epoch}, ours was "
        f"{owned.epoch}); this one writes no more of it",
    )
