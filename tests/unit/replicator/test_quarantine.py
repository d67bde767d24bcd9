"""Two sinks in one replicator: one stands still, the other goes on as if alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvuscdc.v1 import task_pb2

from tests.unit.replicator.test_runner import START, Bench, insert, tick, until

MEMORY = 60_000
TEXT = "x" * 400


def beside(first: Bench, port: int) -> Bench:
    """Another collection in the same process; the first one's sink has port 1."""
    bench = Bench(memory=MEMORY)
    bench.budget = first.budget
    sink = task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri=f"http://127.0.0.1:{port}"))
    bench.runner = bench._owner(replace(bench.runner.assignment, assignment_id="b.7", sink=sink))
    return bench


async def test_rows_that_a_sink_does_not_take_leave_memory_to_another() -> None:
    first = Bench(memory=MEMORY)
    stuck, other = (first, beside(first, 1)), beside(first, 2)
    answers = asyncio.Event()

    async def wait(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
        await answers.wait()

    for bench in (*stuck, other):
        await bench.start()
    last = 200
    for bench in stuck:
        bench.sink.before_write = wait
        for n in range(1, last + 1):
            bench.append(insert(START + n, [n], TEXT), tick(START + n))
            await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert first.budget.held < MEMORY * 0.8, "reading has paused for them"
    assert other.runner._intake.has_memory, "not only for a helping at a time"
    for n in range(1, last + 1):
        other.append(insert(START + n, [n], TEXT), tick(START + n))
    await until(lambda: other.resolved_ts == START + last)
    assert all(bench.resolved_ts < START + last for bench in stuck)
    answers.set()
    await until(lambda: all(bench.resolved_ts == START + last for bench in stuck))
    for bench in (*stuck, other):
        await bench.runner.stop()
        await bench.connections.close()
    assert (first.budget.held, first.budget.writable) == (0, 0)
    assert not first.budget.shared
