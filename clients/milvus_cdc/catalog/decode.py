"""A source's keys and values as a `Catalogue`, whole or kept up to date change by change; pure.

Laws: the result depends on the keys and values alone, in whatever order they came (only a dropped
collection keeps the schema and partitions it was last seen with while Milvus clears their keys
away); only collections whose keys changed are decoded again, and an unchanged one stays the same
object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from milvus_cdc.catalog.access import ACCESS_KINDS, Access
from milvus_cdc.catalog.imports import Imports
from milvus_cdc.catalog.layout import (
    DEFAULT_DATABASE,
    DEFAULT_DATABASE_ID,
    TOMBSTONE,
    Kind,
    Layout,
    Place,
    locate,
)
from milvus_cdc.catalog.values import (
    Entry,
    Parts,
    decode_alias,
    decode_collection,
    decode_database,
    decode_incarnation,
    decode_tso,
)
from milvus_cdc.model import Alias, Catalogue, Collection, Database, ObjectState, Partition

K = TypeVar("K")

_CHILDREN = {
    Kind.PARTITION: "partitions",
    Kind.FIELD: "fields",
    Kind.FUNCTION: "functions",
    Kind.INDEX: "indexes",
    Kind.PARTITION_LOAD: "partition_loads",
}


class Assembly:
    """The keys of one source as last heard, and the Catalogue they make."""

    def __init__(self, layout: Layout) -> None:
        self._tso_keys = frozenset(layout.tso_keys)
        self._meta = layout.meta
        self._tsos: dict[str, Entry] = {}
        self._databases: dict[int, Entry] = {}
        self._gone_names: dict[int, str] = {}
        self._access = Access()
        self._imports = Imports()
        self._aliases: dict[tuple[int, str], Entry] = {}
        self._alias_snapshots: dict[tuple[int, str], set[int]] = {}
        self._parts: dict[int, Parts] = {}
        self._changed: set[int] = set()
        self._collections: dict[int, Collection] = {}

    def apply(self, key: str, value: bytes | None) -> None:
        """Takes one key's value; None and the tombstone mean that it is gone."""
        if key in self._tso_keys:
            if value is None:
                self._tsos.pop(key, None)
            else:
                self._tsos[key] = Entry(key, value)
            return
        place = locate(key.removeprefix(self._meta)) if key.startswith(self._meta) else None
        if place is None:
            return
        entry = None if value is None or value == TOMBSTONE else Entry(key, value)
        match place.kind:
            case Kind.DATABASE:
                _put(self._databases, place.database_id, entry)
                self._changed.update(self._of_database(place.database_id))
            case Kind.DATABASE_SNAPSHOT:
                self._note_database_name(place, entry)
            case Kind.ALIAS:
                _put(self._aliases, (place.database_id, place.names[0]), entry)
            case Kind.ALIAS_SNAPSHOT:
                alias = place.database_id, place.names[0]
                _note_ts(
                    self._alias_snapshots.setdefault(alias, set()), place.ts, value is not None
                )
            case Kind.IMPORT_TASK | Kind.IMPORT_JOB | Kind.IMPORT_FILES:
                self._changed.update(self._imports.apply(place, entry) & self._parts.keys())
            case kind if kind in ACCESS_KINDS:
                self._access.apply(place, entry)
            case _:
                self._apply_to_collection(place, entry, present=value is not None)

    def decode_some(self, most: int) -> bool:
        """Decodes so many of the collections whose keys changed; whether any are left. For callers
        that have other things to do in between. Raises as `catalogue` does.
        """
        names = self._names(self._decode_databases())
        for collection_id in sorted(self._changed)[:most]:
            self._decode(collection_id, names)
            # Only now: an error leaves it to be decoded again.
            self._changed.discard(collection_id)
        return bool(self._changed)

    def catalogue(self, cluster_id: int, revision: int) -> Catalogue:
        """What the keys say now. Raises BugError SOURCE_METADATA_UNDECODABLE naming a key."""
        self.decode_some(len(self._changed))
        databases = self._decode_databases()
        default = self._databases.get(DEFAULT_DATABASE_ID)
        keyed = bool(self._databases) or not self._without_databases()
        return Catalogue(
            cluster_id=cluster_id,
            revision=revision,
            tso=max(map(decode_tso, self._tsos.values()), default=0),
            databases=databases,
            collections=tuple(
                self._collections[collection_id] for collection_id in sorted(self._collections)
            ),
            databases_keyed=keyed,
            incarnation=0 if default is None else decode_incarnation(default),
            aliases=self._decode_aliases(self._names(databases)),
            rbac=self._access.rbac(),
        )

    def _decode_aliases(self, names: Mapping[int, str]) -> tuple[Alias, ...]:
        """An alias of a database that is gone is gone with it; the newer layout counts."""
        found: dict[tuple[int, str], Alias] = {}
        for (database_id, name), entry in sorted(self._aliases.items()):
            own = database_id or DEFAULT_DATABASE_ID
            ts = max(self._alias_snapshots.get((database_id, name), ()), default=0)
            if own not in names:
                continue
            alias = decode_alias(entry, name, names[own], own, ts)
            if alias is not None:
                found[own, name] = alias
        return tuple(found[key] for key in sorted(found))

    def _names(self, databases: tuple[Database, ...]) -> dict[int, str]:
        names = self._gone_names | {each.database_id: each.name for each in databases}
        names.setdefault(DEFAULT_DATABASE_ID, DEFAULT_DATABASE)
        return names

    def _of_database(self, database_id: int) -> list[int]:
        """Collections with a key below this database; those without any are in the default one."""
        ids = {database_id, 0} if database_id == DEFAULT_DATABASE_ID else {database_id}
        return [each for each, parts in self._parts.items() if ids & parts.infos.keys()]

    def _note_database_name(self, place: Place, entry: Entry | None) -> None:
        # A collection that is still being dropped may outlive the key of its database.
        if entry is not None:
            database = decode_database(entry, place.database_id)
            if database is not None and self._gone_names.get(place.database_id) != database.name:
                self._gone_names[place.database_id] = database.name
                self._changed.update(self._of_database(place.database_id))

    def _apply_to_collection(self, place: Place, entry: Entry | None, *, present: bool) -> None:
        parts = self._parts.get(place.collection_id)
        if parts is None:
            parts = self._parts[place.collection_id] = Parts()
        self._changed.add(place.collection_id)
        match place.kind:
            case Kind.COLLECTION:
                _put(parts.infos, place.database_id, entry)
            case Kind.COLLECTION_LOAD:
                parts.load = entry
            case Kind.COLLECTION_SNAPSHOT:
                _note_ts(parts.info_snapshots, place.ts, present)
            case Kind.PARTITION_SNAPSHOT:
                snapshots = parts.partition_snapshots.setdefault(place.object_id, set())
                _note_ts(snapshots, place.ts, present)
                if not snapshots:
                    del parts.partition_snapshots[place.object_id]
            case _:
                _put(getattr(parts, _CHILDREN[place.kind]), place.object_id, entry)

    def _without_databases(self) -> bool:
        """It looks like 2.2, which has no databases; users are there from its first start on."""
        infos = [database_id for parts in self._parts.values() for database_id in parts.infos]
        return not any(infos) and bool(infos or self._access.users)

    def _decode_databases(self) -> tuple[Database, ...]:
        if not self._databases and self._without_databases():
            return (Database(DEFAULT_DATABASE_ID, DEFAULT_DATABASE),)
        decoded = (decode_database(entry, each) for each, entry in sorted(self._databases.items()))
        return tuple(database for database in decoded if database is not None)

    def _decode(self, collection_id: int, names: Mapping[int, str]) -> None:
        parts = self._parts[collection_id]
        if parts.empty():
            del self._parts[collection_id]
        known = self._collections.get(collection_id)
        collection = decode_collection(collection_id, parts, names)
        if collection is not None and (imports := self._imports.of(collection_id)):
            collection = replace(collection, imports=imports)
        if collection is None:
            self._collections.pop(collection_id, None)
            return
        if known is not None and collection.state is ObjectState.DROPPED:
            collection = _as_last_seen(collection, known)
        if collection != known:
            self._collections[collection_id] = collection


def decode_catalogue(
    keys: Mapping[str, bytes], layout: Layout, *, cluster_id: int = 0, revision: int = 0
) -> Catalogue:
    """The Catalogue of a listing. Raises BugError SOURCE_METADATA_UNDECODABLE naming a key."""
    assembly = Assembly(layout)
    for key, value in keys.items():
        assembly.apply(key, value)
    return assembly.catalogue(cluster_id, revision)


def _put(entries: dict[K, Entry], key: K, entry: Entry | None) -> None:
    if entry is None:
        entries.pop(key, None)
    else:
        entries[key] = entry


def _note_ts(snapshots: set[int], ts: int, present: bool) -> None:
    if present:
        snapshots.add(ts)
    else:
        snapshots.discard(ts)


def _as_last_seen(now: Collection, known: Collection) -> Collection:
    """Milvus removes a dropped collection's fields and partitions one by one, before the collection
    itself.
    """
    partitions: dict[int, Partition] = {each.partition_id: each for each in now.partitions}
    for each in known.partitions:
        partitions.setdefault(
            each.partition_id,
            replace(each, state=ObjectState.DROPPED, drop_ts=each.drop_ts or now.drop_ts),
        )
    return replace(
        now,
        schema=max(known.schema, now.schema, key=len),
        partitions=tuple(partitions[each] for each in sorted(partitions)),
    )
