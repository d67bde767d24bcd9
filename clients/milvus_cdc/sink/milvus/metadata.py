"""Looks at what belongs to no collection (databases, aliases, roles) and says how to mend it.

Laws: a look changes nothing; what cannot be looked at or held hides nothing else; what this server
cannot hold at all is a condition, not an error that lasts for ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

from milvus_cdc.errors import CdcError
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import RoleGrant
from milvus_cdc.sink.differences import Action, ObjectDifference, database_difference
from milvus_cdc.sink.metadata import (
    MetadataDiff,
    MetadataWish,
    Payload,
    RbacWish,
    Repair,
    Trouble,
    missing_users,
    of_alias,
    rbac_differences,
    rbac_item,
)
from milvus_cdc.sink.milvus.aliases import Aliases
from milvus_cdc.sink.milvus.rbac import AccessControl, unsupported

_SECONDS = 20.0
CREDENTIAL_NEEDED = "CREDENTIAL_NEEDED"


class Metadata:
    """Of one server."""

    def __init__(
        self,
        client: MilvusClient,
        aliases: Aliases,
        *,
        has_database: Callable[[str], Awaitable[bool]],
        ensure_database: Callable[[str], Awaitable[None]],
        drop_database: Callable[[str], Awaitable[None]],
    ) -> None:
        self._client = client
        self._has_database = has_database
        self._ensure_database = ensure_database
        self._drop_database = drop_database
        self._aliases = aliases
        self.access = AccessControl(client)

    async def look(self, wish: MetadataWish) -> MetadataDiff:
        diff = MetadataDiff()
        await self._databases(wish, diff, dropped=False)
        await self._properties(wish, diff)
        await self._look_at_aliases(wish, diff)
        if wish.rbac is not None:
            await self._rbac(wish.rbac, diff)
        # Last, because a database goes only when nothing is left in it.
        await self._databases(wish, diff, dropped=True)
        return diff

    async def _databases(self, wish: MetadataWish, diff: MetadataDiff, *, dropped: bool) -> None:
        for name, is_dropped in wish.databases:
            if is_dropped is not dropped:
                continue
            try:
                there = await self._has_database(name)
            except CdcError as error:
                diff.troubles.append(Trouble("database", name, error))
                continue
            if there is dropped:
                action = Action.DROP if dropped else Action.CREATE
                detail = "the source dropped it" if dropped else "is missing"
                mend = self._drop_database if dropped else self._ensure_database
                diff.repairs.append(
                    Repair(
                        database_difference(action, name, detail),
                        partial(mend, name),
                        (name, dropped),
                    )
                )

    async def _properties(self, wish: MetadataWish, diff: MetadataDiff) -> None:
        """Milvus 2.4 and later, from its source; unproved on a server."""
        for name, properties in wish.database_properties:
            request = milvus_pb2.DescribeDatabaseRequest(db_name=name)
            try:
                if not await self._has_database(name):
                    there: dict[str, str] = {}
                else:
                    answer = await self._client.call(
                        "DescribeDatabase", request, timeout=_SECONDS, database=name
                    )
                    there = {pair.key: pair.value for pair in answer.properties}
            except CdcError as error:
                if not unsupported(error):
                    diff.troubles.append(Trouble("property", name, error))
                    continue
                diff.conditions.append(
                    (
                        "DATABASE_PROPERTIES_NOT_CARRIED",
                        f"The sink cannot hold properties of databases; those of {name!r} are "
                        "left out.",
                    )
                )
                continue
            for key, value in properties:
                if there.get(key) == value:
                    continue
                action = Action.ALTER if key in there else Action.CREATE
                detail = f"is {there[key]!r}" if key in there else "is unset"
                difference = ObjectDifference(
                    action, "property", name, "", key, f"{detail}, wanted is {value!r}"
                )
                alter = partial(self._alter, name, key, value)
                diff.repairs.append(Repair(difference, alter, (name, key, value)))

    async def _alter(self, database: str, key: str, value: str) -> None:
        request = milvus_pb2.AlterDatabaseRequest(
            db_name=database, properties=[common_pb2.KeyValuePair(key=key, value=value)]
        )
        await self._client.call("AlterDatabase", request, timeout=_SECONDS, database=database)

    async def _look_at_aliases(self, wish: MetadataWish, diff: MetadataDiff) -> None:
        for alias in wish.aliases:
            try:
                found = await self._aliases.find(alias.database, alias.alias)
            except CdcError as error:
                if unsupported(error):
                    diff.conditions.append(_no_aliases(wish))
                    return
                diff.troubles.append(Trouble("alias", alias.alias, error))
                continue
            if found != alias.collection:
                mend = partial(self._aliases.put, alias, moves=found is not None)
                diff.repairs.append(Repair(of_alias(alias, found), mend, alias))
        for database, name in wish.dropped_aliases:
            try:
                found = await self._aliases.find(database, name)
            except CdcError as error:
                if unsupported(error):
                    return
                diff.troubles.append(Trouble("alias", name, error))
                continue
            if found is not None:
                difference = ObjectDifference(
                    Action.DROP, "alias", database, found, name, "the source has it no more"
                )
                drop = partial(self._aliases.drop, database, name)
                diff.repairs.append(Repair(difference, drop, ("alias", database, name)))

    async def _rbac(self, wish: RbacWish, diff: MetadataDiff) -> None:
        try:
            there = await self.access.look(wish)
        except CdcError as error:
            if unsupported(error):
                diff.conditions.append(("RBAC_NOT_CARRIED", f"The sink: {error.message}"))
            else:
                diff.troubles.append(Trouble("role", "", error))
            return
        for difference, payload in rbac_differences(wish, there):
            item = rbac_item(difference.action, payload)
            diff.repairs.append(Repair(difference, self._mend(difference, payload), item))
        for user in missing_users(wish, there):
            difference = ObjectDifference(
                Action.CREATE, "user", "", "", user, "is missing; its password is not known"
            )
            diff.repairs.append(Repair(difference, None, rbac_item(Action.CREATE, user)))
            diff.conditions.append(credential_needed(user, self._client.uri))

    def _mend(
        self, difference: ObjectDifference, payload: Payload
    ) -> Callable[[], Awaitable[None]]:
        drops = difference.action is Action.DROP
        access = self.access
        match difference.kind:
            case "role":
                return partial(access.drop_role if drops else access.create_role, str(payload))
            case "grant":
                return partial(access.operate_grant, cast("RoleGrant", payload), revoke=drops)
            case "member":
                user, role = cast("tuple[str, str]", payload)
                return partial(access.operate_member, user, role, remove=drops)
            case _ if drops:
                return partial(access.drop_group, str(payload))
            case _:
                name, privileges = cast("tuple[str, tuple[str, ...]]", payload)
                return partial(access.put_group, name, privileges)


def credential_needed(user: str, uri: str) -> tuple[str, str]:
    return (
        CREDENTIAL_NEEDED,
        f"User {user!r} is not at the sink, and the source keeps only a hash of the password. "
        f"Create it: milvus-cdc sink create-user --uri {uri} --user {user}",
    )


def _no_aliases(wish: MetadataWish) -> tuple[str, str]:
    names = ", ".join(f"{each.database}.{each.alias}" for each in wish.aliases[:5])
    more = f" and {len(wish.aliases) - 5} more" if len(wish.aliases) > 5 else ""
    return ("ALIASES_NOT_CARRIED", f"The sink knows no aliases; left out: {names}{more}.")
