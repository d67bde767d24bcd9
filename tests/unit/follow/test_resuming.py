"""Property: over any number of stops, each change is handed out once, in order; memory has a bound.

The log mixes two collections on two topics, with messages that lie before or behind the ticks they
belong to; the expectation is made of the log alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.follow import (
    ChangeBatch,
    EventKind,
    Follower,
    Item,
    Positions,
    SchemaEvent,
    WriterFeed,
    intake,
)
from milvus_cdc.rows import Table
from milvus_cdc.sink.writer import (
    Batch,
    Capabilities,
    Checkpoint,
    Opened,
    Opening,
    SchemaChange,
)

from tests.unit.follow.world import (
    START,
    Change,
    World,
    changes,
    collection,
    delete,
    drop_partition,
    insert,
    take,
    tick,
)


@pytest.fixture(autouse=True, scope="module")
def small_portions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "LEAST_PORTION_BYTES", 100)
        yield


P, Q = "by-dev-rootcoord-dml_0", "by-dev-rootcoord-dml_1"
LIVES = 400


def fill(world: World, rng: random.Random, steps: int) -> dict[str, list[Change]]:
    """Appends a log to each topic; what has to be told of each vchannel."""
    told: dict[str, list[Change]] = {}
    drops: list[tuple[int, int]] = []
    ts = START
    waiting: dict[str, list[tuple[int, bytes]]] = {P: [], Q: []}
    shards = [
        (each.collection_id, place.vchannel, place.pchannel)
        for each in world.metadata.collections.values()
        for place in each.vchannels
    ]
    for step in range(steps):
        ts += rng.randint(1, 3)
        collection_id, vchannel, pchannel = rng.choice(shards)
        keys = [rng.randrange(40) for _ in range(rng.randint(1, 4))]
        text = f"{step}" * rng.choice((1, 1, 8))
        log = told.setdefault(vchannel, [])
        match rng.choice(("insert", "insert", "delete", "upsert", "tick", "drop")):
            case "insert":
                # As Milvus cuts one request by partition and size.
                cut = rng.randint(0, len(keys) - 1)
                for part in (keys[:cut], keys[cut:]):
                    if part:
                        payload = insert(vchannel, collection_id, ts, part, text)
                        waiting[pchannel].append((ts, payload))
                log += [(vchannel, ts, key, text) for key in keys]
            case "delete":
                waiting[pchannel].append((ts, delete(vchannel, collection_id, ts, keys)))
                log += [(vchannel, ts, key, "") for key in keys]
            case "upsert":
                halves = [
                    (ts, insert(vchannel, collection_id, ts, keys, text)),
                    (ts, delete(vchannel, collection_id, ts, keys)),
                ]
                rng.shuffle(halves)
                waiting[pchannel] += halves
                log += [(vchannel, ts, key, text) for key in keys]
            case "drop" if rng.random() < 0.3:
                drops.append((collection_id, ts))
                payload = drop_partition(collection_id, ts, 1_000 + step, f"p{step}")
                for each in waiting.values():
                    each.append((ts, payload))
            case _:
                flush(world, rng, waiting[pchannel], pchannel, ts)
    ts += 1
    for pchannel, messages in waiting.items():
        flush(world, rng, messages, pchannel, ts, everything=True)
    return told


def flush(
    world: World,
    rng: random.Random,
    messages: list[tuple[int, bytes]],
    pchannel: str,
    ts: int,
    *,
    everything: bool = False,
) -> None:
    """Messages in any order before a tick that covers some of them; all with an older timestamp
    lie before it.
    """
    until = ts if everything else rng.randint(max(START, ts - 6), ts)
    rng.shuffle(messages)
    kept: list[tuple[int, bytes]] = []
    for each in messages:
        if each[0] > until and rng.random() < 0.5:
            kept.append(each)
        else:
            world.append(pchannel, each[1])
    world.append(pchannel, tick(until))
    messages[:] = kept


async def made(rng: random.Random, steps: int) -> tuple[World, dict[str, list[Change]]]:
    world = World()
    world.source.create(P)
    world.source.create(Q)
    await world.metadata.put(
        collection(7, "c", P, Q), collection(8, "d", P), collection(9, "e", Q, Q)
    )
    return world, fill(world, rng, steps)


def by_vchannel(found: list[Change]) -> dict[str, list[Change]]:
    """By time; the messages of one request have no order among them."""
    told: dict[str, list[Change]] = {}
    for change in found:
        told.setdefault(change[0], []).append(change)
    for log in told.values():
        assert [change[1] for change in log] == sorted(change[1] for change in log)
        log.sort()
    return told


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120))
async def test_each_change_once_and_in_order_over_any_number_of_stops(
    seed: int, steps: int
) -> None:
    rng = random.Random(seed)
    world, expected = await made(rng, steps)
    wanted = sum(len(each) for each in expected.values())
    found: list[Change] = []
    positions = None
    for _ in range(LIVES):
        options: dict[str, Any] = {
            "rows_per_batch": rng.choice((1, 3, 10_000)),
            "memory_bytes": rng.choice((200, 2_000, 1 << 20)),
        }
        async with world.follower(positions, **options) as follower:
            lasts = rng.randint(4, 30)

            def done(taken: list[Item], lasts: int = lasts, had: int = len(found)) -> bool:
                return len(taken) >= lasts or had + len(changes(taken)) >= wanted

            items = await take(follower, done)
            if rng.random() < 0.5:
                dealt, positions = items, follower.positions(including=items[-1])
            else:
                dealt, positions = items[:-1], follower.positions()
        found += changes(dealt)
        positions = Positions.from_json(positions.to_json())
        if len(found) >= wanted:
            break
    assert by_vchannel(found) == {v: sorted(log) for v, log in expected.items() if log}


@dataclass
class Ledger:
    """A writer that keeps checkpoints with the rows, and is all that a program remembers."""

    rows: list[Change] = field(default_factory=list)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)
    capabilities: Capabilities = field(default_factory=lambda: Capabilities(own_checkpoint=True))

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        self.openings.append(opening)
        return Opened(tuple(self.checkpoints.values()))

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        vchannel = batch.changes[0].vchannel
        whole = ChangeBatch(table, vchannel, batch.changes, batch.checkpoints[0])
        self.rows += changes([whole])
        self.checkpoints |= {each.vchannel: each for each in batch.checkpoints}

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None: ...

    async def heartbeat(self, table: Table, resolved_ts: int) -> None: ...

    async def release(self, table: Table) -> None: ...

    async def close(self) -> None: ...

    async def probe(self) -> str:
        return ""

    def violations(self, tables: Sequence[Table]) -> list[str]:
        return []


@pytest.mark.parametrize("seed", range(5))
async def test_a_writer_that_keeps_checkpoints_needs_no_saved_positions(seed: int) -> None:
    rng = random.Random(seed)
    world, expected = await made(rng, 100)
    ledger = Ledger()
    wanted = sum(len(each) for each in expected.values())
    while len(ledger.rows) < wanted:
        async with world.follower(rows_per_batch=5) as follower:
            await feed(follower, ledger, rng.randint(4, 20), wanted)
    assert by_vchannel(ledger.rows) == {v: sorted(log) for v, log in expected.items() if log}


async def feed(follower: Follower, ledger: Ledger, lasts: int, wanted: int) -> None:
    feeding = WriterFeed(follower, ledger, adopt=True)
    async for item in follower:
        await feeding.write(item)
        lasts -= 1
        if lasts <= 0 or len(ledger.rows) >= wanted:
            return


async def test_a_writer_is_told_whether_a_collection_is_new() -> None:
    world, _ = await made(random.Random(1), 50)
    ledger = Ledger()
    async with world.follower(select="default.d") as follower:
        feeding = WriterFeed(follower, ledger)
        found = await anext(follower)
        assert isinstance(found, SchemaEvent)
        assert found.kind is EventKind.COLLECTION_FOUND
        assert not follower.positions().collections, "nobody has opened it yet"
        await feeding.write(found)
        positions = follower.positions(including=found)
    async with world.follower(positions, select="default.d") as follower:
        await WriterFeed(follower, ledger).write(await anext(follower))
    assert ledger.openings == [Opening.NEW, Opening.RESUME]
