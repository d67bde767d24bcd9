"""What every queue adapter promises its readers, on real queues and on the one in memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import nats
import pytest
from milvus_cdc.errors import BugError, LogResetError, LogTruncatedError, RetryableError
from milvus_cdc.source import (
    KafkaConfig,
    LogEntry,
    LogReader,
    NatsConfig,
    PulsarConfig,
)
from milvus_cdc.source.registry import open_source

from tests.contract.pulsar_queue import PulsarQueue
from tests.contract.queues import KafkaQueue, MemoryQueue, NatsQueue, Queue
from tests.servers import Stack

MANY = 4 * 1024 * 1024


@pytest.fixture(
    params=[
        "memory",
        "nats",
        pytest.param("kafka", marks=pytest.mark.kafka),
        pytest.param("pulsar", marks=pytest.mark.pulsar),
    ]
)
async def queue(request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    queue: Queue
    match request.param:
        case "memory":
            queue = MemoryQueue()
        case "nats":
            queue = NatsQueue(request.getfixturevalue("nats_stack"))
        case "pulsar":
            queue = PulsarQueue(request.getfixturevalue("pulsar_broker"))
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
    assert queue.source.behind(full.first, full.end) == 20
    reader = await queue.source.open(queue.topic, full.end)
    assert await reader.read(MANY, 0.05) == []
    await queue.append(b"next")
    (entry,) = await read_all(reader, 1)
    assert entry.payload == b"next"
    assert queue.source.order(entry.position) >= queue.source.order(full.end)
    assert queue.source.order((await queue.source.log_range(queue.topic)).end) > queue.source.order(
        entry.position
    )
    await reader.close()


async def test_a_place_is_found_by_the_time_of_its_entry(queue: Queue) -> None:
    source, topic = queue.source, queue.topic
    between = []
    for n in range(4):
        await queue.append(*NUMBERS[5 * n : 5 * n + 5])
        await asyncio.sleep(0.05)
        between.append(int(time.time() * 1000))
        await asyncio.sleep(0.05)
    found = await source.log_range(topic)
    reader = await beginning(queue)
    places = [entry.position for entry in await read_all(reader, 20)] + [found.end]
    await reader.close()
    for n, unix_ms in enumerate(between):
        assert await source.seek(topic, unix_ms) == places[5 * (n + 1)]
    assert await source.seek(topic, 0) == found.first
    assert await source.seek(topic, 1) == found.first
    assert await source.seek(topic, between[-1] + 3_600_000) == found.end
    await queue.truncate(await source.seek(topic, between[1]))
    now = await source.log_range(topic)
    assert await source.seek(topic, between[0]) == now.first
    assert now.first == places[10]
    with pytest.raises(LogResetError, match="does not exist"):
        await source.seek("no-such-topic", 1)


async def test_limits_are_those_of_the_queue(queue: Queue) -> None:
    source, topic = queue.source, queue.topic
    await queue.limit(age_ms=3_600_000, size=48 * 2**20)
    empty = await source.limits(topic)
    assert (empty.max_age_ms, empty.max_bytes) == (3_600_000, 48 * 2**20)
    assert empty.whole == queue.repeats  # Pulsar does not tell
    await queue.append(*[bytes(10_000)] * 20)
    limits = await source.limits(topic)
    assert limits.range == await source.log_range(topic)
    assert limits.whole == queue.repeats
    assert 10_000 <= limits.entry_bytes <= 11_000
    tenth = source.back(limits.range.end, 10)
    assert source.behind(tenth, limits.range.end) == 10
    await queue.truncate(tenth)
    cut = await source.limits(topic)
    assert (cut.whole, cut.range.first) == (False, tenth)
    with pytest.raises(LogResetError, match="does not exist"):
        await source.limits("no-such-topic")


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


async def test_entries_bring_the_trace_of_their_request(queue: Queue) -> None:
    await queue.append(b"one")
    reader = await beginning(queue)
    [entry] = await read_all(reader, 1)
    assert entry.traceparent == "00-x"
    await reader.close()


async def test_opening_before_the_first_entry_is_an_error_naming_it(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    entries = await read_all(reader, 20)
    await reader.close()
    await queue.truncate(entries[5].position)
    first = queue.source.text(entries[5].position)
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
    for beyond in queue.beyond(end):
        with pytest.raises(LogResetError):
            await queue.source.open(queue.topic, beyond)


async def test_a_missing_topic_is_a_reset(queue: Queue) -> None:
    with pytest.raises(LogResetError, match="does not exist"):
        await queue.source.open("no-such-topic", queue.place)
    with pytest.raises(LogResetError, match="does not exist"):
        await queue.source.log_range("no-such-topic")


async def test_a_topic_made_again_is_a_reset_for_open_readers(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    await read_all(reader, 20)
    await queue.delete()
    await queue.create()
    with pytest.raises(LogResetError):
        await read_until_error(reader)
    await reader.close()


async def test_a_position_belongs_to_an_incarnation_of_its_topic(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    reader = await beginning(queue)
    entries = await read_all(reader, 20)
    old = reader.incarnation
    assert old
    assert (await queue.source.log_range(queue.topic)).incarnation == old
    await reader.close()
    again = await queue.source.open(queue.topic, entries[3].position, old)
    assert again.incarnation == old
    await again.close()

    await queue.delete()
    await queue.create()
    await queue.append(*NUMBERS, *NUMBERS)
    with pytest.raises(LogResetError, match=rf"{queue.topic} was deleted and made again"):
        await queue.source.open(queue.topic, entries[3].position, old)
    if not queue.repeats:
        with pytest.raises(LogTruncatedError):
            await queue.source.open(queue.topic, entries[3].position)
        assert (await queue.source.log_range(queue.topic)).incarnation not in (b"", old)
        return
    fresh = await queue.source.open(queue.topic, entries[3].position)
    assert fresh.incarnation not in (b"", old)
    assert payloads(await read_all(fresh, 37)) == [*NUMBERS, *NUMBERS][3:]
    await fresh.close()


async def test_an_incarnation_outlives_its_server(queue: Queue) -> None:
    await queue.append(*NUMBERS)
    before = await queue.source.log_range(queue.topic)
    await queue.stop_server()
    await queue.start_server()
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(RetryableError):
                assert await queue.source.log_range(queue.topic) == before
                break
            await asyncio.sleep(0.2)


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
        await queue.source.open(queue.topic, queue.foreign)


async def test_nobody_listening_is_retryable() -> None:
    for config in (
        NatsConfig("nats://127.0.0.1:9"),
        KafkaConfig(("127.0.0.1:9",)),
        PulsarConfig("pulsar://127.0.0.1:9"),
    ):
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
