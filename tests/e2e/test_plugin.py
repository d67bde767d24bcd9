"""A task whose sink comes from another package: it follows a real source, through a crash."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import DataType

from tests.e2e.canonical import Rows, canonical
from tests.e2e.load import Shape
from tests.e2e.pair import Pair, error_info
from tests.e2e.test_rows_out import follow
from tests.servers import Stack


@pytest.fixture(autouse=True)
def _installed(example_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the services that a test starts."""
    found = [str(example_package), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, found)))


def sqlite(path: str | float) -> task_pb2.Sink:
    sink = task_pb2.Sink()
    sink.plugin.name = "sqlite"
    sink.plugin.config.update({"path": path})
    return sink


@pytest.mark.timeout(300)
def test_a_sink_of_another_package_follows(nats_stack: Stack, tmp_path: Path) -> None:
    database, place = "out_plugin", tmp_path / "rows.db"

    def read(shape: Shape) -> Rows:
        with closing(sqlite3.connect(place)) as db:
            found = db.execute("SELECT doc FROM rows WHERE name = ?", [f"{database}.{shape.name}"])
            rows = [json.loads(doc) for (doc,) in found]
        for row in rows:
            for field in shape.fields:
                if field.dtype == DataType.BINARY_VECTOR:
                    row[field.name] = bytes.fromhex(row[field.name])
        return {row[shape.key.name]: canonical(shape, row) for row in rows}

    rounds = (("replicator", "kill"),)
    follow(nats_stack, tmp_path, database, sqlite(str(place)), read, rounds)


def test_bad_plugins_are_refused_by_name(nats_stack: Stack, tmp_path: Path) -> None:
    unknown = sqlite("/x")
    unknown.plugin.name = "sqlight"
    with Pair(nats_stack, tmp_path) as pair:
        for sink, reason, field in (
            (unknown, "PLUGIN_UNKNOWN", "task.sink.plugin.name"),
            (sqlite("rows.db"), "INVALID_FIELD", "task.sink.plugin.config.path"),
            (sqlite(5), "INVALID_FIELD", "task.sink.plugin.config.path"),
            (sqlite("/no/such/rows.db"), "SINK_FILE", "task.sink.plugin.config.path"),
        ):
            request = task_service_pb2.CreateTaskRequest(
                task=pair.task("out_plugin.*", sink=sink), validate_only=True
            )
            with pytest.raises(grpc.RpcError) as raised:
                pair.tasks.CreateTask(request, timeout=30)
            info = error_info(raised.value)
            assert (info.reason, info.metadata["field"]) == (reason, field), info
        assert not pair.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks
