"""A sink in memory, for tests: rows decoded from their columns, failures and delays on demand.

Laws: it keeps the seam's contract, proved by the same suite as the real sinks. Like Milvus it does
not look at keys when it inserts: an insert of an existing key doubles it, a key twice in one upsert
is stored twice, an upsert into another named partition leaves the row in the old one; unlike
Milvus' query it hides none of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from milvus_cdc.errors import BugError, RetryableError, UserError
from milvus_cdc.model import Carry, Collection, ObjectState
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import (
    AnyBatch,
    CollectionTarget,
    Copies,
    DeleteBatch,
    Opened,
    RowBatch,
)
from milvus_cdc.sink.differences import (
    ObjectDifference,
    compare,
    missing,
)
from milvus_cdc.sink.memory_collection import HeldCollection
from milvus_cdc.sink.memory_metadata import MemoryMetadata
from milvus_cdc.sink.memory_rows import Row
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.milvus import schema as schemas
from milvus_cdc.sink.writer import Batch

WriteHook = Callable[[CollectionTarget, RowBatch | DeleteBatch], Awaitable[None]]
RepairHook = Callable[[ObjectDifference], Awaitable[None]]


class MemorySink:
    """Databases and collections that a test can look into.

    `before_write` and `after_write` may raise what a sink may raise, or wait: what the first raises
    means that nothing was written, after the second everything was.
    """

    def __init__(self) -> None:
        self._databases: dict[str, dict[str, HeldCollection]] = {"default": {}}
        self._ids = 0
        self.before_write: WriteHook | None = None
        self.after_write: WriteHook | None = None
        self.writes: list[RowBatch | DeleteBatch] = []
        """Every batch that took effect, in that order."""
        self.before_repair: RepairHook | None = None
        self.repairs: list[ObjectDifference] = []
        """Everything that took effect, in that order."""
        self.diffs = 0
        """How often somebody looked."""
        self.before_copies: Callable[[], Awaitable[None]] | None = None
        """May raise, or wait."""
        self.flushes: list[str] = []
        """`database.collection` of every flush."""
        self.metadata = MemoryMetadata(
            lambda database: (
                list(self._databases[database]) if database in self._databases else None
            ),
            self.ensure_database,
            self.drop_database,
        )

    # ---- for tests

    def rows(self, database: str, collection: str, partition: str | None = None) -> list[Row]:
        """Every row, doubled keys too; of one partition when it is named."""
        held = self._databases[database][collection]
        return list(held.rows() if partition is None else held.partitions[partition])

    def count(self, database: str, collection: str) -> int:
        """Like `count(*)`: doubled keys count twice."""
        return len(self.rows(database, collection))

    def partitions(self, database: str, collection: str) -> list[str]:
        return list(self._databases[database][collection].partitions)

    def indexes(self, database: str, collection: str) -> dict[str, tuple[tuple[str, str], ...]]:
        held = self._databases[database][collection]
        return {name: params for name, (_, params) in held.indexes.items()}

    def loaded(self, database: str, collection: str) -> set[str]:
        """Partitions that are."""
        return set(self._databases[database][collection].loaded)

    def properties(self, database: str, collection: str) -> dict[str, str]:
        return self._databases[database][collection].properties

    def rename(self, database: str, old: str, new: str) -> None:
        held = self._databases[database]
        held[new] = held.pop(old)

    def databases(self) -> list[str]:
        return list(self._databases)

    def collections(self, database: str) -> list[str]:
        return list(self._databases[database])

    # ---- the seam

    async def probe(self) -> str:
        return "memory"

    async def heartbeat(self, target: CollectionTarget, resolved_ts: int) -> None:
        """Its own clock goes on by itself."""

    async def release(self, target: CollectionTarget) -> None:
        pass

    async def close(self) -> None:
        pass

    async def violations(self, want: Collection, *, indexes: bool) -> list[str]:
        return []

    async def ensure_database(self, database: str) -> None:
        self._databases.setdefault(database or "default", {})

    async def drop_database(self, database: str) -> None:
        if database in ("", "default"):
            return
        if self._databases.get(database):
            raise UserError("SINK_DATABASE_NOT_EMPTY", f"database {database!r} holds collections")
        self._databases.pop(database, None)

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
        held = self._find(want)
        adopted = False
        if opened:
            if held is None:
                raise UserError("SINK_COLLECTION_MISSING", f"{want.full_name} is gone; resync")
            if sink_collection_id and sink_collection_id != held.collection_id:
                raise UserError("SINK_COLLECTION_REPLACED", f"{want.full_name} is another; resync")
        elif held is not None and recreate and create:
            held = None
        if held is None and not create:
            raise UserError("SINK_COLLECTION_MISSING", f"{want.full_name} is not at the sink")
        if held is None:
            held = self._create(want)
        else:
            schemas.check_fits(want, schemas.created_schema(held.want))
            if not opened and any(True for _ in held.rows()):
                if not adopt:
                    raise UserError("COLLECTION_EXISTS", f"{want.full_name} holds rows")
                adopted = True
        made = []
        if create and not schemas.has_partition_key(schemas.parse(want)):
            for partition in want.partitions:
                if partition.state is ObjectState.CREATED and partition.name not in held.partitions:
                    held.partitions[partition.name] = []
                    made.append(partition.name)
        conditions = schemas.conditions(want)
        return Opened(held.collection_id, adopted, conditions, tuple(made), late_writes=True)

    async def drop_collection(
        self, want: Collection, *, sink_collection_id: int, ts: int = 0
    ) -> None:
        held = self._find(want)
        if held is not None and sink_collection_id in (0, held.collection_id):
            del self._databases[want.database][want.name]

    async def rename_collection(
        self,
        want: Collection,
        *,
        renamed_from: tuple[str, str],
        sink_collection_id: int,
        ts: int = 0,
    ) -> None:
        old = replace(want, database=renamed_from[0], name=renamed_from[1])
        there, before = self._find(want), self._find(old)
        if (
            there is not None
            and sink_collection_id in (0, there.collection_id)
            and (sink_collection_id or before is None)
        ):
            return
        if before is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{old.full_name} is gone; resync")
        if sink_collection_id not in (0, before.collection_id):
            raise UserError("SINK_COLLECTION_REPLACED", f"{old.full_name} is another; resync")
        if there is not None:
            raise RetryableError("SINK_NAME_TAKEN", f"{want.full_name} is there already")
        self._databases[want.database][want.name] = self._databases[old.database].pop(old.name)

    async def create_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        self._at(want.database, want.name).partitions.setdefault(partition, [])

    async def drop_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        held = self._find(want)
        if held is not None:
            held.partitions.pop(partition, None)

    async def diff(
        self, want: Collection, carry: Carry, *, sink_collection_id: int = 0
    ) -> tuple[ObjectDifference, ...]:
        self.diffs += 1
        held = self._ours(want, sink_collection_id)
        if held is None:
            return (missing(want, "is gone, its rows with it"),)
        name = next(n for n, each in self._databases[want.database].items() if each is held)
        schema = schemas.parse(want)
        return compare(
            want,
            held.seen(name),
            carry,
            partition_key=schemas.has_partition_key(schema),
            description=schema.description,
        )

    async def repair(
        self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
    ) -> None:
        if self.before_repair is not None:
            await self.before_repair(difference)
        held = self._ours(want, sink_collection_id)
        if held is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{want.full_name} is gone; resync")
        self.repairs.append(difference)
        if difference.kind == "collection":
            self._databases[want.database].pop(difference.name, None)
            self._databases[want.database][want.name] = held
        else:
            held.mend(want, difference)

    async def look_at_metadata(self, wish: MetadataWish) -> MetadataDiff:
        return self.metadata.look(wish)

    async def diff_metadata(self, wish: MetadataWish) -> tuple[ObjectDifference, ...]:
        return tuple(repair.difference for repair in self.metadata.look(wish).repairs)

    async def change_credential(self, change: CredentialChange) -> None:
        self.metadata.change_credential(change)

    async def flush(self, want: Collection) -> None:
        self._at(want.database, want.name)
        self.flushes.append(want.full_name)

    def target(self, want: Collection) -> CollectionTarget:
        parsed = schemas.parse(want)
        return CollectionTarget(
            database=want.database,
            collection=want.name,
            key_field=schemas.key_field(parsed).name,
            partition_key=schemas.has_partition_key(parsed),
        )

    async def write(
        self, target: CollectionTarget, batch: AnyBatch, timeout_seconds: float
    ) -> None:
        if isinstance(batch, Batch):
            raise BugError("FOREIGN_TARGET", "a batch of another sink")
        if timeout_seconds <= 0:
            raise RetryableError("SINK_TIMEOUT", "no time left to send it")
        # A real sink answers later: what runs beside this write gets its turn.
        await asyncio.sleep(0)
        if self.before_write is not None:
            await self.before_write(target, batch)
        held = self._at(target.database, target.collection)
        if isinstance(batch, DeleteBatch):
            held.delete(batch, partition_key=target.partition_key)
        else:
            held.put(batch, partition_key=target.partition_key)
        self.writes.append(batch)
        if self.after_write is not None:
            await self.after_write(target, batch)

    async def copies(
        self, target: CollectionTarget, partition: str, keys: Sequence[Key]
    ) -> Copies | None:
        if self.before_copies is not None:
            await self.before_copies()
        held = self._at(target.database, target.collection)
        return held.copies(partition, keys, partition_key=target.partition_key)

    def _create(self, want: Collection) -> HeldCollection:
        if want.database not in self._databases:
            raise RetryableError("SINK_ERROR", f"database {want.database!r} not found")
        self._ids += 1
        held = HeldCollection.make(self._ids, want)
        self._databases[want.database][want.name] = held
        return held

    def _find(self, want: Collection) -> HeldCollection | None:
        return self._databases.get(want.database, {}).get(want.name)

    def _ours(self, want: Collection, sink_collection_id: int) -> HeldCollection | None:
        """By its id when that is known, whatever its name is now."""
        if not sink_collection_id:
            return self._find(want)
        named = self._databases.get(want.database, {}).values()
        return next((held for held in named if held.collection_id == sink_collection_id), None)

    def _at(self, database: str, collection: str) -> HeldCollection:
        held = self._databases.get(database, {}).get(collection)
        if held is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{database}.{collection} is not there")
        return held
