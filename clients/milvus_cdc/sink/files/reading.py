"""Reads what the file sink has published: which files are complete, their changes in order, and the
state of the collection at a point in time.

    store = open_store("file:///backup")
    for each in find_collections(store):
        history = each.history(at=time_to_ts(datetime(2026, 11, 21, 9, 30, tzinfo=UTC)))
        table = history.state()

Laws: only what manifests name is read; a state takes every change at or below its timestamp and
none beyond. Blocking calls. Rows and state are read from Parquet only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from milvus_cdc.errors import UserError
from milvus_cdc.model import ms_to_tso, tso_to_text
from milvus_cdc.rows import Table
from milvus_cdc.sink.files import alive, encode, places, schema_file
from milvus_cdc.sink.files.chain import Chain
from milvus_cdc.sink.files.manifest import Event, FileEntry, Manifest
from milvus_cdc.sink.files.opening import open_store
from milvus_cdc.sink.files.store import MissingError, Store
from milvus_cdc.sink.writer import SchemaChangeKind

__all__ = ["CollectionFiles", "History", "PublishedFile", "find_collections", "open_store"]

NEWEST = 2**63 - 1


def time_to_ts(at: datetime) -> int:
    """The last TSO of that millisecond."""
    return ms_to_tso(int(at.timestamp() * 1000) + 1) - 1


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """`number` is that of its manifest."""

    number: int
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class CollectionFiles:
    """One collection of the source, by its id, whatever its name was."""

    store: Store
    folder: str
    head: Manifest

    def history(self, at: int = NEWEST, generation: int = 0) -> History:
        """As of a TSO; of the newest generation when none is named. Raises UserError NOT_COMPLETE
        when not everything up to that time is published yet.
        """
        chain = Chain(self.store, self.folder)
        links = [
            each
            for each in chain.read_all()
            if each.generation == (generation or self.head.generation)
        ]
        if not links:
            raise UserError(
                "GENERATION_MISSING",
                f"{self.folder} has no generation {generation}; the newest is"
                f" {self.head.generation}",
            )
        complete = links[-1].complete_ts
        if at != NEWEST and at > complete and not links[-1].dropped:
            known = tso_to_text(complete) if complete else "no time yet"
            raise UserError(
                "NOT_COMPLETE",
                f"{self.folder} is complete up to {known}, not up to {tso_to_text(at)}; choose an "
                "earlier time, or wait for the files to be published",
            )
        return History(self.store, self.folder, tuple(links), at)


def find_collections(store: Store) -> list[CollectionFiles]:
    """All that were ever opened below the store's folder, by name and id."""
    found = []
    for database in store.folders(""):
        if database.startswith(("_", ".")):
            continue
        for name in store.folders(database):
            folder = f"{database}/{name}"
            if not places.is_collection_folder(name):
                continue
            head = Chain(store, folder).newest()
            if head is not None:
                found.append(CollectionFiles(store, folder, head))
    return sorted(found, key=lambda f: (f.head.database, f.head.collection, f.head.collection_id))


class History:
    """What one generation's manifests say up to a TSO."""

    def __init__(
        self, store: Store, folder: str, links: tuple[Manifest, ...], at: int = NEWEST
    ) -> None:
        self.store = store
        self.folder = folder
        self.links = links
        self.at = at

    @property
    def complete_ts(self) -> int:
        """Every change at or below it is published; 0 when that is not known."""
        return self.links[-1].complete_ts

    @cached_property
    def files(self) -> list[PublishedFile]:
        """Those with changes up to the time, in the order in which they take effect."""
        return [
            PublishedFile(link.number, entry)
            for link in self.links
            for entry in link.files
            if entry.min_ts <= self.at
        ]

    @cached_property
    def events(self) -> list[tuple[int, Event]]:
        """Schema changes up to the time, each after the files of lower numbers."""
        return [
            (link.number, event)
            for link in self.links
            for event in link.events
            if event.ts <= self.at
        ]

    @cached_property
    def dropped(self) -> bool:
        """The collection is gone at the source by then."""
        return any(event.kind == SchemaChangeKind.DROP_COLLECTION for _, event in self.events)

    @cached_property
    def name(self) -> tuple[str, str]:
        """Database and collection by then."""
        name = (self.links[0].database, self.links[0].collection)
        for _, event in self.events:
            if event.kind == SchemaChangeKind.RENAME_COLLECTION:
                name = (event.database, event.collection)
        return name

    @cached_property
    def partitions(self) -> tuple[str, ...]:
        """Named ones that are there by then, empty ones included, as far as the sink was told."""
        known: tuple[str, ...] = ()
        for link in self.links:
            times = [event.ts for event in link.events] + [file.min_ts for file in link.files]
            if min(times, default=0) <= self.at:
                known = link.partitions
        return known

    @cached_property
    def table(self) -> Table:
        """With the schema of the newest manifest."""
        head = self.links[-1]
        path = f"{self.folder}/{places.schema_path(head.schema)}"
        try:
            fields, schema = schema_file.load(self.store.get(path), path)
        except MissingError:
            raise UserError(
                "SCHEMA_UNREADABLE", f"{path} is missing; restore the file from a copy"
            ) from None
        database, collection = self.name
        return Table(
            task=head.task,
            task_uid=head.task_uid,
            collection_id=head.collection_id,
            source_database=head.source_database,
            source_collection=head.source_collection,
            database=database,
            collection=collection,
            fields=fields,
            schema=schema,
        )

    def open(self, file: PublishedFile) -> pq.ParquetFile:
        """Raises UserError FILE_MISSING, NOT_PARQUET."""
        path = file.entry.path
        if not path.endswith(".parquet"):
            raise UserError("NOT_PARQUET", f"{path}: rows are read back from Parquet only")
        try:
            return pq.ParquetFile(self.store.open(f"{self.folder}/{path}"), pre_buffer=True)
        except MissingError:
            raise UserError(
                "FILE_MISSING", f"{self.folder}/{path} is published and not there any more"
            ) from None

    def changes(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Every change up to the time, in order, with the table's columns and ours."""
        wanted = encode.file_schema(self.table)
        if columns is not None:
            wanted = pa.schema([wanted.field(name) for name in columns])
        for file in self.files:
            read = self.open(file)
            names = [name for name in wanted.names if name in read.schema_arrow.names]
            extra = [] if "_ts" in names or file.entry.max_ts <= self.at else ["_ts"]
            for batch in read.iter_batches(columns=names + extra):
                if file.entry.max_ts > self.at:
                    batch = batch.filter(pc.less_equal(batch.column("_ts"), self.at))
                yield conform(batch, wanted)

    def masks(self, memory_bytes: int = alive.MEMORY_BYTES) -> alive.Masks:
        """Which changes are rows that are there by then; `memory_bytes` bounds what is held to
        tell them.
        """
        return {} if self.dropped else alive.masks(self, memory_bytes)

    def rows(self, masks: alive.Masks | None = None) -> Iterator[pa.RecordBatch]:
        """The rows that are there by then, each key once per partition, with the table's columns
        and `_partition`; `masks` are those of the method.
        """
        wanted = pa.schema(
            [*encode.file_schema(self.table)][: len(self.table.fields)]
            + [field for field in encode.OWN_COLUMNS if field.name == "_partition"]
        )
        chosen_rows = self.masks() if masks is None else masks
        for file in self.files:
            mask = chosen_rows.get(file.entry.path)
            if mask is None or not mask.any():
                continue
            read = self.open(file)
            names = [name for name in wanted.names if name in read.schema_arrow.names]
            begin = 0
            for group in range(read.num_row_groups):
                end = begin + read.metadata.row_group(group).num_rows
                chosen, begin = mask[begin:end], end
                if not chosen.any():
                    continue
                rows = read.read_row_group(group, columns=names).filter(pa.array(chosen))
                for batch in rows.combine_chunks().to_batches():
                    yield conform(batch, wanted)

    def state(self) -> pa.Table:
        """All of `rows` at once."""
        batches = list(self.rows())
        schema = encode.file_schema(self.table)
        own = {field.name for field in encode.OWN_COLUMNS} - {"_partition"}
        wanted = pa.schema([field for field in schema if field.name not in own])
        return pa.Table.from_batches([batch.cast(wanted) for batch in batches], wanted)


def conform(batch: pa.RecordBatch, wanted: pa.Schema) -> pa.RecordBatch:
    """Columns in the order of `wanted`; one that a file of an older schema lacks is null."""
    return pa.RecordBatch.from_arrays(
        [
            batch.column(field.name)
            if field.name in batch.schema.names
            else pa.nulls(batch.num_rows, field.type)
            for field in wanted
        ],
        schema=wanted.remove_metadata(),
    )
