"""The seam to a sink: open, apply schema, write ordered batches, close.

A write returns only when its rows are durable. Errors are those of `milvus_cdc.errors`:
UnknownOutcomeError when the write may have happened (the caller repeats it as an upsert),
RetryableError when it certainly did not or may simply be repeated, UserError when only a person can
help. Sinks register under the entry point group `milvus_cdc.sinks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from milvus_cdc.codec.messages import Keys
from milvus_cdc.model import Collection


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


@dataclass(frozen=True, slots=True)
class CollectionTarget:
    """Where a collection's rows go, and what the sink must know to address them."""

    database: str
    collection: str
    key_field: str
    """Name of the primary key field."""
    partition_key: bool
    """It has a partition key: writes name no partition."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer of open_collection."""

    sink_collection_id: int
    """0 where the sink does not tell."""
    adopted: bool = False
    """It was there with rows and the task may adopt it."""
    conditions: tuple[tuple[str, str], ...] = field(default=())
    """(TYPE, message) pairs a user should see, for example AUTO_ID_KEYS."""


class Sink(Protocol):
    """A connection to one sink, shared by every collection written to it."""

    async def probe(self) -> str:
        """Connects and returns the sink's version, or raises what is wrong."""
        ...

    async def ensure_database(self, database: str) -> None:
        """Creates it when it is missing."""
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
    ) -> Opened:
        """Makes the sink collection be there with a fitting schema, and all partitions in state
        CREATED.

        Not yet `opened`: what is there must fit (SCHEMA_MISMATCH names the field) and be empty,
        unless `adopt` (COLLECTION_EXISTS); `recreate` drops it first. `opened`: it is this task's;
        when it is missing it is an error (SINK_COLLECTION_MISSING says: resync), never silently
        made anew without its rows.
        """
        ...

    async def drop_collection(self, want: Collection, *, sink_collection_id: int) -> None:
        """Succeeds when it does not exist, or is another one by now (id differs, where ids are
        told).
        """
        ...

    async def create_partition(self, want: Collection, partition: str) -> None: ...

    async def drop_partition(self, want: Collection, partition: str) -> None:
        """Releases it first where the sink needs that. Succeeds when it does not exist."""
        ...

    async def reconcile(self, want: Collection) -> None:
        """Makes indexes and load state be as wanted (missing ones created, surplus ones
        dropped).
        """
        ...

    def target(self, want: Collection) -> CollectionTarget: ...

    async def write(
        self, target: CollectionTarget, batch: RowBatch | DeleteBatch, timeout_seconds: float
    ) -> None:
        """Durable when it returns. The deadline of everything it sends ends within
        `timeout_seconds`.
        """
        ...

    async def close(self) -> None: ...
