"""The results as tables for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.assignments import Held
from benchmarks.catchup import CatchUp, Crash
from benchmarks.ddl import DdlLag
from benchmarks.files import FileFigures
from benchmarks.footprint import Idle, Listing, Stalled
from benchmarks.kafka_sink import AT_LEAST_ONCE, EXACTLY_ONCE, KafkaFigures
from benchmarks.lag import Lag
from benchmarks.metadata import Metadata
from benchmarks.postgres import PostgresFigures
from benchmarks.pulsar_read import PulsarRead
from benchmarks.reconcile import Reconciled
from benchmarks.scaleout import Scaled
from benchmarks.steady import Steady
from benchmarks.trust import FIRST_CHECK, TlsCost
from benchmarks.usage import machine
from benchmarks.writers import Direct

JUDGED_DIM = 128
GOAL_RATIO = {1_000: 0.8, 100: 0.6}
GOAL_CPU = {1_000: 4.0, 100: 12.0}
GOAL_CPU_DISCARDING = 3.0
GOAL_CRASH = 0.9
GOAL_P50, GOAL_P99 = 0.3, 0.7
GOAL_DDL_P99 = 2.0
GOAL_MIB = 256.0
GOAL_IDLE = 5.0
GOAL_LIST_MS = 100.0
GOAL_LISTING_SECONDS = 10.0
GOAL_CONTROLLER_MIB = 400.0
GOAL_HELD_PERCENT, GOAL_HELD_MIB, GOAL_RESYNC_SECONDS = 20.0, 500.0, 10.0
GOAL_SCALE = 0.9
GOAL_PULSAR_READ = 0.7
GOAL_RECONCILE_SECONDS = 60.0
GOAL_RECONCILE_CALLS = 5
GOAL_KAFKA_CPU = {
    ("flat JSON", 128): 40.0,
    ("Debezium JSON", 128): 60.0,
    ("Avro", 128): 12.0,
    ("Avro", 768): 40.0,
    ("Protobuf", 128): 12.0,
    ("Protobuf", 768): 40.0,
}
GOAL_KAFKA_RATIO = {AT_LEAST_ONCE: 0.5, EXACTLY_ONCE: 0.8}
GOAL_FILES_RATE = 150_000
GOAL_FILES_SIZE = 1.1
GOAL_POSTGRES_RATIO = 0.7
GOAL_TLS_RATIO = 0.85
GOAL_CHECK_US = 50.0


@dataclass(slots=True)
class Results:
    """One run; direct writers by queue and dimension, pymilvus and prebuilt requests."""

    command: str
    machine: str = field(default_factory=machine)
    direct: dict[str, tuple[Direct, Direct]] = field(default_factory=dict)
    catch_ups: list[CatchUp] = field(default_factory=list)
    discarded: list[CatchUp] = field(default_factory=list)
    """Whose requests were not sent."""
    crashes: dict[str, Crash] = field(default_factory=dict)
    steady: list[Steady] = field(default_factory=list)
    lags: list[Lag] = field(default_factory=list)
    ddl: list[DdlLag] = field(default_factory=list)
    stalled: dict[str, Stalled] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)
    listing: dict[str, Listing] = field(default_factory=dict)
    metadata: list[Metadata] = field(default_factory=list)
    held: Held | None = None
    reconciled: Reconciled | None = None
    scaled: list[Scaled] = field(default_factory=list)
    kafka_sink: list[KafkaFigures] = field(default_factory=list)
    files: list[FileFigures] = field(default_factory=list)
    postgres: list[PostgresFigures] = field(default_factory=list)
    pulsar_read: PulsarRead | None = None
    tls: TlsCost | None = None
    checks: dict[str, float] = field(default_factory=dict)
    """Microseconds of knowing a caller, by what he shows."""

    def ratio(self, run: CatchUp) -> float | None:
        """To plain pymilvus under the same conditions."""
        direct = self.direct.get(f"{run.queue} {run.dim}")
        return None if direct is None else run.rate / direct[0].rate

    def crash_ratio(self, key: str) -> float | None:
        """The second owner's pace to that of the same catch-up without a crash."""
        for run in self.catch_ups:
            if f"{run.queue} {run.dim}" == key and run.rows_per_insert == 1_000:
                return self.crashes[key].inner_rate / run.inner_rate
        return None

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def show(self, console: Console) -> None:
        console.print(f"\n{self.command}\n{self.machine}")
        for table in (
            self._throughput(),
            self._figures(),
            self._kafka_sink(),
            self._files(),
            self._postgres(),
        ):
            if table.row_count:
                console.print(table)

    def _throughput(self) -> RichTable:
        table = RichTable(title="Throughput (no index, not loaded, 2 shards)", title_justify="left")
        for column in ("", "queue", "dim", "rows/s", "10-90 %", "of direct", "goal"):
            table.add_column(column, justify="left" if column in ("", "queue") else "right")
        for column in ("CPU s per M rows", "MiB"):
            table.add_column(column, justify="right" if column == "MiB" else "left")
        for key, (plain, prebuilt) in self.direct.items():
            queue, dim = key.split()
            for what, direct in (("direct pymilvus", plain), ("direct prebuilt bytes", prebuilt)):
                label = f"{what}, {direct.batch} x{direct.parallelism}"
                table.add_row(label, queue, dim, f"{direct.rate:,.0f}", "", "", "", "", "")
        for run in self.catch_ups:
            ratio = self.ratio(run)
            judged = run.dim == JUDGED_DIM
            goal = GOAL_RATIO.get(run.rows_per_insert) if judged else None
            cpu_goal = GOAL_CPU.get(run.rows_per_insert) if judged else None
            table.add_row(
                f"catch-up, {run.rows_per_insert}-row inserts",
                run.queue,
                str(run.dim),
                f"{run.rate:,.0f}",
                f"{run.inner_rate:,.0f}",
                "" if ratio is None else _judged(ratio, goal, at_least=True),
                "" if goal is None else f">= {goal}",
                _cpu(run.cpu_per_million, cpu_goal),
                _judged(run.peak_mib, GOAL_MIB, digits=0),
            )
        for run in self.discarded:
            judged = run.dim == JUDGED_DIM and run.rows_per_insert == 1_000
            table.add_row(
                f"requests not sent, {run.rows_per_insert}-row inserts",
                run.queue,
                str(run.dim),
                f"{run.rate:,.0f}",
                f"{run.inner_rate:,.0f}",
                "",
                "",
                _cpu(run.cpu_per_million, GOAL_CPU_DISCARDING if judged else None),
                _judged(run.peak_mib, GOAL_MIB, digits=0),
            )
        for stream in self.steady:
            table.add_row(
                f"steady, {stream.rows_per_insert}-row inserts",
                stream.queue,
                str(stream.dim),
                f"{stream.source_rate:,.0f}",
                "",
                "",
                "lag flat",
                _cpu(stream.cpu_per_million, None),
                _judged(stream.peak_mib, GOAL_MIB, digits=0),
            )
        return table

    def _figures(self) -> RichTable:
        table = RichTable(title="Other figures", title_justify="left")
        for column in ("", "seen", "goal"):
            table.add_column(column)
        for key, crash in self.crashes.items():
            ratio = self.crash_ratio(key)
            table.add_row(
                f"{key}: pace after kill -9 of the owner, to the ordinary one",
                f"{'' if ratio is None else _judged(ratio, GOAL_CRASH, at_least=True)} "
                f"({crash.pause_seconds:.1f} s to the first row, {crash.upserted:,} of "
                f"{crash.rows:,} rows upserted)",
                f">= {GOAL_CRASH}",
            )
        for stream in self.steady:
            lags = " ".join(f"{lag:.1f}" for lag in stream.lags)
            table.add_row(
                f"{stream.queue} {stream.dim}: lag every 10 s at {stream.source_rate:,.0f} rows/s",
                f"{lags} s, the last row {stream.drain_seconds:.1f} s after the end",
                "flat",
            )
        for lag in self.lags:
            load = f"{lag.background:,} rows/s" if lag.background else "idle"
            table.add_row(
                f"{lag.queue}: acknowledged to visible, {load}, ticks every {lag.tick_ms} ms "
                f"({lag.probes} probes)",
                f"p50 {_judged(lag.p50, GOAL_P50)} s, p99 {_judged(lag.p99, GOAL_P99)} s, "
                f"largest {lag.largest:.2f} s",
                f"< {GOAL_P50}, < {GOAL_P99} s",
            )
        for seen in self.ddl:
            slowest = sorted(seen.by_kind.items(), key=lambda each: -each[1])
            table.add_row(
                f"{seen.queue}: {seen.operations} operations beside {seen.rows_per_second:,.0f} "
                "rows/s, acknowledged to shown",
                f"p50 {seen.p50:.2f} s, p99 {_judged(seen.p99, GOAL_DDL_P99)} s, at most: "
                + ", ".join(f"{what} {most:.2f}" for what, most in slowest),
                f"p99 < {GOAL_DDL_P99:.0f} s",
            )
        for queue, stall in self.stalled.items():
            table.add_row(
                f"{queue}: replicator memory, sink stopped, {stall.rows_waiting:,} rows waiting",
                f"{_judged(stall.peak_mib, GOAL_MIB, digits=0)} MiB "
                f"({stall.before_mib:.0f} before the first task)",
                f"< {GOAL_MIB:.0f} MiB",
            )
        for queue, rest in self.idle.items():
            shares = ", ".join(f"{n} {_judged(p, GOAL_IDLE, 1)} %" for n, p in rest.percent.items())
            table.add_row(
                f"{queue}: CPU at rest, {rest.collections} collections",
                shares,
                f"< {GOAL_IDLE:.0f} % of a core",
            )
        for queue, listed in self.listing.items():
            table.add_row(
                f"{queue}: List of {listed.tasks:,} tasks",
                f"{_judged(listed.milliseconds, GOAL_LIST_MS, 0)} ms",
                f"< {GOAL_LIST_MS:.0f} ms",
            )
        for known in self.metadata:
            table.add_row(
                f"source with {known.collections:,} collections, {known.followed:,} followed",
                f"first listing {_judged(known.listing_seconds, GOAL_LISTING_SECONDS, 1)} s, "
                f"controller {_judged(known.peak_mib, GOAL_CONTROLLER_MIB, 0)} MiB, "
                f"one changed key {known.change_cpu_ms:.0f} ms of CPU",
                f"< {GOAL_LISTING_SECONDS:.0f} s, < {GOAL_CONTROLLER_MIB:.0f} MiB",
            )
        if (held := self.held) is not None:
            table.add_row(
                f"{held.assignments:,} assignments at rest on {held.replicators} replicators",
                f"controller {_judged(held.rest_percent, GOAL_HELD_PERCENT, 1)} % of a core "
                f"({held.reports_per_second:.0f} reports/s), "
                f"{_judged(held.peak_mib, GOAL_HELD_MIB, 0)} MiB, in sync "
                f"{_judged(held.resync_seconds, GOAL_RESYNC_SECONDS, 1)} s after its restart",
                f"< {GOAL_HELD_PERCENT:.0f} %, < {GOAL_HELD_MIB:.0f} MiB, "
                f"< {GOAL_RESYNC_SECONDS:.0f} s",
            )
        for fleet in self.scaled:
            table.add_row(
                f"sinks of fixed speed, replicators: {fleet.replicators}",
                f"{fleet.rows_per_second:,.0f} rows/s, "
                f"{_judged(fleet.single, GOAL_SCALE, at_least=True)} of as many times one, "
                f"{fleet.linear:.2f} of what the sinks take (the slowest {fleet.slowest:.2f})",
                f">= {GOAL_SCALE} x linear",
            )
        if (look := self.reconciled) is not None:
            table.add_row(
                f"comparison of {look.collections:,} unchanged collections, {look.loaded:,} loaded",
                f"{_judged(look.seconds, GOAL_RECONCILE_SECONDS, 1)} s, "
                f"{_judged(look.calls_most, GOAL_RECONCILE_CALLS, 0)} calls each at most, "
                f"{look.calls:.1f} on average",
                f"< {GOAL_RECONCILE_SECONDS:.0f} s, {GOAL_RECONCILE_CALLS} calls",
            )
        if (read := self.pulsar_read) is not None:
            table.add_row(
                "reading a Pulsar topic, entries of 256 KiB",
                f"{read.source:,.0f} MiB/s, "
                f"{_judged(read.source / read.bare, GOAL_PULSAR_READ, at_least=True)} of a bare "
                "pulsar-client reader",
                f">= {GOAL_PULSAR_READ}",
            )
        if (cost := self.tls) is not None:
            rates = [
                " ".join(f"{run.rate:,.0f}" for run in runs) for runs in (cost.plain, cost.secured)
            ]
            table.add_row(
                "catch-up with mutual TLS, to plaintext",
                f"{_judged(cost.ratio, GOAL_TLS_RATIO, at_least=True)} of the pace "
                f"({rates[1]} rows/s to {rates[0]}), {cost.cpu_ratio:.2f} of the replicator's "
                f"CPU, {cost.whole_cpu_ratio:.2f} of that of source, replicator and sink",
                f">= {GOAL_TLS_RATIO}",
            )
        for what, microseconds in self.checks.items():
            goal = None if what == FIRST_CHECK else GOAL_CHECK_US
            table.add_row(
                f"knowing a caller, {what}",
                f"{_judged(microseconds, goal, 1)} µs a call",
                "" if goal is None else f"< {goal:.0f} µs",
            )
        return table

    def _kafka_sink(self) -> RichTable:
        table = RichTable(title="Kafka sink (CPU of its process)", title_justify="left")
        table.add_column("format")
        table.add_column("")
        for column in ("dim", "rows/s", "CPU s per M rows", "goal", "ratio"):
            table.add_column(column, justify="right")
        table.add_column("goal")
        for seen in self.kafka_sink:
            judged = seen.contender == AT_LEAST_ONCE
            cpu_goal = GOAL_KAFKA_CPU.get((seen.format, seen.dim)) if judged else None
            goal = GOAL_KAFKA_RATIO.get(seen.contender) if seen.ratio is not None else None
            rival = "at least once" if seen.contender == EXACTLY_ONCE else "raw"
            table.add_row(
                seen.format,
                seen.contender,
                str(seen.dim),
                f"{seen.rate:,.0f}",
                _judged(seen.cpu_per_million, cpu_goal, 1),
                "" if cpu_goal is None else f"<= {cpu_goal:.0f}",
                "" if seen.ratio is None else _judged(seen.ratio, goal, at_least=True),
                "" if goal is None else f">= {goal} of {rival}",
            )
        return table

    def _files(self) -> RichTable:
        table = RichTable(title="Parquet files (default options)", title_justify="left")
        for column in ("dim", "rows/s", "goal", "CPU s per M rows", "MiB more"):
            table.add_column(column, justify="right")
        for column in ("files", "bytes to vectors'", "goal"):
            table.add_column(column, justify="right")
        for seen in self.files:
            goal = GOAL_FILES_RATE if seen.dim == JUDGED_DIM else None
            table.add_row(
                str(seen.dim),
                _judged(seen.rate, goal, 0, at_least=True),
                "" if goal is None else f">= {goal:,}",
                f"{seen.cpu_per_million:.1f}",
                f"{seen.growth_mib:.0f}",
                str(seen.files),
                _judged(seen.size_ratio, GOAL_FILES_SIZE),
                f"<= {GOAL_FILES_SIZE}",
            )
        return table

    def _postgres(self) -> RichTable:
        table = RichTable(title="PostgreSQL sink", title_justify="left")
        for column in ("dim", "rows/s", "upserts/s", "CPU s per M rows"):
            table.add_column(column, justify="right")
        for column in ("plain COPY rows/s", "of plain COPY", "goal"):
            table.add_column(column, justify="right")
        for seen in self.postgres:
            table.add_row(
                str(seen.dim),
                f"{seen.rate:,.0f}",
                f"{seen.upserts:,.0f}",
                f"{seen.cpu_per_million:.1f}",
                f"{seen.plain_copy:,.0f}",
                _judged(seen.ratio, GOAL_POSTGRES_RATIO, at_least=True),
                f">= {GOAL_POSTGRES_RATIO}",
            )
        return table


def _judged(value: float, goal: float | None, digits: int = 2, *, at_least: bool = False) -> str:
    text = f"{value:.{digits}f}"
    if goal is None:
        return text
    reached = value >= goal if at_least else value <= goal
    return f"[green]{text}[/]" if reached else f"[red]{text} (short)[/]"


def _cpu(per_million: dict[str, float], goal: float | None) -> str:
    return ", ".join(
        f"{name} {_judged(value, goal if name == 'replicator' else None, 1)}"
        for name, value in per_million.items()
    )
