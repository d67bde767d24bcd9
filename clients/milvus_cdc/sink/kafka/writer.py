"""The Kafka writer: which topic, which records, at least or exactly once.

Laws: a record's key is its row's primary key, and its partition the Java client's for that key, so
all changes of a row lie in order on one partition; `write` returns when the brokers have all of a
batch on disk in as many replicas as the topic demands (`acks=all`). At least once: a batch that
failed comes whole again, so the last record of each key is right again after it. Exactly once: see
`exactly_once`.

A log keeps what was: a dropped collection's topic stays, a renamed one's rows go on in the topic of
the new name. Schema changes are told at least once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import orjson
import structlog
from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import BugError, CdcError, RetryableError, UserError
from milvus_cdc.format import Format
from milvus_cdc.format.registry import open_format
from milvus_cdc.model import tso_to_ms
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import headers, settings
from milvus_cdc.sink.kafka.broker import Brokers
from milvus_cdc.sink.kafka.deliveries import HandingOver
from milvus_cdc.sink.kafka.exactly_once import ExactlyOnce
from milvus_cdc.sink.kafka.failures import RecordTooLargeError
from milvus_cdc.sink.kafka.producers import Producers
from milvus_cdc.sink.kafka.settings import FIELD
from milvus_cdc.sink.kafka.topics import DEFAULT_TOPIC, TopicTemplate
from milvus_cdc.sink.writer import (
    Batch,
    Capabilities,
    Opened,
    Opening,
    SchemaChange,
    SchemaChangeKind,
)

log = structlog.get_logger()

HEARTBEAT_SECONDS = 10.0
EVENT_SECONDS = 8.0
CREATED = "CREATE_COLLECTION"

AT_LEAST_ONCE = Capabilities(in_flight=4, renames=False)
EXACTLY_ONCE = Capabilities(
    own_checkpoint=True,
    # A commit costs the brokers some milliseconds however many rows it has.
    rows_per_batch=50_000,
    bytes_per_batch=32 * 1024 * 1024,
    linger_seconds=0.1,
    in_flight=1,
    renames=False,
)


class _Collection:
    """What this process knows of one that it writes."""

    def __init__(self, table: Table, topic: str, shared: headers.Headers) -> None:
        self.table = table
        self.topic = topic
        self.headers = shared
        self.encoding = asyncio.Lock()
        """Its batches are encoded and handed over in order."""


class KafkaWriter:
    """See module docstring and `milvus_cdc.sink.writer.Writer`."""

    def __init__(self, spec: sink_kafka_pb2.KafkaSink, secrets: SecretResolver) -> None:
        """No I/O. Raises UserError for what cannot work."""
        self._topic = TopicTemplate(spec.topic or DEFAULT_TOPIC, "topic")
        self._schema_topic = _optional(spec.schema_topic, "schema_topic")
        self._heartbeat_topic = _optional(spec.heartbeat_topic, "heartbeat_topic")
        self._tombstones = spec.tombstones
        self._headers = spec.headers
        exactly_once = spec.delivery == sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
        _check_combinations(spec, exactly_once)
        self._heartbeat_seconds = (
            spec.heartbeat_interval.ToTimedelta().total_seconds()
            if spec.HasField("heartbeat_interval")
            else HEARTBEAT_SECONDS
        )
        client = settings.connection(spec, secrets)
        producer = settings.producer(spec, client)
        settings.check(producer, spec)
        self._format: Format = open_format(spec.format, secrets, f"{FIELD}.format")
        self._brokers = Brokers(spec, client)
        self._producers = Producers(producer, self._brokers.names)
        self._exactly_once = (
            ExactlyOnce(spec, client, producer, self._brokers) if exactly_once else None
        )
        self._collections: dict[tuple[str, int], _Collection] = {}
        self._heartbeats: dict[tuple[str, int], float] = {}

    @property
    def capabilities(self) -> Capabilities:
        own = AT_LEAST_ONCE if self._exactly_once is None else EXACTLY_ONCE
        return replace(own, heartbeats=self._heartbeat_topic is not None)

    async def probe(self) -> str:
        known = {
            template.text: template.field
            for template in (self._topic, self._schema_topic, self._heartbeat_topic)
            if template is not None and template.constant
        }
        version = await self._brokers.probe(known)
        if self._exactly_once is not None:
            await self._exactly_once.probe()
        return version

    def violations(self, tables: Sequence[Table]) -> list[str]:
        templates = (self._topic, self._schema_topic, self._heartbeat_topic)
        texts = self._topic.violations(tables)
        for template in templates[1:]:
            if template is not None:
                texts += [t for table in tables for t in template.violations([table])]
        return list(dict.fromkeys(texts))

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        collection = await self._prepare(table)

        def created(handing: HandingOver) -> None:
            self._hand_event(handing, collection, None)

        opened = Opened()
        if self._exactly_once is not None:
            opened = await self._exactly_once.open(table, opening, epoch, created)
        elif opening is not Opening.RESUME and self._schema_topic is not None:
            await self._tell(collection, created, EVENT_SECONDS)
        if opening is Opening.RECREATE:
            # Now that nobody else can add to it.
            opened = replace(opened, conditions=await self._forget(collection))
        return opened

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        collection = self._collections.get(_key(change.table))
        if collection is None or change.kind is SchemaChangeKind.RENAME_COLLECTION:
            collection = await self._prepare(change.table)
        if self._schema_topic is None:
            return
        opened = collection

        def hand_over(handing: HandingOver) -> None:
            self._hand_event(handing, opened, change)

        await self._tell(opened, hand_over, timeout_seconds)

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        collection = self._collections.get(_key(table))
        if collection is None:
            raise BugError("NOT_OPENED", f"rows of {table.full_name}, which is not open")
        if collection.table is not table and collection.table != table:
            collection = await self._prepare(table)
        target = collection

        def hand_rows(handing: HandingOver, changes: tuple[Changes, ...]) -> None:
            for each in changes:
                handing.records(
                    target.topic,
                    self._format.encode(target.table, each),
                    headers.of_changes(each, target.table, target.headers, self._headers),
                    tombstones=self._tombstones and each.op is ChangeOp.DELETE,
                )

        try:
            if self._exactly_once is not None:
                await self._exactly_once.write(table, batch, timeout_seconds, hand_rows)
            else:
                await self._producers.send(
                    lambda handing: hand_rows(handing, batch.changes),
                    timeout_seconds,
                    target.encoding,
                )
        except RecordTooLargeError as error:
            if error.record is not None:
                find = partial(self._find, target.table, batch.changes, *error.record)
                error.rows = await asyncio.to_thread(find)
            raise
        except UserError as error:
            await self._confirm_missing(collection.topic, self._topic.field, error)
            raise

    def _find(
        self, table: Table, changes: Sequence[Changes], key: bytes, size: int
    ) -> tuple[tuple[int, int], ...]:
        """Where the record is that a broker or the library finds too large."""
        return tuple(
            (index, row)
            for index, each in enumerate(changes)
            if each.op is not ChangeOp.DELETE
            for row, record in enumerate(self._format.encode(table, each))
            if record.key == key and len(key) + len(record.value or b"") == size
        )

    async def heartbeat(self, table: Table, resolved_ts: int) -> None:
        """Every change of the collection at or below `resolved_ts` (TSO) is in its topic. Told at
        most once per interval and collection, and without waiting; may be lost.
        """
        if self._heartbeat_topic is None:
            return
        now = time.monotonic()
        key = _key(table)
        if now - self._heartbeats.get(key, -self._heartbeat_seconds) < self._heartbeat_seconds:
            return
        self._heartbeats[key] = now
        value = {
            "database": table.database,
            "collection": table.collection,
            "source_database": table.source_database,
            "source_collection": table.source_collection,
            "source_collection_id": table.collection_id,
            "resolved_ts": resolved_ts,
            "resolved_ts_ms": tso_to_ms(resolved_ts),
            "ts_ms": time.time_ns() // 1_000_000,
        }
        # The next one says more; rows find out what is wrong with the brokers.
        with contextlib.suppress(CdcError):
            self._producers.offer(
                self._heartbeat_topic.topic(table),
                table.full_name.encode(),
                orjson.dumps(value),
                headers.of_event("HEARTBEAT", headers.of_table(table, "application/json")),
            )

    async def release(self, table: Table) -> None:
        self._collections.pop(_key(table), None)
        self._heartbeats.pop(_key(table), None)
        if self._exactly_once is not None:
            await self._exactly_once.release(table)

    async def close(self) -> None:
        await self._producers.close()
        if self._exactly_once is not None:
            await self._exactly_once.close()
        await self._format.close()
        self._brokers.close()

    async def _prepare(self, table: Table) -> _Collection:
        """Topics and format are ready for the collection under its name of now."""
        topic = self._topic.topic(table)
        schema_topic = self._schema_topic.topic(table) if self._schema_topic is not None else ""
        await self._brokers.ensure(topic, self._topic.field)
        for template in (self._schema_topic, self._heartbeat_topic):
            if template is not None:
                await self._brokers.ensure(template.topic(table), template.field)
        await self._format.prepare(table, topic, schema_topic)
        shared = headers.of_table(table, self._format.content_type)
        collection = _Collection(table, topic, shared)
        self._collections[_key(table)] = collection
        return collection

    async def _forget(self, collection: _Collection) -> tuple[tuple[str, str], ...]:
        """The rows of the collection go, where they can; else somebody should know."""
        reason = "other collections may share it"
        if self._topic.of_one_collection:
            try:
                await self._brokers.empty(collection.topic)
                return ()
            except UserError as error:
                reason = error.message
        text = (
            f"topic {collection.topic} still has the records of before the resync ({reason}); "
            f"{collection.table.full_name} comes whole again after them"
        )
        return (("RECORDS_REMAIN", text),)

    async def _tell(
        self, collection: _Collection, hand_over: Callable[[HandingOver], None], seconds: float
    ) -> None:
        """An event on the topic of schema changes, which there is."""
        assert self._schema_topic is not None
        try:
            await self._producers.send(hand_over, seconds)
        except UserError as error:
            topic = self._schema_topic.topic(collection.table)
            await self._confirm_missing(topic, self._schema_topic.field, error)
            raise

    async def _confirm_missing(self, topic: str, field: str, error: UserError) -> None:
        """A client that has lost its broker may think a topic gone; only a broker knows."""
        if error.reason != "SINK_TOPIC_MISSING":
            return
        error.field = field
        if await self._brokers.exists(topic):
            raise RetryableError(
                "SINK_ERROR", f"topic {topic} is there again: {error.message}"
            ) from error

    def _hand_event(
        self, handing: HandingOver, collection: _Collection, change: SchemaChange | None
    ) -> None:
        if self._schema_topic is None:
            return
        record = self._format.encode_schema(change, collection.table)
        kind = CREATED if change is None else change.kind.value
        handing.records(
            self._schema_topic.topic(collection.table),
            [record],
            headers.of_event(kind, collection.headers, 0 if change is None else change.ts),
            tombstones=False,
        )


def _key(table: Table) -> tuple[str, int]:
    return table.task_uid, table.collection_id


def _optional(text: str, field: str) -> TopicTemplate | None:
    return TopicTemplate(text, field) if text else None


def _check_combinations(spec: sink_kafka_pb2.KafkaSink, exactly_once: bool) -> None:
    """Options that have no meaning without another one."""
    for name, there, wants in (
        ("heartbeat_interval", spec.HasField("heartbeat_interval"), bool(spec.heartbeat_topic)),
        ("transactions", spec.HasField("transactions"), exactly_once),
    ):
        if there and not wants:
            needs = "heartbeat_topic" if name == "heartbeat_interval" else "exactly-once delivery"
            raise UserError(
                "INVALID_FIELD",
                f"{FIELD}.{name} has no meaning without {needs}",
                field=f"{FIELD}.{name}",
            )
