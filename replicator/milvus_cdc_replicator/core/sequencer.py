"""Turns operations in order into few large requests, several in flight, without ever reordering one
key.

Laws: a delete or upsert waits for everything in flight that shares a key with it, an insert for
deletes and upserts; plain inserts never wait for each other. One Upsert request holds a key once
(Milvus stores a key twice that stands twice in one request). Requests start in the order in which
they were made.

`ordered`, for sinks that take changes as they come: a request holds whatever comes, in order; only
those that share keys wait for each other, plain inserts too: there the last one counts. `atomic`,
for sinks that remember how far they are: one request at a time, and each ends where a place in
every log can be named that lies between what it holds and what it does not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from milvus_cdc.order.ops import LogOp, Mark

from milvus_cdc_replicator.core.ops import Write, WriteKind


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """Bounds of one request and of how many run at once."""

    rows_per_request: int = 10_000
    bytes_per_request: int = 16 * 1024 * 1024
    in_flight: int = 4
    ordered: bool = False
    atomic: bool = False
    lingers: bool = False
    """An unfinished request waits until somebody says `hurry`."""


class Sequencer:
    """Invariant: for each key, requests complete in the order of their operations."""

    def __init__(self, limits: WriteLimits) -> None:
        self._limits = limits
        self._open: Write | None = None
        self._sealed: deque[Write] = deque()
        self._in_flight: dict[int, Write] = {}
        self._next_id = 1
        self.held_bytes = 0
        """Bytes of everything taken and not yet durable."""
        self._hurry = False
        self._unmarked: set[str] = set()
        """Vchannels whose place is not known since their last operation was added."""

    @property
    def idle(self) -> bool:
        return self._open is None and not self._sealed and not self._in_flight

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def backlog(self) -> int:
        """Requests that are full and wait."""
        return len(self._sealed)

    @property
    def lingering(self) -> bool:
        """There is an unfinished request that waits for more, or for `hurry`."""
        return self._limits.lingers and self._open is not None and not self._hurry

    def hurry(self) -> None:
        """What is unfinished goes out as soon as it can."""
        self._hurry = self._open is not None

    @property
    def limits(self) -> WriteLimits:
        return self._limits

    def arrange(self, limits: WriteLimits) -> None:
        """As the sink wants it, before anything was added."""
        assert self.idle
        self._limits = limits

    def bound(self, rows: int, size: int, *, lingers: bool) -> None:
        """Other bounds of what is added from now on; what is unfinished goes on under them."""
        self._limits = replace(
            self._limits, rows_per_request=rows, bytes_per_request=size, lingers=lingers
        )

    def mark(self, mark: Mark) -> None:
        """Between the operations added so far and all others, `mark` is the place of a vchannel."""
        self._unmarked.discard(mark.vchannel)
        write = self._open or (self._sealed[-1] if self._sealed else None)
        if self._limits.atomic and write is not None:
            write.marks[mark.vchannel] = mark

    def add(self, kind: WriteKind, partition: str, op: LogOp, vchannel: str = "") -> None:
        if self._limits.ordered:
            kind, partition = WriteKind.CHANGES, ""
        open_write = self._open
        if open_write is not None and not self._joins(open_write, kind, partition, op):
            self._seal()
            open_write = None
        if open_write is None:
            open_write = Write(self._next_id, kind, partition)
            self._next_id += 1
            self._open = open_write
        open_write.append(op)
        self.held_bytes += op.size
        if self._limits.atomic:
            self._unmarked.add(vchannel)

    def limit_in_flight(self, most: int) -> None:
        """What the sink takes at once, where that is less."""
        self._limits = replace(self._limits, in_flight=min(self._limits.in_flight, most))

    def start(self) -> list[Write]:
        """Requests that may go out now. An unfinished one goes too when there is room: lag
        before size.
        """
        started: list[Write] = []
        while len(self._in_flight) < self._limits.in_flight:
            if not self._sealed:
                if self._open is None or not self._may_seal():
                    break
                self._seal()
            write = self._sealed[0]
            if self._conflicts(write):
                break
            self._sealed.popleft()
            self._in_flight[write.write_id] = write
            started.append(write)
        return started

    def done(self, write_id: int) -> Write:
        write = self._in_flight.pop(write_id)
        self.held_bytes -= write.size
        return write

    def _joins(self, write: Write, kind: WriteKind, partition: str, op: LogOp) -> bool:
        if write.kind is not kind or write.partition != partition:
            return False
        if self._unmarked:
            return True
        if write.rows + op.rows > self._limits.rows_per_request:
            return False
        if write.size + op.size > self._limits.bytes_per_request:
            return False
        if kind is WriteKind.UPSERT:
            return write.keys().isdisjoint(op.keys())
        return True

    def _may_seal(self) -> bool:
        if self._unmarked or self._open is None:
            return False
        return not self._limits.lingers or self._hurry or self._full(self._open)

    def _full(self, write: Write) -> bool:
        rows, size = self._limits.rows_per_request, self._limits.bytes_per_request
        return write.rows >= rows or write.size >= size

    def _seal(self) -> None:
        assert self._open is not None
        self._hurry = False
        self._sealed.append(self._open)
        self._open = None

    def _conflicts(self, write: Write) -> bool:
        for other in self._in_flight.values():
            if write.kind is WriteKind.INSERT and other.kind is WriteKind.INSERT:
                continue
            if write.kind is WriteKind.DELETE and other.kind is WriteKind.DELETE:
                continue
            if not write.keys().isdisjoint(other.keys()):
                return True
        return False
