"""The live table: every collection's rows on both sides, its lag, owner and state."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass, field

import grpc
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import MilvusClient, MilvusException
from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from examples.demo.services import Demo

PLAIN_EVERY_SECONDS = 5.0
COUNT_EVERY_SECONDS = 1.0
_EVENTS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One collection at one moment. Rows are None while a side cannot count them."""

    name: str
    collection_id: int
    state: str
    reason: str
    message: str
    owner: str
    behind: float | None
    """Seconds between now and the source time up to which everything is durable in the sink."""
    rows_source: int | None
    rows_sink: int | None
    rows_upserted: int
    rows_deleted: int

    @property
    def equal_counts(self) -> bool:
        return self.rows_source is not None and self.rows_source == self.rows_sink


class Counter:
    """`count(*)` of one Milvus, as fresh as it is at hand: nobody waits for a watermark here."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._clients: dict[str, MilvusClient] = {}
        self._known: dict[str, tuple[float, int | None]] = {}

    def rows(self, full_name: str) -> int | None:
        """A count may be COUNT_EVERY_SECONDS old: counting must not slow the two clusters down."""
        at, rows = self._known.get(full_name, (0.0, None))
        if time.monotonic() - at > COUNT_EVERY_SECONDS:
            rows = self._count(full_name)
            self._known[full_name] = (time.monotonic(), rows)
        return rows

    def _count(self, full_name: str) -> int | None:
        database, _, name = full_name.partition(".")
        try:
            client = self._clients.get(database)
            if client is None:
                client = self._clients[database] = MilvusClient(self._uri, db_name=database)
            answer = client.query(
                name,
                filter="",
                output_fields=["count(*)"],
                consistency_level="Eventually",
                timeout=2,
            )
        except (MilvusException, grpc.RpcError):
            return None  # not there, not loaded yet, or too busy to say
        return int(answer[0]["count(*)"])

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


@dataclass(slots=True)
class Watch:
    """Looks, and shows what it saw: a table that lives in a terminal, lines elsewhere."""

    demo: Demo
    task: str
    source: Counter
    sink: Counter
    console: Console = field(default_factory=Console)
    seen: list[Seen] = field(default_factory=list)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=_EVENTS_SHOWN))
    title: str = ""
    _began: float = field(default_factory=time.monotonic)
    _live: Live | None = None
    _printed: float = 0.0

    def start(self) -> None:
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.stop()
            self._live = None
        else:
            self._print()

    @property
    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._began

    def tell(self, event: str) -> None:
        """Something worth a line of its own."""
        line = f"{self.elapsed:5.1f} s  {event}"
        self.events.append(line)
        if self._live is None:
            print(line, flush=True)

    def look(self) -> list[Seen]:
        """Asks the controller and both clusters, and shows the answers."""
        try:
            answer = self.demo.tasks.ListTaskCollections(
                task_service_pb2.ListTaskCollectionsRequest(parent=self.task), timeout=15
            )
        except grpc.RpcError as error:
            raise RuntimeError(f"the controller does not answer: {error}") from error
        self.seen = [self._seen(c) for c in answer.collections]
        if self._live is not None:
            self._live.update(self._render())
        elif time.monotonic() - self._printed >= PLAIN_EVERY_SECONDS:
            self._print()
        return self.seen

    def check(self) -> None:
        """RuntimeError when a collection was FAILED when last looked at."""
        for seen in self.seen:
            if seen.state == "FAILED":
                raise RuntimeError(f"{seen.name} FAILED {seen.reason}: {seen.message}")

    def owner(self, full_name: str) -> str:
        """Name of the replicator that held the collection when last looked at; "" if none did."""
        return next((s.owner for s in self.seen if s.name == full_name), "")

    def _seen(self, collection: task_pb2.TaskCollection) -> Seen:
        name = f"{collection.database}.{collection.collection}"
        behind = None
        if collection.HasField("checkpoint_time"):
            behind = max(0.0, time.time() - collection.checkpoint_time.ToNanoseconds() / 1e9)
        return Seen(
            name,
            collection.collection_id,
            task_pb2.CollectionState.Name(collection.state).removeprefix("COLLECTION_STATE_"),
            collection.reason,
            collection.message,
            collection.replicator.removeprefix("replicators/"),
            behind,
            self.source.rows(name),
            self.sink.rows(name),
            collection.rows_upserted,
            collection.rows_deleted,
        )

    def _render(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", expand=False)
        table.add_column("collection", no_wrap=True)
        for column in ("rows source", "rows sink", "upserts", "deletes", "behind"):
            table.add_column(column, justify="right")
        table.add_column("replicator")
        table.add_column("state")
        for seen in sorted(self.seen, key=lambda s: (s.name, s.collection_id)):
            state = f"{seen.state} {seen.reason}".strip()
            color = {"RUNNING": "green", "FAILED": "red"}.get(seen.state, "yellow")
            table.add_row(
                seen.name,
                _number(seen.rows_source),
                _number(seen.rows_sink),
                _number(seen.rows_upserted),
                _number(seen.rows_deleted),
                _seconds(seen.behind),
                seen.owner or "[dim]–[/dim]",
                f"[{color}]{state}[/{color}]",
            )
        table.caption = "\n".join(self.events)
        table.caption_justify = "left"
        return table

    def _print(self) -> None:
        self._printed = time.monotonic()
        parts = [
            f"{s.name} {_number(s.rows_sink)}/{_number(s.rows_source)}"
            f" {_seconds(s.behind)} {s.owner or '–'}"
            + ("" if s.state == "RUNNING" else f" {s.state} {s.reason}".rstrip())
            for s in sorted(self.seen, key=lambda s: (s.name, s.collection_id))
        ]
        print(f"{self.elapsed:5.1f} s  rows sink/source, behind, replicator", flush=True)
        for part in parts:
            print(f"         {part}")
        sys.stdout.flush()


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"
