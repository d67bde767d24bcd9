"""Writers: one that fills as fast as a server takes rows, and the rival, plain pymilvus."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from pymilvus import Collection, PyMilvusDeprecationWarning, connections

from benchmarks.rows import Connection, Requests, Table, create, drop

BATCH_SIZES = (1_000, 5_000, 10_000)
PARALLELISM = (2, 4, 8)
FILL_THREADS = 4


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Seconds until all have ended; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return seconds


def fill(
    address: str,
    requests: Requests,
    rows: int,
    rows_per_insert: int,
    *,
    threads: int = FILL_THREADS,
) -> float:
    """Seconds it took to write `rows` rows with the keys from 0 on."""
    starts = iter(range(0, rows, rows_per_insert))
    lock = threading.Lock()

    def work(_: int) -> None:
        connection = Connection(address)
        try:
            while True:
                with lock:
                    first = next(starts, None)
                if first is None:
                    return
                connection.insert(requests.insert(first, min(rows_per_insert, rows - first)))
        finally:
            connection.close()

    return in_threads(threads, work)


@dataclass(frozen=True, slots=True)
class Direct:
    """The best a direct writer reached."""

    rate: float
    batch: int
    parallelism: int


def best_direct(uri: str, address: str, dim: int, rows: int) -> tuple[Direct, Direct]:
    """Plain pymilvus and, stronger, requests made beforehand: each the best of all batch sizes
    and parallelisms, tried on a part and repeated in full.
    """
    table = Table("bench_direct", dim)
    requests = Requests(table)
    best: list[Direct] = []
    for writer in (_pymilvus, _prebuilt):
        tried: list[Direct] = []
        part = max(rows // 8, 40_000)
        for batch, parallelism in itertools.product(BATCH_SIZES, PARALLELISM):
            drop(uri, table.name)
            create(uri, table)
            seconds = writer(uri, address, requests, part, batch, parallelism)
            tried.append(Direct(part / seconds, batch, parallelism))
        first = max(tried, key=lambda direct: direct.rate)
        drop(uri, table.name)
        create(uri, table)
        seconds = writer(uri, address, requests, rows, first.batch, first.parallelism)
        best.append(Direct(rows / seconds, first.batch, first.parallelism))
    drop(uri, table.name)
    return best[0], best[1]


def _pymilvus(
    uri: str, address: str, requests: Requests, rows: int, batch: int, parallelism: int
) -> float:
    # Its column interface is the fastest one it has, and is announced to go.
    warnings.filterwarnings("ignore", category=PyMilvusDeprecationWarning)
    # Columns as lists are what pymilvus converts fastest.
    vectors = requests.pool[:batch].tolist()
    starts = iter(range(0, rows, batch))
    lock = threading.Lock()
    collections = []
    for index in range(parallelism):
        connections.connect(f"direct-{index}", uri=uri)
        collections.append(Collection(requests.table.name, using=f"direct-{index}"))

    def work(index: int) -> None:
        while True:
            with lock:
                first = next(starts, None)
            if first is None:
                return
            count = min(batch, rows - first)
            collections[index].insert([list(range(first, first + count)), vectors[:count]])

    try:
        return in_threads(parallelism, work)
    finally:
        for index in range(parallelism):
            connections.disconnect(f"direct-{index}")


def _prebuilt(
    uri: str, address: str, requests: Requests, rows: int, batch: int, parallelism: int
) -> float:
    return fill(address, requests, rows, batch, threads=parallelism)
