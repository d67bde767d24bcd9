"""Rows into Kafka by the writer: CPU per row of each format, and pace against raw librdkafka and
between the two deliveries.

The rival gets keys, values and headers ready-made, as the writer made them, and the writer's own
settings of the library; it hears of failures only. Contenders take turns, each run writes a topic
of its own, and is counted at the broker. CPU is that of this process, which reads no source.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from milvus_cdc.format.registry import open_format
from milvus_cdc.rows import Changes, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import KafkaWriter, headers, settings
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import format_pb2, sink_kafka_pb2

from benchmarks.changes import ROUNDS, Spent, requests, spent, table, write
from tests.servers import KafkaServer
from tests.servers.registry import SchemaRegistryServer

PARTITIONS = 4
AT_LEAST_ONCE, EXACTLY_ONCE, RAW = "at least once", "exactly once", "raw librdkafka"
COMPARED_DELIVERIES = "Avro"
SMALL_DIM = 128
"""Up to it text is measured and deliveries are compared, where what a record costs counts most."""
_ROOM_SECONDS = 0.005
_SECRETS = SecretResolver(env_prefix="BENCH_", environ={})

Encoded = list[tuple[headers.Headers, list[bytes], list[bytes | None]]]
"""Keys and values of the rows of each request."""


@dataclass(frozen=True, slots=True)
class KafkaFigures:
    """The best of some rounds of one contender."""

    format: str
    contender: str
    dim: int
    rows: int
    rate: float
    cpu_per_million: float
    ratio: float | None
    """Of its pace to that of raw librdkafka, of exactly once to that of at least once."""


def measure(dims: Sequence[int], rows: int, say: Callable[[str], None]) -> list[KafkaFigures]:
    """On a broker of its own; `rows` are those of dimension 128."""
    figures: list[KafkaFigures] = []
    with (
        tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder,
        KafkaServer(Path(folder)) as server,
        SchemaRegistryServer() as registry,
    ):
        broker = _Broker(server.brokers)
        for dim in dims:
            count = rows * 128 // max(dim, 128)
            changes = requests(count, dim)
            for name, format in _formats(registry.url).items():
                binary = name in ("Avro", "Protobuf")
                if binary or dim <= SMALL_DIM:
                    say(f"Kafka sink: {name}, dimension {dim}")
                    case = _Case(broker, name, format, dim, changes)
                    figures += asyncio.run(case.measure(binary))
    return figures


def _formats(registry_url: str) -> dict[str, format_pb2.Format]:
    registry = format_pb2.SchemaRegistry(url=registry_url)
    return {
        "flat JSON": format_pb2.Format(flat_json=format_pb2.FlatJson()),
        "Debezium JSON": format_pb2.Format(debezium_json=format_pb2.DebeziumJson()),
        "Avro": format_pb2.Format(avro=format_pb2.AvroFormat(registry=registry)),
        "Protobuf": format_pb2.Format(protobuf=format_pb2.ProtobufFormat(registry=registry)),
    }


class _Broker:
    """Topics, made and looked at beside the contenders."""

    def __init__(self, brokers: str) -> None:
        self.brokers = brokers
        self._admin = AdminClient({"bootstrap.servers": brokers, "log_level": "0"})

    def create(self, topic: str) -> None:
        self._admin.create_topics([NewTopic(topic, PARTITIONS)])[topic].result(30)

    def delete(self, topic: str) -> None:
        self._admin.delete_topics([topic])[topic].result(30)

    def records(self, topic: str) -> int:
        """Or more: the ends of transactions count, too."""
        # Otherwise a commit's end, which comes a moment after it is told, hides rows.
        isolation = {"isolation.level": "read_uncommitted"}
        reader = Consumer({"bootstrap.servers": self.brokers, "group.id": "count", **isolation})
        try:
            places = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
            return sum(reader.get_watermark_offsets(place, 30)[1] for place in places)
        finally:
            reader.close()


class _Case:
    """One format and dimension."""

    def __init__(
        self,
        broker: _Broker,
        name: str,
        format: format_pb2.Format,
        dim: int,
        changes: list[Changes],
    ) -> None:
        self._broker = broker
        self._name = name
        self._format = format
        self._dim = dim
        self._topic = f"{name.replace(' ', '-')}-{dim}"
        self._changes = changes
        self._rows = sum(each.num_rows for each in changes)
        self._encoded: Encoded = []
        self._runs = 0

    async def measure(self, binary: bool) -> list[KafkaFigures]:
        contenders: dict[str, Callable[[Table], Awaitable[Spent]]] = {
            AT_LEAST_ONCE: lambda target: self._writer(target, exactly_once=False)
        }
        if binary:
            self._encoded = await self._encode()
            contenders[RAW] = self._raw
        if self._name == COMPARED_DELIVERIES and self._dim <= SMALL_DIM:
            contenders[EXACTLY_ONCE] = lambda target: self._writer(target, exactly_once=True)
        best = dict.fromkeys(contenders, Spent())
        for _ in range(ROUNDS):
            for contender, run in contenders.items():
                best[contender] = best[contender].best(await self._counted(run))
        return [
            KafkaFigures(
                self._name,
                contender,
                self._dim,
                self._rows,
                self._rows / seen.seconds,
                seen.cpu / self._rows * 1e6,
                _ratio(contender, best),
            )
            for contender, seen in best.items()
        ]

    async def _counted(self, run: Callable[[Table], Awaitable[Spent]]) -> Spent:
        self._runs += 1
        name = f"{self._topic}-{self._runs}"
        target = table(self._dim, name, self._runs)
        seen = await run(target)
        if (found := self._broker.records(name)) < self._rows:
            raise RuntimeError(f"{found:,} of {self._rows:,} rows are in topic {name}")
        self._broker.delete(name)
        return seen

    def _spec(self, *, exactly_once: bool = False) -> sink_kafka_pb2.KafkaSink:
        return sink_kafka_pb2.KafkaSink(
            brokers=[self._broker.brokers],
            topic="{collection}",
            format=self._format,
            create_topics=sink_kafka_pb2.KafkaTopicCreation(partitions=PARTITIONS),
            delivery=(
                sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
                if exactly_once
                else sink_kafka_pb2.KAFKA_DELIVERY_AT_LEAST_ONCE
            ),
        )

    async def _writer(self, target: Table, *, exactly_once: bool) -> Spent:
        writer = KafkaWriter(self._spec(exactly_once=exactly_once), _SECRETS)
        try:
            await writer.open(target, Opening.NEW, 1)
            return await spent(lambda: write(writer, target, self._changes))
        finally:
            await writer.close()

    async def _encode(self) -> Encoded:
        target = table(self._dim, f"ready-made-{self._topic}")
        format = open_format(self._format, _SECRETS, "format")
        try:
            await format.prepare(target, target.collection)
            shared = headers.of_table(target, format.content_type)
            made: Encoded = []
            for each in self._changes:
                # A copy: the original would keep its columns once they are decoded.
                records = format.encode(target, replace(each))
                own = headers.of_changes(each, target, shared)
                keys = [record.key or b"" for record in records]
                made.append((own, keys, [record.value for record in records]))
            return made
        finally:
            await format.close()

    async def _raw(self, target: Table) -> Spent:
        self._broker.create(target.collection)
        return await spent(lambda: asyncio.to_thread(self._produce, target.collection))

    def _produce(self, topic: str) -> None:
        failures: list[object] = []
        spec = self._spec()
        producer: Any = Producer(
            {
                **settings.producer(spec, settings.connection(spec, _SECRETS)),
                "delivery.report.only.error": True,
                "on_delivery": lambda error, _: failures.append(error),
            }
        )
        produce, poll = producer.produce, producer.poll
        for own, keys, values in self._encoded:
            for key, value in zip(keys, values, strict=True):
                while True:
                    try:
                        produce(topic, value, key, headers=own)
                        break
                    except BufferError:
                        poll(_ROOM_SECONDS)
            poll(0)
        left = producer.flush(60)
        if failures or left:
            raise RuntimeError(f"{left} records not delivered, or failed: {failures[:1]}")


def _ratio(contender: str, best: dict[str, Spent]) -> float | None:
    rival = {AT_LEAST_ONCE: RAW, EXACTLY_ONCE: AT_LEAST_ONCE}.get(contender)
    return best[rival].seconds / best[contender].seconds if rival in best else None
