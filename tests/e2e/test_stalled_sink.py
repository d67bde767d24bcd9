"""Two tasks on one source: while one's sink stands still, the other's stays in step."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from milvuscdc.v1 import sink_file_pb2, task_pb2, task_service_pb2

from tests.e2e.canonical import differences, source_rows
from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import Pair, error_info
from tests.e2e.test_rows_out import (
    SETTLE_SECONDS,
    Read,
    files_reader,
    postgres_reader,
    postgres_sink,
)
from tests.servers import Stack
from tests.servers.postgres import PostgresServer

DATABASE = "out_stalled"
LOCKED_SECONDS = 12.0
"""Longer than a write may take."""


def _differences(uri: str, read: Read, seconds: float) -> dict[str, list[str]]:
    """Per collection, as soon as there are none or after `seconds`."""
    sources = {s.name: source_rows(uri, DATABASE, s) for s in SHAPES}
    deadline = time.monotonic() + seconds
    while True:
        found = {s.name: differences(sources[s.name], read(s))[:5] for s in SHAPES}
        if not any(found.values()) or time.monotonic() > deadline:
            return {name: texts for name, texts in found.items() if texts}
        time.sleep(0.5)


@pytest.mark.timeout(300)
def test_a_sink_that_stands_still_holds_nobody_else_back(
    nats_stack: Stack,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = nats_stack.source.uri
    folder = tmp_path / "archive"
    folder.mkdir()
    files = sink_file_pb2.FileSink(uri=folder.as_uri(), parquet=sink_file_pb2.ParquetFiles())
    files.rotate_interval.FromMilliseconds(1000)
    stalled = postgres_sink(postgres_server, DATABASE, monkeypatch)
    in_files = files_reader(folder, DATABASE)
    in_postgres = postgres_reader(postgres_server, DATABASE)
    load = Load(uri, DATABASE, seed=11, pause_seconds=0.02)
    load.create()
    names = [f"{DATABASE}.{shape.name}" for shape in SHAPES]
    with Pair(nats_stack, tmp_path) as pair:
        pair.create(f"{DATABASE}.*", sink=stalled)
        pair.create(f"{DATABASE}.*", sink=task_pb2.Sink(files=files), name="tasks/files")
        pair.wait_running(*names, seconds=120)
        load.start()
        try:
            time.sleep(2)
            with postgres_server.connect(DATABASE) as lock, lock.transaction(force_rollback=True):
                for shape in SHAPES:
                    lock.execute(f'LOCK TABLE "{DATABASE}"."{shape.name}" IN EXCLUSIVE MODE')
                time.sleep(LOCKED_SECONDS)
                states = pair.collections().values()
                assert {c.state for c in states} == {task_pb2.COLLECTION_STATE_RETRYING}
                load.stop()
                assert not _differences(uri, in_files, SETTLE_SECONDS)
                states = pair.collections("tasks/files").values()
                assert {c.state for c in states} == {task_pb2.COLLECTION_STATE_RUNNING}
        finally:
            load.stop()
        assert not _differences(uri, in_postgres, SETTLE_SECONDS)
        pair.wait_running(*names)
        for call in (
            pair.tasks.VerifyTask(task_service_pb2.VerifyTaskRequest(name="tasks/files")),
            pair.tasks.DiffTask(task_service_pb2.DiffTaskRequest(name="tasks/files")),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                list(call)
            assert error_info(refused.value).reason == "SINK_NOT_COMPARABLE"
        pair.quiet("SINK_TIMEOUT", "SINK_ERROR")
