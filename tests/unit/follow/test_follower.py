"""A program that follows a source: order, events, positions, trouble."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest
from milvus_cdc.errors import BugError, LogResetError, LogTruncatedError, RetryableError, UserError
from milvus_cdc.follow import ChangeBatch, EventKind, Positions, SchemaEvent
from milvus_cdc.rows import ChangeOp

from tests.unit.follow.world import (
    START,
    World,
    changes,
    collection,
    delete,
    drop_collection,
    drop_partition,
    events,
    insert,
    take,
    tick,
)

P, Q = "by-dev-rootcoord-dml_0", "by-dev-rootcoord-dml_1"
V, W = f"{P}_7v0", f"{Q}_7v1"


async def one_shard() -> World:
    world = World()
    await world.metadata.put(collection(7, "c", P))
    world.source.create(P)
    return world


async def two_shards() -> World:
    world = World()
    await world.metadata.put(collection(7, "c", P, Q))
    world.source.create(P)
    world.source.create(Q)
    return world


async def test_changes_come_in_order_decoded_and_with_their_kind() -> None:
    world = await one_shard()
    world.append(
        P,
        insert(V, 7, START + 5, [1, 2], "late"),
        delete(V, 7, START + 8, [1]),
        insert(V, 7, START + 3, [3], "early"),
        insert(V, 7, START + 9, [2], "new"),
        delete(V, 7, START + 9, [2]),
        tick(START + 10),
        insert(V, 7, START + 11, [4], "no tick yet"),
    )
    async with world.follower() as follower:
        found, batch = await take(follower, lambda taken: len(taken) == 2)
        assert isinstance(found, SchemaEvent)
        assert found.kind is EventKind.COLLECTION_FOUND
        assert not found.resumed
        assert found.table.full_name == "default.c"
        assert isinstance(batch, ChangeBatch)
        assert [each.op for each in batch.changes] == [
            ChangeOp.CREATE,
            ChangeOp.CREATE,
            ChangeOp.DELETE,
            ChangeOp.UPDATE,
        ]
        assert batch.resolved_ts == START + 10
        assert [(r["$op"], r["id"], r["text"]) for r in batch.rows()] == [
            ("CREATE", 3, "early"),
            ("CREATE", 1, "late"),
            ("CREATE", 2, "late"),
            ("DELETE", 1, None),
            ("UPDATE", 2, "new"),
        ]
        table = batch.arrow()
        assert table.column_names == ["$op", "$ts", "$partition", "id", "text", "vector"]
        assert table.column("$ts").to_pylist()[0] == START + 3
        assert batch.num_rows == table.num_rows == 5
        vectors = batch.numpy("vector")
        assert vectors.dtype == np.float32
        assert vectors.tolist() == [[float(key)] * 4 for key in (3, 1, 2, 2)]
        assert batch.numpy("id").tolist() == [3, 1, 2, 2]


async def test_positions_cover_what_was_handed_out_before_the_last_item() -> None:
    world = await one_shard()
    for n in range(3):
        world.append(P, insert(V, 7, START + 10 * n + 1, [n]), tick(START + 10 * n + 5))
    async with world.follower(rows_per_batch=1) as follower:
        _, first, second = await take(follower, lambda taken: len(taken) == 3)
        before, behind = follower.positions(), follower.positions(including=second)
        with pytest.raises(BugError, match="NOT_IN_HAND"):
            follower.positions(including=first)
    for positions, left in ((before, [1, 2]), (behind, [2])):
        again = Positions.from_json(positions.to_json())
        assert again == positions
        async with world.follower(again) as follower:
            items = await take(follower, lambda taken: len(changes(taken)) == len(left))  # noqa: B023
        assert [key for _, _, key, _ in changes(items)] == left
        assert isinstance(items[0], SchemaEvent)
        assert items[0].resumed


async def test_a_batch_ends_inside_of_a_tick_and_is_resumed_there() -> None:
    world = await one_shard()
    world.append(P, *(insert(V, 7, START + 9 - n, [n]) for n in range(8)), tick(START + 10))
    seen: list[int] = []
    positions = None
    for _ in range(8):
        async with world.follower(positions, rows_per_batch=1) as follower:
            items = await take(follower, lambda taken: len(taken) == 2)
            seen += [key for _, _, key, _ in changes(items)]
            positions = Positions.from_json(follower.positions(including=items[-1]).to_json())
    assert seen == [7, 6, 5, 4, 3, 2, 1, 0]


async def test_the_drop_of_a_partition_parts_the_rows_of_all_shards() -> None:
    world = await two_shards()
    old = {"partition_id": 71, "partition": "p"}
    new = {"partition_id": 72, "partition": "p"}
    drop = drop_partition(7, START + 10, 71, "p")
    world.append(P, insert(V, 7, START + 1, [1], **old), drop, tick(START + 11))  # type: ignore[arg-type]
    world.append(P, insert(V, 7, START + 12, [2], **new), tick(START + 13))  # type: ignore[arg-type]
    async with world.follower() as follower:
        items = await take(follower, lambda taken: len(changes(taken)) == 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(follower)
        world.append(Q, insert(W, 7, START + 2, [3], **old), drop, tick(START + 11))  # type: ignore[arg-type]
        items += await take(follower, lambda taken: len(changes(taken)) == 2)
    told = [
        [row["id"] for row in item.rows()] if isinstance(item, ChangeBatch) else item.kind.value
        for item in items
    ]
    assert told == ["COLLECTION_FOUND", [1], [3], "PARTITION_DROPPED", [2]]
    dropped = items[3]
    assert isinstance(dropped, SchemaEvent)
    assert (dropped.partition, dropped.ts) == ("p", START + 10)


async def test_a_drop_is_the_last_word_of_a_collection() -> None:
    world = await two_shards()
    drop = drop_collection(7, START + 5)
    world.append(P, insert(V, 7, START + 1, [1]), drop, tick(START + 6))
    world.append(Q, insert(W, 7, START + 2, [2]), drop, tick(START + 6))
    async with world.follower() as follower:
        items = await take(follower, lambda taken: len(events(taken)) == 2)
        assert [kind.value for kind, _ in events(items)] == [
            "COLLECTION_FOUND",
            "COLLECTION_DROPPED",
        ]
        assert {key for _, _, key, _ in changes(items)} == {1, 2}
        assert 7 in follower.positions().collections
        assert not follower.positions(including=items[-1]).collections
        await world.metadata.put(collection(8, "d", P))
        world.append(P, insert(f"{P}_8v0", 8, START + 20, [9]), tick(START + 21))
        items = await take(follower, lambda taken: len(changes(taken)) == 1)
        assert events(items) == [(EventKind.COLLECTION_FOUND, "d")], "not the dropped one again"


async def test_a_dropped_collection_ends_with_its_log_where_no_tick_comes_any_more() -> None:
    world = await one_shard()
    world.append(P, insert(V, 7, START + 1, [1]), tick(START + 2), drop_collection(7, START + 5))
    async with world.follower() as follower:
        await take(follower, lambda taken: len(changes(taken)) == 1)
        await world.metadata.drop(7)
        items = await take(follower, lambda taken: True)
        assert events(items) == [(EventKind.COLLECTION_DROPPED, "c")]


async def test_collections_come_and_change_their_names() -> None:
    world = await one_shard()
    world.append(P, insert(V, 7, START + 1, [1]), tick(START + 2))
    async with world.follower(select="default.c*", exclude=["default.cx"]) as follower:
        await take(follower, lambda taken: len(changes(taken)) == 1)
        await world.metadata.put(collection(9, "cx", P), collection(10, "other", P))
        at = world.source.order((await world.source.log_range(P)).end)
        await world.metadata.put(collection(8, "c2", P, starts=(at,)))
        world.append(P, insert(f"{P}_8v0", 8, START + 5, [2]), tick(START + 6))
        items = await take(follower, lambda taken: len(changes(taken)) == 1)
        assert events(items) == [(EventKind.COLLECTION_FOUND, "c2")]
        await world.metadata.put(replace(world.metadata.collections[7], name="renamed"))
        [renamed] = await take(follower, lambda taken: True)
        assert isinstance(renamed, SchemaEvent)
        assert renamed.renamed_from == ("default", "c")
        before, behind = follower.positions(), follower.positions(including=renamed)
        world.append(P, insert(V, 7, START + 8, [3]), tick(START + 9))
        [batch] = await take(follower, lambda taken: True)
        assert batch.table.full_name == "default.renamed"
    for positions, told in ((before, ["c", "c2", "renamed"]), (behind, ["c2", "renamed"])):
        async with world.follower(positions, select="default.c*", exclude=["*.cx"]) as follower:
            items = await take(follower, lambda taken: len(changes(taken)) == 1)
            assert sorted(name for _, name in events(items)) == told
            assert [key for _, _, key, _ in changes(items)] == [3]


async def test_a_collection_dropped_while_nobody_followed_is_told_of() -> None:
    world = await one_shard()
    world.append(P, insert(V, 7, START + 1, [1]), tick(START + 2))
    async with world.follower() as follower:
        items = await take(follower, lambda taken: len(changes(taken)) == 1)
        positions = follower.positions(including=items[-1])
    await world.metadata.drop(7)
    for _ in range(2):
        async with world.follower(positions) as follower:
            [gone] = await take(follower, lambda taken: True)
            assert isinstance(gone, SchemaEvent)
            assert (gone.kind, gone.table.full_name) == (
                EventKind.COLLECTION_DROPPED,
                "default.c",
            )
            assert 7 in follower.positions().collections, "until it was dealt with"
            assert not follower.positions(including=gone).collections
    world.metadata.cluster_id = 2
    async with world.follower(positions) as follower:
        with pytest.raises(UserError) as other:
            await anext(follower)
        assert other.value.reason == "SOURCE_IDENTITY_CHANGED"


async def test_a_log_that_lost_something_ends_the_following() -> None:
    world = await one_shard()
    world.append(P, insert(V, 7, START + 1, [1]), tick(START + 2), tick(START + 3), tick(START + 4))
    async with world.follower() as follower:
        items = await take(follower, lambda taken: len(changes(taken)) == 1)
        positions = follower.positions(including=items[-1])
    world.source.truncate(P, (3).to_bytes(8, "little"))
    async with world.follower() as follower:
        await anext(follower)
        for _ in range(2):
            with pytest.raises(LogTruncatedError):
                await anext(follower)
    world.source.delete(P)
    world.append(P, *(tick(START + n) for n in range(9)))
    async with world.follower(positions) as follower:
        await anext(follower)
        with pytest.raises(LogResetError, match="made again"):
            await anext(follower)


async def test_trouble_is_raised_when_it_lasts_and_following_goes_on() -> None:
    world = await one_shard()
    world.append(P, insert(V, 7, START + 1, [1]), tick(START + 2))
    async with world.follower(patience_seconds=0.3) as follower:
        await take(follower, lambda taken: len(changes(taken)) == 1)
        world.source.set_down(True)
        for _ in range(2):
            with pytest.raises(RetryableError, match="QUEUE_UNREACHABLE"):
                await anext(follower)
        world.source.set_down(False)
        world.append(P, insert(V, 7, START + 3, [2]), tick(START + 4))
        item = None
        while item is None:
            with contextlib.suppress(RetryableError):
                item = await anext(follower)
        assert [key for _, _, key, _ in changes([item])] == [2]


@pytest.mark.parametrize("select", [[], "shop", ["sh-p.*"]])
def test_a_selection_of_nothing_is_refused(select: list[str] | str) -> None:
    with pytest.raises(UserError, match="INVALID_FIELD"):
        World().follower(select=select)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "source": 3}'])
def test_positions_of_somebody_else_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="POSITIONS_UNREADABLE"):
        Positions.from_json(text)


async def test_reading_waits_for_the_program() -> None:
    world = await one_shard()
    for n in range(500):
        rows = insert(V, 7, START + 2 * n + 1, list(range(400)), "x" * 40)
        world.append(P, rows, tick(START + 2 * n + 2))
    async with world.follower(memory_bytes=1 << 20, rows_per_batch=400) as follower:
        await take(follower, lambda taken: len(taken) == 2)
        await asyncio.sleep(0.2)
        held = sum(shard.lane.staged_bytes for shard in follower._intake._shards.values())
        # Half of the memory, and what was being read.
        assert 0 < held < (1 << 19) + (1 << 18)
        items = await take(follower, lambda taken: len(taken) == 499)
        assert sum(each.num_rows for each in items if isinstance(each, ChangeBatch)) == 499 * 400
