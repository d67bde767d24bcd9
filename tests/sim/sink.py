"""A Milvus as the sink: a memory one behind a network that loses answers.

Laws: a request takes effect when it arrives, which is never after its deadline (but for `strays`);
whether it has, its sender may never learn.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from milvus_cdc.errors import BugError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.model import Carry, Collection
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import AnyBatch, CollectionTarget, Copies, DeleteBatch, Opened, RowBatch
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.sink.memory_rows import decode_rows
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.writer import Batch

from tests.sim.clockwork import Loop
from tests.sim.network import Network, Server, remote

T = TypeVar("T")

SCHEMA_SECONDS = 60.0
"""The replicator breaks schema changes off by itself, well before."""
CANNOT_COUNT = 0.1
"""Of the questions for keys go to a collection that is not loaded."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes."""

    host: str
    instance: str
    assignment_id: str
    epoch: int


class Rows:
    """What a request asks of the rows of a table, as the referee sees it."""

    def __init__(self, target: CollectionTarget, batch: RowBatch | DeleteBatch) -> None:
        self.table = target.collection
        self.partition = batch.partition
        self.kind = "DELETE" if isinstance(batch, DeleteBatch) else batch.op.value
        self.texts: dict[int, str] = {}
        if isinstance(batch, DeleteBatch):
            self.keys = [int(key) for key in batch.keys]
        else:
            rows = [row for chunk in batch.chunks for row in decode_rows(chunk)]
            self.keys = [row["id"] for row in rows]
            self.texts = {row["id"]: row["text"] for row in rows}

    def __str__(self) -> str:
        return f"{self.kind.lower()} of {self.table}: keys {self.keys}"


class SinkServer(Server):
    """The cluster. `before` and `after` frame every request that takes effect."""

    def __init__(self) -> None:
        super().__init__("sink")
        self.memory = MemorySink()
        self.before: Callable[[Writer, Rows], None] = lambda writer, rows: None
        self.after: Callable[[Writer, Rows], None] = lambda writer, rows: None
        self.holds: Callable[[Writer, CollectionTarget, RowBatch | DeleteBatch], bool] = (
            lambda writer, target, batch: False
        )
        """Asked when a request arrives; True: it does not take effect now."""
        self.on_drop: Callable[[int], None] = lambda collection_id: None
        """Hears of every request to drop a collection, by its id at the source."""

    def write(
        self, writer: Writer, target: CollectionTarget, batch: RowBatch | DeleteBatch
    ) -> None:
        if self.holds(writer, target, batch):
            raise ConnectionResetError(self.name)
        rows = Rows(target, batch)
        self.before(writer, rows)
        at_once(self.memory.write(target, batch, 1.0))
        self.after(writer, rows)

    def copies(self, target: CollectionTarget, partition: str, keys: Sequence[Key]) -> Copies:
        """Of everything: all is loaded."""
        name = target.collection
        if name not in self.memory.collections("default"):
            raise UserError("SINK_COLLECTION_MISSING", f"there is no collection {name}")
        there = self.memory.partitions("default", name)
        if partition and partition not in there:
            raise UserError("SINK_PARTITION_MISSING", f"{name} has no partition {partition}")
        there = [partition] if partition else there
        rows = [row["id"] for one in there for row in self.memory.rows("default", name, one)]
        found = [key for key in rows if key in keys]
        return Copies(len(found), frozenset(found))

    def values(self, table: str) -> dict[int, list[tuple[str, str]]]:
        """What is there, (partition, text), by key; more than one: doubled."""
        found: dict[int, list[tuple[str, str]]] = {}
        if table in self.memory.collections("default"):
            for partition in self.memory.partitions("default", table):
                for row in self.memory.rows("default", table, partition):
                    found.setdefault(row["id"], []).append((partition, row["text"]))
        return found


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Runs what waits for nothing."""
    try:
        while True:
            work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result


class InFlight:
    """Requests of one process that may still take effect."""

    def __init__(self) -> None:
        self.writes: dict[int, tuple[Writer, float]] = {}
        """By number, with the true time of the deadline."""
        self._count = 0

    def begin(self, writer: Writer, deadline: float) -> int:
        self._count += 1
        self.writes[self._count] = writer, deadline
        return self._count

    def end(self, number: int) -> None:
        self.writes.pop(number, None)

    def older(self, assignment_id: str, epoch: int, now: float) -> str:
        """What an owner before `epoch` has under way; empty when nothing."""
        for writer, deadline in self.writes.values():
            if writer.assignment_id == assignment_id and writer.epoch < epoch and deadline > now:
                return f"a request of epoch {writer.epoch} with {deadline - now:.3f} s left"
        return ""


class SinkClient:
    """As a Sink, for one assignment of one process."""

    def __init__(
        self,
        network: Network,
        loop: Loop,
        host: str,
        server: SinkServer,
        in_flight: InFlight,
        writer: Callable[[], Writer] | None,
    ) -> None:
        self._network = network
        self._loop = loop
        self._host = host
        self._server = server
        self._in_flight = in_flight
        self._writer = writer
        self._memory = server.memory

    async def _ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A call that may be repeated."""
        try:
            return await remote(
                self._network, self._host, self._server, lambda: at_once(work()), SCHEMA_SECONDS
            )
        except TimeoutError:
            raise RetryableError("SINK_TIMEOUT", "the sink does not answer") from None
        except ConnectionError:
            raise RetryableError("SINK_UNAVAILABLE", "the connection broke") from None

    async def write(
        self, target: CollectionTarget, batch: AnyBatch, timeout_seconds: float
    ) -> None:
        if isinstance(batch, Batch) or self._writer is None:
            raise BugError("FOREIGN_TARGET", "a batch of another sink")
        writer, rows = self._writer(), batch
        seconds = timeout_seconds / self._loop.clock.rate
        number = self._in_flight.begin(writer, self._network.clockwork.now + seconds)
        try:
            await remote(
                self._network,
                self._host,
                self._server,
                lambda: self._server.write(writer, target, rows),
                timeout_seconds,
            )
        except TimeoutError:
            raise UnknownOutcomeError("SINK_TIMEOUT", "the sink does not answer") from None
        except ConnectionRefusedError:
            raise RetryableError("SINK_UNAVAILABLE", "nobody listens there") from None
        except ConnectionError:
            raise UnknownOutcomeError("SINK_UNAVAILABLE", "the connection broke") from None
        finally:
            self._in_flight.end(number)

    async def copies(
        self, target: CollectionTarget, partition: str, keys: Sequence[Key]
    ) -> Copies | None:
        if self._network.chance(CANNOT_COUNT):
            return None

        async def count() -> Copies:
            return self._server.copies(target, partition, keys)

        return await self._ask(count)

    async def probe(self) -> str:
        return await self._ask(self._memory.probe)

    async def violations(self, want: Collection, *, indexes: bool) -> list[str]:
        return []

    async def ensure_database(self, database: str) -> None:
        await self._ask(lambda: self._memory.ensure_database(database))

    async def drop_database(self, database: str) -> None:
        await self._ask(lambda: self._memory.drop_database(database))

    async def open_collection(self, want: Collection, **how: Any) -> Opened:
        return await self._ask(lambda: self._memory.open_collection(want, **how))

    async def drop_collection(self, want: Collection, **how: Any) -> None:
        async def drop() -> None:
            self._server.on_drop(want.collection_id)
            await self._memory.drop_collection(want, **how)

        await self._ask(drop)

    async def rename_collection(self, want: Collection, **how: Any) -> None:
        await self._ask(lambda: self._memory.rename_collection(want, **how))

    async def create_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._ask(lambda: self._memory.create_partition(want, partition))

    async def drop_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._ask(lambda: self._memory.drop_partition(want, partition))

    async def diff(
        self, want: Collection, carry: Carry, *, sink_collection_id: int = 0
    ) -> tuple[ObjectDifference, ...]:
        return await self._ask(
            lambda: self._memory.diff(want, carry, sink_collection_id=sink_collection_id)
        )

    async def repair(
        self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
    ) -> None:
        await self._ask(
            lambda: self._memory.repair(want, difference, sink_collection_id=sink_collection_id)
        )

    async def look_at_metadata(self, wish: MetadataWish) -> MetadataDiff:
        return await self._ask(lambda: self._memory.look_at_metadata(wish))

    async def diff_metadata(self, wish: MetadataWish) -> tuple[ObjectDifference, ...]:
        return await self._ask(lambda: self._memory.diff_metadata(wish))

    async def change_credential(self, change: CredentialChange) -> None:
        await self._ask(lambda: self._memory.change_credential(change))

    async def heartbeat(self, target: CollectionTarget, resolved_ts: int) -> None:
        pass

    async def release(self, target: CollectionTarget) -> None:
        pass

    async def flush(self, want: Collection) -> None:
        await self._ask(lambda: self._memory.flush(want))

    def target(self, want: Collection) -> CollectionTarget:
        return self._memory.target(want)

    async def close(self) -> None:
        pass
