"""More between two ticks of the source than the replicator may hold."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from pymilvus import DataType, FieldSchema, MilvusClient

from tests.e2e.load import Shape, create_collection
from tests.e2e.pair import Pair
from tests.servers import Stack
from tests.servers.services import ReplicatorProcess

DIM = 256
ROWS = 2_500
SHAPE = Shape(
    "wide",
    (
        FieldSchema("id", DataType.INT64, is_primary=True),
        FieldSchema("vector", DataType.FLOAT_VECTOR, dim=DIM),
    ),
    shards=2,
)
MEMORY_MIB = 8


def _write(stack: Stack, writer: int) -> None:
    """10 MiB, a part of it twice and a part of it deleted, all between a few ticks."""
    client = MilvusClient(uri=stack.source.uri, db_name="memory")
    rng = np.random.default_rng(writer)
    for step in range(4):
        first = (writer * 10 + step) * ROWS
        vectors = rng.random((ROWS, DIM), dtype=np.float32)
        rows = [{"id": first + n, "vector": vectors[n]} for n in range(ROWS)]
        client.insert(SHAPE.name, rows)
        client.upsert(SHAPE.name, [{**row, "vector": row["vector"] * 2} for row in rows[:200]])
        client.delete(SHAPE.name, random.Random(step).sample(range(first, first + ROWS), 100))
    client.close()


@pytest.mark.timeout(400)
def test_an_interval_between_ticks_larger_than_the_memory_is_read_in_portions(
    tmp_path: Path,
) -> None:
    # Ticks as rare as this let 40 MiB come between two of them.
    settings = {"proxy": {"timeTickInterval": 5_000}}
    with Stack(tmp_path / "stack", settings=settings) as stack:
        MilvusClient(uri=stack.source.uri).create_database("memory")
        client = MilvusClient(uri=stack.source.uri, db_name="memory")
        create_collection(client, SHAPE)
        pair = Pair(stack, tmp_path, replicators=0)
        replicator = ReplicatorProcess(
            tmp_path, pair.controller.address, "replicator-0", memoryMiB=MEMORY_MIB
        )
        pair.replicators.append(replicator)
        with pair:
            pair.create("memory.*")
            pair.wait_running(f"memory.{SHAPE.name}")
            writers = [threading.Thread(target=_write, args=(stack, n)) for n in range(4)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            assert pair.prove() == 4 * 4 * (ROWS - 100)
            assert "forgotten until its tick is known" in replicator.log_path.read_text()
            pair.quiet()
