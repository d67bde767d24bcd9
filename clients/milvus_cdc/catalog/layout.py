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


_PLACES = (
    (Kind.FIELD, re.compile(r"root-coord/fields/(?P<collection_id>\d+)/(?P<object_id>\d+)")),
    (
        Kind.PARTITION,
        re.compile(r"root-coord/partitions/(?P<collection_id>\d+)/(?P<object_id>\d+)"),
    ),
    (
        Kind.COLLECTION,
        re.compile(
            r"root-coord/database/collection-info/(?P<database_id>\d+)/(?P<collection_id>\d+)"
        ),
    ),
    (Kind.DATABASE, re.compile(r"root-coord/database/db-info/(?P<database_id>\d+)")),
    (Kind.COLLECTION, re.compile(r"root-coord/collection/(?P<collection_id>\d+)")),
    (Kind.FUNCTION, re.compile(r"root-coord/functions/(?P<collection_id>\d+)/(?P<object_id>\d+)")),
    (Kind.INDEX, re.compile(r"field-index/(?P<collection_id>\d+)/(?P<object_id>\d+)")),
    (Kind.COLLECTION_LOAD, re.compile(r"querycoord-collection-loadinfo/(?P<collection_id>\d+)")),
    (
        Kind.PARTITION_LOAD,
        re.compile(r"querycoord-partition-loadinfo/(?P<collection_id>\d+)/(?P<object_id>\d+)"),
    ),
    (Kind.ALIAS, re.compile(r"root-coord/database/aliases/(?P<database_id>\d+)/(?P<name>[^/]+)")),
    (Kind.ALIAS, re.compile(r"root-coord/aliases/(?P<name>[^/]+)")),
    (Kind.USER, re.compile(r"root-coord/credential/users/(?P<name>[^/]+)")),
    (Kind.ROLE, re.compile(r"root-coord/credential/roles/(?P<name>[^/]+)")),
    (
        Kind.MEMBER,
        re.compile(r"root-coord/credential/user-role-mapping/(?P<name>[^/]+)/(?P<name2>[^/]+)"),
    ),
    (
        Kind.GRANTEE,
        re.compile(
            r"root-coord/credential/grantee-privileges"
            r"/(?P<name>[^/]+)/(?P<name2>[^/]+)/(?P<name3>[^/]+)"
        ),
    ),
    (
        Kind.GRANTEE_ID,
        re.compile(r"root-coord/credential/grantee-id/(?P<name>[^/]+)/(?P<name2>[^/]+)"),
    ),
    (Kind.PRIVILEGE_GROUP, re.compile(r"root-coord/privilege-group/(?P<name>[^/]+)")),
)
_SNAPSHOT = re.compile(r"snapshots/(?P<key>.+)_ts(?P<ts>\d+)", re.DOTALL)
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
        place = locate(snapshot["key"]) if snapshot else None
        if snapshot is None or place is None or place.kind not in _SNAPSHOT_KINDS:
            return None
        return Place(
            _SNAPSHOT_KINDS[place.kind],
            place.database_id,
            place.collection_id,
            place.object_id,
            int(snapshot["ts"]),
            place.names,
        )
    for kind, pattern in _PLACES:
        match = pattern.fullmatch(key)
        if match is not None:
            groups = match.groupdict().items()
            return Place(
                kind,
                names=tuple(text for group, text in groups if group.startswith("name")),
                **{group: int(number) for group, number in groups if not group.startswith("name")},
            )
    return None


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
            *map(KeyRange.key, self.tso_keys),
        )
