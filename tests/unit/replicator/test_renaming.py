"""A collection that gets another name at the sink while its rows go on, and owners that die on the
way.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.model import Collection, ObjectState
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc_replicator import metrics

from tests.unit.replicator.test_runner import START, VCHANNEL, Bench, insert, running, tick, until

pytestmark = pytest.mark.timeout(60)
LAST = 10**18


def renamed(bench: Bench, name: str, rename_ts: int, database: str = "default") -> None:
    """As the controller says it once the collection is opened."""
    assignment = bench.runner.assignment
    report = bench.runner.report()
    assert report.opened is not None
    bench.runner.update(
        replace(
            assignment,
            version=assignment.version + 1,
            want=replace(assignment.want, database=database, name=name),
            opened=True,
            sink_collection_id=report.opened[0],
            renamed_from=(assignment.want.database, assignment.want.name),
            rename_ts=rename_ts,
        )
    )


async def test_rows_before_the_rename_come_first_and_those_in_flight_end_before_it() -> None:
    async with running() as bench:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            entered.set()
            await leave.wait()

        bench.append(tick(START + 1))
        renamed(bench, "d", START + 20)
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        assert bench.sink.collections("default") == ["c"], "what is older is not all there"
        bench.sink.before_write = hold
        bench.append(insert(START + 15, [2]), tick(START + 20))
        await entered.wait()
        bench.append(insert(START + 25, [3]), tick(START + 30))
        await asyncio.sleep(0.1)
        assert bench.sink.collections("default") == ["c"], "a request is under way"
        leave.set()
        await until(lambda: bench.resolved_ts == START + 30)
        assert bench.sink.count("default", "d") == 3
        report = bench.runner.report()
        assert (report.renamed_to, report.state) == (("default", "d"), "RUNNING")
        await until(lambda: ("tasks/t", "default.d") in metrics.CHECKPOINT_AGE._metrics)
        assert ("tasks/t", "default.c") not in metrics.CHECKPOINT_AGE._metrics


async def test_a_flush_that_is_under_way_ends_before_the_rename(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as bench:
        entered, leave = asyncio.Event(), asyncio.Event()
        at_once = bench.sink.flush

        async def slow(want: Collection) -> None:
            entered.set()
            await leave.wait()
            await at_once(want)

        monkeypatch.setattr(bench.sink, "flush", slow)
        assignment = bench.runner.assignment
        bench.runner.update(replace(assignment, version=2, flush_ts=START + 1))
        bench.append(insert(START + 1, [1]), tick(START + 5))
        await entered.wait()
        renamed(bench, "d", START + 5)
        await asyncio.sleep(0.1)
        assert bench.sink.collections("default") == ["c"]
        leave.set()
        await until(lambda: bench.runner.report().renamed_to == ("default", "d"))
        assert bench.sink.flushes == ["default.c"]
        assert bench.runner.report().flushed_ts == START + 1
        assert "FLUSH_REFUSED" not in dict(bench.runner.report().conditions)


async def test_into_another_database_that_is_not_there_yet() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        renamed(bench, "c", START + 9, "away")
        await until(lambda: bench.runner.report().renamed_to == ("away", "c"))
        bench.append(insert(START + 15, [2]), tick(START + 19))
        await until(lambda: bench.sink.count("away", "c") == 2)
        assert bench.sink.collections("default") == []


async def test_a_name_that_is_taken_is_tried_again_and_rows_go_on_meanwhile() -> None:
    async with running() as bench:
        stranger = replace(bench.runner.assignment.want, name="d")
        how: dict[str, Any] = {"opened": False, "adopt": False, "recreate": False}
        await bench.sink.open_collection(stranger, sink_collection_id=0, **how)
        renamed(bench, "d", 0)
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.runner.report().reason == "SINK_NAME_TAKEN")
        bench.append(insert(START + 15, [2]), tick(START + 19))
        await until(lambda: bench.resolved_ts == START + 19)
        assert bench.count() == 2
        await bench.sink.drop_collection(stranger, sink_collection_id=0)
        await until(lambda: bench.runner.report().renamed_to is not None)
        assert bench.runner.report().state == "RUNNING"
        assert bench.sink.count("default", "d") == 2


@pytest.mark.parametrize("done", [True, False])
async def test_the_next_owner_finds_it_under_either_name(done: bool) -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        renamed(bench, "d", START + 9 if done else LAST)
        if done:
            await until(lambda: bench.sink.collections("default") == ["d"])
        else:
            await until(lambda: bench.runner.assignment.version == 2)
        await bench.runner.stop()
        runner = bench.next_owner()
        runner.start()
        await until(lambda: runner.report().opened is not None)
        assert runner.report().renamed_to == (("default", "d") if done else None)
        runner.grant([(VCHANNEL, LAST)])
        bench.append(insert(START + 15, [2]), tick(START + 19))
        name = "d" if done else "c"
        await until(lambda: len({row["id"] for row in bench.sink.rows("default", name)}) == 2)
        assert bench.sink.collections("default") == [name]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("resync", [True, False])
async def test_a_drop_or_a_resync_on_the_way_leaves_nothing_under_the_old_name(
    done: bool, resync: bool
) -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        renamed(bench, "d", 0 if done else LAST)
        await until(lambda: bench.runner.assignment.version == 2)
        if done:
            await until(lambda: bench.sink.collections("default") == ["d"])
        await bench.runner.stop()
        if resync:
            runner = bench.next_owner(opened=False, recreate=True, sink_collection_id=0)
            runner.start()
            await until(lambda: runner.report().opened is not None)
            assert bench.sink.collections("default") == ["d"]
        else:
            want = replace(bench.runner.assignment.want, state=ObjectState.DROPPED)
            lanes = tuple(replace(x, closed=True) for x in bench.runner.assignment.lanes)
            runner = bench.next_owner(want=want, lanes=lanes, drop_granted=True)
            runner.start()
            await until(lambda: runner.report().dropped)
            assert bench.sink.collections("default") == []
