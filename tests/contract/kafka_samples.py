"""What the Kafka writer's tests write, and how they read it back."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from confluent_kafka import Consumer, KafkaError, TopicPartition
from google.protobuf import duration_pb2
from milvus_cdc.format import Record
from milvus_cdc.model import ms_to_tso
from milvus_cdc.rows import ChangeOp, Changes, Field, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.writer import Batch, Checkpoint, SchemaChange
from milvuscdc.v1 import sink_kafka_pb2

VCHANNEL = "by-dev-rootcoord-dml_0_7v0"
BEGIN = ms_to_tso(1_700_000_000_000)


class LineFormat:
    """A column is a row here, `key=value`; a delete has the value "-"."""

    content_type = "text/plain"

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        pass

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        if changes.op is ChangeOp.DELETE:
            assert changes.delete_keys is not None
            return [Record(str(key).encode(), b"-") for key in changes.delete_keys]
        pairs = (column.split(b"=", 1) for column in changes.columns)
        return [Record(key, value, (("line", b"1"),)) for key, value in pairs]

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        what = "CREATED" if change is None else change.kind.value
        return Record(table.full_name.encode(), what.encode())

    async def close(self) -> None:
        pass


def table_named(
    collection: str, *, database: str = "default", collection_id: int = 7, task_uid: str = ""
) -> Table:
    return Table(
        task="tasks/t",
        task_uid=task_uid or collection,
        collection_id=collection_id,
        source_database=database,
        source_collection=collection,
        database=database,
        collection=collection,
        fields=(Field(100, "id", FieldType.VARCHAR, primary_key=True),),
    )


def some_table() -> Table:
    """Of a collection that no other test has."""
    return table_named(f"c{uuid.uuid4().hex[:12]}")


def upserts(
    ts: int, *rows: tuple[object, object], vchannel: str = VCHANNEL, order: int = 0
) -> Changes:
    lines = tuple(f"{key}={value}".encode() for key, value in rows)
    return Changes(ChangeOp.UPDATE, BEGIN + ts, vchannel, order or ts, "", len(lines), lines)


def deletes(ts: int, *keys: str, vchannel: str = VCHANNEL) -> Changes:
    return Changes(ChangeOp.DELETE, BEGIN + ts, vchannel, ts, "", len(keys), delete_keys=keys)


def reached(ts: int, vchannel: str = VCHANNEL) -> Checkpoint:
    return Checkpoint(vchannel, ts.to_bytes(8, "little"), BEGIN + ts)


def batch(*changes: Changes, upto: int = 0) -> Batch:
    return Batch(changes, (reached(upto),) if upto else ())


def spec_for(brokers: str, **options: object) -> sink_kafka_pb2.KafkaSink:
    """Topics of three partitions are made, unless `create_topics` says otherwise."""
    options.setdefault("create_topics", sink_kafka_pb2.KafkaTopicCreation(partitions=3))
    if options["create_topics"] is None:
        del options["create_topics"]
    return sink_kafka_pb2.KafkaSink(brokers=[brokers], **options)  # type: ignore[arg-type]


def writer_for(brokers: str, *, exactly_once: bool = False, **options: object) -> KafkaWriter:
    """One that writes lines."""
    if exactly_once:
        options["delivery"] = sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
    writer = KafkaWriter(spec_for(brokers, **options), SecretResolver(env_prefix="TEST_"))
    writer._format = LineFormat()
    return writer


def seconds(value: int) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=value)


@dataclass
class Read:
    """One record of a topic."""

    key: str
    value: str | None
    partition: int
    headers: dict[str, str] = field(default_factory=dict)


def read_all(brokers: str, topic: str, *, committed: bool = True) -> list[Read]:
    """Everything, per partition in order."""
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "reader",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "isolation.level": "read_committed" if committed else "read_uncommitted",
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
        ended: set[int] = set()
        found: list[Read] = []
        deadline = time.monotonic() + 20
        while len(ended) < len(partitions):
            assert time.monotonic() < deadline, f"{topic} has no end"
            message = consumer.poll(0.5)
            if message is None:
                continue
            if message.error() is not None:
                assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                ended.add(message.partition())
                continue
            value = message.value()
            found.append(
                Read(
                    message.key().decode(),
                    value.decode() if value is not None else None,
                    message.partition(),
                    {name: data.decode() for name, data in message.headers() or []},
                )
            )
        return sorted(found, key=lambda each: each.partition)
    finally:
        consumer.close()


def topic_of(table: Table) -> str:
    return f"milvus.{table.database}.{table.collection}"
