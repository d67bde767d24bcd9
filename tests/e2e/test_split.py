"""One collection of two shards, written by two replicators at once, between two real servers: rows,
partitions made and dropped under load, owners killed; in the end every row is
there once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from milvuscdc.v1 import sink_file_pb2, task_pb2
from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, Load, make_row
from tests.e2e.pair import Pair, error_info
from tests.e2e.test_crashes import LOST_PEER
from tests.servers import Stack

DATABASE = "hot"
SHAPE = next(shape for shape in SHAPES if shape.name == "int_keys")
NAME = f"{DATABASE}.{SHAPE.name}"


def owners(pair: Pair) -> list[str]:
    """Of each part; none while it is held in one piece, or on its way."""
    found = pair.collections().get(NAME)
    if found is None:
        return []
    names = [part.replicator for part in found.parts]
    whole = found.state == task_pb2.COLLECTION_STATE_RUNNING
    return names if whole and all(names) else []


def split(pair: Pair) -> bool:
    return len(set(owners(pair))) == 2


def epochs(pair: Pair) -> int:
    """Grows with every new owner of a part."""
    return sum(a.epoch for a in pair.assignments() if a.collection == NAME)


def use_a_partition(pair: Pair, client: MilvusClient, rng: random.Random, step: int) -> None:
    """It comes, gets rows on both shards, and goes; its name is given again at once. What goes
    before the metadata was read with it is never made at the sink, and nothing waits for its drop.
    """
    sink = MilvusClient(uri=pair.stack.sink.uri, db_name=DATABASE)
    for turn in (0, 1):
        client.create_partition(SHAPE.name, "passing")
        first = 10_000_000 + step * 100_000 + turn * 1_000
        rows = [make_row(SHAPE, rng, first + n) for n in range(200)]
        client.insert(SHAPE.name, rows, partition_name="passing")
        if turn == 0:
            pair.wait("it is there", lambda: "passing" in sink.list_partitions(SHAPE.name))
        if turn == 0 or step % 2 == 0:
            client.release_partitions(SHAPE.name, ["passing"])
            client.drop_partition(SHAPE.name, "passing")
    sink.close()


def replicate(stack: Stack, folder: Path, *, kills: int) -> None:
    rng = random.Random(kills)
    load = Load(stack.source.uri, DATABASE, shapes=(SHAPE,), pause_seconds=0.02)
    load.create()
    source = MilvusClient(uri=stack.source.uri, db_name=DATABASE)
    with Pair(stack, folder, replicators=2) as pair:
        pair.create(f"{DATABASE}.*", max_parts=2)
        load.start()
        pair.wait("both have a part", lambda: split(pair), seconds=120)
        before = epochs(pair)
        use_a_partition(pair, source, rng, 0)
        pair.wait(
            "it was whole, and is split again",
            lambda: split(pair) and epochs(pair) > before,
            120,
        )
        if not kills:
            shown = subprocess.run(
                [sys.executable, "-m", "milvus_cdc.cli.main", "assignment", "list", "-o", "json"],
                env=os.environ | {"MILVUS_CDC_CONTROLLER": pair.controller.address},
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout
            parts = [a for a in json.loads(shown)["assignments"] if a["name"].endswith("of2")]
            assert len({a["replicator"] for a in parts}) == 2, shown
        for step in range(1, kills + 1):
            lost = owners(pair)[step % 2]
            index = next(
                i for i, r in enumerate(pair.replicators) if f"replicators/{r.name}" == lost
            )
            before = epochs(pair)
            pair.replicators[index].restart(hard=True)
            use_a_partition(pair, source, rng, step)
            pair.wait("it is split again", lambda: split(pair) and epochs(pair) > before, 240)  # noqa: B023
        load.stop()
        pair.wait_running(NAME)
        rows = pair.prove()
        assert rows
        print(f"{rows} rows, {epochs(pair)} owners")
        source.release_collection(SHAPE.name)
        source.drop_collection(SHAPE.name)
        sink = MilvusClient(uri=stack.sink.uri, db_name=DATABASE)
        pair.wait("the drop is done", lambda: SHAPE.name not in sink.list_collections())
        sink.close()
        pair.quiet(*LOST_PEER)
    source.close()


@pytest.mark.timeout(400)
def test_rows_and_changes_of_partitions_under_load(nats_stack: Stack, tmp_path: Path) -> None:
    replicate(nats_stack, tmp_path, kills=0)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_owner_of_each_part_is_killed(nats_stack: Stack, tmp_path: Path) -> None:
    replicate(nats_stack, tmp_path, kills=2)


def test_a_sink_that_is_no_milvus_is_refused(nats_stack: Stack, tmp_path: Path) -> None:
    with Pair(nats_stack, tmp_path, replicators=0) as pair:
        files = task_pb2.Sink(files=sink_file_pb2.FileSink(uri=f"file://{tmp_path}"))
        with pytest.raises(grpc.RpcError) as refused:
            pair.create("hot.*", sink=files, max_parts=2)
        info = error_info(refused.value)
        assert (info.reason, info.metadata["field"]) == (
            "NOT_FOR_THIS_SINK",
            "task.split.max_parts",
        )
