"""The test servers do what tests rely on: they come up, survive kills with data, leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import nats
import psutil
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from pymilvus import DataType, MilvusClient

from tests.servers import EtcdServer, ManagedProcess, ServerStartError, Stack, free_port
from tests.servers.logs import assert_quiet, unexpected_lines
from tests.servers.ports import can_listen

REPOSITORY = Path(__file__).parents[2]


def _fill(uri: str, database: str) -> None:
    MilvusClient(uri=uri).create_database(database)
    client = MilvusClient(uri=uri, db_name=database)
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
    client.create_collection("rows", schema=schema)
    client.insert("rows", [{"id": n, "vector": [float(n)] * 4} for n in range(10)])


def _drop(uri: str, database: str) -> None:
    client = MilvusClient(uri=uri, db_name=database)
    client.drop_collection("rows")
    client.drop_database(database)


def _loaded_count(uri: str, database: str) -> int:
    client = MilvusClient(uri=uri, db_name=database)
    if not client.list_indexes("rows"):
        index = client.prepare_index_params("vector", index_type="FLAT", metric_type="L2")
        client.create_index("rows", index)
    client.load_collection("rows")
    rows = client.query("rows", output_fields=["count(*)"], consistency_level="Strong")
    return int(rows[0]["count(*)"])


async def _topics_with_messages(nats_url: str) -> set[str]:
    connection = await nats.connect(nats_url)
    try:
        streams = await connection.jetstream().streams_info()
        return {stream.config.name for stream in streams if stream.state.messages}
    finally:
        await connection.close()


async def test_an_insert_into_the_source_can_be_read_from_nats(nats_stack: Stack) -> None:
    source = nats_stack.source
    _fill(source.uri, "servers_nats")
    topics = await _topics_with_messages(source.nats_url)
    _drop(source.uri, "servers_nats")
    assert any(topic.startswith("source-rootcoord-dml_") for topic in topics)


@pytest.mark.timeout(300)
async def test_a_killed_source_comes_back_with_ports_collections_and_log(
    nats_stack: Stack,
) -> None:
    source = nats_stack.source
    _fill(source.uri, "servers_kill")
    before = await _topics_with_messages(source.nats_url)
    source.restart(hard=True)
    client = MilvusClient(uri=source.uri, db_name="servers_kill")
    assert client.list_collections() == ["rows"]
    assert await _topics_with_messages(source.nats_url) >= before
    _drop(source.uri, "servers_kill")


@pytest.mark.timeout(300)
def test_a_restarted_sink_still_counts_the_rows_it_had(nats_stack: Stack) -> None:
    sink = nats_stack.sink
    for uri in (nats_stack.source.uri, sink.uri):
        _fill(uri, "servers_count")
        assert _loaded_count(uri, "servers_count") == 10
    sink.restart()
    assert _loaded_count(sink.uri, "servers_count") == 10
    sink.restart(hard=True)
    assert _loaded_count(sink.uri, "servers_count") == 10
    for uri in (nats_stack.source.uri, sink.uri):
        _drop(uri, "servers_count")


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_an_insert_into_the_source_can_be_read_from_kafka_after_a_broker_restart(
    kafka_stack: Stack,
) -> None:
    assert kafka_stack.kafka is not None
    _fill(kafka_stack.source.uri, "servers_kafka")
    kafka_stack.source.stop()
    kafka_stack.kafka.restart(hard=True)
    kafka_stack.source.start()
    consumer = Consumer({"bootstrap.servers": kafka_stack.kafka.brokers, "group.id": "servers"})
    try:
        topics = consumer.list_topics(timeout=10).topics
        data = [topic for topic in topics if topic.startswith("source-rootcoord-dml_")]
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING) for topic in data])
        message = consumer.poll(30)
        assert message is not None
        assert message.error() is None
        assert message.value()
    finally:
        consumer.close()
    _drop(kafka_stack.source.uri, "servers_kafka")


def test_a_paused_server_keeps_its_port_and_answers_again_when_resumed(tmp_path: Path) -> None:
    with EtcdServer(tmp_path) as server:
        server.pause()
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=0.5)
        server.resume()
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
            assert answer.status == 200


def test_a_stopped_server_frees_its_port_and_starts_again_on_it(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path).start()
    url, pid = server.url, server.pid
    port = int(server.endpoint.rpartition(":")[2])
    assert not can_listen(port)
    server.stop()
    assert not psutil.pid_exists(pid)
    assert can_listen(port)
    with server:
        assert server.url == url


def test_stopping_a_paused_server_ends_it(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path).start()
    server.pause()
    server.stop()
    assert not server.running


def test_a_server_started_from_a_short_lived_thread_outlives_the_thread(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
        assert answer.status == 200
    server.stop()


def test_a_server_that_ends_at_once_is_reported_with_its_output(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "raise SystemExit('no such disk')"]
    failing = ManagedProcess("failing", program, tmp_path, ready=lambda: False)
    with pytest.raises(ServerStartError, match="no such disk"):
        failing.start()


def test_a_port_held_by_somebody_else_stops_the_start(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "first") as first:
        port = int(first.endpoint.rpartition(":")[2])
        second = ManagedProcess("second", [sys.executable, "-V"], tmp_path, ports=[port])
        with pytest.raises(ServerStartError, match=str(port)):
            second.start()


def test_nothing_survives_a_killed_owner(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.servers import EtcdServer;"
        "print(EtcdServer(Path(sys.argv[1])).start().pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    with owner.stdout:
        server = psutil.Process(int(owner.stdout.readline()))
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    server.wait(timeout=30)


def test_ports_are_never_handed_out_twice() -> None:
    assert len({free_port() for _ in range(50)}) == 50


def test_a_log_with_an_unexpected_warning_or_traceback_is_refused(tmp_path: Path) -> None:
    quiet = json.dumps({"level": "info", "event": "started"})
    warning = json.dumps({"level": "warning", "event": "slow sink"})
    text = f"{quiet}\n{warning}\nTraceback (most recent call last):\n"
    assert unexpected_lines(text, ["slow sink"]) == ["Traceback (most recent call last):"]
    log = tmp_path / "service.log"
    log.write_text(text)
    with pytest.raises(AssertionError, match="slow sink"):
        assert_quiet(log)
