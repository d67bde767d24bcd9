"""A `Writer` where the replicator expects a `Sink`.

Law: what only a Milvus has (indexes, load state, aliases, roles, databases of their own) is neither
made nor compared here; rows, names, partitions and drops reach the writer in the order in which the
replicator decides about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from milvus_cdc.errors import BugError
from milvus_cdc.model import Carry, Collection
from milvus_cdc.order.ops import Key
from milvus_cdc.rows import Table, table_of
from milvus_cdc.sink import AnyBatch, CollectionTarget, Copies, Opened
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.writer import Batch, Opening, SchemaChange, SchemaChangeKind, Writer

SCHEMA_CHANGE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose rows they are."""

    task: str
    task_uid: str
    source_database: str
    source_collection: str
    epoch: int


class WriterSink:
    """One collection's view of a shared writer; without an origin it takes no rows."""

    def __init__(self, writer: Writer, origin: Callable[[], Origin] | None = None) -> None:
        self.writer = writer
        self._origin = origin

    async def probe(self) -> str:
        return await self.writer.probe()

    async def violations_together(self, wants: Sequence[Collection]) -> list[str]:
        """Of all collections at once: two of them may have one name at the destination."""
        return self.writer.violations([table_of(want) for want in wants])

    async def violations(self, want: Collection, *, indexes: bool) -> list[str]:
        return self.writer.violations([table_of(want)])

    async def ensure_database(self, database: str) -> None:
        """Names only."""

    async def drop_database(self, database: str) -> None:
        """Names only."""

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
        if recreate:
            opening = Opening.RECREATE
        elif opened:
            opening = Opening.RESUME
        else:
            opening = Opening.ADOPT if adopt else Opening.NEW
        origin = self._needed()
        answer = await self.writer.open(self._table(want), opening, origin.epoch)
        return Opened(
            sink_collection_id=0,
            adopted=opening is Opening.ADOPT,
            conditions=answer.conditions,
            writer=self.writer.capabilities,
            checkpoints=answer.checkpoints,
        )

    async def drop_collection(
        self, want: Collection, *, sink_collection_id: int, ts: int = 0
    ) -> None:
        await self._apply(SchemaChangeKind.DROP_COLLECTION, want, ts)

    async def rename_collection(
        self,
        want: Collection,
        *,
        renamed_from: tuple[str, str],
        sink_collection_id: int,
        ts: int = 0,
    ) -> None:
        await self._apply(SchemaChangeKind.RENAME_COLLECTION, want, ts, renamed_from=renamed_from)

    async def create_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._apply(SchemaChangeKind.CREATE_PARTITION, want, ts, partition)

    async def drop_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._apply(SchemaChangeKind.DROP_PARTITION, want, ts, partition)

    async def _apply(
        self,
        kind: SchemaChangeKind,
        want: Collection,
        ts: int,
        partition: str = "",
        renamed_from: tuple[str, str] = ("", ""),
    ) -> None:
        change = SchemaChange(kind, self._table(want), partition, renamed_from, ts)
        await self.writer.apply(change, SCHEMA_CHANGE_SECONDS)

    async def diff(
        self, want: Collection, carry: Carry, *, sink_collection_id: int = 0
    ) -> tuple[ObjectDifference, ...]:
        return ()

    async def repair(
        self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
    ) -> None:
        raise BugError("NOTHING_TO_REPAIR", f"{difference.text} at a sink that has no such thing")

    async def look_at_metadata(self, wish: MetadataWish) -> MetadataDiff:
        return MetadataDiff()

    async def diff_metadata(self, wish: MetadataWish) -> tuple[ObjectDifference, ...]:
        return ()

    async def change_credential(self, change: CredentialChange) -> None:
        """Users of the source are nobody here."""

    async def flush(self, want: Collection) -> None:
        """Asks for files of a Milvus; here is none."""

    async def heartbeat(self, target: CollectionTarget, resolved_ts: int) -> None:
        if target.table is not None:
            await self.writer.heartbeat(target.table, resolved_ts)

    async def release(self, target: CollectionTarget) -> None:
        if target.table is not None:
            await self.writer.release(target.table)

    def target(self, want: Collection) -> CollectionTarget:
        table = self._table(want)
        partition_key = any(field.partition_key for field in table.fields)
        return CollectionTarget(want.database, want.name, table.key.name, partition_key, table)

    async def write(
        self, target: CollectionTarget, batch: AnyBatch, timeout_seconds: float
    ) -> None:
        if target.table is None or not isinstance(batch, Batch):
            raise BugError("NOT_A_BATCH", f"{type(batch).__name__} for a writer")
        await self.writer.write(target.table, batch, timeout_seconds)

    async def copies(
        self, target: CollectionTarget, partition: str, keys: Sequence[Key]
    ) -> Copies | None:
        """Later epochs fence, and it cannot be read."""
        return None

    async def close(self) -> None:
        await self.writer.close()

    def _needed(self) -> Origin:
        if self._origin is None:
            raise BugError("NO_ORIGIN", "rows of nobody")
        return self._origin()

    def _table(self, want: Collection) -> Table:
        table = table_of(want)
        if self._origin is None:
            return table
        origin = self._origin()
        return replace(
            table,
            task=origin.task,
            task_uid=origin.task_uid,
            source_database=origin.source_database or want.database,
            source_collection=origin.source_collection or want.name,
        )
