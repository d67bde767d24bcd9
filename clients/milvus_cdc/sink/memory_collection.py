"""One collection of the sink in memory: its rows by partition, and everything beside them.

Law: like Milvus it does not look at keys when it inserts; what that doubles is kept and told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from milvus_cdc.errors import UserError
from milvus_cdc.model import Collection, LoadKind
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import Copies, DeleteBatch, Op, RowBatch
from milvus_cdc.sink.differences import (
    DEFAULT_PARTITION,
    DESCRIPTION,
    Action,
    ObjectDifference,
    Seen,
    SeenIndex,
    loaded_partitions,
    wanted_properties,
)
from milvus_cdc.sink.memory_rows import Row, decode_rows
from milvus_cdc.sink.milvus import schema as schemas


@dataclass(slots=True)
class HeldCollection:
    """As a sink holds it."""

    collection_id: int
    want: Collection
    """As it was made."""
    key_field: str
    partitions: dict[str, list[Row]]
    indexes: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = field(default_factory=dict)
    """Field and parameters by name."""
    loaded: set[str] = field(default_factory=set)
    """Partitions."""
    replicas: int = 0
    properties: dict[str, str] = field(default_factory=dict)
    description: str = ""

    @classmethod
    def make(cls, collection_id: int, want: Collection) -> HeldCollection:
        """Empty, as wanted."""
        schema = schemas.parse(want)
        return cls(
            collection_id,
            want,
            schemas.key_field(schema).name,
            {DEFAULT_PARTITION: []},
            properties=wanted_properties(want),
            description=schema.description,
        )

    def rows(self) -> Iterator[Row]:
        for rows in self.partitions.values():
            yield from rows

    def partition(self, name: str) -> list[Row]:
        """Its rows. Raises UserError."""
        try:
            return self.partitions[name]
        except KeyError:
            raise UserError(
                "SINK_PARTITION_MISSING", f"{self.want.full_name} has no partition {name!r}"
            ) from None

    # ---- rows

    def put(self, batch: RowBatch, *, partition_key: bool) -> None:
        """Into the partition that is named, where one may be. Raises UserError."""
        name = DEFAULT_PARTITION if partition_key else batch.partition or DEFAULT_PARTITION
        place = self.partition(name)
        rows = [row for chunk in batch.chunks for row in decode_rows(chunk)]
        if batch.op is Op.UPSERT:
            keys = {row[self.key_field] for row in rows}
            place[:] = [row for row in place if row[self.key_field] not in keys]
        place += rows

    def delete(self, batch: DeleteBatch, *, partition_key: bool) -> None:
        """From the partition that is named, where one may be, else from all. Raises UserError."""
        gone = set(batch.keys if isinstance(batch.keys, tuple) else batch.keys.tolist())
        named = batch.partition and not partition_key
        names = [batch.partition] if named else list(self.partitions)
        for place in [self.partition(name) for name in names]:
            place[:] = [row for row in place if row[self.key_field] not in gone]

    def copies(self, partition: str, keys: Sequence[Key], *, partition_key: bool) -> Copies | None:
        """None when not all of it is loaded."""
        names = [partition] if partition and not partition_key else list(self.partitions)
        if not self.loaded.issuperset(names):
            return None
        wanted = set(keys)
        rows = [row[self.key_field] for name in names for row in self.partition(name)]
        found = [key for key in rows if key in wanted]
        return Copies(len(found), frozenset(found))

    # ---- what is no row

    def seen(self, name: str) -> Seen:
        """What a look finds, under the name that it has now."""
        return Seen(
            name=name,
            partitions=tuple(self.partitions),
            indexes={
                each: SeenIndex(each, field_name, dict(params))
                for each, (field_name, params) in self.indexes.items()
            },
            loaded=frozenset(self.loaded),
            properties=self.properties,
            replicas=self.replicas if self.loaded else None,
            description=self.description,
        )

    def mend(self, want: Collection, difference: ObjectDifference) -> None:
        """Makes one object as wanted; the collection's name is its sink's."""
        name = difference.name
        match difference.kind:
            case "property" if name == DESCRIPTION:
                self.description = schemas.parse(want).description
            case "property":
                self.properties.pop(name, None)
                wanted = wanted_properties(want)
                if name in wanted:
                    self.properties[name] = wanted[name]
            case "partition" if difference.action is Action.DROP:
                self.partitions.pop(name, None)
                self.loaded.discard(name)
            case "partition":
                self.partitions.setdefault(name, [])
            case "index":
                self.indexes.pop(name, None)
                for index in want.indexes:
                    if index.name == name:
                        self.indexes[name] = index.field_name, index.params
            case "load":
                names = {
                    LoadKind.NONE: set[str](),
                    LoadKind.COLLECTION: set(self.partitions),
                    LoadKind.PARTITIONS: loaded_partitions(want) & set(self.partitions),
                }
                self.loaded = names[want.load.kind]
                self.replicas = want.load.replicas
