"""A sink in memory, for tests: rows decoded from their columns, failures and delays on demand.

Laws: it keeps the seam's contract, proved by the same suite as the real sinks. Like Milvus it does
not look at keys when it inserts: an insert of an existing key doubles it, a key twice in one upsert
is stored twice, an upsert into another named partition leaves the row in the old one; unlike
Milvus' query it hides none of that.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from milvus_cdc.codec.columns import concat, field_id, select_rows
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import Collection, Load, ObjectState
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, Opened, RowBatch, RowChunk
from milvus_cdc.sink.milvus import schema as schemas

DEFAULT_PARTITION = "_default"

Row = dict[str, Any]
"""Cells by field name: plain values; bytes for JSON, vectors (as they lie in memory) and arrays
(serialized); None for null.
"""
WriteHook = Callable[[CollectionTarget, RowBatch | DeleteBatch], Awaitable[None]]


@dataclass(slots=True)
class _Held:
    collection_id: int
    want: Collection
    key_field: str
    partitions: dict[str, list[Row]]
    indexes: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    load: Load = field(default_factory=Load)

    def rows(self) -> Iterator[Row]:
        for rows in self.partitions.values():
            yield from rows


class MemorySink:
    """Databases and collections that a test can look into.

    `before_write` and `after_write` may raise what a sink may raise, or wait: what the first raises
    means that nothing was written, after the second everything was.
    """

    def __init__(self) -> None:
        self._databases: dict[str, dict[str, _Held]] = {"default": {}}
        self._ids = 0
        self.before_write: WriteHook | None = None
        self.after_write: WriteHook | None = None
        self.writes: list[RowBatch | DeleteBatch] = []
        """Every batch that took effect, in that order."""

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
        return dict(self._databases[database][collection].indexes)

    def load(self, database: str, collection: str) -> Load:
        return self._databases[database][collection].load

    def databases(self) -> list[str]:
        return list(self._databases)

    def collections(self, database: str) -> list[str]:
        return list(self._databases[database])

    # ---- the seam

    async def probe(self) -> str:
        return "memory"

    async def close(self) -> None:
        pass

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
    ) -> Opened:
        held = self._find(want)
        adopted = False
        if opened:
            if held is None:
                raise UserError("SINK_COLLECTION_MISSING", f"{want.full_name} is gone; resync")
            if sink_collection_id and sink_collection_id != held.collection_id:
                raise UserError("SINK_COLLECTION_REPLACED", f"{want.full_name} is another; resync")
        elif held is not None and recreate:
            held = None
        if held is None:
            held = self._create(want)
        else:
            schemas.check_fits(want, schemas.created_schema(held.want))
            if not opened and any(True for _ in held.rows()):
                if not adopt:
                    raise UserError("COLLECTION_EXISTS", f"{want.full_name} holds rows")
                adopted = True
        if not schemas.has_partition_key(schemas.parse(want)):
            for partition in want.partitions:
                if partition.state is ObjectState.CREATED:
                    held.partitions.setdefault(partition.name, [])
        return Opened(held.collection_id, adopted, schemas.conditions(want))

    async def drop_collection(self, want: Collection, *, sink_collection_id: int) -> None:
        held = self._find(want)
        if held is not None and sink_collection_id in (0, held.collection_id):
            del self._databases[want.database][want.name]

    async def create_partition(self, want: Collection, partition: str) -> None:
        self._at(want.database, want.name).partitions.setdefault(partition, [])

    async def drop_partition(self, want: Collection, partition: str) -> None:
        held = self._find(want)
        if held is not None:
            held.partitions.pop(partition, None)

    async def reconcile(self, want: Collection) -> None:
        held = self._at(want.database, want.name)
        held.indexes = {index.name: index.params for index in want.indexes}
        held.load = want.load

    def target(self, want: Collection) -> CollectionTarget:
        parsed = schemas.parse(want)
        return CollectionTarget(
            database=want.database,
            collection=want.name,
            key_field=schemas.key_field(parsed).name,
            partition_key=schemas.has_partition_key(parsed),
        )

    async def write(
        self, target: CollectionTarget, batch: RowBatch | DeleteBatch, timeout_seconds: float
    ) -> None:
        if timeout_seconds <= 0:
            raise RetryableError("SINK_TIMEOUT", "no time left to send it")
        # A real sink answers later: what runs beside this write gets its turn.
        await asyncio.sleep(0)
        if self.before_write is not None:
            await self.before_write(target, batch)
        held = self._at(target.database, target.collection)
        if isinstance(batch, DeleteBatch):
            self._delete(held, target, batch)
        else:
            self._put(held, target, batch)
        self.writes.append(batch)
        if self.after_write is not None:
            await self.after_write(target, batch)

    def _put(self, held: _Held, target: CollectionTarget, batch: RowBatch) -> None:
        name = DEFAULT_PARTITION if target.partition_key else batch.partition or DEFAULT_PARTITION
        place = self._partition(held, name)
        rows = [row for chunk in batch.chunks for row in decode_rows(chunk)]
        if batch.op is Op.UPSERT:
            keys = {row[held.key_field] for row in rows}
            place[:] = [row for row in place if row[held.key_field] not in keys]
        place += rows

    def _delete(self, held: _Held, target: CollectionTarget, batch: DeleteBatch) -> None:
        gone = set(batch.keys if isinstance(batch.keys, tuple) else batch.keys.tolist())
        named = batch.partition and not target.partition_key
        names = [batch.partition] if named else list(held.partitions)
        for place in [self._partition(held, name) for name in names]:
            place[:] = [row for row in place if row[held.key_field] not in gone]

    def _partition(self, held: _Held, name: str) -> list[Row]:
        try:
            return held.partitions[name]
        except KeyError:
            raise UserError(
                "SINK_PARTITION_MISSING", f"{held.want.full_name} has no partition {name!r}"
            ) from None

    def _create(self, want: Collection) -> _Held:
        if want.database not in self._databases:
            raise RetryableError("SINK_ERROR", f"database {want.database!r} not found")
        self._ids += 1
        key = schemas.key_field(schemas.parse(want)).name
        held = _Held(self._ids, want, key, {DEFAULT_PARTITION: []})
        self._databases[want.database][want.name] = held
        return held

    def _find(self, want: Collection) -> _Held | None:
        return self._databases.get(want.database, {}).get(want.name)

    def _at(self, database: str, collection: str) -> _Held:
        held = self._databases.get(database, {}).get(collection)
        if held is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{database}.{collection} is not there")
        return held


def decode_rows(chunk: RowChunk) -> list[Row]:
    """The rows of a chunk that are kept, system columns left out."""
    rows: list[Row] = [{} for _ in range(chunk.rows_kept)]
    for column in chunk.columns:
        if field_id(column) < schemas.FIRST_USER_FIELD_ID:
            continue
        kept = concat([column]) if chunk.keep is None else select_rows(column, chunk.keep)
        data = schema_pb2.FieldData.FromString(kept)
        name = "$meta" if data.is_dynamic else data.field_name
        for row, cell in zip(rows, decode_cells(data), strict=True):
            row[name] = cell
    return rows


def decode_cells(data: Any) -> list[Any]:
    """Cells of a schema_pb2.FieldData in request form: null rows have no value."""
    cells = _vectors(data.vectors) if data.HasField("vectors") else _scalars(data.scalars)
    if not data.valid_data:
        return cells
    values = iter(cells)
    return [next(values) if valid else None for valid in data.valid_data]


def _scalars(scalars: Any) -> list[Any]:
    kind = scalars.WhichOneof("data")
    if kind is None:
        return []
    values = list(getattr(scalars, kind).data)
    if kind == "array_data":
        return [_array(value) for value in values]
    if kind == "float_data":
        # By bits, so that NaN equals itself and 0.0 is not -0.0.
        return [struct.pack("<f", value) for value in values]
    if kind == "double_data":
        return [struct.pack("<d", value) for value in values]
    return values


def _array(value: Any) -> bytes:
    # An empty array may or may not say of which type it is.
    kind = value.WhichOneof("data")
    empty = kind is None or not getattr(value, kind).data
    return b"" if empty else bytes(value.SerializeToString(deterministic=True))


def _vectors(vectors: Any) -> list[Any]:
    kind = vectors.WhichOneof("data")
    if kind is None:
        return []
    if kind == "sparse_float_vector":
        return list(vectors.sparse_float_vector.contents)
    if kind == "float_vector":
        packed = struct.pack(f"<{len(vectors.float_vector.data)}f", *vectors.float_vector.data)
        width = vectors.dim * 4
    else:
        packed = getattr(vectors, kind)
        width = {
            "binary_vector": vectors.dim // 8,
            "int8_vector": vectors.dim,
        }.get(kind, vectors.dim * 2)
    return [packed[at : at + width] for at in range(0, len(packed), width)]
