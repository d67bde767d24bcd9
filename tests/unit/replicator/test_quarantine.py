"""Two sinks in one replicator: one stands still, the other goes on as if alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvuscdc.v1 import task_pb2

from tests.unit.replicator.test_runner import START, Bench, insert, tick, until

MEMORY = 60_000
TEXT = "x" * 400


def beside(first: Bench) -> Bench:
    """Another task's collection in the same process, with a sink of its own."""
    bench = Bench(memory=MEMORY)
    bench.budget = first.budget
    sink = task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:2"))
    bench.runner = bench._owner(replace(bench.runner.assignment, assignment_id="b.7", sink=sink))
    return bench


async def test_rows_that_a_sink_does_not_take_leave_memory_to_another() -> None:
    stuck = Bench(memory=MEMORY)
    other = beside(stuck)
    answers = asyncio.Event()

    async def wait(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
        await answers.wait()

    stuck.sink.before_write = wait
    await stuck.start()
    await other.start()
    last = 0
    while stuck.runner._intake.has_memory:
        last += 1
        stuck.append(insert(START + last, [last], TEXT), tick(START + last))
        await asyncio.sleep(0.002)
    for n in range(last + 1, last + 200):
        stuck.append(insert(START + n, [n], TEXT), tick(START + n))
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert stuck.budget.held < MEMORY * 0.8, "reading has paused for it"
    assert other.runner._intake.has_memory, "not only for a helping at a time"
    for n in range(1, 200):
        other.append(insert(START + n, [n], TEXT), tick(START + n))
    await until(lambda: other.resolved_ts == START + 199)
    assert stuck.resolved_ts < START + 199
    answers.set()
    await until(lambda: stuck.resolved_ts == START + last + 199)
    for bench in (stuck, other):
        await bench.runner.stop()
        await bench.connections.close()
    assert (stuck.budget.held, stuck.budget.writable) == (0, 0)
    assert not stuck.budget.shared
