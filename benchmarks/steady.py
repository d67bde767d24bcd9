"""A steady stream: the source takes rows as fast as it can while they are replicated."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass

from benchmarks.rig import Rig, wait_until, written
from benchmarks.rows import Connection, Requests, Table, create, drop
from benchmarks.usage import Meter, peak_mib
from benchmarks.writers import in_threads

WRITERS = 2
SAMPLE_SECONDS = 10.0
DRAIN_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Steady:
    """Lag of a sample: how long ago the source had acknowledged the row now durable at the sink."""

    queue: str
    dim: int
    rows_per_insert: int
    source_rate: float
    lags: tuple[float, ...]
    """Seconds, one sample every ten seconds."""
    drain_seconds: float
    """From the last row acknowledged to the last row durable."""
    cpu_per_million: dict[str, float]
    peak_mib: float


class _Acknowledged:
    """How many rows the source had acknowledged when."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: list[float] = []
        self._totals: list[int] = []

    @property
    def total(self) -> int:
        return self._totals[-1] if self._totals else 0

    def add(self, rows: int) -> None:
        with self._lock:
            self._times.append(time.monotonic())
            self._totals.append(self.total + rows)

    def age(self, durable: int) -> float:
        """Seconds since the first row beyond `durable` was acknowledged; 0 when there is none."""
        with self._lock:
            at = bisect_right(self._totals, durable)
            return time.monotonic() - self._times[at] if at < len(self._times) else 0.0


def steady(rig: Rig, dim: int, seconds: float, rows_per_insert: int = 1_000) -> Steady:
    """Writes with no pause for so long and samples how far the sink is behind."""
    table = Table("bench_steady", dim)
    stack = rig.stack
    for uri in (stack.source.uri, stack.sink.uri):
        drop(uri, table.name)
    create(stack.source.uri, table)
    rig.fresh_replicator()
    rig.create_task("bench-steady", [table.name])
    acknowledged = _Acknowledged()
    requests = Requests(table)
    keys = iter(range(0, 2**62, rows_per_insert))
    lock = threading.Lock()
    connections = [Connection(stack.source.address) for _ in range(WRITERS)]
    # The first row makes sure that everything is connected.
    connections[0].insert(requests.insert(next(keys), rows_per_insert))
    acknowledged.add(rows_per_insert)
    _until_durable(rig, rows_per_insert)
    meter = Meter({**rig.services, **rig.servers})
    end = time.monotonic() + seconds
    lags: list[float] = []

    def work(index: int) -> None:
        if index == WRITERS:
            while time.monotonic() + SAMPLE_SECONDS <= end + 1:
                time.sleep(SAMPLE_SECONDS)
                lags.append(acknowledged.age(sum(written(rig.replicator, "bench-steady").values())))
            return
        while time.monotonic() < end:
            with lock:
                first = next(keys)
            connections[index].insert(requests.insert(first, rows_per_insert))
            acknowledged.add(rows_per_insert)

    in_threads(WRITERS + 1, work)
    stopped = time.monotonic()
    _until_durable(rig, acknowledged.total)
    drained = time.monotonic() - stopped
    cpu = meter.read()
    peak = peak_mib(rig.replicator.pid)
    rig.check("bench-steady")
    rig.delete_task("bench-steady")
    for connection in connections:
        connection.close()
    for uri in (stack.source.uri, stack.sink.uri):
        drop(uri, table.name)
    rows = acknowledged.total
    return Steady(
        queue=rig.queue,
        dim=dim,
        rows_per_insert=rows_per_insert,
        source_rate=rows / seconds,
        lags=tuple(lags),
        drain_seconds=drained,
        cpu_per_million={name: value * 1e6 / rows for name, value in cpu.items()},
        peak_mib=peak,
    )


def _until_durable(rig: Rig, rows: int) -> None:
    wait_until(
        lambda: sum(written(rig.replicator, "bench-steady").values()) >= rows,
        DRAIN_SECONDS,
        f"{rows} rows",
    )
