"""The seam to a sink: open, apply schema, write ordered batches, close.

A write returns only when its rows are durable. Errors are those of `milvus_cdc.errors`:
UnknownOutcomeError when the write may have happened (the caller repeats it as an upsert),
RetryableError when it certainly did not or may simply be repeated, UserError when only a person can
help. Sinks register under the entry point group `milvus_cdc.sinks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from milvus_cdc.codec.messages import Keys
from milvus_cdc.model import Carry, Collection
from milvus_cdc.order.ops import Key
from milvus_cdc.rows import Table
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.writer import Batch, Capabilities, Checkpoint


class Op(StrEnum):
    INSERT = "INSERT"
    """Plain insert: none of these rows can be in the sink yet."""
    UPSERT = "UPSERT"
    """The rows may be there, or replace older ones. A key occurs once in a batch."""


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Rows as they came from the log: one serialized schema.FieldData per column."""

    columns: tuple[bytes, ...]
    num_rows: int
    keep: tuple[int, ...] | None = None
    """Only these rows, ascending; all when None."""

    @property
    def rows_kept(self) -> int:
        return self.num_rows if self.keep is None else len(self.keep)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Chunks to be written as one request, into one partition ("" = none named, as partition-key
    tables want).
    """

    op: Op
    partition: str
    chunks: tuple[RowChunk, ...]

    @property
    def num_rows(self) -> int:
        return sum(chunk.rows_kept for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DeleteBatch:
    """Keys to remove from one partition, or from all ("")."""

    partition: str
    keys: Keys


AnyBatch = RowBatch | DeleteBatch | Batch


@dataclass(frozen=True, slots=True)
class CollectionTarget:
    """Where a collection's rows go, and what the sink must know to address them."""

    database: str
    collection: str
    key_field: str
    """Name of the primary key field."""
    partition_key: bool
    """It has a partition key: writes name no partition."""
    table: Table | None = None
    """The same for a writer."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer of open_collection."""

    sink_collection_id: int
    """0 where the sink does not tell."""
    adopted: bool = False
    """It was there with rows and the task may adopt it."""
    conditions: tuple[tuple[str, str], ...] = field(default=())
    """(TYPE, message) pairs a user should see, for example AUTO_ID_KEYS."""
    created_partitions: tuple[str, ...] = ()
    """Which were missing."""
    writes_in_flight: int = 0
    """Most writes that this sink takes at once for one collection; 0 = as many as come."""
    writer: Capabilities | None = None
    """It takes changes in order, as `Batch`, and is like this."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """What it holds itself, with `writer.own_checkpoint`."""
    late_writes: bool = False
    """Nothing fences an owner whose time is over: what it has sent may take effect late."""


@dataclass(frozen=True, slots=True)
class Copies:
    """What there is of some keys."""

    rows: int
    """All of them together, a key that is stored twice counts twice."""
    keys: frozenset[Key]
    """Those that a reader sees."""


class Sink(Protocol):
    """A connection to one sink, shared by every collection written to it."""

    async def probe(self) -> str:
        """Connects and returns the sink's version, or raises what is wrong."""
        ...

    async def violations(self, want: Collection, *, indexes: bool) -> list[str]:
        """What of this collection the sink cannot hold, each naming the object; indexes only if
        asked. Nothing is made or changed.
        """
        ...

    async def ensure_database(self, database: str) -> None:
        """Creates it when it is missing. Raises UserError UNSUPPORTED_BY_SINK where the sink has
        only one.
        """
        ...

    async def drop_database(self, database: str) -> None:
        """Succeeds when it does not exist. Raises UserError SINK_DATABASE_NOT_EMPTY when it holds
        collections.
        """
        ...

    async def open_collection(
        self,
        want: Collection,
        *,
        opened: bool,
        adopt: bool,
        recreate: bool,
        sink_collection_id: int,
        create: bool = True,
    ) -> Opened:
        """Makes the sink collection be there with a fitting schema, and all partitions in state
        CREATED; without `create` it must be there and nothing of it is made.

        Not yet `opened`: what is there must fit (SCHEMA_MISMATCH names the field) and be empty,
        unless `adopt` (COLLECTION_EXISTS); `recreate` drops it first. `opened`: it is this task's;
        when it is missing it is an error (SINK_COLLECTION_MISSING says: resync), never silently
        made anew without its rows.
        """
        ...

    async def drop_collection(
        self, want: Collection, *, sink_collection_id: int, ts: int = 0
    ) -> None:
        """Succeeds when it does not exist, or is another one by now (id differs, where ids are
        told). Here and below, `ts` (TSO) is when the source did it, 0 where that is not known, for
        sinks that keep a history.
        """
        ...

    async def rename_collection(
        self,
        want: Collection,
        *,
        renamed_from: tuple[str, str],
        sink_collection_id: int,
        ts: int = 0,
    ) -> None:
        """Gives the collection of this id its wanted database and name; `renamed_from` is the
        (database, name) it has, unless that has happened already: then nothing is done. The wanted
        database is there.

        Raises RetryableError SINK_NAME_TAKEN while something else has the name, SINK_HAS_ALIASES
        while aliases stand in the way; UserError SINK_CANNOT_RENAME, and SINK_COLLECTION_MISSING
        or SINK_COLLECTION_REPLACED when it is found under neither name.
        """
        ...

    async def create_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None: ...

    async def drop_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        """Releases it first where the sink needs that. Succeeds when it does not exist."""
        ...

    async def diff(
        self, want: Collection, carry: Carry, *, sink_collection_id: int = 0
    ) -> tuple[ObjectDifference, ...]:
        """How the collection differs, rows aside, in the order in which it is to be mended. Changes
        nothing. Of a collection that is not there a single one, see `differences.is_missing`.

        `want.partitions` says which names are not surplus: leave out those whose drop is done.
        """
        ...

    async def repair(
        self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
    ) -> None:
        """Mends one difference; idempotent. Raises SINK_COLLECTION_MISSING when the collection is
        gone: it is never silently made anew without its rows.
        """
        ...

    async def look_at_metadata(self, wish: MetadataWish) -> MetadataDiff:
        """How the sink differs in what belongs to no collection, and how to mend it. Changes
        nothing; what cannot be looked at is in the answer.
        """
        ...

    async def diff_metadata(self, wish: MetadataWish) -> tuple[ObjectDifference, ...]:
        """The differences alone; raises what hides any of them."""
        ...

    async def change_credential(self, change: CredentialChange) -> None:
        """Makes a user, sets a password, or removes a user. Succeeds when a user to make is there,
        or one to remove is not.
        """
        ...

    async def heartbeat(self, target: CollectionTarget, resolved_ts: int) -> None:
        """Of a writer that wants it: everything at or below `resolved_ts` is there."""
        ...

    async def release(self, target: CollectionTarget) -> None:
        """This process writes no more of the collection for now."""
        ...

    async def flush(self, want: Collection) -> None:
        """Asks the sink to seal what it has of the collection; does not wait for the end of it."""
        ...

    def target(self, want: Collection) -> CollectionTarget: ...

    async def write(
        self, target: CollectionTarget, batch: AnyBatch, timeout_seconds: float
    ) -> None:
        """Durable when it returns. The deadline of everything it sends ends within
        `timeout_seconds`.
        """
        ...

    async def copies(
        self, target: CollectionTarget, partition: str, keys: Sequence[Key]
    ) -> Copies | None:
        """Of a sink with `late_writes`: what is in one partition ("" = in any) of these keys,
        everything acknowledged included. None where it cannot tell: it has no such count, or the
        collection is not loaded.
        """
        ...

    async def close(self) -> None: ...


EVERYTHING = Carry()
"""What a task carries when it does not say."""


async def reconcile(
    sink: Sink, want: Collection, carry: Carry = EVERYTHING, *, sink_collection_id: int = 0
) -> tuple[ObjectDifference, ...]:
    """Compares and mends until nothing differs, thrice at most; what still differs then."""
    differences: tuple[ObjectDifference, ...] = ()
    for attempt in range(4):
        differences = await sink.diff(want, carry, sink_collection_id=sink_collection_id)
        if not differences or attempt == 3:
            break
        for difference in differences:
            await sink.repair(want, difference, sink_collection_id=sink_collection_id)
    return differences
