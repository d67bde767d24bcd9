"""What the services need when there is little or nothing to do: memory before a stalled sink, CPU
at rest, the time of a long list.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from milvuscdc.v1 import task_pb2, task_service_pb2

from benchmarks.rig import Rig, wait_until, written
from benchmarks.rows import Table, create, drop
from benchmarks.usage import Meter, peak_mib, resident_mib

STALL_SECONDS = 7.0
"""Less than the lease of a Milvus in its etcd, which a stopped process does not renew."""
SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Stalled:
    """The replicator while the sink is stopped in mid-work and rows wait in the queue."""

    rows_waiting: int
    before_mib: float
    """Resident before the first task."""
    peak_mib: float
    rows_after: int
    """Durable at the end, once the sink went on: all of them."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Per cent of one core, with collections that nobody writes."""

    collections: int
    percent: dict[str, float]


@dataclass(frozen=True, slots=True)
class Listing:
    tasks: int
    milliseconds: float
    """Median of ten calls."""


def stalled(rig: Rig, tables: dict[Table, int]) -> Stalled:
    """Starts to replicate prepared collections, stops the sink, lets it go on."""
    for table in tables:
        drop(rig.stack.sink.uri, table.name)
    rig.fresh_replicator()
    before = resident_mib(rig.replicator.pid)
    rig.create_task("bench-stalled", [table.name for table in tables])
    wait_until(
        lambda: sum(written(rig.replicator, "bench-stalled").values()) > 0, 120, "rows", every=0.05
    )
    rig.stack.sink.pause()
    try:
        waiting = sum(tables.values()) - sum(written(rig.replicator, "bench-stalled").values())
        time.sleep(STALL_SECONDS)
        peak = peak_mib(rig.replicator.pid)
    finally:
        rig.stack.sink.resume()
    wait_until(
        lambda: sum(written(rig.replicator, "bench-stalled").values()) >= sum(tables.values()),
        600,
        "the rest after the stall",
    )
    rows = sum(written(rig.replicator, "bench-stalled").values())
    peak = max(peak, peak_mib(rig.replicator.pid))
    rig.check("bench-stalled")
    rig.delete_task("bench-stalled")
    for table in tables:
        drop(rig.stack.sink.uri, table.name)
    return Stalled(waiting, before, peak, rows)


def idle(rig: Rig, collections: int, seconds: float) -> Idle:
    """Follows empty collections and does nothing."""
    names = [f"bench_idle_{number}" for number in range(collections)]
    for name in names:
        for uri in (rig.stack.source.uri, rig.stack.sink.uri):
            drop(uri, name)
        create(rig.stack.source.uri, Table(name, 8), shards=1)
    rig.fresh_replicator()
    rig.create_task("bench-idle", ["bench_idle_*"])

    def all_running() -> bool:
        running = [
            c
            for c in rig.collections("bench-idle")
            if c.state == task_pb2.COLLECTION_STATE_RUNNING and c.HasField("checkpoint_time")
        ]
        return len(running) == collections

    wait_until(all_running, 180, f"{collections} collections to run", every=0.5)
    time.sleep(SETTLE_SECONDS)
    meter = Meter(rig.services)
    started = time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - started
    percent = {name: value / elapsed * 100 for name, value in meter.read().items()}
    rig.delete_task("bench-idle")
    for name in names:
        for uri in (rig.stack.source.uri, rig.stack.sink.uri):
            drop(uri, name)
    return Idle(collections, percent)


def listing(rig: Rig, tasks: int) -> Listing:
    """Lists so many tasks, none of which matches a collection; they stay."""

    def make(number: int) -> None:
        rig.create_task(f"bench-list-{number}", [f"bench_nothing_{number}"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, range(tasks)))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        answer = rig.tasks.ListTasks(task_service_pb2.ListTasksRequest(page_size=1000), timeout=60)
        times.append(time.perf_counter() - started)
        if len(answer.tasks) < min(tasks, 1000):
            raise RuntimeError(f"{len(answer.tasks)} of {tasks} tasks listed")
    return Listing(tasks, statistics.median(times) * 1000)
