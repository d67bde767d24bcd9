"""Every sink of ours passes the contract that its authors ship (`milvus_cdc.testing`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from milvus_cdc.rows import Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import FileWriter
from milvus_cdc.sink.files.reading import find_collections, open_store
from milvus_cdc.sink.files.store import LocalStore
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.memory_writer import DESTINATIONS, MemoryDestination, MemoryWriter
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.writer import Writer
from milvus_cdc.testing.samples import row
from milvus_cdc.testing.writer_contract import Seen, State, WriterContract
from milvuscdc.v1 import sink_file_pb2, sink_kafka_pb2

from tests.contract.postgres_samples import Database
from tests.servers import KafkaServer, PostgresServer

SECRETS = SecretResolver(env_prefix="TEST_")


class InMemory(WriterContract):
    own_checkpoint: bool

    @pytest.fixture(autouse=True)
    def _destination(self) -> Iterator[None]:
        self.name = uuid.uuid4().hex
        self.there = DESTINATIONS[self.name] = MemoryDestination()
        yield
        del DESTINATIONS[self.name]

    def make_writer(self) -> Writer:
        return MemoryWriter({"destination": self.name, "own_checkpoint": self.own_checkpoint})

    async def state(self, table: Table) -> State:
        held = self.there.held(table)
        return {} if held is None else {key: each for key, (_, each) in held.rows.items()}

    async def history(self, table: Table) -> list[Seen] | None:
        held = self.there.held(table)
        return [] if held is None else list(itertools.starmap(Seen, held.history))

    def stalled(self, table: Table) -> contextlib.AbstractAsyncContextManager[None]:
        return self.there.stalled()


class TestMemory(InMemory):
    own_checkpoint = False


class TestMemoryWithCheckpoint(InMemory):
    own_checkpoint = True


class TestPostgres(WriterContract):
    @pytest.fixture(autouse=True)
    def _database(self, postgres_server: PostgresServer) -> None:
        self.database = Database.fresh(postgres_server)

    def make_writer(self) -> PostgresWriter:
        return self.database.writer()

    async def state(self, table: Table) -> State:
        return await asyncio.to_thread(self._state, table)

    def _state(self, table: Table) -> State:
        place = f'"{table.database}"."{table.collection}"'
        # A table of that name may be another collection's.
        [(there,)] = self.database.select("SELECT to_regclass('milvus_cdc.collections')")
        mine = there and self.database.select(
            "SELECT 1 FROM milvus_cdc.collections WHERE task_uid = %s AND collection_id = %s",
            table.task_uid,
            table.collection_id,
        )
        if not mine:
            return {}
        names = ("id", "v", "n", "s")
        found = self.database.select(f"SELECT id, v::real[], n, s FROM {place}")
        return {each[0]: dict(zip(names, each, strict=True)) for each in found}

    @contextlib.asynccontextmanager
    async def stalled(self, table: Table) -> AsyncIterator[None]:
        place = f'"{table.database}"."{table.collection}"'
        with self.database.server.connect(self.database.name) as connection:
            connection.autocommit = False
            connection.execute(f"LOCK TABLE {place} IN ACCESS EXCLUSIVE MODE")
            yield
            connection.rollback()


class Files(WriterContract):
    """Both forms of file; the reader is ours for Parquet, and the manifests with json for lines."""

    spec: sink_file_pb2.FileSink

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = tmp_path
        self.monkeypatch = monkeypatch

    def make_writer(self) -> FileWriter:
        spec = sink_file_pb2.FileSink(uri=f"file://{self.folder}")
        spec.MergeFrom(self.spec)
        return FileWriter(spec, SECRETS)

    @contextlib.asynccontextmanager
    async def stalled(self, table: Table) -> AsyncIterator[None]:
        gate = threading.Event()
        real = LocalStore.put

        def put(store: LocalStore, *arguments: Any, **options: Any) -> None:
            gate.wait(60)
            real(store, *arguments, **options)

        with self.monkeypatch.context() as patch:
            patch.setattr(LocalStore, "put", put)
            try:
                yield
            finally:
                gate.set()


class TestParquetFiles(Files):
    spec = sink_file_pb2.FileSink(parquet=sink_file_pb2.ParquetFiles())

    async def state(self, table: Table) -> State:
        return {
            each["id"]: {name: each[name] for name in row(0, 0)}
            for history in self._histories(table)
            for each in history.state().to_pylist()
        }

    async def history(self, table: Table) -> list[Seen] | None:
        return [
            Seen(
                each["id"],
                None if each["_op"] == "DELETE" else {name: each[name] for name in row(0, 0)},
            )
            for history in self._histories(table)
            for batch in history.changes()
            for each in batch.to_pylist()
        ]

    def _histories(self, table: Table) -> list[Any]:
        return [
            each.history()
            for each in find_collections(open_store(f"file://{self.folder}"))
            if (each.head.task_uid, each.head.collection_id)
            == (table.task_uid, table.collection_id)
        ]


@pytest.fixture(scope="module")
def broker(
    tmp_path_factory: pytest.TempPathFactory, kafka_available: None
) -> Iterator[KafkaServer]:
    """Of its own: it is paused in between."""
    with KafkaServer(tmp_path_factory.mktemp("kafka-contract")) as server:
        yield server


@pytest.mark.kafka
class Kafka(WriterContract):
    forgets = False
    delivery: sink_kafka_pb2.KafkaDelivery.ValueType

    @pytest.fixture(autouse=True)
    def _broker(self, broker: KafkaServer) -> None:
        self.broker = broker

    def make_writer(self) -> KafkaWriter:
        spec = sink_kafka_pb2.KafkaSink(
            brokers=[self.broker.brokers],
            create_topics=sink_kafka_pb2.KafkaTopicCreation(partitions=3),
            delivery=self.delivery,
        )
        return KafkaWriter(spec, SECRETS)

    async def history(self, table: Table) -> list[Seen] | None:
        topic = f"milvus.{table.database}.{table.collection}"
        return await asyncio.to_thread(self._history, topic)

    def _history(self, topic: str) -> list[Seen]:
        """Up to where the topic ends now: what was committed is seen a moment later."""
        ends: dict[int, int] = {}
        with self._consumer("read_uncommitted") as any_record:
            known = any_record.list_topics(topic, timeout=10).topics[topic]
            for partition in known.partitions if known.error is None else ():
                place = TopicPartition(topic, partition)
                ends[partition] = any_record.get_watermark_offsets(place, timeout=10)[1]
        found: list[Seen] = []
        with self._consumer("read_committed") as consumer:
            consumer.assign([TopicPartition(topic, each, 0) for each in ends])
            deadline = time.monotonic() + 20
            while ends:
                assert time.monotonic() < deadline, f"{topic} has no end"
                message = consumer.poll(0.5)
                if message is None:
                    continue
                if message.error() is None:
                    value = message.value()
                    key = json.loads(message.key())
                    found.append(Seen(key, None if value is None else json.loads(value)))
                    continue
                assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                partition = message.partition()
                if message.offset() >= ends.get(partition, 0):
                    ends.pop(partition, None)
                else:
                    consumer.seek(TopicPartition(topic, partition, message.offset()))
        return found

    @contextlib.contextmanager
    def _consumer(self, isolation: str) -> Iterator[Consumer]:
        consumer = Consumer(
            {
                "bootstrap.servers": self.broker.brokers,
                "group.id": "contract",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "isolation.level": isolation,
                "fetch.wait.max.ms": 20,
                "allow.auto.create.topics": False,
            }
        )
        try:
            yield consumer
        finally:
            consumer.close()

    @contextlib.asynccontextmanager
    async def stalled(self, table: Table) -> AsyncIterator[None]:
        self.broker.pause()
        try:
            yield
        finally:
            self.broker.resume()


class TestKafka(Kafka):
    delivery = sink_kafka_pb2.KAFKA_DELIVERY_AT_LEAST_ONCE


class TestKafkaExactlyOnce(Kafka):
    delivery = sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
