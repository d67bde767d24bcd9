"""Users, roles, grants and privilege groups of a source, as a `model.Rbac`; pure.

Formats (milvus `internal/metastore/kv/rootcoord/kv_catalog.go`, seen on 2.3.5): a user's value is
JSON with a password hash, which is not read; a role's and a member's value is empty;
`grantee-privileges/{role}/{object type}/{database}.{object}` holds an id, and every
`grantee-id/{id}/{privilege}` is one privilege. An id without privileges is what a revoke leaves.
Privilege groups (2.5, from its source) are `milvus.PrivilegeGroupInfo`. None of them has snapshots:
their changes have no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError

from milvus_cdc.catalog.layout import DEFAULT_DATABASE, Kind, Place
from milvus_cdc.catalog.values import Entry, undecodable
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import Rbac, RoleGrant

ACCESS_KINDS = frozenset(
    {
        Kind.USER,
        Kind.ROLE,
        Kind.MEMBER,
        Kind.GRANTEE,
        Kind.GRANTEE_ID,
        Kind.PRIVILEGE_GROUP,
    }
)

T = TypeVar("T")

_PREFIXES = ("PrivilegeGroup", "Privilege")


@dataclass(slots=True)
class Access:
    """The keys as last heard, by what their names say."""

    users: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)
    grantees: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(role, object type, database.object) -> id."""
    privileges: set[tuple[str, str]] = field(default_factory=set)
    """(id, privilege)."""
    groups: dict[str, Entry] = field(default_factory=dict)
    _made: Rbac | None = None

    def apply(self, place: Place, entry: Entry | None) -> None:
        self._made = None
        names = place.names
        match place.kind:
            case Kind.USER:
                _mark(self.users, names[0], entry)
            case Kind.ROLE:
                _mark(self.roles, names[0], entry)
            case Kind.MEMBER:
                _mark(self.members, (names[0], names[1]), entry)
            case Kind.GRANTEE_ID:
                _mark(self.privileges, (names[0], names[1]), entry)
            case Kind.GRANTEE:
                role, object_type, target = names
                if entry is None:
                    self.grantees.pop((role, object_type, target), None)
                else:
                    self.grantees[role, object_type, target] = entry.value.decode(errors="replace")
            case _:
                if entry is None:
                    self.groups.pop(names[0], None)
                else:
                    self.groups[names[0]] = entry

    def rbac(self) -> Rbac:
        """Raises BugError SOURCE_METADATA_UNDECODABLE naming a key."""
        if self._made is None:
            self._made = Rbac(
                users=tuple(sorted(self.users)),
                roles=tuple(sorted(self.roles)),
                members=tuple(sorted(self.members)),
                grants=self._grants(),
                privilege_groups=tuple(
                    (name, _group(entry)) for name, entry in sorted(self.groups.items())
                ),
            )
        return self._made

    def _grants(self) -> tuple[RoleGrant, ...]:
        by_id: dict[str, list[str]] = {}
        for grantee_id, privilege in self.privileges:
            by_id.setdefault(grantee_id, []).append(privilege)
        return tuple(
            sorted(
                RoleGrant(role, object_type, name, database, _api_name(privilege))
                for (role, object_type, target), grantee_id in self.grantees.items()
                for database, name in [_split(target)]
                for privilege in by_id.get(grantee_id, ())
            )
        )


def _mark(names: set[T], name: T, entry: Entry | None) -> None:
    if entry is None:
        names.discard(name)
    else:
        names.add(name)


def _split(target: str) -> tuple[str, str]:
    """Before 2.3 there were no databases in it."""
    database, dot, name = target.partition(".")
    return (database, name) if dot else (DEFAULT_DATABASE, target)


def _api_name(privilege: str) -> str:
    """As the API spells it (milvus `pkg/util/constant.go`, MetaStore2API)."""
    for prefix in _PREFIXES:
        if privilege.startswith(prefix):
            return privilege.removeprefix(prefix)
    return privilege


def _group(entry: Entry) -> tuple[str, ...]:
    try:
        info = milvus_pb2.PrivilegeGroupInfo.FromString(entry.value)
    except DecodeError as error:
        raise undecodable(entry.key, "not a PrivilegeGroupInfo") from error
    return tuple(sorted({_api_name(each.name) for each in info.privileges}))
