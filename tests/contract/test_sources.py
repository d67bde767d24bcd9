"""What every queue adapter promises its readers, on real queues and on the one in memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Protocol
from uuid import uuid4

import nats
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from milvus_cdc.errors import BugError, LogResetError, LogTruncatedError, RetryableError
from milvus_cdc.source import (
    KafkaConfig,
    LogEntry,
    LogReader,
    LogSource,
    NatsConfig,
)
from milvus_cdc.source.memory import MemorySource
from milvus_cdc.source.positions import decode, encode
from milvus_cdc.source.registry import open_source

from tests.servers import Stack

MANY = 4 * 1024 * 1024


class Queue(Protocol):
    """A queue with one topic that the test may do anything to."""

    source: LogSource
    topic: str

    async def create(self) -> None: ...
    async def append(self, *payloads: bytes, streaming: bool = False) -> None: ...
    async def truncate(self, first: bytes) -> None:
        """Removes everything before `first`."""
        ...

    async def delete(self) -> None: ...
    async def stop_server(self) -> None: ...
    async def start_server(self) -> None: ...


class MemoryQueue:
    def __init__(self) -> None:
        self._memory = MemorySource()
        self.source: LogSource = self._memory
        self.topic = "t"

    async def create(self) -> None:
        self._memory.create(self.topic)

    async def append(self, *payloads: bytes, streaming: bool = False) -> None:
        for payload in payloads:
            self._memory.append(self.topic, payload, streaming=streaming)

    async def truncate(self, first: bytes) -> None:
        self._memory.truncate(self.topic, first)

    async def delete(self) -> None:
        self._memory.delete(self.topic)

    async def stop_server(self) -> None:
        self._memory.set_down(True)

    async def start_server(self) -> None:
        self._memory.set_down(False)


class NatsQueue:
    """A stream of the test's own beside those of a real Milvus, made the way Milvus makes them."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._url = stack.source.nats_url
        self.source = open_source(NatsConfig(self._url))
        self.topic = f"contract-{uuid4().hex}"

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

    async def delete(self) -> None:
        async with self._js() as js:
            await js.delete_stream(self.topic)

    async def stop_server(self) -> None:
        await asyncio.to_thread(self._stack.source.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self._stack.source.start)


class KafkaQueue:
    def __init__(self, stack: Stack) -> None:
        assert stack.kafka is not None
        self._stack = stack
        self._server = stack.kafka
        self._settings = {"bootstrap.servers": stack.kafka.brokers, "log_level": "0"}
        self._admin = AdminClient(self._settings)
        self.source = open_source(KafkaConfig((stack.kafka.brokers,)))
        self.topic = f"contract-{uuid4().hex}"

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

    async def delete(self) -> None:
        def delete() -> None:
            for answer in self._admin.delete_topics([self.topic]).values():
                answer.result(10)

        await asyncio.to_thread(delete)

    async def stop_server(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self._server.start)


@pytest.fixture(params=["memory", "nats", pytest.param("kafka", marks=pytest.mark.kafka)])
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    queue: Queue
    match request.param:
        case "memory":
            queue = MemoryQueue()
        case "nats":
            queue = NatsQueue(request.getfixturevalue("nats_stack"))
        case _:
            queue = KafkaQueue(request.getfixturevalue("kafka_stack"))
    await queue.create()
    yield queue
    await queue.source.close()
    with contextlib.suppress(Exception):
        await queue.delete()


async def read_all(reader: LogReader, count: int, max_bytes: int = MANY) -> list[LogEntry]:
    entries: list[LogEntry] = []
    async with asyncio.timeout(30):
        while len(entries) < count:
            entries += await reader.read(max_bytes, 1.0)
    return entries


async def read_until_error(reader: LogReader) -> None:
    async with asyncio.timeout(60):
        while True:
            assert await reader.read(MANY, 0.5) == []


async def beginning(queue: Queue) -> LogReader:
    return await queue.source.open(queue.topic, (await queue.source.log_range(queue.topic)).first)


def payloads(entries: list[LogEntry]) -> list[bytes]:
    return [entry.payload for entry in entries]


NUMBERS = [b"%d" % n for n in range(20)]


async def test_reads_from_a_position_inclusive_in_order_and_waits_at_the_end(
    queue: Queue,
) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    entries = await read_all(reader, 20)
    assert payloads(entries) == NUMBERS
    orders = [queue.source.order(entry.position) for entry in entries]
    assert orders == sorted(set(orders))
    assert await reader.read(MANY, 0.05) == []
    again = await queue.source.open(queue.topic, entries[7].position)
    assert await read_all(again, 13) == entries[7:]
    waiting = asyncio.create_task(reader.read(MANY, 20))
    await asyncio.sleep(0.05)
    await queue.append(b"late")
    assert payloads(await waiting) == [b"late"]
    await reader.close()
    await again.close()


async def test_the_range_is_first_and_next(queue: Queue) -> None:
    empty = await queue.source.log_range(queue.topic)
    assert empty.first == empty.end
    await queue.append(*NUMBERS)
    full = await queue.source.log_range(queue.topic)
    assert full.first == empty.first
    assert queue.source.order(full.end) == queue.source.order(full.first) + 20
    reader = await queue.source.open(queue.topic, full.end)
    assert await reader.read(MANY, 0.05) == []
    await queue.append(b"next")
    (entry,) = await read_all(reader, 1)
    assert (entry.position, entry.payload) == (full.end, b"next")
    await reader.close()


async def test_a_read_stops_near_its_bytes_and_large_entries_come_all_the_same(
    queue: Queue,
) -> None:
    sizes = [1, 900_000, 5, 300_000, 0, 700_000] * 3
    await queue.append(*(bytes([n]) * size for n, size in enumerate(sizes)))
    reader = await beginning(queue)
    got: list[bytes] = []
    async with asyncio.timeout(30):
        while len(got) < len(sizes):
            entries = await reader.read(200_000, 5.0)
            assert len(entries) == 1 or sum(len(e.payload) for e in entries) <= 200_000
            got += payloads(entries)
    assert got == [bytes([n]) * size for n, size in enumerate(sizes)]
    await reader.close()


async def test_a_cancelled_read_loses_nothing(queue: Queue) -> None:
    reader = await beginning(queue)
    got: list[bytes] = []
    for n in range(20):
        reading = asyncio.create_task(reader.read(MANY, 5))
        await asyncio.sleep(0.002 * (n % 3))
        await queue.append(b"%d" % n)
        await asyncio.sleep(0.001 * (n % 5))
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            got += payloads(await reading)
    if len(got) < 20:
        got += payloads(await read_all(reader, 20 - len(got)))
    assert got == NUMBERS
    await reader.close()


async def test_streaming_entries_are_marked(queue: Queue) -> None:
    await queue.append(b"old")
    await queue.append(b"new", streaming=True)
    reader = await beginning(queue)
    assert [e.streaming for e in await read_all(reader, 2)] == [False, True]
    await reader.close()


async def test_opening_before_the_first_entry_is_an_error_naming_it(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    entries = await read_all(reader, 20)
    await reader.close()
    await queue.truncate(entries[5].position)
    first = queue.source.order(entries[5].position)
    with pytest.raises(LogTruncatedError, match=rf"\b{first}\b"):
        await queue.source.open(queue.topic, entries[4].position)
    kept = await queue.source.open(queue.topic, entries[5].position)
    assert await read_all(kept, 15) == entries[5:]
    await kept.close()


async def test_a_reader_the_log_was_cut_under_never_jumps(queue: Queue) -> None:
    await queue.append(*NUMBERS[:5])
    reader = await beginning(queue)
    await read_all(reader, 5)
    await reader.close()
    end = (await queue.source.log_range(queue.topic)).end
    late = await queue.source.open(queue.topic, end)
    await queue.append(*NUMBERS[5:])
    await queue.truncate((await queue.source.log_range(queue.topic)).end)
    with pytest.raises(LogTruncatedError):
        await read_until_error(late)
    await late.close()


async def test_a_position_beyond_the_end_is_a_reset(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    end = (await queue.source.log_range(queue.topic)).end
    with pytest.raises(LogResetError):
        await queue.source.open(queue.topic, encode(decode(end) + 1))
    with pytest.raises(LogResetError):
        await queue.source.open(queue.topic, b"\xff" * 8)


async def test_a_missing_topic_is_a_reset(queue: Queue) -> None:
    with pytest.raises(LogResetError, match="does not exist"):
        await queue.source.open("no-such-topic", encode(1))
    with pytest.raises(LogResetError, match="does not exist"):
        await queue.source.log_range("no-such-topic")


async def test_a_topic_made_again_is_a_reset_for_open_readers_and_new_ones(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    entries = await read_all(reader, 20)
    await queue.delete()
    await queue.create()
    with pytest.raises(LogResetError):
        await read_until_error(reader)
    await queue.append(*NUMBERS, *NUMBERS)
    with pytest.raises(LogResetError, match="made again"):
        await queue.source.open(queue.topic, entries[3].position)
    await reader.close()


async def test_a_reader_survives_its_server(queue: Queue) -> None:
    await queue.append(*NUMBERS[:10])
    reader = await beginning(queue)
    assert payloads(await read_all(reader, 10)) == NUMBERS[:10]
    await queue.stop_server()
    try:
        with pytest.raises(RetryableError):
            await read_until_error(reader)
        with pytest.raises(RetryableError):
            await queue.source.log_range(queue.topic)
        with pytest.raises(RetryableError):
            await queue.source.probe()
    finally:
        await queue.start_server()
    await queue.source.probe()
    await queue.append(*NUMBERS[10:])
    got: list[bytes] = []
    async with asyncio.timeout(30):
        while len(got) < 10:
            with contextlib.suppress(RetryableError):
                got += payloads(await reader.read(MANY, 1.0))
    assert got == NUMBERS[10:]
    await reader.close()


async def test_readers_do_not_disturb_each_other(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    one, other = await beginning(queue), await beginning(queue)
    first = await one.read(MANY, 5)
    assert payloads(await read_all(other, 20)) == NUMBERS
    await other.close()
    assert payloads(first + await read_all(one, 20 - len(first))) == NUMBERS
    await one.close()


async def test_a_position_of_another_queue_is_refused(queue: Queue) -> None:
    with pytest.raises(BugError, match="BAD_POSITION"):
        await queue.source.open(queue.topic, b"\x08\x01\x10\x02")


async def test_nobody_listening_is_retryable() -> None:
    for config in (NatsConfig("nats://127.0.0.1:9"), KafkaConfig(("127.0.0.1:9",))):
        source = open_source(config)
        with pytest.raises(RetryableError, match="QUEUE_UNREACHABLE"):
            await source.probe()
        await source.close()


async def test_a_nats_reader_holds_no_more_than_was_asked_for(nats_stack: Stack) -> None:
    queue = NatsQueue(nats_stack)
    await queue.create()
    await queue.append(*[bytes(500_000)] * 20)
    reader = await beginning(queue)
    assert await reader.read(1_000_000, 5)
    client = await nats.connect(nats_stack.source.nats_url)
    # Time enough to pull everything, for a reader that would.
    await asyncio.sleep(1)
    (consumer,) = await client.jetstream().consumers_info(queue.topic)
    assert consumer.delivered is not None
    assert consumer.delivered.stream_seq <= 5
    assert len(await read_all(reader, 19)) == 19
    await client.close()
    await reader.close()
    await queue.source.close()
    await queue.delete()


async def test_a_nats_reader_whose_consumer_is_forgotten_makes_a_new_one(
    nats_stack: Stack,
) -> None:
    queue = NatsQueue(nats_stack)
    await queue.create()
    await queue.append(*NUMBERS[:10])
    reader = await beginning(queue)
    assert payloads(await read_all(reader, 10)) == NUMBERS[:10]
    client = await nats.connect(nats_stack.source.nats_url)
    stream = client.jetstream()
    for consumer in await stream.consumers_info(queue.topic):
        await stream.delete_consumer(queue.topic, consumer.name)
    await queue.append(*NUMBERS[10:])
    assert payloads(await read_all(reader, 10)) == NUMBERS[10:]
    await client.close()
    await reader.close()
    await queue.source.close()
    await queue.delete()
