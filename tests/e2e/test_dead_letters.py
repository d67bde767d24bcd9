"""A row of a real Milvus that PostgreSQL cannot hold: it stops its collection; with a place
for it, it is a dead letter there, and everything else arrives.
"""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import dead_letters_pb2, task_pb2, task_service_pb2
from pymilvus import MilvusClient

from tests.e2e.pair import TASK, Pair, error_info
from tests.e2e.test_rows_out import postgres_sink
from tests.servers import Stack
from tests.servers.postgres import PostgresServer

DATABASE, NAME = "dead", "notes"
BAD = {7: "a\0b", 23: "\0"}


def _place(folder: Path) -> dead_letters_pb2.DeadLetters:
    return dead_letters_pb2.DeadLetters(files=dead_letters_pb2.DeadLetterFiles(uri=folder.as_uri()))


def _update(pair: Pair, place: dead_letters_pb2.DeadLetters, **options: bool) -> task_pb2.Task:
    request = task_service_pb2.UpdateTaskRequest(
        task=task_pb2.Task(name=TASK, dead_letters=place),
        update_mask=field_mask_pb2.FieldMask(paths=["dead_letters"]),
        **options,
    )
    return pair.tasks.UpdateTask(request, timeout=30).task


@pytest.mark.timeout(300)
def test_a_row_that_cannot_be_held_waits_for_a_place_and_goes_there(
    nats_stack: Stack,
    postgres_server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MilvusClient(uri=nats_stack.source.uri).create_database(DATABASE)
    source = MilvusClient(uri=nats_stack.source.uri, db_name=DATABASE)
    source.create_collection(NAME, dimension=4, auto_id=False)
    folder = tmp_path / "letters"
    folder.mkdir()
    sink = postgres_sink(postgres_server, DATABASE, monkeypatch)

    def insert(first: int, last: int) -> None:
        rows = [
            {"id": n, "vector": [1.0, 2.0, 3.0, float(n)], "text": BAD.get(n, f"é{n}")}
            for n in range(first, last)
        ]
        source.insert(NAME, rows)

    def count() -> int:
        with postgres_server.connect(DATABASE) as connection:
            found = connection.execute(f'SELECT count(*) FROM "{DATABASE}"."{NAME}"').fetchone()
        assert found is not None
        return int(found[0])

    def shown() -> task_pb2.TaskCollection:
        return pair.collections()[f"{DATABASE}.{NAME}"]

    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create(f"{DATABASE}.*", sink=sink)
        pair.wait_running(f"{DATABASE}.{NAME}", seconds=90)
        insert(0, 50)
        pair.wait("it stops", lambda: shown().state == task_pb2.COLLECTION_STATE_FAILED)
        assert shown().reason == "ROW_NOT_STORABLE"
        assert count() == 0, "nothing of its batch"
        with pytest.raises(grpc.RpcError) as refused:
            _update(pair, _place(tmp_path / "not there"), validate_only=True)
        info = error_info(refused.value)
        assert (info.reason, info.metadata["field"]) == (
            "FOLDER_MISSING",
            "task.dead_letters.files.uri",
        )
        _update(pair, _place(folder))
        pair.tasks.RetryTask(task_service_pb2.RetryTaskRequest(name=TASK))
        pair.wait("the others arrive", lambda: count() == 48, seconds=90)
        pair.wait("it is counted", lambda: shown().rows_refused == 2)
        pair.replicators[0].kill()
        pair.replicators[0].start()
        insert(50, 80)
        pair.wait("it goes on", lambda: count() == 78, seconds=90)
        assert shown().rows_refused == 2
        assert "DEAD_LETTERS" in {condition.type for condition in shown().conditions}
        lines = [line for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]
        letters = {letter["key"]: letter for letter in map(json.loads, lines)}
        assert sorted(letters) == sorted(BAD)
        for key, letter in letters.items():
            assert letter["reason"] == "ROW_NOT_STORABLE"
            assert letter["row"]["text"] == BAD[key]
            assert letter["row"]["vector"] == [1.0, 2.0, 3.0, float(key)]
        pair.quiet("ROW_NOT_STORABLE", "stream", "not reachable", "lost")
