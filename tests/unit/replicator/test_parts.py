"""A runner that has a part of a collection: rows only, and it says when it needs the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from milvus_cdc.model import Drift
from milvus_cdc.sink import Opened
from milvus_cdc.sink.memory import MemorySink

from tests.unit.replicator.test_runner import START, Bench, insert, running, tick, until


async def part_of(bench: Bench, **other: Any) -> None:
    """The whole's owner has opened it; the next one has a part."""
    await bench.runner.stop()
    report = bench.runner.report()
    assert report.opened is not None
    bench.next_owner(opened=True, sink_collection_id=report.opened[0], part=True, **other)
    await bench.start()


async def test_a_partition_that_somebody_dropped_is_for_the_whole_to_bring_back() -> None:
    async with running() as bench:
        await part_of(bench, compares=False)
        bench.append(insert(START + 1, [1]), tick(START + 2))
        await until(lambda: bench.resolved_ts == START + 2)
        del bench.sink._at("default", "c").partitions["_default"]
        bench.append(insert(START + 5, [2]), tick(START + 6))
        await until(lambda: bench.runner.report().whole_now)
        report = bench.runner.report()
        assert (report.state, bench.resolved_ts) == ("RUNNING", START + 2)
        await bench.runner.stop()
        assert bench.runner.report().state == "RUNNING"
        assert "_default" not in bench.sink.partitions("default", "c")


async def test_a_part_leaves_renames_flushes_and_drops_alone() -> None:
    async with running() as bench:
        await part_of(bench, compares=False, drift=Drift.REPAIR)
        last = bench.runner.assignment
        want = replace(last.want, name="d")
        bench.runner.update(
            replace(last, version=2, want=want, renamed_from=("default", "c"), flush_ts=START + 1)
        )
        bench.append(insert(START + 1, [1]), tick(START + 2))
        await until(lambda: bench.resolved_ts == START + 2)
        bench.append(tick(START + 4))
        await until(lambda: bench.resolved_ts == START + 4)
        report = bench.runner.report()
        assert (report.renamed_to, report.flushed_ts, report.applied_version) == (None, 0, 0)
        assert bench.sink.collections("default") == ["c"]


async def test_a_sink_that_takes_one_write_at_a_time_takes_no_parts() -> None:
    class OneAtATime(MemorySink):
        async def open_collection(self, *args: Any, **how: Any) -> Opened:
            return replace(await super().open_collection(*args, **how), writes_in_flight=1)

    async with running() as bench:
        bench.sink.__class__ = OneAtATime
        await bench.runner.stop()
        bench.next_owner(opened=True, part=True).start()
        await until(lambda: bench.runner.report().state == "FAILED")
        assert bench.runner.report().reason == "SINK_TAKES_NO_PARTS"
        assert "split.max_parts" in bench.runner.report().message
