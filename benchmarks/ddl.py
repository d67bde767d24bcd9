"""Lag of operations: from the source's answer until the sink shows it, while the source takes rows
as fast as it can.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pymilvus import MilvusClient

from benchmarks.lag import percentile
from benchmarks.rig import Rig, wait_until
from benchmarks.rows import Connection, Requests, Table, create, drop

WRITERS = 2
ROWS_PER_INSERT = 1_000
POLL_SECONDS = 0.01
GIVE_UP_SECONDS = 120.0
TASK = "bench-ddl"
LOADED = Table("bench_ddl_rows", 128)
NAME = "bench_ddl_other"

Step = tuple[str, Callable[[], object], Callable[[], bool]]
"""What it is, the operation at the source, and whether the sink shows it."""


@dataclass(frozen=True, slots=True)
class DdlLag:
    """Seconds, over all operations and of each kind."""

    queue: str
    rows_per_second: float
    operations: int
    p50: float
    p99: float
    by_kind: dict[str, float]
    """The longest of each."""


def measure(rig: Rig, seconds: float) -> DdlLag:
    """One operation after the other, while two writers fill another collection of the task."""
    stack = rig.stack
    for uri in (stack.source.uri, stack.sink.uri):
        for name in (LOADED.name, NAME, f"{NAME}_2"):
            drop(uri, name)
    create(stack.source.uri, LOADED)
    rig.fresh_replicator()
    rig.create_task(TASK, [LOADED.name, f"{NAME}*"])
    source, sink = MilvusClient(stack.source.uri), MilvusClient(stack.sink.uri)
    wait_until(lambda: sink.has_collection(LOADED.name), 60, f"{LOADED.name} at the sink")
    stop, rows = threading.Event(), [0] * WRITERS
    writers = [
        threading.Thread(target=_write, args=(stack.source.address, index, rows, stop), daemon=True)
        for index in range(WRITERS)
    ]
    lags: dict[str, list[float]] = {}
    started = time.monotonic()
    try:
        for writer in writers:
            writer.start()
        time.sleep(3)
        while time.monotonic() < started + seconds:
            for what, operation, shown in _steps(stack.source.uri, source, sink):
                operation()
                acknowledged = time.perf_counter()
                wait_until(shown, GIVE_UP_SECONDS, f"{what} at the sink", every=POLL_SECONDS)
                lags.setdefault(what, []).append(time.perf_counter() - acknowledged)
        lasted = time.monotonic() - started
        rig.check(TASK)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        source.close()
        sink.close()
    rig.delete_task(TASK)
    for uri in (stack.source.uri, stack.sink.uri):
        drop(uri, LOADED.name)
    ordered = sorted(lag for each in lags.values() for lag in each)
    return DdlLag(
        queue=rig.queue,
        rows_per_second=sum(rows) / lasted,
        operations=len(ordered),
        p50=percentile(ordered, 50),
        p99=percentile(ordered, 99),
        by_kind={what: max(each) for what, each in lags.items()},
    )


def _steps(uri: str, source: MilvusClient, sink: MilvusClient) -> Iterator[Step]:
    """The life of a collection; it ends as it began, without it. `uri`: the source's."""
    later = f"{NAME}_2"

    def index() -> None:
        params = source.prepare_index_params()
        params.add_index("vector", index_type="FLAT", metric_type="L2", index_name="near")
        source.create_index(NAME, params, sync=False)

    def has_alias() -> bool:
        return "bench_ddl_alias" in sink.list_aliases(NAME).get("aliases", [])

    def loaded() -> bool:
        return "Loaded" in str(sink.get_load_state(NAME).get("state"))

    yield (
        "create collection",
        lambda: create(uri, Table(NAME, 8), shards=1),
        lambda: sink.has_collection(NAME),
    )
    yield (
        "create partition",
        lambda: source.create_partition(NAME, "p"),
        lambda: sink.has_partition(NAME, "p"),
    )
    yield "create index", index, lambda: "near" in sink.list_indexes(NAME)
    yield "create alias", lambda: source.create_alias(NAME, "bench_ddl_alias"), has_alias
    yield "load", lambda: source.load_collection(NAME), loaded
    yield "release", lambda: source.release_collection(NAME), lambda: not loaded()
    yield "drop alias", lambda: source.drop_alias("bench_ddl_alias"), lambda: not has_alias()
    yield (
        "drop partition",
        lambda: source.drop_partition(NAME, "p"),
        lambda: not sink.has_partition(NAME, "p"),
    )
    yield "drop index", lambda: source.drop_index(NAME, "near"), lambda: not sink.list_indexes(NAME)
    yield (
        "rename collection",
        lambda: source.rename_collection(NAME, later),
        lambda: sink.has_collection(later) and not sink.has_collection(NAME),
    )
    yield (
        "drop collection",
        lambda: source.drop_collection(later),
        lambda: not sink.has_collection(later),
    )


def _write(address: str, index: int, rows: list[int], stop: threading.Event) -> None:
    connection, requests = Connection(address), Requests(LOADED)
    try:
        key = index * ROWS_PER_INSERT
        while not stop.is_set():
            connection.insert(requests.insert(key, ROWS_PER_INSERT))
            key += WRITERS * ROWS_PER_INSERT
            rows[index] += ROWS_PER_INSERT
    finally:
        connection.close()
