"""What Pulsar does to a reader beyond the contract of the queues: holes, batches, ledgers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from milvus_cdc.errors import LogResetError, LogTruncatedError, UserError
from milvus_cdc.source import LogReader
from milvus_cdc.source.pulsar_positions import decode
from milvus_cdc.source.registry import open_source

from tests.contract.pulsar_queue import LEDGER_ENTRIES, PulsarQueue
from tests.contract.test_sources import MANY, NUMBERS, beginning, payloads, read_all
from tests.servers import PulsarServer

pytestmark = pytest.mark.pulsar


@pytest.fixture(params=["with admin", "without admin"])
async def queue(
    request: pytest.FixtureRequest, pulsar_broker: PulsarServer
) -> AsyncIterator[PulsarQueue]:
    queue = PulsarQueue(pulsar_broker, admin=request.param == "with admin")
    await queue.create()
    yield queue
    await queue.source.close()
    await queue.delete()


async def failure(reader: LogReader) -> tuple[list[bytes], Exception]:
    """What it brings before it fails, and how it does."""
    got: list[bytes] = []
    async with asyncio.timeout(60):
        while True:
            try:
                got += payloads(await reader.read(MANY, 1.0))
            except Exception as error:
                return got, error


async def test_ledgers_are_passed_and_any_entry_is_a_beginning(queue: PulsarQueue) -> None:
    await queue.append(*NUMBERS)
    assert len(queue.ledgers()) >= len(NUMBERS) // LEDGER_ENTRIES
    found = await queue.source.log_range(queue.topic)
    reader = await queue.source.open(queue.topic, found.first)
    entries = await read_all(reader, 20)
    assert payloads(entries) == NUMBERS
    await reader.close()
    assert decode(found.end) == decode(entries[-1].position).after
    for n in (4, 5, 19):
        again = await queue.source.open(queue.topic, entries[n].position)
        assert await read_all(again, 20 - n) == entries[n:]
        await again.close()


async def test_a_position_as_milvus_writes_it_is_the_same_message(queue: PulsarQueue) -> None:
    await queue.append(*NUMBERS[:4])
    reader = await queue.source.open(queue.topic, (await queue.source.log_range(queue.topic)).first)
    third = (await read_all(reader, 4))[2]
    await reader.close()
    ledger, entry, _ = decode(third.position)
    varint = bytes([ledger & 0x7F | (0x80 if ledger > 0x7F else 0)])
    varint += bytes([ledger >> 7]) if ledger > 0x7F else b""
    # Seen in etcd: partition 0 and batch index 0; older clients write both as -1.
    ends = (b"\x18\x00\x20\x00", b"\x18" + b"\xff" * 9 + b"\x01\x20" + b"\xff" * 9 + b"\x01")
    for end in ends:
        position = b"\x08" + varint + b"\x10" + bytes([entry]) + end
        assert queue.source.order(position) == queue.source.order(third.position)
        reader = await queue.source.open(queue.topic, position)
        assert payloads(await read_all(reader, 2)) == NUMBERS[2:4]
        await reader.close()


async def test_batches_are_read_message_by_message(queue: PulsarQueue) -> None:
    await asyncio.to_thread(queue.produce, tuple(NUMBERS[:9]), {}, 3)
    await queue.append(*NUMBERS[9:12])
    found = await queue.source.log_range(queue.topic)
    reader = await queue.source.open(queue.topic, found.first)
    entries = await read_all(reader, 12)
    assert payloads(entries) == NUMBERS[:12]
    assert {decode(entry.position).batch for entry in entries} == {0, 1, 2}
    orders = [queue.source.order(entry.position) for entry in entries]
    assert orders == sorted(set(orders))
    await reader.close()
    for n in (1, 2, 8):
        again = await queue.source.open(queue.topic, entries[n].position)
        assert await read_all(again, 12 - n) == entries[n:]
        await again.close()
    await asyncio.to_thread(queue.produce, tuple(NUMBERS[12:15]), {}, 3)
    late = await queue.source.open(queue.topic, (await queue.source.log_range(queue.topic)).end)
    assert await late.read(MANY, 0.3) == []
    await queue.append(b"next")
    assert payloads(await read_all(late, 1)) == [b"next"]
    await late.close()


async def test_a_hole_at_the_beginning_is_named(queue: PulsarQueue) -> None:
    await queue.append(*NUMBERS)
    reader = await queue.source.open(queue.topic, (await queue.source.log_range(queue.topic)).first)
    entries = await read_all(reader, 20)
    await reader.close()
    await queue.truncate(entries[10].position)
    for n in (0, 4, 9):
        with pytest.raises(LogTruncatedError, match=queue.source.text(entries[10].position)):
            await queue.source.open(queue.topic, entries[n].position)
    kept = await queue.source.open(queue.topic, entries[10].position)
    assert await read_all(kept, 10) == entries[10:]
    await kept.close()
    for beyond in queue.beyond((await queue.source.log_range(queue.topic)).end):
        with pytest.raises(LogResetError):
            await queue.source.open(queue.topic, beyond)


async def test_an_open_reader_does_not_jump_over_what_was_deleted(queue: PulsarQueue) -> None:
    await queue.append(*NUMBERS[:2])
    reader = await queue.source.open(queue.topic, (await queue.source.log_range(queue.topic)).first)
    assert payloads(await read_all(reader, 2)) == NUMBERS[:2]
    # It is asked no more, and its client gets no further than its queue.
    big = [bytes([n]) * 1000 for n in range(200)]
    await reader.read(1, 0.1)
    await queue.append(*big)
    await asyncio.sleep(1)
    await queue.truncate((await queue.source.log_range(queue.topic)).end)
    await queue.append(b"behind the hole")
    got, error = await failure(reader)
    assert isinstance(error, LogTruncatedError), error
    assert "no longer holds message" in error.message
    assert got == big[: len(got)]
    await reader.close()


async def test_a_message_in_a_new_ledger_is_believed_only_if_its_predecessor_is_there(
    queue: PulsarQueue,
) -> None:
    await queue.append(*NUMBERS[:5])
    end = (await queue.source.log_range(queue.topic)).end
    reader = await queue.source.open(queue.topic, end)
    assert await reader.read(MANY, 0.5) == []
    await queue.append(*NUMBERS[5:8])
    assert payloads(await read_all(reader, 3)) == NUMBERS[5:8]
    await queue.truncate((await queue.source.log_range(queue.topic)).end)
    await queue.append(b"in a new ledger")
    got, error = await failure(reader)
    assert (got, type(error)) == ([], LogTruncatedError)
    await reader.close()


async def test_an_empty_topic_needs_the_rest_api(pulsar_broker: PulsarServer) -> None:
    queue = PulsarQueue(pulsar_broker, admin=False)
    await queue.create()
    with pytest.raises(UserError, match="QUEUE_EMPTY") as refused:
        await queue.source.log_range(queue.topic)
    assert refused.value.field == "source.pulsar.admin_url"
    await queue.source.close()


async def test_a_ledger_that_stayed_empty_is_no_hole(pulsar_broker: PulsarServer) -> None:
    queue = PulsarQueue(pulsar_broker)
    await queue.create()
    reader = await beginning(queue)
    assert await reader.read(MANY, 0.5) == []
    await queue.append(*NUMBERS[:2])
    assert payloads(await read_all(reader, 2)) == NUMBERS[:2]
    pulsar_broker.admin("PUT", f"{queue.path}/unload")
    pulsar_broker.admin("PUT", f"{queue.path}/unload")
    await queue.append(*NUMBERS[2:4])
    assert payloads(await read_all(reader, 2)) == NUMBERS[2:4]
    await reader.close()
    await queue.source.close()


async def test_limits_are_told_where_nothing_else_keeps_the_log(
    pulsar_broker: PulsarServer,
) -> None:
    queue = PulsarQueue(pulsar_broker)
    await queue.create()
    nothing = await queue.source.limits(queue.topic)
    assert (nothing.max_age_ms, nothing.max_bytes) == (1, 1), "it goes as soon as Milvus has it"
    held = open_source(replace(queue.config, held=True))
    limits = await held.limits(queue.topic)
    assert (limits.max_age_ms, limits.max_bytes) == (0, 0)
    await asyncio.to_thread(pulsar_broker.retain, 60, -1, f"public/{queue.namespace}")
    hour = await queue.source.limits(queue.topic)
    assert (hour.max_age_ms, hour.max_bytes) == (3_600_000, 0)
    await held.close()
    await queue.source.close()
