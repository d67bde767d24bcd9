"""Rows into Parquet files by the writer, with its default options: pace, CPU, memory, and the size
of all that lies in the folder then.

In a process of its own, because memory that another part has given back would hide what this takes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from milvus_cdc.rows import Changes
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import FileWriter
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_file_pb2

from benchmarks.changes import ROUNDS, Spent, requests, spent, table, write
from benchmarks.usage import peak_mib, reset_peak, resident_mib

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class FileFigures:
    """The best of some rounds."""

    dim: int
    rows: int
    rate: float
    cpu_per_million: float
    size_ratio: float
    """Bytes in the folder to those of the vectors alone."""
    files: int
    growth_mib: float
    """The most that was ever resident beyond what was before the first round."""


def measure(rows: int, dim: int) -> FileFigures:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, rows, dim).result()


def _measure(rows: int, dim: int) -> FileFigures:
    changes = requests(rows, dim)
    best, own = Spent(), os.getpid()
    reset_peak(own)
    before = resident_mib(own)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as name:
            folder = Path(name)
            best = best.best(asyncio.run(_write(folder, dim, changes)))
            sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return FileFigures(
        dim=dim,
        rows=rows,
        rate=rows / best.seconds,
        cpu_per_million=best.cpu / rows * 1e6,
        size_ratio=sum(sizes.values()) / (rows * dim * _FLOAT_BYTES),
        files=sum(path.suffix == ".parquet" for path in sizes),
        growth_mib=peak_mib(own) - before,
    )


async def _write(folder: Path, dim: int, changes: list[Changes]) -> Spent:
    writer = FileWriter(
        sink_file_pb2.FileSink(uri=folder.as_uri()), SecretResolver(env_prefix="BENCH_", environ={})
    )
    target = table(dim)
    try:
        await writer.open(target, Opening.NEW, 1)
        return await spent(lambda: write(writer, target, changes))
    finally:
        await writer.close()
