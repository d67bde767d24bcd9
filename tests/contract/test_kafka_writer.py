"""The Kafka writer on a real broker: order, placement, replay, loss."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AdminClient,
)
from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.writer import Opening, SchemaChange, SchemaChangeKind
from milvuscdc.v1 import sink_kafka_pb2

from tests.contract.kafka_samples import (
    BEGIN,
    Read,
    batch,
    deletes,
    read_all,
    seconds,
    some_table,
    spec_for,
    table_named,
    topic_of,
    upserts,
    writer_for,
)
from tests.servers import KafkaServer, free_port

pytestmark = pytest.mark.kafka

Open = Callable[..., KafkaWriter]

SECONDS = 8.0


@pytest.fixture
def broker(kafka_broker: KafkaServer) -> KafkaServer:
    return kafka_broker


@pytest.fixture
async def writer(broker: KafkaServer) -> AsyncIterator[Open]:
    """Makes writers of lines, and closes them."""
    opened: list[KafkaWriter] = []

    def make(**options: Any) -> KafkaWriter:
        opened.append(writer_for(broker.brokers, **options))
        return opened[-1]

    yield make
    for each in opened:
        await each.close()


def by_key(records: list[Read]) -> dict[str, list[str | None]]:
    values = defaultdict(list)
    for record in records:
        values[record.key].append(record.value)
    return dict(values)


async def test_changes_of_a_key_lie_in_order_on_one_partition(
    broker: KafkaServer, writer: Open
) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    for step in range(1, 21):
        rows = upserts(step, *[(key, step) for key in range(50)], (7, f"{step}b"))
        await sink.write(table, batch(rows), SECONDS)
    records = read_all(broker.brokers, topic_of(table))
    assert len({record.partition for record in records}) == 3
    assert len({(record.key, record.partition) for record in records}) == 50
    seen = by_key(records)
    assert seen["7"] == [text for step in range(1, 21) for text in (f"{step}", f"{step}b")]
    assert all(seen[str(k)] == [str(s) for s in range(1, 21)] for k in range(50) if k != 7)


async def test_every_record_says_what_it_is(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(5, (1, "a"), order=42)), SECONDS)
    (record,) = read_all(broker.brokers, topic_of(table))
    assert record.headers == {
        "cdc.op": "UPDATE",
        "cdc.ts_ms": "1700000000000",
        "cdc.ts": str(BEGIN + 5),
        "cdc.vchannel": "by-dev-rootcoord-dml_0_7v0",
        "cdc.position": "42",
        "cdc.database": "default",
        "cdc.collection": table.collection,
        "cdc.collection_id": "7",
        "cdc.schema_version": "1",
        "content-type": "text/plain",
        "line": "1",
    }


async def test_fewer_headers(broker: KafkaServer, writer: Open) -> None:
    for wanted, names in (
        (sink_kafka_pb2.KAFKA_HEADERS_NONE, {"line"}),
        (
            sink_kafka_pb2.KAFKA_HEADERS_CHANGE,
            {"line", "cdc.op", "cdc.ts", "cdc.vchannel", "cdc.position", "cdc.schema_version"},
        ),
    ):
        table = some_table()
        sink = writer(headers=wanted)
        await sink.open(table, Opening.NEW, 1)
        await sink.write(table, batch(upserts(5, (1, "a"))), SECONDS)
        (record,) = read_all(broker.brokers, topic_of(table))
        assert set(record.headers) == names


async def test_a_delete_is_followed_by_a_tombstone_where_wanted(
    broker: KafkaServer, writer: Open
) -> None:
    for tombstones, expected in ((False, ["a", "-"]), (True, ["a", "-", None])):
        table = some_table()
        sink = writer(tombstones=tombstones)
        await sink.open(table, Opening.NEW, 1)
        await sink.write(table, batch(upserts(1, (1, "a")), deletes(2, "1")), SECONDS)
        assert by_key(read_all(broker.brokers, topic_of(table))) == {"1": expected}


async def test_flat_json_as_a_task_says_it(broker: KafkaServer) -> None:
    table = some_table()
    sink = KafkaWriter(spec_for(broker.brokers), SecretResolver(env_prefix="TEST_"))
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(deletes(2, "1", "2")), SECONDS)
    records = read_all(broker.brokers, topic_of(table))
    await sink.close()
    assert {record.value for record in records} == {None}
    assert {record.headers["cdc.op"] for record in records} == {"DELETE"}
    assert records[0].headers["content-type"] == "application/json"


def java(broker: KafkaServer, *arguments: str, given: str = "") -> list[str]:
    """Runs Kafka's own Java client."""
    if shutil.which("javac") is None:
        pytest.skip("apt-get install -y openjdk-17-jdk-headless")
    peer = Path(__file__).with_name("kafka_peer.java")
    command = ["java", "-XX:TieredStopAtLevel=1", "-cp", broker.classpath, str(peer), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


async def test_keys_lie_where_the_java_client_puts_them(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer(create_topics=sink_kafka_pb2.KafkaTopicCreation(partitions=13))
    await sink.open(table, Opening.NEW, 1)
    # Of all lengths modulo 4, and with bytes above 127: murmur2 takes them signed in Java.
    keys = [str(n) for n in (*range(300), -1, 2**63 - 1)] + [f"küche-{'ж' * n}" for n in range(40)]
    await sink.write(table, batch(upserts(1, *[(key, "x") for key in keys])), SECONDS)
    ours = {r.key: r.partition for r in read_all(broker.brokers, topic_of(table))}
    theirs = await asyncio.to_thread(java, broker, "place", "13", given="\n".join(keys))
    assert [ours[key] for key in keys] == [int(line) for line in theirs]
    assert len(set(ours.values())) == 13


async def test_other_clients_read_what_was_committed(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer(exactly_once=True, compression=sink_kafka_pb2.KAFKA_COMPRESSION_ZSTD)
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, *[(k, k) for k in range(50)]), upto=1), SECONDS)
    lines = await asyncio.to_thread(java, broker, "consume", broker.brokers, topic_of(table))
    assert sorted(int(line.split("\t")[1]) for line in lines) == list(range(50))
    if shutil.which("kcat") is None:
        pytest.skip("apt-get install -y kcat")
    arguments = ["-b", broker.brokers, "-t", topic_of(table), "-C", "-e", "-q", "-K="]
    done = await asyncio.to_thread(
        subprocess.run, ["kcat", *arguments], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == sorted(f"{k}={k}" for k in range(50))


async def test_more_rows_than_the_client_may_hold(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    limits = {"queue.buffering.max.messages": "100", "batch.num.messages": "50"}
    for exactly_once in (False, True):
        sink = writer(librdkafka=limits, exactly_once=exactly_once)
        await sink.open(table, Opening.RESUME, 1)
        rows = upserts(9, *[(key, "x") for key in range(2_000)])
        await sink.write(table, batch(rows, upto=9), SECONDS)
    assert len(read_all(broker.brokers, topic_of(table))) == 4_000


async def test_schema_changes_and_source_time_are_told(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    name = table.collection
    sink = writer(
        schema_topic=f"schema.{name}", heartbeat_topic=f"time.{name}", heartbeat_interval=seconds(1)
    )
    await sink.open(table, Opening.NEW, 1)
    await sink.open(table, Opening.RESUME, 2)
    renamed = table_named(f"{name}_2", task_uid=table.task_uid)
    for change in (
        SchemaChange(SchemaChangeKind.CREATE_PARTITION, table, partition="p"),
        SchemaChange(
            SchemaChangeKind.RENAME_COLLECTION, renamed, renamed_from=("default", name), ts=BEGIN
        ),
    ):
        await sink.apply(change, SECONDS)
    await sink.write(renamed, batch(upserts(3, (1, "a"))), SECONDS)
    await sink.apply(SchemaChange(SchemaChangeKind.DROP_COLLECTION, renamed), SECONDS)
    events = read_all(broker.brokers, f"schema.{name}")
    assert sorted(event.value or "" for event in events) == [
        "CREATED",
        "CREATE_PARTITION",
        "DROP_COLLECTION",
        "RENAME_COLLECTION",
    ]
    assert {e.headers["cdc.event"] for e in events} >= {"CREATE_COLLECTION", "DROP_COLLECTION"}
    assert [e.headers["cdc.event"] for e in events if e.headers.get("cdc.ts") == str(BEGIN)] == [
        "RENAME_COLLECTION"
    ]
    assert sink.capabilities.heartbeats
    assert len(read_all(broker.brokers, topic_of(renamed))) == 1

    for ts in range(5):
        await sink.heartbeat(renamed, BEGIN + ts)
    await asyncio.sleep(1.1)
    await sink.heartbeat(renamed, BEGIN + 9)
    await asyncio.sleep(0.3)
    beats = read_all(broker.brokers, f"time.{name}")
    assert [json.loads(beat.value or "")["resolved_ts"] for beat in beats] == [BEGIN, BEGIN + 9]


async def test_no_room_for_a_heartbeat_is_no_trouble(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer(
        heartbeat_topic=f"time.{table.collection}",
        librdkafka={"queue.buffering.max.messages": "1", "linger.ms": "2000"},
    )
    await sink.open(table, Opening.NEW, 1)
    for number in range(3):
        await sink.heartbeat(table_named(f"{table.collection}_{number}"), BEGIN)
    await asyncio.sleep(2.5)
    assert len(read_all(broker.brokers, f"time.{table.collection}")) == 1


async def test_a_new_beginning_empties_the_topic(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, (1, "old"))), SECONDS)
    assert not (await sink.open(table, Opening.RECREATE, 2)).conditions
    await sink.write(table, batch(upserts(1, (1, "new"))), SECONDS)
    assert by_key(read_all(broker.brokers, topic_of(table))) == {"1": ["new"]}

    shared = writer(topic=f"all.{table.collection}")
    await shared.open(table, Opening.NEW, 1)
    ((kind, text),) = (await shared.open(table, Opening.RECREATE, 2)).conditions
    assert kind == "RECORDS_REMAIN"
    assert f"all.{table.collection}" in text


async def test_topics_that_the_task_may_not_make(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    with pytest.raises(UserError) as failed:
        await writer(create_topics=None).open(table, Opening.NEW, 1)
    assert (failed.value.reason, failed.value.field) == ("SINK_TOPIC_MISSING", "sink.kafka.topic")
    with pytest.raises(UserError) as failed:
        await writer(create_topics=None, topic=f"x.{table.collection}").probe()
    assert failed.value.reason == "SINK_TOPIC_MISSING"
    bad = sink_kafka_pb2.KafkaTopicCreation(partitions=1, replication_factor=9)
    with pytest.raises(UserError) as failed:
        await writer(create_topics=bad).open(table, Opening.NEW, 1)
    assert (failed.value.reason, failed.value.field) == (
        "SINK_TOPIC_REFUSED",
        "sink.kafka.create_topics",
    )
    bad = sink_kafka_pb2.KafkaTopicCreation(partitions=1, config={"cleanup.polizei": "x"})
    with pytest.raises(UserError, match=r"cleanup\.polizei"):
        await writer(create_topics=bad, topic=f"x.{table.collection}").probe()


async def test_a_record_that_is_too_large(broker: KafkaServer, writer: Open) -> None:
    for exactly_once in (False, True):
        # Larger than the client may send, then than the topic takes.
        for limit, size in (("1048588", 1_000_001), ("2000", 3_000)):
            table = some_table()
            creation = sink_kafka_pb2.KafkaTopicCreation(
                partitions=1, config={"max.message.bytes": limit}
            )
            sink = writer(create_topics=creation, exactly_once=exactly_once)
            await sink.open(table, Opening.NEW, 1)
            rows = upserts(1, (1, "a"), ("vast", "x" * size), (3, "c"))
            with pytest.raises(UserError) as failed:
                await sink.write(table, batch(rows, upto=1), SECONDS)
            assert failed.value.reason == "RECORD_TOO_LARGE"
            assert "max.message.bytes" in failed.value.message
            if size > 1_000_000:
                assert "the key vast" in failed.value.message
            # The collection stands; nothing of it hinders what comes after.
            await sink.write(table, batch(upserts(2, (4, "d")), upto=2), SECONDS)
            seen = by_key(read_all(broker.brokers, topic_of(table)))
            assert seen["4"] == ["d"]
            assert not exactly_once or set(seen) == {"4"}


async def test_a_topic_deleted_under_us(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    # So that the client notices within the test.
    sink = writer(librdkafka={"topic.metadata.propagation.max.ms": "1000"})
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, (1, "a"))), SECONDS)
    admin = AdminClient({"bootstrap.servers": broker.brokers})
    admin.delete_topics([topic_of(table)])[topic_of(table)].result(10)
    reasons = set()
    for _ in range(20):
        try:
            await sink.write(table, batch(upserts(2, (1, "b"))), 2.0)
        except CdcError as error:
            reasons.add(error.reason)
            if isinstance(error, UserError):
                break
    assert "SINK_TOPIC_MISSING" in reasons
    assert topic_of(table) not in admin.list_topics(timeout=5).topics


async def test_a_schema_topic_deleted_under_us(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    events = f"{topic_of(table)}.schema"
    sink = writer(librdkafka={"topic.metadata.propagation.max.ms": "1000"}, schema_topic=events)
    await sink.open(table, Opening.NEW, 1)
    admin = AdminClient({"bootstrap.servers": broker.brokers})
    admin.delete_topics([events])[events].result(10)
    drop = SchemaChange(SchemaChangeKind.DROP_COLLECTION, table, ts=BEGIN)
    found = None
    for _ in range(20):
        try:
            await sink.apply(drop, 2.0)
        except UserError as error:
            found = error
            break
        except CdcError:
            continue
    assert found is not None
    assert (found.reason, found.field) == ("SINK_TOPIC_MISSING", "sink.kafka.schema_topic")


async def test_a_broker_that_is_killed_under_writes_loses_nothing(
    broker: KafkaServer, writer: Open
) -> None:
    stop = asyncio.Event()
    tables = {exactly_once: some_table() for exactly_once in (False, True)}
    written = dict.fromkeys(tables, 0)
    errors: dict[bool, set[str]] = {exactly_once: set() for exactly_once in tables}

    async def write_on(exactly_once: bool, sink: KafkaWriter) -> None:
        while not stop.is_set():
            step = written[exactly_once] + 1
            rows = upserts(step, *[(key, step) for key in range(20)])
            try:
                await sink.write(tables[exactly_once], batch(rows, upto=step), 2.0)
                written[exactly_once] = step
            except RetryableError as error:
                errors[exactly_once].add(error.reason)

    sinks = {exactly_once: writer(exactly_once=exactly_once) for exactly_once in tables}
    for exactly_once, sink in sinks.items():
        await sink.open(tables[exactly_once], Opening.NEW, 1)
    running = [asyncio.create_task(write_on(*each)) for each in sinks.items()]
    await asyncio.sleep(0.5)
    broker.kill()
    await asyncio.sleep(2.5)
    await asyncio.to_thread(broker.start)
    after = dict(written)
    while any(written[each] < after[each] + 5 for each in written):
        await asyncio.sleep(0.1)
    stop.set()
    await asyncio.gather(*running)
    assert errors[False] == {"SINK_TIMEOUT"}
    assert errors[True]
    for exactly_once, table in tables.items():
        expected = list(range(1, written[exactly_once] + 1))
        seen = by_key(read_all(broker.brokers, topic_of(table)))
        assert len(seen) == 20
        for values in seen.values():
            numbers = [int(value or 0) for value in values]
            # Repeated ones come after themselves, never after something newer.
            assert numbers == sorted(numbers)
            assert (numbers if exactly_once else sorted(set(numbers))) == expected


async def test_a_broker_that_is_away(
    writer: Open, broker: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc.sink.kafka.broker.REQUEST_SECONDS", 1.0)
    nobody = f"127.0.0.1:{free_port()}"
    sink = writer_for(nobody)
    with pytest.raises(RetryableError) as failed:
        await sink.probe()
    assert nobody in failed.value.message
    await sink.close()

    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, (1, "a"))), SECONDS)
    broker.pause()
    started = time.monotonic()
    with pytest.raises(UnknownOutcomeError):
        await sink.write(table, batch(upserts(2, (1, "b"))), 2.0)
    assert time.monotonic() - started < 2.5
    broker.resume()
    await sink.write(table, batch(upserts(2, (1, "b"))), SECONDS)
    assert by_key(read_all(broker.brokers, topic_of(table)))["1"][-1] == "b"


async def test_nothing_is_left_running(broker: KafkaServer) -> None:
    def threads() -> set[str]:
        # Those of the default executor are everybody's.
        return {t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")}

    before = threads()
    for exactly_once in (False, True):
        table = some_table()
        sink = writer_for(broker.brokers, exactly_once=exactly_once)
        await sink.open(table, Opening.NEW, 1)
        await sink.write(table, batch(upserts(1, (1, "a")), upto=1), SECONDS)
        assert threads() > before
        broker.pause()
        writing = asyncio.create_task(sink.write(table, batch(upserts(2, (1, "b"))), 2.0))
        await asyncio.sleep(0.2)
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        started = time.monotonic()
        await sink.release(table)
        await sink.close()
        assert time.monotonic() - started < 5
        broker.resume()
        while threads() - before:
            assert time.monotonic() - started < 10, threads() - before
            await asyncio.sleep(0.05)
