"""Files put back from a copy that somebody made earlier: told, and mended by a resync."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from milvuscdc.v1 import sink_file_pb2, task_pb2, task_service_pb2

from tests.e2e.canonical import differences, source_rows
from tests.e2e.load import make_row
from tests.e2e.pair import TASK, Pair
from tests.e2e.test_faults import FAILED, SIMPLE, source_with
from tests.e2e.test_rows_out import SETTLE_SECONDS, files_reader
from tests.servers import Stack

DATABASE = "put_back"
NAME = f"{DATABASE}.simple"


@pytest.mark.timeout(300)
def test_a_sink_put_back_to_an_older_state_is_noticed(nats_stack: Stack, tmp_path: Path) -> None:
    uri = nats_stack.source.uri
    folder, copy = tmp_path / "archive", tmp_path / "copy"
    folder.mkdir()
    files = sink_file_pb2.FileSink(uri=folder.as_uri(), parquet=sink_file_pb2.ParquetFiles())
    files.rotate_interval.FromMilliseconds(500)
    read = files_reader(folder, DATABASE)
    source = source_with(nats_stack, DATABASE, "simple")

    def equal() -> bool:
        return not differences(source_rows(uri, DATABASE, SIMPLE), read(SIMPLE))

    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{DATABASE}.*", sink=task_pb2.Sink(files=files))
        pair.wait("all there", equal, SETTLE_SECONDS)
        shutil.copytree(folder, copy)
        rng = random.Random(4)
        source.insert("simple", [make_row(SIMPLE, rng, n) for n in range(1000, 1040)])
        pair.wait("more of them", equal, SETTLE_SECONDS)
        pair.replicators[0].stop()
        shutil.rmtree(folder)
        copy.rename(folder)
        pair.replicators[0].start()
        pair.wait("failed", lambda: pair.collections()[NAME].state == FAILED)
        assert pair.collections()[NAME].reason == "SINK_PUT_BACK"
        assert not equal()
        request = task_service_pb2.ResyncCollectionRequest(name=TASK, collection=NAME)
        pair.tasks.ResyncCollection(request)
        pair.wait("all there again", equal, SETTLE_SECONDS)
        pair.quiet('"event": "collection failed"', "SINK_PUT_BACK", "SINK_FENCED")
