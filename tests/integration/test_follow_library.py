"""The library on a real source: stopped and resumed in mid-stream, its user ends with the rows that
the source has; and the example does what its page says.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.follow import (
    ChangeBatch,
    EventKind,
    Follower,
    NatsConfig,
    Positions,
    SchemaEvent,
)
from milvus_cdc.model import tso_to_ms
from pymilvus import MilvusClient

from tests.e2e.canonical import Rows, canonical, differences, source_rows
from tests.e2e.load import SHAPES, Load, delete_keys
from tests.servers import Stack

ROOT = Path(__file__).parents[2]
BY_NAME = {shape.name: shape for shape in SHAPES}
RUNS = 8


class Mirror:
    """What a program makes of the changes: a row per key."""

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}
        self.resolved: dict[str, int] = {}
        """By vchannel."""
        self.newest: dict[str, tuple[int, str]] = {}
        """By vchannel: the newest change taken, and what it was."""

    def take(self, item: ChangeBatch | SchemaEvent) -> None:
        name = item.table.collection
        if isinstance(item, SchemaEvent):
            if item.kind is EventKind.COLLECTION_FOUND:
                self.rows.setdefault(name, {})
            return
        before = self.resolved.get(item.vchannel, 0)
        assert all(before < each.ts <= item.resolved_ts for each in item.changes), "a change twice"
        self.resolved[item.vchannel] = item.resolved_ts
        rows, shape = self.rows[name], BY_NAME[name]
        for row in item.rows():
            key = row[shape.key.name]
            if row["$op"] == "DELETE":
                rows.pop(key, None)
            else:
                rows[key] = canonical(shape, row)


def follower(stack: Stack, database: str, positions: Positions | None, **options: Any) -> Follower:
    return Follower(
        etcd=[stack.etcd.url],
        root_path=stack.source.root_path,
        queue=NatsConfig(stack.source.nats_url),
        select=[f"{database}.*"],
        positions=positions,
        **options,
    )


@pytest.mark.timeout(240)
async def test_stopped_and_resumed_in_mid_stream_it_ends_as_the_source(nats_stack: Stack) -> None:
    database = "followed_by_a_program"
    load = Load(nats_stack.source.uri, database, seed=5, pause_seconds=0.02)
    await asyncio.to_thread(load.create)
    mirror, rng = Mirror(), random.Random(5)
    text: str | None = None
    load.start()
    try:
        for _ in range(RUNS):
            text = await run(nats_stack, database, mirror, text, rng, rng.uniform(0.5, 2.0))
    finally:
        await asyncio.to_thread(load.stop)
    assert load.acknowledged > 1_000
    done_ms = int(time.time() * 1000)
    found = [""]
    deadline = time.monotonic() + 60
    while found and time.monotonic() < deadline:
        text = await run(nats_stack, database, mirror, text, rng, 3.0)
        assert text is not None
        if any(
            tso_to_ms(at.resolved_ts) <= done_ms
            for each in Positions.from_json(text).collections.values()
            for at in each.vchannels.values()
        ):
            continue  # what is not read yet is no difference
        found = []
        for shape in SHAPES:
            rows = await asyncio.to_thread(source_rows, nats_stack.source.uri, database, shape)
            assert rows
            found += differences(rows, mirror.rows[shape.name])
        assert not found, found[:10]
    assert not found


async def run(
    stack: Stack,
    database: str,
    mirror: Mirror,
    text: str | None,
    rng: random.Random,
    seconds: float,
) -> str:
    """Follows for a while, ends anywhere; the positions behind what the mirror has taken."""
    positions = None if text is None else Positions.from_json(text)
    async with follower(stack, database, positions, rows_per_batch=rng.choice((20, 500))) as items:
        try:
            async with asyncio.timeout(seconds):
                async for item in items:
                    mirror.take(item)
                    text = items.positions(including=item).to_json()
        except TimeoutError:
            pass
        # Nothing is in hand that was not taken: the last word also has the newest ticks.
        return items.positions().to_json()


@pytest.mark.timeout(120)
def test_the_example_does_what_it_says(nats_stack: Stack, tmp_path: Path) -> None:
    database, shape = "followed_by_the_example", BY_NAME["int_keys"]
    load = Load(nats_stack.source.uri, database, shapes=(shape,))
    load.create()
    client = MilvusClient(uri=nats_stack.source.uri, db_name=database)
    try:
        row = {"vector": [0.5] * 16}
        client.insert(shape.name, [{"id": key, **row} for key in (1, 2)])
        name = f"{database}.int_keys"
        first = example(nats_stack, database, tmp_path)
        assert sorted(first) == [f"{name} COLLECTION_FOUND", f"{name} CREATE 1", f"{name} CREATE 2"]
        client.upsert(shape.name, [{"id": 1, **row}])
        delete_keys(client, shape.name, shape, [2])
        second = example(nats_stack, database, tmp_path)
        assert sorted(second) == [
            f"{name} COLLECTION_FOUND",
            f"{name} DELETE 2",
            f"{name} UPDATE 1",
        ]
    finally:
        client.close()


def example(stack: Stack, database: str, folder: Path) -> list[str]:
    """The first three lines that it prints; then it is killed."""
    command = [
        sys.executable,
        str(ROOT / "examples/follow.py"),
        stack.etcd.url,
        stack.source.root_path,
        stack.source.nats_url,
        f"{database}.*",
        str(folder / "positions.json"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3)]
        time.sleep(1.0)  # the positions behind them are saved
        process.kill()
    return lines
