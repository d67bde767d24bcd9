"""The users of the source: a thread per table that inserts, upserts and deletes at a steady pace.

Law: what a writer meets that it did not expect ends the demo; nothing is retried behind its back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pymilvus import MilvusClient

from examples.demo.data import Row, Table

JOIN_SECONDS = 30.0


@dataclass(slots=True)
class Counts:
    inserted: int = 0
    upserted: int = 0
    deleted: int = 0


def create(client: MilvusClient, table: Table) -> None:
    """Creates, indexes and loads a table at the source, through the public API alone."""
    client.create_collection(table.name, schema=table.schema, num_shards=table.shards)
    for partition in table.partitions:
        client.create_partition(table.name, partition)
    index = client.prepare_index_params()
    index.add_index(table.vector, **table.index)
    client.create_index(table.name, index)
    client.load_collection(table.name)


class Writer:
    """Writes rows of one table; with every fourth batch it upserts and deletes older ones."""

    def __init__(
        self, uri: str, table: Table, rows_per_second: int, *, first: int = 0, counts: Counts
    ) -> None:
        self.table = table
        self.counts = counts
        self._client = MilvusClient(uri=uri, db_name=table.database)
        self._rate = rows_per_second
        self._next = first
        self._batch = 0
        self._oldest = first

    def backlog(self, rows: int) -> None:
        """Rows that are there before anybody replicates."""
        for _ in range(0, rows, 500):
            self._insert(min(500, rows))

    def run(self, stop: threading.Event) -> None:
        """Until `stop`, half a second's rows at a time."""
        size = max(1, self._rate // 2)
        due = time.monotonic()
        while not stop.is_set():
            self._insert(size)
            self._batch += 1
            if self._batch % 4 == 0:
                self._change()
            due += 0.5
            stop.wait(max(0.0, due - time.monotonic()))

    def close(self) -> None:
        self._client.close()

    def _insert(self, count: int) -> None:
        rows = self.table.rows(self._next, count)
        for partition, part in self._by_partition(rows).items():
            self._client.insert(self.table.name, part, partition_name=partition)
        self._next += count
        self.counts.inserted += count

    def _change(self) -> None:
        """Upserts a run of older rows, deletes the next ones, brings some of those back."""
        rows = self.table.rows(self._oldest, 60)
        self._oldest += 60
        for partition, part in self._by_partition(map(self.table.changed, rows[:40])).items():
            self._client.upsert(self.table.name, part, partition_name=partition)
        self._client.delete(self.table.name, ids=[row[self.table.key] for row in rows[40:]])
        for partition, part in self._by_partition(rows[40:45]).items():
            self._client.insert(self.table.name, part, partition_name=partition)
        self.counts.upserted += 40
        self.counts.deleted += 20
        self.counts.inserted += 5

    def _by_partition(self, rows: Iterable[Row]) -> dict[str, list[Row]]:
        parts: dict[str, list[Row]] = {}
        for row in rows:
            partition = self.table.partition_of(row) if self.table.partition_of else ""
            parts.setdefault(partition, []).append(row)
        return parts


class Stream:
    """All writers, each in a thread of its own."""

    def __init__(self, uri: str) -> None:
        self.counts = Counts()
        self._uri = uri
        self._stops: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._writers: list[Writer] = []
        self._error: BaseException | None = None

    def add(self, table: Table, rows_per_second: int, *, first: int = 0) -> Writer:
        writer = Writer(self._uri, table, rows_per_second, first=first, counts=self.counts)
        self._writers.append(writer)
        return writer

    def start(self, writer: Writer) -> Callable[[], None]:
        """Runs it; what is returned ends this writer alone, its last batch included."""
        stop = threading.Event()
        self._stops.append(stop)
        thread = self._spawn(f"writer of {writer.table.full_name}", lambda: writer.run(stop))

        def end() -> None:
            stop.set()
            thread.join(JOIN_SECONDS)

        return end

    def do(self, what: str, action: Callable[[], None]) -> None:
        """An act of its own beside the writers."""
        self._spawn(what, action)

    def check(self) -> None:
        """Raises what a writer met."""
        if self._error is not None:
            raise RuntimeError(f"writing at the source failed: {self._error}") from self._error

    def finish(self) -> None:
        """Lets every batch under way end."""
        for stop in self._stops:
            stop.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        for writer in self._writers:
            writer.close()

    def _spawn(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                body()
            except BaseException as error:
                self._error = self._error or error

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread
