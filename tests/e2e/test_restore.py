"""Files of a followed source become collections of a Milvus again: as of then, and as of now."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from milvuscdc.v1 import sink_file_pb2, task_pb2
from pymilvus import MilvusClient

from tests.e2e.canonical import Rows, differences, source_rows
from tests.e2e.load import SHAPES, Load, Shape, delete_keys, make_readable, make_row, new_key
from tests.e2e.pair import Pair
from tests.e2e.test_rows_out import SETTLE_SECONDS, Read, files_reader
from tests.servers import Stack

DATABASE = "restore"
APART_SECONDS = 1.5
"""Between what was before a moment and what comes after it, whichever clock is asked."""
AT_ONCE = 4
LATER_STEP = 1_000_000
"""Of keys that the first load cannot have used."""


def restore(folder: Path, uri: str, shape: Shape, to: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "milvus_cdc.cli.main", "restore", "--from", folder.as_uri(),
         "--collection", f"{DATABASE}.{shape.name}", "--uri", uri, "--to", f"{to}.{shape.name}",
         "-o", "json", *options],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def wait_until_equal(stack: Stack, read: Read) -> dict[str, Rows]:
    """What the source has, once the files hold it."""
    sources = {s.name: source_rows(stack.source.uri, DATABASE, s) for s in SHAPES}
    deadline = time.monotonic() + SETTLE_SECONDS
    for shape in SHAPES:
        found = [""]
        while found:
            found = differences(sources[shape.name], read(shape))
            assert not found or time.monotonic() < deadline, (shape.name, found[:5])
            time.sleep(0.2)
    return sources


def change(client: MilvusClient, shape: Shape, rows: Rows) -> None:
    """Some go, some come; of the first partition with a name nothing is left."""
    rng = random.Random(shape.name)
    delete_keys(client, shape.name, shape, sorted(rows)[::3])
    keys = [None if shape.auto_id else new_key(shape, rng, LATER_STEP, n) for n in range(40)]
    client.insert(shape.name, [make_row(shape, rng, key) for key in keys])
    for partition in shape.partitions[:1]:
        # Milvus drops none that is loaded.
        client.release_collection(shape.name)
        client.drop_partition(shape.name, partition)
        client.load_collection(shape.name)


def comes_back(
    stack: Stack,
    folder: Path,
    shape: Shape,
    when: str,
    options: Sequence[str],
    rows: Rows,
) -> None:
    """Restored as of then or now, it has the rows and the partitions of that time."""
    uri, database = stack.sink.uri, f"{DATABASE}_{when}"
    facts = restore(folder, uri, shape, database, *options)
    assert facts["rowsWritten"] == len(rows) > 20
    restored = MilvusClient(uri=uri, db_name=database)
    make_readable(restored, shape)
    if not shape.has_partition_key:
        named = shape.partitions if when == "then" else shape.partitions[1:]
        assert set(restored.list_partitions(shape.name)) == {"_default", *named}
    restored.close()
    assert not differences(rows, source_rows(uri, database, shape))


@pytest.mark.timeout(400)
def test_collections_come_back_as_they_were_and_as_they_are(
    nats_stack: Stack, tmp_path: Path
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    files = sink_file_pb2.FileSink(uri=folder.as_uri(), parquet=sink_file_pb2.ParquetFiles())
    files.rotate_interval.FromMilliseconds(500)
    read = files_reader(folder, DATABASE)
    load = Load(nats_stack.source.uri, DATABASE, seed=21, pause_seconds=0.02)
    load.create()
    client = MilvusClient(uri=nats_stack.source.uri, db_name=DATABASE)
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{DATABASE}.*", sink=task_pb2.Sink(files=files))
        load.start()
        time.sleep(5)
        load.stop()
        then = wait_until_equal(nats_stack, read)
        time.sleep(APART_SECONDS)
        moment = datetime.now(UTC).isoformat()
        time.sleep(APART_SECONDS)
        for shape in SHAPES:
            change(client, shape, then[shape.name])
        now = wait_until_equal(nats_stack, read)
        pair.quiet()
    times = (("then", ("--at", moment), then), ("now", (), now))
    with ThreadPoolExecutor(AT_ONCE) as beside:
        # They wait for the Milvus most of the time.
        tried = [
            beside.submit(comes_back, nats_stack, folder, shape, when, options, rows[shape.name])
            for when, options, rows in times
            for shape in SHAPES
        ]
    for each in tried:
        each.result()
    client.close()
