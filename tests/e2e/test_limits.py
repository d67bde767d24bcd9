"""A task's limits and batches, between two real servers, changed while it runs."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, Load, make_row, new_key
from tests.e2e.pair import TASK, Pair
from tests.servers import Stack

DATABASE = "limited"
ROWS_PER_SECOND = 200
SECONDS = 8.0
LATER_STEP = 1_000_000
"""Of keys that the load cannot have used."""


def _update(pair: Pair, *paths: str, **fields: Any) -> task_pb2.Task:
    request = task_service_pb2.UpdateTaskRequest(
        task=task_pb2.Task(name=TASK, **fields),
        update_mask=field_mask_pb2.FieldMask(paths=paths),
    )
    return pair.tasks.UpdateTask(request, timeout=10).task


def _written(pair: Pair) -> int:
    progress = pair.get().progress
    return progress.rows_inserted + progress.rows_upserted + progress.rows_deleted


def _limited(pair: Pair) -> bool:
    return any(
        condition.type == "RATE_LIMITED"
        for collection in pair.collections().values()
        for condition in collection.conditions
    )


@pytest.mark.timeout(300)
def test_a_task_keeps_its_limits_until_they_are_lifted(nats_stack: Stack, tmp_path: Path) -> None:
    load = Load(nats_stack.source.uri, DATABASE, seed=5, pause_seconds=0.02)
    load.create()
    load.start()
    time.sleep(12)
    load.stop()
    names = [f"{DATABASE}.{shape.name}" for shape in SHAPES]
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        task = pair.task(f"{DATABASE}.*")
        task.limits.rows_per_second = ROWS_PER_SECOND
        task.batching.max_rows = 50
        pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60)
        pair.wait("a limit shows", lambda: _limited(pair), seconds=90)
        pair.wait_running(*names)
        begun, before = time.monotonic(), _written(pair)
        time.sleep(SECONDS)
        written, took = _written(pair) - before, time.monotonic() - begun
        print(f"{written} rows in {took:.1f} s")
        # Two replicators' allowance of a second, and what they had not reported before.
        assert 0 < written <= ROWS_PER_SECOND * (took + 3)
        assert _limited(pair), "there is more to write"
        # Without limits, and with batches that wait for more.
        _update(pair, "limits")
        linger = task_pb2.Batching(max_rows=5000)
        linger.linger.FromMilliseconds(300)
        changed = _update(pair, "batching", batching=linger)
        assert changed.batching == linger
        assert not changed.HasField("limits")
        client = MilvusClient(uri=nats_stack.source.uri, db_name=DATABASE)
        rng = random.Random(7)
        for shape in SHAPES:
            keys = [
                None if shape.auto_id else new_key(shape, rng, LATER_STEP, n) for n in range(300)
            ]
            client.insert(shape.name, [make_row(shape, rng, key) for key in keys])
        client.close()
        pair.wait("no limit shows", lambda: not _limited(pair), seconds=60)
        assert pair.prove() > written
        pair.quiet()
