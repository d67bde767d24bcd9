"""The task files of deploy/examples do what they say, all on one source at once; nothing but
addresses is put into them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pymilvus import MilvusClient

from tests.e2e.canonical import differences, source_rows
from tests.e2e.load import SHAPES, create_collection, delete_keys, make_row
from tests.e2e.pair import Pair
from tests.e2e.test_rows_out import (
    SETTLE_SECONDS,
    Read,
    files_reader,
    kafka_reader,
    postgres_reader,
)
from tests.servers import KafkaServer, Stack
from tests.servers.postgres import PASSWORD, PostgresServer

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
DATABASE = "examples"


def create(pair: Pair, folder: Path, name: str, places: dict[str, str]) -> None:
    text = (EXAMPLES / name).read_text()
    for written, here in places.items():
        text = text.replace(written, here)
    file = folder / name
    file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "milvus_cdc.cli.main", "--controller", pair.controller.address,
         "task", "create", "-f", str(file)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.kafka
@pytest.mark.timeout(300)
def test_every_example_brings_the_rows(
    nats_stack: Stack,
    kafka_broker: KafkaServer,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MILVUS_CDC_SECRET_POSTGRES", PASSWORD)
    postgres_server.make_database("vectors")
    with postgres_server.connect("vectors") as connection:
        connection.execute(f"CREATE ROLE milvus_cdc LOGIN PASSWORD '{PASSWORD}'")
        connection.execute("ALTER DATABASE vectors OWNER TO milvus_cdc")
        connection.execute("CREATE EXTENSION vector")
    archive = tmp_path / "archive"
    archive.mkdir()
    places = {
        "127.0.0.1:2379": nats_stack.etcd.endpoint,
        "by-dev": nats_stack.source.root_path,
        "nats://127.0.0.1:4222": nats_stack.source.nats_url,
        "127.0.0.1:9092": kafka_broker.brokers,
        "port: 5432": f"port: {postgres_server.port}",
        "file:///var/lib/milvus-cdc/archive": archive.as_uri(),
        "rotateInterval: 60s": "rotateInterval: 1s",
    }
    rng = random.Random(5)
    root = MilvusClient(uri=nats_stack.source.uri)
    root.create_database(DATABASE)
    client = MilvusClient(uri=nats_stack.source.uri, db_name=DATABASE)
    shape = SHAPES[2]
    create_collection(client, shape)
    with Pair(nats_stack, tmp_path) as pair:
        for name in ("kafka.yaml", "parquet.yaml", "postgres.yaml"):
            create(pair, tmp_path, name, places)
        client.insert(shape.name, [make_row(shape, rng, n) for n in range(300)])
        client.upsert(shape.name, [make_row(shape, rng, n) for n in range(50)])
        delete_keys(client, shape.name, shape, list(range(100, 150)))
        source = source_rows(nats_stack.source.uri, DATABASE, shape)
        assert len(source) == 250
        readers: dict[str, Read] = {
            "kafka": kafka_reader(kafka_broker.brokers, DATABASE, once=True),
            "parquet": files_reader(archive, DATABASE),
            "postgres": postgres_reader(postgres_server, DATABASE, at="vectors"),
        }
        deadline = time.monotonic() + SETTLE_SECONDS
        for name, read in readers.items():
            found = ["nothing yet"]
            while found and time.monotonic() < deadline:
                time.sleep(0.5)
                try:
                    found = differences(source, read(shape))
                except Exception as error:  # not even the topic or table is there yet
                    found = [repr(error)]
            assert not found, (name, found[:5])
        pair.quiet()
