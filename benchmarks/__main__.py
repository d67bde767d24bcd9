"""`python -m benchmarks`: measures on real servers of this machine and prints what was seen.

Rows are those of dimension 128; larger vectors get fewer, so that the bytes stay the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import structlog
from rich.console import Console

from benchmarks import (
    assignments,
    catchup,
    ddl,
    files,
    footprint,
    kafka_sink,
    lag,
    metadata,
    postgres,
    pulsar_read,
    reconcile,
    scaleout,
    steady,
    trust,
)
from benchmarks.rig import Rig
from benchmarks.rows import Table, drop
from benchmarks.table import Results
from benchmarks.writers import best_direct
from tests.servers import (
    kafka_unavailable_reason,
    postgres_unavailable_reason,
    pulsar_unavailable_reason,
)

OF_A_QUEUE = (
    "direct",
    "catchup",
    "discard",
    "crash",
    "steady",
    "lag",
    "ddl",
    "memory",
    "idle",
    "list",
)
"""Parts that are measured on the servers of a source, for each kind of queue."""
PARTS = (
    *OF_A_QUEUE,
    "metadata",
    "reconcile",
    "assignments",
    "scaleout",
    "kafka-sink",
    "files",
    "postgres",
    "trust",
    "pulsar-read",
)
LAG_ROWS_PER_SECOND = 1_000
IDLE_COLLECTIONS = 64
LISTED_TASKS = 1_000
MANY_COLLECTIONS = 10_000
COMPARED_COLLECTIONS = 1_000
SCALED_SECONDS = 15
MANY_REPLICATORS = 50
LOADED_SHARE = 10
"""One in so many is loaded: a server of this machine holds no more of them."""
PROBE_SECONDS = 40
FAST_TICK_MS = 50

_started = time.monotonic()


def main() -> int:
    options = _options()
    # What clients say while they try again by themselves is no figure.
    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)
    console = Console(width=None if sys.stdout.isatty() else 200)
    results = Results(command=f"python -m benchmarks {' '.join(sys.argv[1:])}".strip())
    try:
        _measure_all(options, results)
    finally:
        # Half an hour of figures is not lost by what fails after them.
        results.show(console)
        if options.json:
            results.write_json(options.json)
    return 0


def _measure_all(options: argparse.Namespace, results: Results) -> None:
    if "metadata" in options.only:
        many = MANY_COLLECTIONS // 10 if options.quick else MANY_COLLECTIONS
        _say(f"metadata of {many:,} collections")
        results.metadata = metadata.measure(many)
    if "reconcile" in options.only:
        compared = COMPARED_COLLECTIONS // 10 if options.quick else COMPARED_COLLECTIONS
        _say(f"comparison of {compared:,} collections with a sink")
        results.reconciled = reconcile.measure(compared, compared // LOADED_SHARE)
    if "assignments" in options.only:
        many = MANY_COLLECTIONS // 10 if options.quick else MANY_COLLECTIONS
        _say(f"{many:,} assignments on {MANY_REPLICATORS} replicators")
        results.held = assignments.measure(many, MANY_REPLICATORS)
    if "scaleout" in options.only:
        _say(f"{', '.join(map(str, scaleout.FLEETS))} replicators with sinks of fixed speed")
        results.scaled = scaleout.measure(SCALED_SECONDS / 3 if options.quick else SCALED_SECONDS)
    _measure_row_sinks(options, results)
    if "trust" in options.only:
        _say("trust: knowing a caller")
        results.checks = trust.check_costs()
        _say("trust: starting etcd, a source, two sinks, services with and without TLS")
        results.tls = trust.tls_cost("nats", _rows(options, trust.DIM), _say)
    if "pulsar-read" in options.only:
        if reason := pulsar_unavailable_reason():
            _say(f"reading Pulsar left out: {reason}")
        else:
            _say("a topic of a Pulsar, read by the source's reader and by a bare one")
            results.pulsar_read = pulsar_read.measure()
    for queue in options.queues if set(options.only).intersection(OF_A_QUEUE) else ():
        if queue == "kafka" and (reason := kafka_unavailable_reason()):
            _say(f"kafka left out: {reason}")
            continue
        _say(f"{queue}: starting etcd, two Milvus, controller, replicator")
        with Rig(queue) as rig:
            _measure(rig, options, results)
        if "lag" in options.only and not options.quick:
            _say(f"{queue}: the same servers, ticking every {FAST_TICK_MS} ms")
            with Rig(queue, tick_ms=FAST_TICK_MS) as rig:
                _measure_lag(rig, PROBE_SECONDS, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--queues", type=_words, default=("nats", "kafka"), help="nats,kafka")
    parser.add_argument("--dims", type=_numbers, default=(128, 768), help="128,768")
    parser.add_argument("--rows", type=int, default=500_000, help="of dimension 128")
    parser.add_argument("--only", type=_words, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer rows and shorter streams")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    for name, allowed in (("queues", ("nats", "kafka")), ("only", PARTS)):
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"--{name} knows {', '.join(allowed)}, not {', '.join(sorted(unknown))}")
    if options.quick:
        options.rows = min(options.rows, 100_000)
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rows(options: argparse.Namespace, dim: int) -> int:
    rows: int = options.rows
    return rows * 128 // max(dim, 128)


def _measure_row_sinks(options: argparse.Namespace, results: Results) -> None:
    """Kafka, files and PostgreSQL, fed without a source."""
    parts = options.only
    if "kafka-sink" in parts:
        if reason := kafka_unavailable_reason():
            _say(f"Kafka sink left out: {reason}")
        else:
            _say("Kafka sink: starting a broker")
            results.kafka_sink = kafka_sink.measure(options.dims, options.rows, _say)
    if "files" in parts:
        for dim in options.dims:
            _say(f"Parquet files, dimension {dim}")
            results.files.append(files.measure(_rows(options, dim), dim))
    if "postgres" in parts:
        if reason := postgres_unavailable_reason():
            _say(f"PostgreSQL left out: {reason}")
            return
        for dim in options.dims:
            _say(f"PostgreSQL, dimension {dim}")
            results.postgres.append(postgres.measure(_rows(options, dim), dim))


def _measure(rig: Rig, options: argparse.Namespace, results: Results) -> None:
    queue, parts = rig.queue, options.only
    stream_seconds = 20 if options.quick else 60
    probe_seconds = 15 if options.quick else PROBE_SECONDS
    for dim in options.dims:
        key = f"{queue} {dim}"
        rows = _rows(options, dim)
        if "direct" in parts:
            _say(f"{key}: direct writers, the best of all batch sizes and parallelisms")
            uri = rig.stack.sink.uri
            results.direct[key] = best_direct(uri, rig.stack.sink.address, dim, rows)
        tables: dict[Table, int] = {}
        for rows_per_insert in (1_000, 100):
            table = Table(f"bench_{dim}_{rows_per_insert}", dim)
            if not {"catchup", "discard", "crash", "memory"} & set(parts):
                continue
            _say(f"{key}: writing {rows:,} rows in {rows_per_insert}-row inserts")
            fill_rate = catchup.prepare(rig, table, rows, rows_per_insert)
            tables[table] = rows
            if "catchup" in parts:
                _say(f"{key}: catch-up")
                results.catch_ups.append(
                    catchup.catch_up(rig, table, rows, rows_per_insert, fill_rate)
                )
            if "discard" in parts:
                _say(f"{key}: catch-up whose requests are not sent")
                results.discarded.append(
                    catchup.catch_up(rig, table, rows, rows_per_insert, fill_rate, discarding=True)
                )
            if "crash" in parts and rows_per_insert == 1_000:
                _say(f"{key}: catch-up whose owner is killed")
                results.crashes[key] = catchup.crash(rig, table, rows)
        if "memory" in parts and dim == options.dims[0]:
            _say(f"{key}: {sum(tables.values()):,} rows wait before a stopped sink")
            results.stalled[queue] = footprint.stalled(rig, tables)
        for table in tables:
            drop(rig.stack.source.uri, table.name)
        if "steady" in parts:
            _say(f"{key}: steady stream of {stream_seconds} s")
            results.steady.append(steady.steady(rig, dim, stream_seconds))
    if "lag" in parts:
        _measure_lag(rig, probe_seconds, results)
    if "ddl" in parts:
        _say(f"{queue}: operations beside a stream of rows")
        results.ddl.append(ddl.measure(rig, stream_seconds))
    if "idle" in parts:
        _say(f"{queue}: at rest with {IDLE_COLLECTIONS} collections")
        results.idle[queue] = footprint.idle(rig, IDLE_COLLECTIONS, probe_seconds)
    if "list" in parts and queue == options.queues[0]:
        tasks = LISTED_TASKS // 10 if options.quick else LISTED_TASKS
        _say(f"{queue}: list of {tasks} tasks")
        results.listing[queue] = footprint.listing(rig, tasks)


def _measure_lag(rig: Rig, seconds: float, results: Results) -> None:
    for background in (0, LAG_ROWS_PER_SECOND):
        _say(f"{rig.queue}: lag with {background} rows/s beside the probes")
        results.lags.append(lag.measure(rig, background, seconds))


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
