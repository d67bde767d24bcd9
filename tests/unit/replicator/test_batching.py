"""What a task says about batches: bounds and linger, for a Milvus and for writers, also changed
while rows come.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.model import Batching, RateLimits
from milvus_cdc.rows import Table
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc.sink.memory_writer import DESTINATIONS, MemoryWriter
from milvus_cdc.sink.writer import Batch
from milvus_cdc.sink.writer_sink import Origin, WriterSink
from milvus_cdc_replicator.core.batching import bounded
from milvus_cdc_replicator.core.sequencer import WriteLimits

from tests.unit.replicator.test_runner import START, VCHANNEL, Bench, insert, tick, until

ONE_HOUR = 3_600_000


@given(
    own=st.builds(WriteLimits, st.integers(1, 1 << 20), st.integers(1, 1 << 30)),
    linger=st.sampled_from([0.0, 0.1, 60.0]),
    wish=st.builds(
        Batching,
        st.integers(0, 1 << 21),
        st.integers(0, 1 << 31),
        st.none() | st.integers(0, ONE_HOUR),
    ),
    paced=st.builds(RateLimits, st.integers(0, 1 << 20), st.integers(0, 1 << 30)),
)
def test_the_smaller_bound_counts_and_what_is_unset_is_the_sinks(
    own: WriteLimits, linger: float, wish: Batching, paced: RateLimits
) -> None:
    limits, seconds = bounded(own, linger, wish, paced)
    assert seconds == (linger if wish.linger_ms is None else wish.linger_ms / 1000)
    for bound, mine, wished, rate in (
        (limits.rows_per_request, own.rows_per_request, wish.max_rows, paced.rows_per_second),
        (limits.bytes_per_request, own.bytes_per_request, wish.max_bytes, paced.bytes_per_second),
    ):
        allowed = max(1, int(rate * max(1.0, seconds)))
        others = [each for each, is_set in ((wished, wished), (allowed, rate)) if is_set]
        assert bound == min([mine, *others])
    assert limits.lingers == (seconds > 0)
    assert (limits.in_flight, limits.atomic, limits.ordered) == (
        own.in_flight,
        own.atomic,
        own.ordered,
    )


class Recorder(MemoryWriter):
    """Remembers how many rows each batch had."""

    def __init__(self, *, own_checkpoint: bool) -> None:
        self.place = uuid.uuid4().hex
        super().__init__({"destination": self.place, "own_checkpoint": own_checkpoint})
        self.sizes: list[int] = []

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        await super().write(table, batch, timeout_seconds)
        self.sizes.append(batch.num_rows)


@asynccontextmanager
async def running(
    kind: str, batching: Batching, **options: Any
) -> AsyncIterator[tuple[Bench, list[int]]]:
    """With the sizes of the requests that the sink has taken."""
    bench = Bench(**options)
    bench.runner.assignment = replace(bench.runner.assignment, batching=batching)
    bench.runner._object.update(bench.runner.assignment)
    sizes: list[int] = []
    if kind == "milvus":

        async def note(_target: CollectionTarget, batch: RowBatch | DeleteBatch) -> None:
            assert isinstance(batch, RowBatch)
            sizes.append(batch.num_rows)

        bench.sink.after_write = note
    else:
        writer = Recorder(own_checkpoint=kind == "atomic")
        sizes = writer.sizes
        origin = Origin("tasks/t", "uid", "default", "c", 3)
        sink = WriterSink(writer, lambda: origin)
        bench.connections._sink = sink  # type: ignore[assignment]
    await bench.start()
    try:
        yield bench, sizes
    finally:
        await bench.runner.stop()
        await bench.connections.close()
        assert (bench.budget.held, bench.budget.writable) == (0, 0), "memory is given back"
        if kind != "milvus":
            del DESTINATIONS[writer.place]


def update(bench: Bench, batching: Batching) -> None:
    assignment = bench.runner.assignment
    bench.runner.update(replace(assignment, version=assignment.version + 1, batching=batching))


KINDS = ("milvus", "writer", "atomic")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_batch_has_no_more_rows_than_the_task_says(kind: str) -> None:
    async with running(kind, Batching(max_rows=4)) as (bench, sizes):
        rows = [insert(START + n, [2 * n, 2 * n + 1]) for n in range(1, 11)]
        # Each is a place where a batch may end, also where the sink keeps the checkpoint.
        bench.append(*rows, tick(START + 20))
        await until(lambda: bench.resolved_ts == START + 20)
        assert sum(sizes) == 20
        assert max(sizes) <= 4
        update(bench, Batching())
        bench.append(*(insert(START + 20 + n, [2 * n]) for n in range(1, 11)), tick(START + 40))
        await until(lambda: bench.resolved_ts == START + 40)
        assert max(sizes) > 4, "the sink's own bound counts again"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_batch_has_no_more_bytes_than_the_task_says(kind: str) -> None:
    async with running(kind, Batching(max_bytes=400)) as (bench, sizes):
        rows = [insert(START + n, [n], "x" * 60) for n in range(1, 11)]
        bench.append(*rows, insert(START + 12, list(range(50, 60)), "x" * 60), tick(START + 20))
        await until(lambda: bench.resolved_ts == START + 20)
        assert sum(sizes) == 20
        assert max(sizes) == 10, "a request of the source is never divided"
        assert len(sizes) >= 4


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_unfinished_waits_for_more_until_the_task_says_otherwise(kind: str) -> None:
    async with running(kind, Batching(linger_ms=ONE_HOUR)) as (bench, sizes):
        # What is not in the log waits for the first place in it, and rows do not wait then.
        bench.append(tick(START))
        await until(lambda: bench.resolved_ts == START and not bench.runner._object.waits)
        for n in range(1, 4):
            bench.append(insert(START + n, [n]), tick(START + n))
        await until(lambda: bench.runner._core.lanes[VCHANNEL].released_ts == START + 3)
        await asyncio.sleep(0.05)
        assert sizes == []
        update(bench, Batching())
        await until(lambda: bench.resolved_ts == START + 3)
        assert sizes == [3]


@pytest.mark.parametrize("kind", KINDS)
async def test_it_waits_no_longer_than_that(kind: str) -> None:
    async with running(kind, Batching(linger_ms=50)) as (bench, sizes):
        bench.append(insert(START + 1, [1]), tick(START + 1))
        await until(lambda: bench.resolved_ts == START + 1)
        assert sizes == [1]


@pytest.mark.parametrize("kind", KINDS)
async def test_memory_that_is_needed_ends_the_waiting(kind: str) -> None:
    wish = Batching(linger_ms=ONE_HOUR)
    async with running(kind, wish, memory=20_000) as (bench, sizes):
        for n in range(1, 101):
            bench.append(insert(START + n, [n], "x" * 400), tick(START + n))
        await until(lambda: sum(sizes) > 50)
