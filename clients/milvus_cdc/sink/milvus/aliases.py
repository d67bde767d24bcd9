"""Aliases of a Milvus: what each stands for, and moving it.

Laws: a switch is one AlterAlias, so that whoever reads by the alias always finds it; an alias that
stands for the right collection is left alone.

Facts of 2.3.5, seen: dropping a collection leaves its alias, which DescribeAlias then does not
find and CreateAlias refuses as existing (1602), while AlterAlias moves it; renaming a collection
takes its aliases along; creating an equal alias and dropping a missing one succeed. 2.2 has no
DescribeAlias: there a collection described by the alias tells its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milvus_cdc.errors import UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink.metadata import AliasWish

ALIAS_NOT_FOUND = 1600
ALIAS_IS_COLLECTION = 1601
ALIAS_EXISTS = 1602
_SECONDS = 20.0


class Aliases:
    """Of one server."""

    def __init__(self, client: MilvusClient) -> None:
        self._client = client
        self._describes: bool | None = None

    async def find(self, database: str, alias: str) -> str | None:
        """The collection it stands for; None when there is no such alias, or none that is alive.

        Raises UserError SINK_UNSUPPORTED where the server knows no aliases.
        """
        if self._describes is False:
            return await self._find_by_collection(database, alias)
        request = milvus_pb2.DescribeAliasRequest(db_name=database, alias=alias)
        try:
            answer = await self._client.ask(
                "DescribeAlias", request, timeout=_SECONDS, database=database
            )
        except UserError as error:
            if error.reason != "SINK_UNSUPPORTED":
                raise
            self._describes = False
            return await self._find_by_collection(database, alias)
        except Refusal as refusal:
            if _missing(refusal):
                return None
            raise self._client.error(refusal) from refusal
        self._describes = True
        return str(answer.collection) or None

    async def _find_by_collection(self, database: str, alias: str) -> str | None:
        request = milvus_pb2.DescribeCollectionRequest(db_name=database, collection_name=alias)
        try:
            answer = await self._client.ask(
                "DescribeCollection", request, timeout=_SECONDS, database=database
            )
        except Refusal as refusal:
            if _missing(refusal):
                return None
            raise self._client.error(refusal) from refusal
        return str(answer.schema.name) if alias in answer.aliases else None

    async def put(self, wish: AliasWish, *, moves: bool) -> None:
        """Makes it stand for the collection; `moves`: it is there already.

        Raises UserError SINK_ALIAS_NAME_TAKEN when a collection has its name.
        """
        methods = ("AlterAlias", "CreateAlias") if moves else ("CreateAlias", "AlterAlias")
        try:
            await self._ask(methods[0], wish)
        except Refusal as first:
            if not (_exists(first) or _missing(first)):
                raise self._refused(first, wish) from first
            try:
                await self._ask(methods[1], wish)
            except Refusal as second:
                # The other way is closed too: what the first one said is what is wrong.
                raise self._refused(second if _missing(first) else first, wish) from second

    async def put_back(self, want: Collection, aliases: Sequence[str]) -> None:
        """They stand for a collection made anew, as they stood for the one before."""
        for alias in aliases:
            await self.put(AliasWish(want.database, alias, want.name), moves=True)

    async def drop(self, database: str, alias: str) -> None:
        """Succeeds when there is none."""
        request = milvus_pb2.DropAliasRequest(db_name=database, alias=alias)
        try:
            await self._client.ask("DropAlias", request, timeout=_SECONDS, database=database)
        except Refusal as refusal:
            if not _missing(refusal):
                raise self._client.error(refusal) from refusal

    async def _ask(self, method: str, wish: AliasWish) -> Any:
        request = getattr(milvus_pb2, f"{method}Request")(
            db_name=wish.database, collection_name=wish.collection, alias=wish.alias
        )
        return await self._client.ask(method, request, timeout=_SECONDS, database=wish.database)

    def _refused(self, refusal: Refusal, wish: AliasWish) -> Exception:
        if refusal.code == ALIAS_IS_COLLECTION or refusal.says("collection name conflict"):
            return UserError(
                "SINK_ALIAS_NAME_TAKEN",
                f"{wish.database}.{wish.alias} cannot become an alias of {wish.collection}: a "
                "collection of this name is at the sink; drop or rename it there",
            )
        return self._client.error(refusal)


def _missing(refusal: Refusal) -> bool:
    return (
        refusal.code == ALIAS_NOT_FOUND
        or refusal.not_found
        or refusal.says("alias not found", "aliased collection name", "alias does not exist")
        or (refusal.says("database") and refusal.says("not found"))
    )


def _exists(refusal: Refusal) -> bool:
    return refusal.code == ALIAS_EXISTS or refusal.says("already exist", "is alias to another")
