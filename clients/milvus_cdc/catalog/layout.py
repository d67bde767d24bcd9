"""Where a source keeps what: keys below `{root}/{meta}/` and the TSO key beside it.

Prefixes are those of Milvus `internal/metastore/kv/{rootcoord,datacoord,querycoord}` and were seen
on servers of 2.2.16 and 2.3.5: `root-coord/` with `snapshots/root-coord/` for every earlier value,
`field-index/` (indexes) and `querycoord-{collection,partition}-loadinfo/` (what is loaded). Earlier
2.2 keeps the collections of its only database below `root-coord/collection/`; later versions still
read that for the default database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from milvus_cdc.etcd import KeyRange

TOMBSTONE = b"\xe2\x9b\xbc"
"""Milvus' "deleted" as a value (`suffix_snapshot.go`)."""

DEFAULT_DATABASE_ID = 1
DEFAULT_DATABASE = "default"


class Kind(StrEnum):
    DATABASE = "DATABASE"
    COLLECTION = "COLLECTION"
    PARTITION = "PARTITION"
    FIELD = "FIELD"
    FUNCTION = "FUNCTION"
    INDEX = "INDEX"
    COLLECTION_LOAD = "COLLECTION_LOAD"
    PARTITION_LOAD = "PARTITION_LOAD"
    ALIAS = "ALIAS"
    IMPORT_TASK = "IMPORT_TASK"
    """A bulk import of 2.2 and 2.3; its collection is in the value."""
    IMPORT_JOB = "IMPORT_JOB"
    """The same of 2.4 and later, in parts that are IMPORT_FILES."""
    IMPORT_FILES = "IMPORT_FILES"
    USER = "USER"
    ROLE = "ROLE"
    MEMBER = "MEMBER"
    GRANTEE = "GRANTEE"
    GRANTEE_ID = "GRANTEE_ID"
    PRIVILEGE_GROUP = "PRIVILEGE_GROUP"
    ALIAS_SNAPSHOT = "ALIAS_SNAPSHOT"
    DATABASE_SNAPSHOT = "DATABASE_SNAPSHOT"
    COLLECTION_SNAPSHOT = "COLLECTION_SNAPSHOT"
    PARTITION_SNAPSHOT = "PARTITION_SNAPSHOT"


@dataclass(frozen=True, slots=True)
class Place:
    """What a key stands for. Ids that the kind does not have are 0."""

    kind: Kind
    database_id: int = 0
    """0 for a collection in the layout without databases."""
    collection_id: int = 0
    object_id: int = 0
    """Of the partition, field, function or index."""
    ts: int = 0
    """TSO of a snapshot."""
    names: tuple[str, ...] = ()
    """Of what has names instead of ids, in the order of the key."""


_PLACES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "root-coord/fields": (Kind.FIELD, ("collection_id", "object_id")),
    "root-coord/partitions": (Kind.PARTITION, ("collection_id", "object_id")),
    "root-coord/database/collection-info": (Kind.COLLECTION, ("database_id", "collection_id")),
    "root-coord/database/db-info": (Kind.DATABASE, ("database_id",)),
    "root-coord/collection": (Kind.COLLECTION, ("collection_id",)),
    "root-coord/functions": (Kind.FUNCTION, ("collection_id", "object_id")),
    "field-index": (Kind.INDEX, ("collection_id", "object_id")),
    "querycoord-collection-loadinfo": (Kind.COLLECTION_LOAD, ("collection_id",)),
    "querycoord-partition-loadinfo": (Kind.PARTITION_LOAD, ("collection_id", "object_id")),
    "importtask": (Kind.IMPORT_TASK, ("object_id",)),
    "datacoord-meta/import-job": (Kind.IMPORT_JOB, ("object_id",)),
    "datacoord-meta/import-task": (Kind.IMPORT_FILES, ("object_id",)),
    "root-coord/database/aliases": (Kind.ALIAS, ("database_id", "name")),
    "root-coord/aliases": (Kind.ALIAS, ("name",)),
    "root-coord/credential/users": (Kind.USER, ("name",)),
    "root-coord/credential/roles": (Kind.ROLE, ("name",)),
    "root-coord/credential/user-role-mapping": (Kind.MEMBER, ("name",) * 2),
    "root-coord/credential/grantee-privileges": (Kind.GRANTEE, ("name",) * 3),
    "root-coord/credential/grantee-id": (Kind.GRANTEE_ID, ("name",) * 2),
    "root-coord/privilege-group": (Kind.PRIVILEGE_GROUP, ("name",)),
}
"""By all that comes before the first id or name: what those are."""
_IMPORTS = ("importtask", "datacoord-meta/import-job", "datacoord-meta/import-task")
_LONGEST = max(prefix.count("/") for prefix in _PLACES) + 1
_ID_DIGITS = 20
"""Of 64 bits; a longer number is none of Milvus'."""
_SNAPSHOT = re.compile(r"snapshots/(?P<key>.+)_ts(?P<ts>\d{1,20})", re.DOTALL)
_SNAPSHOT_KINDS = {
    Kind.DATABASE: Kind.DATABASE_SNAPSHOT,
    Kind.COLLECTION: Kind.COLLECTION_SNAPSHOT,
    Kind.PARTITION: Kind.PARTITION_SNAPSHOT,
    Kind.ALIAS: Kind.ALIAS_SNAPSHOT,
}


def locate(key: str) -> Place | None:
    """The place of a key, relative to `{root}/{meta}/`; None for keys that say nothing here."""
    if key.startswith("snapshots/"):
        snapshot = _SNAPSHOT.fullmatch(key)
        if snapshot is None or snapshot["key"].startswith("snapshots/"):
            return None
        place = locate(snapshot["key"])
        if place is None or place.kind not in _SNAPSHOT_KINDS:
            return None
        return Place(
            _SNAPSHOT_KINDS[place.kind],
            place.database_id,
            place.collection_id,
            place.object_id,
            int(snapshot["ts"]),
            place.names,
        )
    segments = key.split("/")
    prefix = ""
    for count, segment in enumerate(segments[:_LONGEST], 1):
        prefix = f"{prefix}/{segment}" if prefix else segment
        if prefix in _PLACES:
            return _place(*_PLACES[prefix], segments[count:])
    return None


def _place(kind: Kind, wanted: tuple[str, ...], found: list[str]) -> Place | None:
    if len(found) != len(wanted) or not all(found):
        return None
    ids: dict[str, int] = {}
    names: tuple[str, ...] = ()
    for what, text in zip(wanted, found, strict=True):
        if what == "name":
            names += (text,)
        elif text.isdecimal() and len(text) <= _ID_DIGITS:
            ids[what] = int(text)
        else:
            return None
    return Place(kind, names=names, **ids)


@dataclass(frozen=True, slots=True)
class Layout:
    """The keys of one source: `etcd.rootPath` and `etcd.metaSubPath` of its configuration."""

    root_path: str
    meta_sub_path: str = "meta"

    @property
    def meta(self) -> str:
        return "/".join(part.strip("/") for part in (self.root_path, self.meta_sub_path)) + "/"

    @property
    def tso_keys(self) -> tuple[str, str]:
        """Of 2.3 and later, and of 2.2 (both seen), which an upgrade leaves behind."""
        kv = f"{self.root_path.strip('/')}/kv"
        return f"{kv}/gid/timestamp", f"{kv}/tso/timestamp"

    def to_list(self) -> tuple[KeyRange, ...]:
        """What a listing needs: of most snapshots only the key, whose `_ts` dates a drop."""
        snapshots = f"{self.meta}snapshots/root-coord/"
        return (
            *map(KeyRange.key, self.tso_keys),
            KeyRange.prefix(f"{self.meta}root-coord/"),
            KeyRange.prefix(f"{self.meta}field-index/"),
            KeyRange.prefix(f"{self.meta}querycoord-collection-loadinfo/"),
            KeyRange.prefix(f"{self.meta}querycoord-partition-loadinfo/"),
            *(KeyRange.prefix(f"{self.meta}{place}/") for place in _IMPORTS),
            KeyRange.prefix(f"{snapshots}database/db-info/"),
            KeyRange.prefix(f"{snapshots}database/collection-info/", keys_only=True),
            KeyRange.prefix(f"{snapshots}collection/", keys_only=True),
            KeyRange.prefix(f"{snapshots}partitions/", keys_only=True),
            KeyRange.prefix(f"{snapshots}database/aliases/", keys_only=True),
            KeyRange.prefix(f"{snapshots}aliases/", keys_only=True),
        )

    def to_watch(self) -> tuple[KeyRange, ...]:
        """What a watch needs.

        A value and its snapshot are one transaction, and etcd keeps a revision together only within
        one range: hence one range from `root-coord/` to the end of `snapshots/root-coord/`,
        although it brings other keys too.
        """
        root_coord = KeyRange.prefix(f"{self.meta}root-coord/")
        snapshots = KeyRange.prefix(f"{self.meta}snapshots/root-coord/")
        return (
            KeyRange(root_coord.start, snapshots.end),
            KeyRange.prefix(f"{self.meta}field-index/"),
            KeyRange.prefix(f"{self.meta}querycoord-collection-loadinfo/"),
            KeyRange.prefix(f"{self.meta}querycoord-partition-loadinfo/"),
            *(KeyRange.prefix(f"{self.meta}{place}/") for place in _IMPORTS),
            *map(KeyRange.key, self.tso_keys),
        )
