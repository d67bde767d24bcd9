"""A source followed by PostgreSQL, Kafka and files: whatever ends however, what an ordinary client
reads there is the source, row for row.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from milvus_cdc.sink.files.reading import find_collections, open_store
from milvuscdc.v1 import (
    secret_pb2,
    sink_file_pb2,
    sink_kafka_pb2,
    sink_postgres_pb2,
    task_pb2,
)
from pymilvus import DataType

from tests.e2e.canonical import META, Rows, canonical, differences, nested, source_rows
from tests.e2e.load import SHAPES, Load, Shape
from tests.e2e.pair import Pair
from tests.e2e.test_crashes import LOST_PEER, _restart
from tests.servers import Stack
from tests.servers.kafka import KafkaServer
from tests.servers.postgres import PASSWORD, USER, PostgresServer

ROUNDS = (("replicator", "kill"), ("replicator", "term"), ("both", "kill"))
SOAK = tuple(itertools.islice(itertools.cycle(ROUNDS), 60))
SETTLE_SECONDS = 60
few_or_many = pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(ROUNDS, id="few", marks=pytest.mark.timeout(400)),
        pytest.param(SOAK, id="many", marks=pytest.mark.soak),
    ],
)
Read = Callable[[Shape], Rows]
Rounds = tuple[tuple[str, str], ...]


def follow(
    stack: Stack,
    folder: Path,
    database: str,
    sink: task_pb2.Sink,
    read: Read,
    rounds: Rounds,
    during: Callable[[int], None] = lambda _: None,
) -> None:
    """A mixed load, a crash a round, and in the end `read` gives what the source has."""
    load = Load(stack.source.uri, database, seed=len(rounds), pause_seconds=0.02)
    load.create()
    rng = random.Random(database)
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    with Pair(stack, folder, replicators=2) as pair:
        pair.create(f"{database}.*", sink=sink)
        load.start()
        try:
            for number, (who, how) in enumerate(rounds):
                time.sleep(rng.uniform(1.0, 3.0))
                if who == "both":
                    _restart(pair.controller, how)
                _restart(rng.choice(pair.replicators), how)
                during(number)
        finally:
            load.stop()
        pair.wait_running(*names, seconds=120)
        for shape in SHAPES:
            source = source_rows(stack.source.uri, database, shape)
            assert source
            found = [""]
            deadline = time.monotonic() + SETTLE_SECONDS
            while found and time.monotonic() < deadline:
                time.sleep(0.5)
                found = differences(source, read(shape))
            assert not found, (shape.name, len(source), len(found), found[:10])
        pair.quiet(*LOST_PEER)


def postgres_sink(
    server: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> task_pb2.Sink:
    monkeypatch.setenv("MILVUS_CDC_SECRET_POSTGRES", PASSWORD)
    return task_pb2.Sink(
        postgres=sink_postgres_pb2.PostgresSink(
            host=server.host,
            port=server.port,
            database=server.make_database(database),
            user=USER,
            password=secret_pb2.Secret(env="MILVUS_CDC_SECRET_POSTGRES"),
        )
    )


def postgres_reader(server: PostgresServer, database: str, at: str = "") -> Read:
    """Tables of the source's `database`, in the server's database `at`, by default of that name."""

    def read(shape: Shape) -> Rows:
        # pgvector's text form needs no client of its own.
        columns = [
            f'"{f.name}"::text' if f.dtype == DataType.FLOAT_VECTOR else f'"{f.name}"'
            for f in shape.fields
        ] + ([f'"{META}"'] if shape.dynamic else [])
        names = [f.name for f in shape.fields] + ([META] if shape.dynamic else [])
        query = f'SELECT {", ".join(columns)} FROM "{database}"."{shape.name}"'
        with server.connect(at or database) as connection:
            rows = [dict(zip(names, row, strict=True)) for row in connection.execute(query)]
        keys = [row[shape.key.name] for row in rows]
        assert len(keys) == len(set(keys)), "a key twice"
        return {row[shape.key.name]: canonical(shape, row) for row in rows}

    return read


@few_or_many
def test_postgres_is_the_source_whatever_ends(
    nats_stack: Stack,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: Rounds,
) -> None:
    database = f"out_postgres_{len(rounds)}"
    sink = postgres_sink(postgres_server, database, monkeypatch)
    read = postgres_reader(postgres_server, database)
    follow(nats_stack, tmp_path, database, sink, read, rounds)


def files_reader(folder: Path, database: str) -> Read:
    """The last row of every key, and no change of the source more than once."""

    def read(shape: Shape) -> Rows:
        store = open_store(folder.as_uri())
        for collection in find_collections(store):
            history = collection.history()
            if history.name == (database, shape.name):
                break
        else:
            return {}
        names = [shape.key.name, "_vchannel", "_order"]
        seen = Counter(
            tuple(row.values()) for batch in history.changes(names) for row in batch.to_pylist()
        )
        assert not seen or max(seen.values()) == 1, seen.most_common(3)
        rows = history.state().to_pylist()
        keys = [row[shape.key.name] for row in rows]
        assert len(keys) == len(set(keys)), "a key twice"
        return {row[shape.key.name]: canonical(shape, row) for row in rows}

    return read


@few_or_many
def test_files_hold_the_source_and_no_change_twice_whatever_ends(
    nats_stack: Stack, tmp_path: Path, rounds: Rounds
) -> None:
    database = f"out_files_{len(rounds)}"
    folder = tmp_path / "archive"
    folder.mkdir()
    files = sink_file_pb2.FileSink(uri=folder.as_uri(), parquet=sink_file_pb2.ParquetFiles())
    files.rotate_interval.FromMilliseconds(1500)
    sink = task_pb2.Sink(files=files)
    follow(nats_stack, tmp_path, database, sink, files_reader(folder, database), rounds)


def kafka_reader(brokers: str, database: str, *, once: bool) -> Read:
    """The last record of every key, as a consumer sees them that reads what is committed."""

    def read(shape: Shape) -> Rows:
        topic = f"milvus.{database}.{shape.name}"
        found: Rows = {}
        seen: Counter[tuple[object, ...]] = Counter()
        for message in committed(brokers, topic):
            headers = dict(message.headers() or [])
            key = json.loads(message.key())
            seen[key, headers["cdc.vchannel"], headers["cdc.position"]] += 1
            assert headers["traceparent"].startswith(b"00-")  # as the source's Milvus wrote it
            value = message.value()
            if value is None:
                found.pop(key, None)
            else:
                row = json.loads(value)
                found[key] = canonical(shape, nested(shape, row))
        if once:
            assert not seen or max(seen.values()) == 1, seen.most_common(3)
        return found

    return read


def committed(brokers: str, topic: str) -> list[Message]:
    """Everything of a topic, to its end as a transaction sees it."""
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "reader",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    try:
        listed = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in listed])
        messages: list[Message] = []
        ended: set[int] = set()
        while len(ended) < len(listed):
            for message in consumer.consume(1000, timeout=0.2):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
                else:
                    raise KafkaException(error)
        return messages
    finally:
        consumer.close()


@pytest.mark.kafka
@few_or_many
@pytest.mark.parametrize("once", [False, True], ids=["at_least_once", "exactly_once"])
def test_records_on_kafka_are_the_source_whatever_ends(
    nats_stack: Stack, kafka_broker: KafkaServer, tmp_path: Path, once: bool, rounds: Rounds
) -> None:
    database = f"out_kafka_{once}_{len(rounds)}".lower()
    kafka = sink_kafka_pb2.KafkaSink(
        brokers=[kafka_broker.brokers],
        delivery=sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
        if once
        else sink_kafka_pb2.KAFKA_DELIVERY_AT_LEAST_ONCE,
        create_topics=sink_kafka_pb2.KafkaTopicCreation(partitions=3),
    )
    read = kafka_reader(kafka_broker.brokers, database, once=once)
    follow(nats_stack, tmp_path, database, task_pb2.Sink(kafka=kafka), read, rounds)
