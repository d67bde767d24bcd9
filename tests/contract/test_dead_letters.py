"""Places for refused rows, on a real folder, object store and broker; and sinks that say which rows
they refuse.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from milvus_cdc.dead_letters import Letter, Place, letters_of
from milvus_cdc.dead_letters.opening import open_place
from milvus_cdc.errors import RowRefusedError, UserError
from milvus_cdc.rows import ChangeOp
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files.opening import open_store
from milvus_cdc.sink.kafka import KafkaWriter
from milvus_cdc.sink.writer import Opening
from milvus_cdc.sink.writer_sink import Origin, WriterSink
from milvus_cdc.testing import samples
from milvuscdc.v1 import dead_letters_pb2, sink_kafka_pb2

from tests.contract.kafka_samples import batch, read_all, some_table, upserts, writer_for
from tests.servers import KafkaServer, S3Server
from tests.servers.s3 import KEY_ID, REGION, SECRET
from tests.unit.replicator.test_runner import START, Bench, insert, tick

SECONDS = 8.0
SECRETS = SecretResolver(env_prefix="TEST_", environ={"TEST_KEY": KEY_ID, "TEST_SECRET": SECRET})


def place_of(**kind: Any) -> Place:
    return open_place(dead_letters_pb2.DeadLetters(**kind), SECRETS)


def some_letters(*keys: int, text: str = "é") -> list[Letter]:
    table = samples.table(f"c{uuid.uuid4().hex[:8]}", collection_id=7)
    rows = [samples.row(key, 5, text) for key in keys]
    changes = samples.put(table, rows, 3, op=ChangeOp.UPDATE)
    return letters_of(table, changes, "ROW_NOT_STORABLE", "field s cannot be held")


def check(letters: list[Letter], found: list[dict[str, Any]]) -> None:
    assert [each["key"] for each in found] == [json.loads(letter.key) for letter in letters]
    for each in found:
        assert each["row"] == {"id": each["key"], "v": each["row"]["v"], "n": 5, "s": "é"}
        assert len(each["row"]["v"]) == samples.DIM
        assert (each["reason"], each["op"]) == ("ROW_NOT_STORABLE", "UPDATE")
        assert each["vchannel"] == samples.VCHANNEL
        assert each["ts"] == samples.BEGIN + 3
        assert each["ts_ms"] == 1_700_000_000_000


async def test_letters_in_a_folder(tmp_path: Path) -> None:
    place = place_of(files=dead_letters_pb2.DeadLetterFiles(uri=tmp_path.as_uri()))
    assert str(tmp_path) in await place.probe()
    letters = some_letters(1, 2)
    await place.put(letters, SECONDS)
    (path,) = await asyncio.to_thread(lambda: list(tmp_path.rglob("*.jsonl")))
    collection = letters[0].table.source_collection
    assert path.parent == tmp_path / "contract" / f"default.{collection}-7"
    check(letters, [json.loads(line) for line in path.read_text().splitlines()])
    gone = place_of(files=dead_letters_pb2.DeadLetterFiles(uri=f"file://{tmp_path}/gone"))
    for attempt in (gone.probe(), gone.put(letters, SECONDS)):
        with pytest.raises(UserError) as failed:
            await attempt
        assert (failed.value.reason, failed.value.field) == (
            "FOLDER_MISSING",
            "dead_letters.files.uri",
        )


async def test_letters_in_an_object_store(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    spec = dead_letters_pb2.DeadLetterFiles(uri=f"s3://{bucket}/dead")
    spec.s3.endpoint, spec.s3.region = s3_server.endpoint, REGION
    spec.s3.access_key_id.env, spec.s3.secret_access_key.env = "TEST_KEY", "TEST_SECRET"
    place = place_of(files=spec)
    await place.probe()
    letters = some_letters(1, 2)
    await place.put(letters, SECONDS)
    store = open_store(
        spec.uri,
        endpoint=s3_server.endpoint,
        region=REGION,
        access_key_id=KEY_ID,
        secret_access_key=SECRET,
    )
    (entry,) = await asyncio.to_thread(store.entries, "contract")
    data = await asyncio.to_thread(store.get, entry.path)
    check(letters, [json.loads(line) for line in data.splitlines()])
    spec.uri = "s3://not-there/dead"
    with pytest.raises(UserError) as failed:
        await place_of(files=spec).probe()
    assert failed.value.field.startswith("dead_letters.files")
    spec.s3.secret_access_key.env = "TEST_NOTHING"
    with pytest.raises(UserError) as failed:
        place_of(files=spec)
    assert failed.value.field == "dead_letters.files.s3.secret_access_key"


@pytest.mark.kafka
async def test_letters_on_a_topic(kafka_broker: KafkaServer) -> None:
    topic = f"dead.{uuid.uuid4().hex[:8]}"
    spec = dead_letters_pb2.DeadLetterTopic(brokers=[kafka_broker.brokers], topic=topic)
    place = place_of(kafka=spec)
    with pytest.raises(UserError) as failed:
        await place.probe()
    assert (failed.value.reason, failed.value.field) == (
        "SINK_TOPIC_MISSING",
        "dead_letters.kafka.topic",
    )
    assert "create_topics" not in failed.value.message
    admin = AdminClient({"bootstrap.servers": kafka_broker.brokers})
    new = NewTopic(topic, 1, 1, config={"max.message.bytes": "2000"})
    admin.create_topics([new])[topic].result(20)
    assert "Kafka cluster" in await place.probe()
    letters = some_letters(1, 2)
    await place.put(letters, SECONDS)
    vast = some_letters(3, text="x" * 3_000)
    await place.put([*vast, *some_letters(4)], SECONDS)
    found = read_all(kafka_broker.brokers, topic)
    values = {record.key: json.loads(record.value or "") for record in found}
    check(letters, [values["1"], values["2"]])
    assert values["3"]["row"] is None
    assert "too large" in values["3"]["row_left_out"]
    assert values["4"]["row"] is not None
    await place.close()


@pytest.mark.kafka
async def test_settings_that_are_wrong_are_named_where_they_stand() -> None:
    spec = dead_letters_pb2.DeadLetterTopic(brokers=["127.0.0.1:1"], topic="t")
    spec.librdkafka["acks"] = "0"
    with pytest.raises(UserError) as failed:
        place_of(kafka=spec)
    assert failed.value.field == "dead_letters.kafka.librdkafka.acks"
    assert "sink.kafka" not in failed.value.message


@pytest.mark.kafka
async def test_a_record_that_the_producer_refuses_is_named(kafka_broker: KafkaServer) -> None:
    for exactly_once in (False, True):
        for limit, size, rows in (("1048588", 1_000_001, ((1, 1),)), ("2000", 3_000, ())):
            table = some_table()
            creation = sink_kafka_pb2.KafkaTopicCreation(
                partitions=1, config={"max.message.bytes": limit}
            )
            writer = writer_for(
                kafka_broker.brokers, create_topics=creation, exactly_once=exactly_once
            )
            await writer.open(table, Opening.NEW, 1)
            changes = (
                upserts(1, ("vast", "small"), (2, "b")),
                upserts(2, (1, "a"), ("vast", "x" * size), (3, "c")),
            )
            with pytest.raises(RowRefusedError) as failed:
                await writer.write(table, batch(*changes, upto=2), SECONDS)
            assert failed.value.reason == "RECORD_TOO_LARGE"
            assert failed.value.rows == rows, "only where it is certain which it is"
            await writer.close()


@pytest.mark.kafka
@pytest.mark.parametrize("exactly_once", [False, True])
async def test_a_row_too_large_for_its_topic_is_a_letter_and_the_others_are_there(
    kafka_broker: KafkaServer, tmp_path: Path, exactly_once: bool
) -> None:
    """By a whole runner; found in halves, or named by the producer."""
    topic = f"rows.{uuid.uuid4().hex[:8]}"
    spec = sink_kafka_pb2.KafkaSink(
        brokers=[kafka_broker.brokers],
        topic=topic,
        create_topics=sink_kafka_pb2.KafkaTopicCreation(
            partitions=1, config={"max.message.bytes": "3000"}
        ),
    )
    if exactly_once:
        spec.delivery = sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
        spec.librdkafka["message.max.bytes"] = "3000"
    letters = dead_letters_pb2.DeadLetters(
        files=dead_letters_pb2.DeadLetterFiles(uri=tmp_path.as_uri())
    )
    place = open_place(letters, SECRETS)
    bench = Bench()
    uid = uuid.uuid4().hex
    origin = Origin("tasks/t", uid, "default", "c", 3)
    sink = WriterSink(KafkaWriter(spec, SECRETS), lambda: origin)
    bench.connections._sink = sink  # type: ignore[assignment]
    bench.connections.dead_letters = lambda _: place  # type: ignore[attr-defined]
    assignment = replace(bench.runner.assignment, dead_letters=letters)
    bench.runner.assignment = assignment
    bench.runner._object.update(assignment)
    await bench.start()
    bench.append(
        insert(START + 1, [1, 2, 3]),
        insert(START + 2, [4], "x" * 4_000),
        insert(START + 3, [5, 6]),
        tick(START + 9),
    )
    async with asyncio.timeout(60):
        while bench.resolved_ts < START + 9:
            await asyncio.sleep(0.05)
    assert bench.runner.report().counters.rows_refused == 1
    await bench.runner.stop()
    await sink.close()
    await bench.connections.close()
    found = [record.key for record in read_all(kafka_broker.brokers, topic)]
    assert set(found) == {"1", "2", "3", "5", "6"}
    assert not exactly_once or len(found) == 5
    (path,) = await asyncio.to_thread(lambda: list(tmp_path.rglob("*.jsonl")))
    letter = json.loads(path.read_text())
    assert (letter["key"], letter["reason"]) == (4, "RECORD_TOO_LARGE")
    assert letter["row"] == {"id": 4, "text": "x" * 4_000}
