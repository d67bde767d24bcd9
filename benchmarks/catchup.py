"""Catch-up: rows that were written beforehand, from the task's creation to the last one durable,
with and without the owner's death in between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from benchmarks import discarding as discarding_program
from benchmarks.rig import Rig, wait_until, written
from benchmarks.rows import Requests, Table, create, drop
from benchmarks.usage import Meter, peak_mib
from benchmarks.writers import fill

POLL_SECONDS = 0.1
CHECK_SECONDS = 2.0
QUIET_SECONDS = 3.0
STALLED_SECONDS = 90.0
KILL_AT = 0.45


@dataclass(slots=True)
class Curve:
    """Rows durable over time, from zero."""

    points: list[tuple[float, int]] = field(default_factory=list)

    def add(self, seconds: float, rows: int) -> None:
        if not self.points or rows > self.points[-1][1]:
            self.points.append((seconds, rows))

    @property
    def rows(self) -> int:
        return self.points[-1][1] if self.points else 0

    @property
    def seconds(self) -> float:
        return self.points[-1][0]

    @property
    def rate(self) -> float:
        return self.rows / self.seconds

    def when(self, rows: float) -> float:
        """When that many rows were there, between two polls in proportion."""
        before_time, before = 0.0, 0
        for at, count in self.points:
            if count >= rows:
                part = (rows - before) / (count - before) if count > before else 1.0
                return before_time + part * (at - before_time)
            before_time, before = at, count
        return before_time

    def inner_rate(self, low: float = 0.1, high: float = 0.9) -> float:
        """Rows per second between two shares of all rows."""
        seconds = self.when(high * self.rows) - self.when(low * self.rows)
        return (high - low) * self.rows / max(seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class CatchUp:
    """One run."""

    queue: str
    dim: int
    rows: int
    rows_per_insert: int
    rate: float
    inner_rate: float
    cpu_per_million: dict[str, float]
    """Seconds by process."""
    peak_mib: float
    fill_rate: float


@dataclass(frozen=True, slots=True)
class Crash:
    """The second owner's part of a catch-up whose first owner was killed."""

    pause_seconds: float
    """From the kill to the first row of the second owner."""
    rate: float
    inner_rate: float
    rows: int
    upserted: int


def prepare(rig: Rig, table: Table, rows: int, rows_per_insert: int) -> float:
    """Writes the source collection; rows per second."""
    drop(rig.stack.source.uri, table.name)
    create(rig.stack.source.uri, table)
    seconds = fill(rig.stack.source.address, Requests(table), rows, rows_per_insert)
    return rows / seconds


def follow(rig: Rig, task: str, table: Table, rows: int, started: float) -> Curve:
    """Polls until `rows` rows are durable."""
    curve = Curve()
    checked = changed = time.monotonic()
    while curve.rows < rows:
        time.sleep(POLL_SECONDS)
        before = curve.rows
        curve.add(time.perf_counter() - started, sum(written(rig.replicator, task).values()))
        now = time.monotonic()
        if curve.rows > before:
            changed = now
        if now - checked > CHECK_SECONDS:
            checked = now
            rig.check(task)
        if now - changed > STALLED_SECONDS:
            raise RuntimeError(f"{table.name}: {curve.rows} of {rows} rows, then nothing more")
    return curve


def catch_up(
    rig: Rig,
    table: Table,
    rows: int,
    rows_per_insert: int,
    fill_rate: float,
    *,
    discarding: bool = False,
) -> CatchUp:
    """Replicates a prepared collection once, with a replicator made for it; `discarding`: up to
    the finished requests, which are not sent.
    """
    task = table.name.replace("_", "-")
    rig.drop_at_sink(table.name)
    rig.fresh_replicator(*((discarding_program.__file__,) if discarding else ()))
    meter = Meter({**rig.services, **rig.servers})
    started = time.perf_counter()
    rig.create_task(task, [table.name])
    curve = follow(rig, task, table, rows, started)
    cpu = meter.read()
    peak = peak_mib(rig.replicator.pid)
    rig.delete_task(task)
    rig.drop_at_sink(table.name)
    return CatchUp(
        queue=rig.queue,
        dim=table.dim,
        rows=rows,
        rows_per_insert=rows_per_insert,
        rate=curve.rate,
        inner_rate=curve.inner_rate(),
        cpu_per_million={name: value * 1e6 / rows for name, value in cpu.items()},
        peak_mib=peak,
        fill_rate=fill_rate,
    )


def crash(rig: Rig, table: Table, rows: int) -> Crash:
    """Kills the owner in mid-way while a second replicator stands by."""
    task = table.name.replace("_", "-") + "-crash"
    rig.drop_at_sink(table.name)
    pair = (rig.fresh_replicator(), rig.spare_replicator())
    rig.create_task(task, [table.name])

    def durable() -> list[int]:
        return [sum(written(replicator, task).values()) for replicator in pair]

    wait_until(lambda: sum(durable()) >= KILL_AT * rows, 120, "rows", every=0.02)
    rows_of = durable()
    first, second = pair if rows_of[0] else pair[::-1]
    first.kill()
    killed = time.perf_counter()
    rig.replicator = second
    wait_until(lambda: bool(written(second, task)), 120, "the second owner", every=0.05)
    began = time.perf_counter()
    curve = Curve()
    changed = time.monotonic()
    while time.monotonic() - changed < QUIET_SECONDS:
        before = curve.rows
        curve.add(time.perf_counter() - began, sum(written(second, task).values()))
        if curve.rows > before:
            changed = time.monotonic()
        time.sleep(POLL_SECONDS)
    rig.check(task)
    kinds = written(second, task)
    rig.delete_task(task)
    rig.drop_at_sink(table.name)
    return Crash(
        pause_seconds=began - killed,
        rate=curve.rate,
        inner_rate=curve.inner_rate(0.02, 0.95),
        rows=curve.rows,
        upserted=kinds.get("UPSERT", 0),
    )
