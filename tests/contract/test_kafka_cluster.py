"""The Kafka writer before three brokers whose leaders die under it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient
from milvus_cdc.errors import RetryableError
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_kafka_pb2

from tests.contract.kafka_samples import (
    batch,
    read_all,
    some_table,
    topic_of,
    upserts,
    writer_for,
)
from tests.servers import KafkaServer, Quorum

pytestmark = pytest.mark.kafka

KEYS = 20
Cluster = dict[int, KafkaServer]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, kafka_available: None) -> Iterator[Cluster]:
    quorum = Quorum.of(3)
    nodes = {
        node: KafkaServer(
            tmp_path_factory.mktemp("broker"), name=f"kafka-{node}", quorum=quorum, node=node
        )
        for node in (1, 2, 3)
    }
    with contextlib.ExitStack() as stack:
        for each in nodes.values():
            # None of them is ready before there is a majority.
            stack.callback(each.stop)
            each.spawn()
        for each in nodes.values():
            each.wait_ready()
        yield nodes


def leader(cluster: Cluster, topic: str) -> int:
    """Of the topic's only partition."""
    admin = AdminClient({"bootstrap.servers": cluster[1].brokers})
    found: int = admin.list_topics(topic, timeout=10).topics[topic].partitions[0].leader
    return found


@pytest.mark.parametrize("exactly_once", [False, True], ids=["at-least-once", "exactly-once"])
async def test_leaders_that_die(cluster: Cluster, exactly_once: bool) -> None:
    """One that is killed, and one that hands over in good order."""
    table = some_table()
    creation = sink_kafka_pb2.KafkaTopicCreation(partitions=1)
    sink = writer_for(cluster[1].brokers, exactly_once=exactly_once, create_topics=creation)
    await sink.open(table, Opening.NEW, 1)
    stop, written = asyncio.Event(), 0

    async def write_on() -> None:
        nonlocal written
        while not stop.is_set():
            step = written + 1
            rows = upserts(step, *[(key, step) for key in range(KEYS)])
            with contextlib.suppress(RetryableError):
                await sink.write(table, batch(rows, upto=step), 5.0)
                written = step

    async def goes_on() -> None:
        before = written
        while written < before + 20:
            assert not writing.done()
            await asyncio.sleep(0.05)

    writing = asyncio.create_task(write_on())
    try:
        await goes_on()
        for kill in (True, False):
            first = await asyncio.to_thread(leader, cluster, topic_of(table))
            await asyncio.to_thread(cluster[first].kill if kill else cluster[first].stop)
            await goes_on()
            assert await asyncio.to_thread(leader, cluster, topic_of(table)) not in (first, -1)
            await asyncio.to_thread(cluster[first].start)
            await goes_on()
    finally:
        stop.set()
        await writing
        await sink.close()
    records = read_all(cluster[1].brokers, topic_of(table))
    for key in range(KEYS):
        seen = [int(each.value or 0) for each in records if each.key == str(key)]
        # What comes again comes after itself, never after something newer.
        assert seen == sorted(seen)
        assert (seen if exactly_once else sorted(set(seen))) == list(range(1, written + 1))
