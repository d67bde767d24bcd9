"""The small seam for destinations that take rows and schema changes: Kafka, files, databases.

A writer gets one collection's changes as ordered, columnar batches. Laws: `write` returns only when
its rows are durable; batches of one collection come in order, and a key's next batch only after
its last one has returned; after a failure the same rows come again, so a replay must have no effect
beyond that of the first time, or the writer keeps the checkpoint itself (`own_checkpoint`) and
the replay never happens. Errors are those of `milvus_cdc.errors`: RetryableError (come again),
UnknownOutcomeError (come again, it may have happened), RowRefusedError (certain rows will never be
taken), UserError (only a person can help).

Sinks register under the entry point group `milvus_cdc.sinks`, see `milvus_cdc.sink.plugin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from milvus_cdc.rows import Changes, Table


class Opening(StrEnum):
    """How a collection is opened."""

    NEW = "NEW"
    """Its first time: what is there under its name is not its own."""
    ADOPT = "ADOPT"
    """As NEW, but what is there may be taken over."""
    RESUME = "RESUME"
    """It was opened before, perhaps by another process; that one may write no more."""
    RECREATE = "RECREATE"
    """Whatever is there goes, its rows come anew from the beginning."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every change of this vchannel at or below `resolved_ts` (TSO) is in the sink; `read_from` is
    an opaque place in the log at or before the first one that is not.
    """

    vchannel: str
    read_from: bytes
    resolved_ts: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes of one collection, in the order in which they are to take effect."""

    changes: tuple[Changes, ...]
    checkpoints: tuple[Checkpoint, ...] = ()
    """Only with `own_checkpoint`: to be stored together with the rows, all or nothing. Vchannels
    that are not named stay as they are.
    """

    @property
    def num_rows(self) -> int:
        return sum(changes.num_rows for changes in self.changes)


class SchemaChangeKind(StrEnum):
    DROP_COLLECTION = "DROP_COLLECTION"
    RENAME_COLLECTION = "RENAME_COLLECTION"
    CREATE_PARTITION = "CREATE_PARTITION"
    DROP_PARTITION = "DROP_PARTITION"
    """Its rows are gone at the source; no deletes come for them."""


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """What happened to a collection, after every row before it and before any row after it."""

    kind: SchemaChangeKind
    table: Table
    """As it is after the change."""
    partition: str = ""
    renamed_from: tuple[str, str] = ("", "")
    """(database, collection) that it had at the sink."""
    ts: int = 0
    """TSO of the change at the source; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a writer is like; the replicator arranges its batches accordingly."""

    own_checkpoint: bool = False
    """It stores `Batch.checkpoints` atomically with the rows, and `open` answers with them: then
    they are the authority, each change takes effect once, and one batch is under way at a time.
    """
    rows_per_batch: int = 10_000
    bytes_per_batch: int = 8 * 1024 * 1024
    """A batch is at least one request of the source, so it can be larger."""
    linger_seconds: float = 0.0
    """How long an unfinished batch waits for more rows. 0: lag before size."""
    in_flight: int = 2
    """Batches of one collection under way at once, never two that share a key; 1 with
    `own_checkpoint`.
    """
    renames: bool = True
    """RENAME_COLLECTION takes what is there along; without it older rows keep the old name."""
    heartbeats: bool = False
    """`heartbeat` does something."""
    divisible: bool = False
    """With `own_checkpoint`: what a part of a batch did, written without checkpoints, is the same
    when the whole comes again. So a row that is refused can be looked for part by part; the
    checkpoints come last, in a batch without changes.
    """


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer of `Writer.open`."""

    checkpoints: tuple[Checkpoint, ...] = ()
    """With `own_checkpoint`: those it holds. A vchannel without one begins where the task says."""
    conditions: tuple[tuple[str, str], ...] = field(default=())
    """(TYPE, message) pairs that a user should see."""


class Writer(Protocol):
    """A connection to one destination, shared by all collections of all tasks with the same sink.

    Calls for different collections come at the same time, those for one collection come one after
    the other, apart from `Capabilities.in_flight` writes.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    async def probe(self) -> str:
        """Connects, and returns the destination's version for a person to read; raises what is
        wrong (unreachable, missing rights), naming the field of the configuration.
        """
        ...

    def violations(self, tables: Sequence[Table]) -> list[str]:
        """Why these collections cannot be written side by side, each text naming its object: two
        of them with one name here, a type that cannot be held. Makes and changes nothing.
        """
        ...

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        """Makes ready for this collection's rows. A writer with `own_checkpoint` also makes sure
        that nobody who opened it with a lower epoch can write any more, then reads checkpoints.
        """
        ...

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        """Carries out a schema change; idempotent."""
        ...

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        """Durable when it returns, and the end of every attempt lies within `timeout_seconds`."""
        ...

    async def heartbeat(self, table: Table, resolved_ts: int) -> None:
        """Every change of the collection at or below `resolved_ts` (TSO) is in the sink. Said about
        once a second with `Capabilities.heartbeats`, also where no rows come; does not wait, and
        may be lost.
        """
        ...

    async def release(self, table: Table) -> None:
        """This process writes no more of the collection for now: resources may go."""
        ...

    async def close(self) -> None:
        """Ends all connections: the process ends, or nobody has worked with any collection for a
        while. Another writer is made when it is needed again.
        """
        ...
