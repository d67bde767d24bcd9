"""A replicator is lost, and what it had sent reaches the sink long after: found and mended, and
nothing else is taken for it.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from milvuscdc.v1 import task_pb2
from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, Load, Row, make_row
from tests.e2e.pair import Pair
from tests.e2e.test_crashes import LOST_PEER
from tests.servers import Stack
from tests.servers.process import ManagedProcess

DATABASE = "late"
SHAPE = next(shape for shape in SHAPES if shape.name == "int_keys")
NAME = f"{DATABASE}.{SHAPE.name}"
FOUND = "keys are wrong at the sink"
RIGHT = "keys recounted"


def _rows(rng: random.Random, *keys: int) -> list[Row]:
    return [make_row(SHAPE, rng, key) for key in keys]


def _events(process: ManagedProcess, about: str) -> list[dict[str, object]]:
    lines = process.log_path.read_text().splitlines()
    return [json.loads(line) for line in lines if about in line]


def _epoch(pair: Pair) -> int:
    return next((a.epoch for a in pair.assignments() if a.collection), 0)


@pytest.mark.timeout(400)
def test_keys_that_a_lost_replicator_doubles_late_are_mended(
    nats_stack: Stack, tmp_path: Path
) -> None:
    rng = random.Random(6)
    Load(nats_stack.source.uri, DATABASE, shapes=(SHAPE,)).create()
    source = MilvusClient(uri=nats_stack.source.uri, db_name=DATABASE)
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create(f"{DATABASE}.*")
        source.insert(SHAPE.name, _rows(rng, *range(1000)))
        pair.wait_running(NAME)
        assert pair.prove() == 1000
        owner = next(a.replicator for a in pair.assignments() if a.collection)
        lost, other = sorted(pair.replicators, key=lambda r: f"replicators/{r.name}" != owner)
        lost.kill()
        # It was granted as much ahead, so it may have sent these.
        older = _rows(rng, *range(1000, 1100))
        source.insert(SHAPE.name, older)
        pair.wait("the other one has it", lambda: _epoch(pair) == 2)
        source.upsert(SHAPE.name, _rows(rng, *range(1050, 1060)))
        source.delete(SHAPE.name, list(range(1060, 1070)))
        pair.wait("all of it is there", lambda: pair.get().progress.rows_deleted == 10)
        began = time.monotonic()
        sink = MilvusClient(uri=nats_stack.sink.uri, db_name=DATABASE)
        sink.insert(SHAPE.name, older)
        pair.wait("it is found", lambda: bool(_events(other, FOUND)), seconds=120)
        (found,) = _events(other, FOUND)
        assert (found["doubled"], found["back"], found["gone"]) == (90, 10, 0)
        print(f"found {time.monotonic() - began:.0f} s after the late request")
        pair.wait("it is right", lambda: bool(_events(other, RIGHT)), seconds=120)
        print(f"mended {time.monotonic() - began:.0f} s after it")
        assert _epoch(pair) == 3
        assert pair.prove() == 1090
        pair.wait_running(NAME)
        assert pair.collections()[NAME].state == task_pb2.COLLECTION_STATE_RUNNING
        pair.quiet(*LOST_PEER, FOUND)
    source.close()
    sink.close()


@pytest.mark.timeout(400)
def test_under_a_mixed_load_nothing_is_taken_for_wrong(nats_stack: Stack, tmp_path: Path) -> None:
    load = Load(nats_stack.source.uri, "recounted", pause_seconds=0.1)
    load.create()
    names = {f"recounted.{shape.name}" for shape in SHAPES}
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create("recounted.*")
        load.start()
        pair.wait_running(*names)
        time.sleep(2)
        held = {a.replicator for a in pair.assignments() if a.collection}
        for replicator in pair.replicators:
            if f"replicators/{replicator.name}" in held:
                replicator.restart(hard=True)

        def recounted() -> dict[object, object]:
            found = [line for each in pair.replicators for line in _events(each, RIGHT)]
            return {line["collection"]: line["keys"] for line in found}

        pair.wait("all are recounted", lambda: recounted().keys() == names, seconds=200)
        print(f"keys recounted under load: {recounted()}")
        assert all(recounted().values())
        load.stop()
        pair.wait_running(*names)
        assert pair.prove()
        pair.quiet(*LOST_PEER)
