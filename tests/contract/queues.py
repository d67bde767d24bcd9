"""Queues with one topic that a test may do anything to, all with the same handles."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Protocol
from uuid import uuid4

import nats
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)
from milvus_cdc.source import KafkaConfig, LogSource, NatsConfig
from milvus_cdc.source.memory import MemorySource
from milvus_cdc.source.positions import decode, encode
from milvus_cdc.source.registry import open_source

from tests.servers import Stack


class Queue(Protocol):
    source: LogSource
    topic: str
    place: bytes
    """A position of this queue, wherever it may be."""
    foreign: bytes
    """None of this queue."""
    repeats: bool
    """A topic made again has the positions of the old one."""

    def beyond(self, end: bytes) -> list[bytes]:
        """Positions behind the log's end."""
        ...

    async def create(self) -> None: ...
    async def append(self, *payloads: bytes, streaming: bool = False) -> None: ...
    async def truncate(self, first: bytes) -> None:
        """Removes everything before `first`."""
        ...

    async def limit(self, *, age_ms: int, size: int) -> None:
        """What the queue is told to keep."""
        ...

    async def delete(self) -> None: ...
    async def stop_server(self) -> None: ...
    async def start_server(self) -> None: ...


class _Numbered:
    place = encode(1)
    foreign = b"\x08\x01\x10\x02"
    repeats = True

    def beyond(self, end: bytes) -> list[bytes]:
        return [encode(decode(end) + 1), b"\xff" * 8]


class MemoryQueue(_Numbered):
    def __init__(self) -> None:
        self._memory = MemorySource()
        self.source: LogSource = self._memory
        self.topic = "t"

    async def create(self) -> None:
        self._memory.create(self.topic)

    async def append(self, *payloads: bytes, streaming: bool = False) -> None:
        for payload in payloads:
            self._memory.append(self.topic, payload, streaming=streaming, traceparent="00-x")

    async def truncate(self, first: bytes) -> None:
        self._memory.truncate(self.topic, first)

    async def limit(self, *, age_ms: int, size: int) -> None:
        topic = self._memory._topics[self.topic]
        topic.max_age_ms, topic.max_bytes = age_ms, size

    async def delete(self) -> None:
        self._memory.delete(self.topic)

    async def stop_server(self) -> None:
        self._memory.set_down(True)

    async def start_server(self) -> None:
        self._memory.set_down(False)


class NatsQueue(_Numbered):
    """A stream of the test's own beside those of a real Milvus, made the way Milvus makes them."""

    def __init__(self, stack: Stack, topic: str = "") -> None:
        self._stack = stack
        self._url = stack.source.nats_url
        self.source = open_source(NatsConfig(self._url))
        self.topic = topic or f"contract-{uuid4().hex}"

    @contextlib.asynccontextmanager
    async def _js(self) -> AsyncIterator[nats.js.JetStreamContext]:
        client = await nats.connect(self._url)
        try:
            yield client.jetstream()
        finally:
            await client.close()

    async def create(self) -> None:
        async with self._js() as js:
            await js.add_stream(name=self.topic, subjects=[self.topic], max_age=259_200)

    async def append(self, *payloads: bytes, streaming: bool = False) -> None:
        headers = {"traceparent": "00-x"} | ({"_v": "1"} if streaming else {})
        async with self._js() as js:
            for payload in payloads:
                await js.publish(self.topic, payload, headers=headers)

    async def truncate(self, first: bytes) -> None:
        async with self._js() as js:
            await js.purge_stream(self.topic, seq=decode(first))

    async def limit(self, *, age_ms: int, size: int) -> None:
        async with self._js() as js:
            await js.update_stream(
                name=self.topic, subjects=[self.topic], max_age=age_ms / 1000, max_bytes=size
            )

    async def delete(self) -> None:
        async with self._js() as js:
            await js.delete_stream(self.topic)

    async def stop_server(self) -> None:
        await asyncio.to_thread(self._stack.source.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self._stack.source.start)


class KafkaQueue(_Numbered):
    def __init__(self, stack: Stack, topic: str = "") -> None:
        assert stack.kafka is not None
        self._stack = stack
        self._server = stack.kafka
        self._settings = {"bootstrap.servers": stack.kafka.brokers, "log_level": "0"}
        self._admin = AdminClient(self._settings)
        self.source = open_source(KafkaConfig((stack.kafka.brokers,)))
        self.topic = topic or f"contract-{uuid4().hex}"

    async def create(self) -> None:
        def create() -> None:
            # A topic just deleted may still be going.
            for _ in range(50):
                answer = self._admin.create_topics([NewTopic(self.topic, 1, 1)])[self.topic]
                if answer.exception(10) is None:
                    break
            # Shortly after, the partition may have no leader yet.
            partition = {TopicPartition(self.topic, 0): OffsetSpec.latest()}
            for _ in range(50):
                (answer,) = self._admin.list_offsets(partition).values()
                if answer.exception(10) is None:
                    return
                time.sleep(0.1)
            raise answer.exception() or RuntimeError

        await asyncio.to_thread(create)

    async def append(self, *payloads: bytes, streaming: bool = False) -> None:
        def produce() -> None:
            # As Milvus' producer does.
            producer = Producer(
                self._settings | {"compression.codec": "zstd", "message.max.bytes": 10_485_760}
            )
            for payload in payloads:
                producer.produce(
                    self.topic,
                    payload,
                    partition=0,
                    headers=[("traceparent", b"00-x")] + ([("_v", b"1")] if streaming else []),
                )
            assert producer.flush(20) == 0

        await asyncio.to_thread(produce)

    async def truncate(self, first: bytes) -> None:
        def truncate() -> None:
            partition = TopicPartition(self.topic, 0, decode(first))
            for answer in self._admin.delete_records([partition]).values():
                answer.result(10)

        await asyncio.to_thread(truncate)

    async def limit(self, *, age_ms: int, size: int) -> None:
        def alter() -> None:
            values = {"retention.ms": age_ms, "retention.bytes": size}
            resource = ConfigResource(
                ResourceType.TOPIC,
                self.topic,
                incremental_configs=[
                    ConfigEntry(name, str(value), incremental_operation=AlterConfigOpType.SET)
                    for name, value in values.items()
                ],
            )
            for answer in self._admin.incremental_alter_configs([resource]).values():
                answer.result(10)

        await asyncio.to_thread(alter)

    async def delete(self) -> None:
        def delete() -> None:
            for answer in self._admin.delete_topics([self.topic]).values():
                answer.result(10)

        await asyncio.to_thread(delete)

    async def stop_server(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self._server.start)
