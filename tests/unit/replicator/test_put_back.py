"""A sink that keeps checkpoints and is put back to an older state says so, and is left alone."""

from __future__ import annotations

import copy
import uuid
from dataclasses import replace

from milvus_cdc.sink.memory_writer import DESTINATIONS, MemoryWriter
from milvus_cdc.sink.writer_sink import Origin, WriterSink
from milvus_cdc_replicator.report import Report

from tests.unit.replicator.test_runner import START, Bench, failure, insert, tick, until


def go_on(bench: Bench, report: Report) -> None:
    """From where the last one reported to be."""
    start = bench.runner.assignment.lanes[0]
    [lane] = report.lanes
    lanes = (
        replace(
            start,
            read_from=lane.read_from,
            resolved_ts=lane.resolved_ts,
            stored_ts=lane.stored_ts,
            horizon_ts=START + 1000,
        ),
    )
    bench.next_owner(opened=True, lanes=lanes)


async def test_what_was_there_once_and_is_not_any_more_stops_the_collection() -> None:
    bench, place = Bench(), uuid.uuid4().hex
    writer = MemoryWriter({"destination": place, "own_checkpoint": True})
    origin = Origin("tasks/t", "uid", "default", "books", 3)
    bench.connections._sink = WriterSink(  # type: ignore[assignment]
        writer, lambda: replace(origin, epoch=bench.runner.assignment.epoch)
    )
    await bench.start()
    bench.append(insert(START + 1, [1]), tick(START + 2))
    await until(lambda: bench.resolved_ts == START + 2)
    backup = copy.deepcopy(DESTINATIONS[place].collections)
    # Time alone is not stored by the sink, and its lack is nothing to speak of.
    bench.append(tick(START + 5))
    await until(lambda: bench.resolved_ts == START + 5)
    report = bench.runner.report()
    await bench.runner.stop()
    go_on(bench, report)
    await bench.start()
    bench.append(insert(START + 7, [2]), tick(START + 9))
    await until(lambda: bench.resolved_ts == START + 9)
    report = bench.runner.report()
    await bench.runner.stop()

    DESTINATIONS[place].collections = backup
    go_on(bench, report)
    bench.runner.start()
    failed = await failure(bench)
    assert failed.reason == "SINK_PUT_BACK"
    assert "resync" in failed.message
    await bench.runner.stop()
    await bench.connections.close()
