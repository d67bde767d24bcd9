"""What belongs to no collection in the sink in memory, for tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any

from milvus_cdc.errors import CdcError, UserError
from milvus_cdc.sink.differences import Action, ObjectDifference, database_difference
from milvus_cdc.sink.metadata import (
    CredentialAction,
    CredentialChange,
    MetadataDiff,
    MetadataWish,
    RbacState,
    Repair,
    missing_users,
    of_alias,
    rbac_differences,
    rbac_item,
)


class MemoryMetadata:
    """Databases are the sink's; `refuse` makes mending one object fail, by (kind, name)."""

    def __init__(
        self,
        collections: Callable[[str], list[str] | None],
        ensure_database: Callable[[str], Awaitable[None]],
        drop_database: Callable[[str], Awaitable[None]],
    ) -> None:
        self._collections = collections
        self._ensure_database = ensure_database
        self._drop_database = drop_database
        self.aliases: dict[tuple[str, str], str] = {}
        """(database, alias) -> collection."""
        self.properties: dict[str, dict[str, str]] = {}
        self.rbac = RbacState(users={"root"}, roles={"admin", "public"})
        self.changes: list[ObjectDifference] = []
        """Everything that was mended, in that order."""
        self.credentials: list[CredentialChange] = []
        self.refuse: dict[tuple[str, str], CdcError] = {}

    def look(self, wish: MetadataWish) -> MetadataDiff:
        diff = MetadataDiff()

        def add(difference: ObjectDifference, item: Hashable, do: Callable[[], Any]) -> None:
            diff.repairs.append(Repair(difference, partial(self._mend, difference, do), item))

        for name, dropped in sorted(wish.databases, key=lambda each: each[1]):
            there = self._collections(name) is not None
            if there is dropped and not dropped:
                made = database_difference(Action.CREATE, name, "is missing")
                add(made, (name, False), partial(self._ensure_database, name))
        for name, properties in wish.database_properties:
            held = self.properties.setdefault(name, {})
            for key, value in properties:
                if held.get(key) != value:
                    changed = ObjectDifference(Action.ALTER, "property", name, "", key, value)
                    add(changed, (name, key, value), partial(held.__setitem__, key, value))
        for alias in wish.aliases:
            place = alias.database, alias.alias
            found = self.aliases.get(place)
            if found != alias.collection:
                put = partial(self._put_alias, place, alias.collection)
                add(of_alias(alias, found), alias, put)
        for place in wish.dropped_aliases:
            if place in self.aliases:
                gone = ObjectDifference(
                    Action.DROP, "alias", place[0], self.aliases[place], place[1], "dropped"
                )
                add(gone, ("alias", *place), partial(self.aliases.pop, place, None))
        if wish.rbac is not None:
            for difference, payload in rbac_differences(wish.rbac, self.rbac):
                item = rbac_item(difference.action, payload)
                add(difference, item, partial(self._change_rbac, difference, payload))
            for user in missing_users(wish.rbac, self.rbac):
                needed = ObjectDifference(Action.CREATE, "user", "", "", user, "is missing")
                diff.repairs.append(Repair(needed, None, rbac_item(Action.CREATE, user)))
                diff.conditions.append(("CREDENTIAL_NEEDED", f"User {user!r} is not at the sink."))
        for name, dropped in wish.databases:
            if dropped and self._collections(name) is not None:
                gone = database_difference(Action.DROP, name, "the source dropped it")
                add(gone, (name, True), partial(self._drop_database, name))
        return diff

    async def _mend(self, difference: ObjectDifference, do: Callable[[], Any]) -> None:
        refused = self.refuse.get((difference.kind, difference.name))
        if refused is not None:
            raise refused
        answer = do()
        if isinstance(answer, Awaitable):
            await answer
        self.changes.append(difference)

    def _put_alias(self, place: tuple[str, str], collection: str) -> None:
        held = self._collections(place[0]) or []
        if place[1] in held:
            raise UserError("SINK_ALIAS_NAME_TAKEN", f"{place[1]} is a collection")
        if collection not in held:
            raise UserError("SINK_COLLECTION_MISSING", f"{collection} is not there")
        self.aliases[place] = collection

    def _change_rbac(self, difference: ObjectDifference, payload: Any) -> None:
        drops = difference.action is Action.DROP
        if difference.kind == "privilege group":
            if drops:
                self.rbac.privilege_groups.pop(payload, None)
            else:
                self.rbac.privilege_groups[payload[0]] = set(payload[1])
            return
        held: dict[str, set[Any]] = {
            "role": self.rbac.roles,
            "grant": self.rbac.grants,
            "member": self.rbac.members,
        }
        (held[difference.kind].discard if drops else held[difference.kind].add)(payload)

    def change_credential(self, change: CredentialChange) -> None:
        self.credentials.append(change)
        if change.action is CredentialAction.DELETE:
            self.rbac.users.discard(change.user)
        else:
            self.rbac.users.add(change.user)
