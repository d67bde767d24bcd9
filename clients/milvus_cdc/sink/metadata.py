"""What a task wants at a sink beside collections, what differs, and how it is mended; pure.

Laws: what is wanted is added to what is there. Something is taken away only when it is named as
dropped, or is a property or a group's privilege of something that is wanted as a whole. A user is
never made: nobody here knows a password.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from milvus_cdc.errors import CdcError
from milvus_cdc.model import RoleGrant
from milvus_cdc.sink.differences import Action, ObjectDifference

BUILT_IN_ROLES = frozenset({"admin", "public"})


@dataclass(frozen=True, slots=True)
class Repair:
    """`mend` is idempotent and raises milvus_cdc.errors; None where only a person can. `item` is
    the part of the wish that it fulfils, one of `wish_items`.
    """

    difference: ObjectDifference
    mend: Callable[[], Awaitable[None]] | None
    item: Hashable


@dataclass(frozen=True, slots=True)
class Trouble:
    """One object that could not be looked at or mended."""

    kind: str
    """As in ObjectDifference."""
    name: str
    error: CdcError


@dataclass(frozen=True, slots=True)
class AliasWish:
    """By names at the sink."""

    database: str
    alias: str
    collection: str


@dataclass(frozen=True, slots=True)
class RbacWish:
    """Databases and collections by their names at the sink."""

    users: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    """(user, role)."""
    grants: tuple[RoleGrant, ...] = ()
    privilege_groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dropped_roles: tuple[str, ...] = ()
    dropped_members: tuple[tuple[str, str], ...] = ()
    dropped_grants: tuple[RoleGrant, ...] = ()
    dropped_privilege_groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetadataWish:
    """What belongs to a task and not to a collection, as wanted at the sink."""

    databases: tuple[tuple[str, bool], ...] = ()
    """(name, dropped)."""
    database_properties: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """By database, where there are any."""
    aliases: tuple[AliasWish, ...] = ()
    dropped_aliases: tuple[tuple[str, str], ...] = ()
    """(database, alias)."""
    rbac: RbacWish | None = None
    """None: roles are not looked at."""


@dataclass(slots=True)
class MetadataDiff:
    """In the order in which it has to be mended."""

    repairs: list[Repair] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    """What could not be looked at."""
    conditions: list[tuple[str, str]] = field(default_factory=list)
    """(TYPE, message) of what this sink cannot hold, or what waits for a person."""


@dataclass(slots=True)
class RbacState:
    """What is there, of what was asked about."""

    users: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)
    grants: set[RoleGrant] = field(default_factory=set)
    privilege_groups: dict[str, set[str]] = field(default_factory=dict)


class CredentialAction(StrEnum):
    CREATE = "CREATE"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


@dataclass(frozen=True, slots=True)
class CredentialChange:
    """A user made, changed or removed by its name; passwords as the API takes them (base64)."""

    action: CredentialAction
    user: str
    password: str = field(default="", repr=False)
    old_password: str = field(default="", repr=False)


Payload = str | RoleGrant | tuple[str, str] | tuple[str, tuple[str, ...]]


def rbac_differences(
    want: RbacWish, there: RbacState
) -> Iterator[tuple[ObjectDifference, Payload]]:
    """In an order in which each can be mended once those before it are."""
    for name, privileges in want.privilege_groups:
        found = there.privilege_groups.get(name)
        if found != set(privileges):
            action = Action.CREATE if found is None else Action.ALTER
            detail = f"wanted {', '.join(privileges) or 'nothing'}"
            yield _difference(action, "privilege group", name, detail), (name, privileges)
    for role in want.roles:
        if role not in there.roles and role not in BUILT_IN_ROLES:
            yield _difference(Action.CREATE, "role", role), role
    for grant in want.grants:
        if grant not in there.grants:
            yield _of_grant(Action.CREATE, grant), grant
    for member in want.members:
        if member not in there.members and member[0] in there.users:
            yield _of_member(Action.CREATE, member), member
    for grant in want.dropped_grants:
        if grant in there.grants:
            yield _of_grant(Action.DROP, grant), grant
    for member in want.dropped_members:
        if member in there.members:
            yield _of_member(Action.DROP, member), member
    for role in want.dropped_roles:
        if role in there.roles and role not in BUILT_IN_ROLES:
            yield _difference(Action.DROP, "role", role), role
    for name in want.dropped_privilege_groups:
        if name in there.privilege_groups:
            yield _difference(Action.DROP, "privilege group", name), name


def wish_items(wish: MetadataWish) -> frozenset[Hashable]:
    """Every single wish: what is in one version's and not in another's was changed in between."""
    items: set[Hashable] = set(wish.databases)
    items.update(
        (name, key, value) for name, pairs in wish.database_properties for key, value in pairs
    )
    items.update(wish.aliases)
    items.update(("alias", *place) for place in wish.dropped_aliases)
    rbac = wish.rbac or RbacWish()
    for action, payloads in (
        (Action.CREATE, (*rbac.users, *rbac.roles, *rbac.members, *rbac.grants)),
        (Action.CREATE, rbac.privilege_groups),
        (Action.DROP, (*rbac.dropped_roles, *rbac.dropped_members, *rbac.dropped_grants)),
        (Action.DROP, rbac.dropped_privilege_groups),
    ):
        items.update(rbac_item(action, payload) for payload in payloads)
    return frozenset(items)


def rbac_item(action: Action, payload: Hashable) -> Hashable:
    return (action is Action.DROP, payload)


def missing_users(want: RbacWish, there: RbacState) -> list[str]:
    return sorted(set(want.users) - there.users)


def asked_databases(want: RbacWish, role: str) -> tuple[str, ...]:
    """Where the grants of a role are to be looked for."""
    grants = (*want.grants, *want.dropped_grants)
    return tuple(sorted({grant.database for grant in grants if grant.role == role}))


def of_alias(want: AliasWish, found: str | None) -> ObjectDifference:
    """`found`: the collection that it stands for; None when it is not there."""
    action = Action.CREATE if found is None else Action.ALTER
    detail = f"for {want.collection}" + (f", not {found}" if found else "")
    return ObjectDifference(action, "alias", want.database, want.collection, want.alias, detail)


def _difference(action: Action, kind: str, name: str, detail: str = "") -> ObjectDifference:
    detail = detail or ("the source has it no more" if action is Action.DROP else "is missing")
    return ObjectDifference(action, kind, "", "", name, detail)


def _of_grant(action: Action, grant: RoleGrant) -> ObjectDifference:
    collection = grant.object_name if grant.object_type == "Collection" else ""
    detail = f"{grant.privilege} on {grant.object_type} {grant.object_name}"
    return ObjectDifference(action, "grant", grant.database, collection, grant.role, detail)


def _of_member(action: Action, member: tuple[str, str]) -> ObjectDifference:
    user, role = member
    return ObjectDifference(action, "member", "", "", role, f"user {user}")
