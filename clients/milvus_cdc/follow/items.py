"""What a follower hands out: batches of changes, and what happened to collections in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.writer import Batch, Checkpoint

OP, TS, PARTITION = "$op", "$ts", "$partition"
"""Columns of a batch beside those of the collection; no field of Milvus can be called so."""


class EventKind(StrEnum):
    COLLECTION_FOUND = "COLLECTION_FOUND"
    """Its changes come from now on. It is the first word of a collection in every run."""
    COLLECTION_RENAMED = "COLLECTION_RENAMED"
    """Seen in the metadata: rows around it may come with either name."""
    COLLECTION_DROPPED = "COLLECTION_DROPPED"
    """The last word of a collection."""
    PARTITION_DROPPED = "PARTITION_DROPPED"
    """All rows it had are gone; no deletes come for them. Exact: in no shard does a row from before
    come after it, nor one of a new partition of the same name before it.
    """


@dataclass(frozen=True, slots=True)
class SchemaEvent:
    """Something happened to a collection as a whole."""

    kind: EventKind
    table: Table
    """As it is now. Without fields where a collection was dropped while nobody followed it."""
    ts: int = 0
    """TSO of the drop; 0 where it is not known."""
    partition: str = ""
    renamed_from: tuple[str, str] = ("", "")
    """(database, collection)."""
    resumed: bool = False
    """COLLECTION_FOUND: its changes go on behind saved positions."""


@dataclass(frozen=True, eq=False)
class ChangeBatch:
    """Changes of one shard of a collection, in the order in which they took effect."""

    table: Table
    vchannel: str
    changes: tuple[Changes, ...]
    """Each is of one request of the source and one kind; see `milvus_cdc.rows.Changes`."""
    checkpoint: Checkpoint
    """Where its vchannel stands with this batch."""

    @property
    def resolved_ts(self) -> int:
        """TSO; with this batch everything of the vchannel at or below it was handed out."""
        return self.checkpoint.resolved_ts

    @property
    def num_rows(self) -> int:
        """Rows and deleted keys."""
        return sum(changes.num_rows for changes in self.changes)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Of `arrow`: `$op`, `$ts`, `$partition`, then the fields, of which a delete has one."""
        return pa.schema(
            [
                pa.field(OP, pa.string(), nullable=False),
                pa.field(TS, pa.uint64(), nullable=False),
                pa.field(PARTITION, pa.string(), nullable=False),
                *(
                    pa.field(f.name, f.arrow_type, nullable=not f.primary_key)
                    for f in self.table.fields
                ),
            ]
        )

    def arrow(self) -> pa.Table:
        """All of it as one table, a row for each row or deleted key, in order."""
        schema = self.arrow_schema
        return pa.Table.from_batches([self._arrow(each) for each in self.changes], schema)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `arrow` as dicts, one after the other; convenient, and slow."""
        for changes in self.changes:
            yield from self._arrow(changes).to_pylist()

    def numpy(self, name: str) -> NDArray[Any]:
        """A field of all rows that were written (not of deletes), in order; vectors of a fixed
        dimension as a matrix, the others as Arrow makes them.
        """
        whole = [c.arrow(self.table).column(name) for c in self.changes if c.op != ChangeOp.DELETE]
        field = next(f for f in self.table.fields if f.name == name)
        array = pa.concat_arrays(whole) if whole else pa.array([], field.arrow_type)
        if pa.types.is_fixed_size_list(array.type) and not array.null_count:
            return np.asarray(array.flatten().to_numpy()).reshape(-1, array.type.list_size)
        return np.asarray(array.to_numpy(zero_copy_only=False))

    def to_write(self) -> Batch:
        """As `milvus_cdc.sink.writer.Writer.write` takes it."""
        return Batch(self.changes, (self.checkpoint,))

    def _arrow(self, changes: Changes) -> pa.RecordBatch:
        count = changes.num_rows
        decoded = changes.arrow(self.table)
        fields = [
            decoded.column(f.name)
            if f.name in decoded.schema.names
            else pa.nulls(count, f.arrow_type)
            for f in self.table.fields
        ]
        about = [
            pa.repeat(changes.op.value, count),
            pa.repeat(pa.scalar(changes.ts, pa.uint64()), count),
            pa.repeat(changes.partition, count),
        ]
        return pa.RecordBatch.from_arrays([*about, *fields], schema=self.arrow_schema)


Item = ChangeBatch | SchemaEvent
