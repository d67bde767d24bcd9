"""Rows and checkpoint in one Kafka transaction, on a real broker: each change once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.kafka.transactions import TransactionalProducer
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_kafka_pb2

from tests.contract.kafka_crash_victim import KEYS
from tests.contract.kafka_samples import (
    Read,
    batch,
    reached,
    read_all,
    some_table,
    topic_of,
    upserts,
    writer_for,
)
from tests.servers import KafkaServer

pytestmark = pytest.mark.kafka

Open = Callable[..., KafkaWriter]

SECONDS = 8.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broker(kafka_broker: KafkaServer) -> KafkaServer:
    return kafka_broker


@pytest.fixture
async def writer(broker: KafkaServer) -> AsyncIterator[Open]:
    """Makes writers of one replicator each, and closes them."""
    opened: list[KafkaWriter] = []

    def make(**options: object) -> KafkaWriter:
        opened.append(writer_for(broker.brokers, exactly_once=True, **options))
        return opened[-1]

    yield make
    for each in opened:
        await each.close()


def numbers(records: list[Read], key: str = "1") -> list[int]:
    return [int(record.value or 0) for record in records if record.key == key]


async def test_the_sink_knows_where_it_was(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    first = writer()
    assert (await first.open(table, Opening.NEW, 1)).checkpoints == ()
    await first.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    await first.write(table, batch(upserts(2, (1, 2), vchannel="other"), upto=3), SECONDS)
    await first.release(table)
    second = writer()
    assert (await second.open(table, Opening.RESUME, 2)).checkpoints == (reached(3),)
    # The same process too, and a vchannel that is not named stays where it was.
    await second.write(table, batch(upserts(4, (1, 4))), SECONDS)
    assert (await second.open(table, Opening.RESUME, 3)).checkpoints == (reached(3),)
    assert (await second.open(table, Opening.RECREATE, 4)).checkpoints == ()
    await second.write(table, batch(upserts(1, (1, 10)), upto=1), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == [10]
    assert (await writer().open(table, Opening.RESUME, 5)).checkpoints == (reached(1),)


async def test_rows_that_come_again_are_not_written_again(
    broker: KafkaServer, writer: Open
) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    for _ in range(3):
        await sink.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    # A part of them, together with new ones; and an older checkpoint takes nothing back.
    await sink.write(table, batch(upserts(1, (1, 1)), upserts(2, (1, 2)), upto=2), SECONDS)
    await sink.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == [1, 2]
    assert (await writer().open(table, Opening.RESUME, 2)).checkpoints == (reached(2),)


async def test_a_replaced_owner_writes_nothing_more(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    old, new = writer(), writer()
    await old.open(table, Opening.NEW, 1)
    await old.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    await new.open(table, Opening.RESUME, 2)
    for _ in range(3):
        with pytest.raises(RetryableError, match="FENCED"):
            await old.write(table, batch(upserts(2, (1, -2)), upto=2), SECONDS)
        await new.write(table, batch(upserts(2, (1, 2)), upto=2), SECONDS)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.open(table, Opening.RESUME, 1)
    # It had to connect to see that; the rightful one takes its connection back.
    with pytest.raises(RetryableError, match="SINK_TRANSACTION_LOST"):
        await new.write(table, batch(upserts(3, (1, 3)), upto=3), SECONDS)
    await new.write(table, batch(upserts(3, (1, 3)), upto=3), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == [1, 2, 3]


async def test_a_replaced_owner_whose_producer_was_given_up(
    broker: KafkaServer, writer: Open
) -> None:
    """It connects anew, which costs the rightful owner its connection, and writes nothing."""
    table, another = some_table(), some_table()
    old = writer(transactions=sink_kafka_pb2.KafkaTransactions(producers=1))
    new = writer()
    await old.open(table, Opening.NEW, 1)
    await new.open(table, Opening.RESUME, 2)
    await old.open(another, Opening.NEW, 1)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.write(table, batch(upserts(1, (1, -1)), upto=1), SECONDS)
    with pytest.raises(RetryableError, match="SINK_TRANSACTION_LOST"):
        await new.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    await new.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == [1]


async def test_many_collections_share_few_producers(broker: KafkaServer, writer: Open) -> None:
    tables = [some_table() for _ in range(12)]
    sink = writer(
        topic="shared.{database}",
        transactions=sink_kafka_pb2.KafkaTransactions(producers=3),
    )
    before = threading.active_count()
    await asyncio.gather(*[sink.open(table, Opening.NEW, 1) for table in tables])
    assert sink._exactly_once is not None
    pool = sink._exactly_once._pool
    for step in (1, 2, 3):
        await asyncio.gather(
            *[
                sink.write(t, batch(upserts(step, (t.collection, step)), upto=step), 30)
                for t in tables
            ]
        )
        assert pool._used + len(pool._idle) <= 3
    assert threading.active_count() - before < 20
    records = read_all(broker.brokers, "shared.default")
    for table in tables:
        assert numbers(records, table.collection) == [1, 2, 3]


async def test_a_commit_whose_outcome_is_not_known(
    broker: KafkaServer, writer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    await sink.write(table, batch(upserts(1, (1, 1)), upto=1), SECONDS)

    broker.pause()
    with pytest.raises(UnknownOutcomeError):
        await sink.write(table, batch(upserts(2, (1, 2)), upto=2), 1.5)
    broker.resume()
    await sink.write(table, batch(upserts(2, (1, 2)), upto=2), SECONDS)

    # Committed, and the answer lost.
    commit = TransactionalProducer._commit

    def committed_unheard(self: TransactionalProducer, deadline: float, started: float) -> None:
        commit(self, deadline, started)
        self.broken = True
        raise UnknownOutcomeError("SINK_TIMEOUT", "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(TransactionalProducer, "_commit", committed_unheard)
        with pytest.raises(UnknownOutcomeError):
            await sink.write(table, batch(upserts(3, (1, 3)), upto=3), SECONDS)
    await sink.write(table, batch(upserts(3, (1, 3)), upto=3), SECONDS)
    await sink.write(table, batch(upserts(4, (1, 4)), upto=4), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == [1, 2, 3, 4]


async def test_who_is_cancelled_in_a_commit(broker: KafkaServer, writer: Open) -> None:
    table = some_table()
    sink = writer()
    await sink.open(table, Opening.NEW, 1)
    for step in range(1, 8):
        writing = asyncio.create_task(
            sink.write(table, batch(upserts(step, (1, step)), upto=step), SECONDS)
        )
        await asyncio.sleep(step * 0.005)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await sink.write(table, batch(upserts(step, (1, step)), upto=step), SECONDS)
    assert numbers(read_all(broker.brokers, topic_of(table))) == list(range(1, 8))


async def test_a_checkpoint_topic_that_forgets_is_refused(
    broker: KafkaServer, writer: Open
) -> None:
    name = f"forgets-{some_table().collection}"
    admin = AdminClient({"bootstrap.servers": broker.brokers})
    admin.create_topics([NewTopic(name, 1, config={"cleanup.policy": "delete"})])[name].result(10)
    sink = writer(transactions=sink_kafka_pb2.KafkaTransactions(checkpoint_topic=name))
    for attempt in (sink.probe(), sink.open(some_table(), Opening.NEW, 1)):
        with pytest.raises(UserError, match=f"SINK_CHECKPOINT_TOPIC.*{name}.*delete") as caught:
            await attempt
        assert caught.value.field == "sink.kafka.transactions.checkpoint_topic"


async def test_several_probe_at_once(writer: Open) -> None:
    assert len(await asyncio.gather(*(writer().probe() for _ in range(3)))) == 3


async def test_a_process_killed_at_any_moment(broker: KafkaServer) -> None:
    table = some_table()
    chance = random.Random(5)
    last = 600
    for epoch in range(1, 7):
        victim = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.kafka_crash_victim", broker.brokers),
            *(table.collection, str(epoch), str(last)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        assert victim.stdout is not None
        line = await victim.stdout.readline()
        if epoch < 6:
            await asyncio.sleep(chance.uniform(0.05, 0.6))
            with contextlib.suppress(ProcessLookupError):  # it was through with it
                victim.kill()
        await victim.communicate()
        assert line.startswith(b"open"), line
    records = read_all(broker.brokers, topic_of(table))
    for key in range(KEYS):
        seen = numbers(records, str(key))
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) >= last
    # What was killed in mid-transaction is there for those who ask for it.
    assert len(read_all(broker.brokers, topic_of(table), committed=False)) >= len(records)
