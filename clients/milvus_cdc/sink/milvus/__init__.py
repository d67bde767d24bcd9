"""Milvus as a sink in apply mode: the ordinary public API, so that the target stays writable and
serving.

Facts of the public API that this module keeps, seen on 2.3.5: creating an equal collection again
succeeds; a key twice in one Upsert is stored twice; `query` hides doubled keys and `count(*)` does
not; rows of a collection that is not loaded are counted nowhere before a flush; a name may be an
alias of another collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from milvus_cdc.errors import (
    BugError,
    RetryableError,
    UserError,
)
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Carry, Collection
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import AnyBatch, CollectionTarget, Copies, Opened
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.milvus import capabilities as able
from milvus_cdc.sink.milvus import requests
from milvus_cdc.sink.milvus import schema as schemas
from milvus_cdc.sink.milvus.aliases import Aliases
from milvus_cdc.sink.milvus.calls import DDL_SECONDS
from milvus_cdc.sink.milvus.copies import copies
from milvus_cdc.sink.milvus.metadata import Metadata
from milvus_cdc.sink.milvus.objects import Objects
from milvus_cdc.sink.milvus.renaming import rename
from milvus_cdc.sink.milvus.writing import RowWriter
from milvus_cdc.sink.writer import Batch

__all__ = ["MilvusSink"]


class MilvusSink:
    """One Milvus; see the Sink protocol for what each call promises."""

    def __init__(self, to: str | MilvusClient, token: str | None = None) -> None:
        """`to`: an address, or a client, which is closed with this."""
        self._client = MilvusClient(to, token) if isinstance(to, str) else to
        self._capabilities: able.Capabilities | None = None
        self._objects = Objects(self._client, self.capabilities)
        self._aliases = Aliases(self._client)
        self._metadata = Metadata(
            self._client,
            self._aliases,
            has_database=self._has_database,
            ensure_database=self.ensure_database,
            drop_database=self.drop_database,
        )
        self._rows = RowWriter(self._client, self.capabilities)

    def use_token(self, token: str | None) -> None:
        """From the next call on."""
        self._client.use_token(token)

    async def heartbeat(self, target: CollectionTarget, resolved_ts: int) -> None:
        """Its own clock goes on by itself."""

    async def release(self, target: CollectionTarget) -> None:
        """It holds nothing for a collection."""

    async def close(self) -> None:
        await self._client.close()

    async def capabilities(self) -> able.Capabilities:
        """Asked for once in the life of this object."""
        if self._capabilities is None:
            self._capabilities = await able.ask(self._client)
        return self._capabilities

    async def probe(self) -> str:
        # Another server may have taken the place of the one that was asked.
        self._capabilities = None
        known = await self.capabilities()
        # Some versions tell their version to anybody; listing shows whether the token is taken.
        await self._client.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())
        return known.version or known.name

    async def violations(self, want: Collection, *, indexes: bool) -> list[str]:
        return (await self.capabilities()).violations(want, indexes=indexes)

    # ---- databases

    async def ensure_database(self, database: str) -> None:
        if database in ("", "default"):
            return
        if not (known := await self.capabilities()).databases:
            raise UserError(
                "UNSUPPORTED_BY_SINK",
                f"database {database!r}: {known.name} has one namespace only; map its collections "
                f"to default ({database}.* -> default.{database}_*)",
            )
        # Looked for first: a user who may write to a database need not be allowed to create one.
        if await self._collections(database) is not None:
            return
        request = milvus_pb2.CreateDatabaseRequest(db_name=database)
        try:
            await self._client.ask("CreateDatabase", request, timeout=DDL_SECONDS)
        except Refusal as refusal:
            if not refusal.says("already exist"):
                raise self._client.error(refusal) from refusal

    async def drop_database(self, database: str) -> None:
        if database in ("", "default") or not (await self.capabilities()).databases:
            return
        held = await self._collections(database)
        if held is None:
            return
        if held:
            raise _not_empty(database, f"{len(held)} collections, for example {sorted(held)[0]!r}")
        request = milvus_pb2.DropDatabaseRequest(db_name=database)
        try:
            await self._client.ask("DropDatabase", request, timeout=DDL_SECONDS)
        except Refusal as refusal:
            if refusal.says("not empty"):
                raise _not_empty(database, "collections") from refusal
            if not refusal.no_database:
                raise self._client.error(refusal) from refusal

    async def _has_database(self, database: str) -> bool:
        return await self._collections(database) is not None

    async def _collections(self, database: str) -> list[str] | None:
        """None when there is no such database."""
        request = milvus_pb2.ShowCollectionsRequest(db_name=database)
        try:
            answer = await self._client.ask("ShowCollections", request, database=database)
        except Refusal as refusal:
            if refusal.no_database:
                return None
            raise self._client.error(refusal) from refusal
        return list(answer.collection_names)

    # ---- collections

    async def open_collection(
        self,
        want: Collection,
        *,
        opened: bool,
        adopt: bool,
        recreate: bool,
        sink_collection_id: int,
        create: bool = True,
    ) -> Opened:
        known = await self.capabilities()
        known.check(want)
        adopted = False
        if opened:
            there = await self._objects.insist(want, sink_collection_id)
            schemas.check_fits(want, there.schema)
        else:
            there = await self._objects.describe(want)
            if there is None and not create:
                raise UserError(
                    "SINK_COLLECTION_MISSING",
                    f"{want.full_name} is not at the sink, and this task does not carry `schema`; "
                    "create it there, then `milvus-cdc task retry`",
                )
            aliases: Sequence[str] = ()
            if there is not None and recreate and create:
                aliases, there = there.aliases, None
                await self._drop(want, aliases)
            if there is None:
                there = await self._create(want)
                await self._aliases.put_back(want, aliases)
            else:
                schemas.check_fits(want, there.schema)
                adopted = await self._may_hold_rows(want)
                if adopted and not adopt:
                    raise UserError(
                        "COLLECTION_EXISTS",
                        f"{want.full_name} exists at the sink and holds rows; drop it there, "
                        "exclude it from the task, or create the task with adoptExisting: true",
                    )
        made = await self._objects.create_partitions(want) if create else ()
        return Opened(
            sink_collection_id=there.collectionID,
            adopted=adopted,
            conditions=schemas.conditions(want),
            created_partitions=made,
            writes_in_flight=1 if known.serial_writes else 0,
            late_writes=True,
        )

    async def drop_collection(
        self, want: Collection, *, sink_collection_id: int, ts: int = 0
    ) -> None:
        there = await self._objects.describe(want)
        if there is not None and not _is_other(there, sink_collection_id):
            await self._drop(want)

    async def rename_collection(
        self,
        want: Collection,
        *,
        renamed_from: tuple[str, str],
        sink_collection_id: int,
        ts: int = 0,
    ) -> None:
        known = await self.capabilities()
        await rename(self._client, self._objects, known, want, renamed_from, sink_collection_id)

    async def create_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._objects.create_partition(want, partition)

    async def drop_partition(self, want: Collection, partition: str, *, ts: int = 0) -> None:
        await self._objects.drop_partition(want, partition)

    async def diff(
        self, want: Collection, carry: Carry, *, sink_collection_id: int = 0
    ) -> tuple[ObjectDifference, ...]:
        return await self._objects.diff(want, carry, sink_collection_id)

    async def repair(
        self, want: Collection, difference: ObjectDifference, *, sink_collection_id: int = 0
    ) -> None:
        await self._objects.repair(want, difference, sink_collection_id)

    async def look_at_metadata(self, wish: MetadataWish) -> MetadataDiff:
        return await self._metadata.look(wish)

    async def diff_metadata(self, wish: MetadataWish) -> tuple[ObjectDifference, ...]:
        diff = await self._metadata.look(wish)
        for trouble in diff.troubles:
            raise trouble.error
        return tuple(repair.difference for repair in diff.repairs)

    async def change_credential(self, change: CredentialChange) -> None:
        await self._metadata.access.change_credential(change)

    async def flush(self, want: Collection) -> None:
        request = milvus_pb2.FlushRequest(db_name=want.database, collection_names=[want.name])
        await self._client.call("Flush", request, timeout=DDL_SECONDS, database=want.database)

    async def _create(self, want: Collection) -> Any:
        await self._client.call(
            "CreateCollection",
            schemas.create_request(want),
            timeout=DDL_SECONDS,
            database=want.database,
        )
        there = await self._objects.describe(want)
        if there is None:
            raise RetryableError(
                "SINK_COLLECTION_NOT_READY", f"{want.full_name} was created and is not there yet"
            )
        return there

    async def _drop(self, want: Collection, aliases: Sequence[str] = ()) -> None:
        """Those `aliases` go first where the server wants it so."""
        request = milvus_pb2.DropCollectionRequest(db_name=want.database, collection_name=want.name)
        try:
            await self._client.ask(
                "DropCollection", request, timeout=DDL_SECONDS, database=want.database
            )
        except Refusal as refusal:
            if refusal.says("alias") and aliases:
                for alias in aliases:
                    await self._aliases.drop(want.database, alias)
                return await self._drop(want)
            if refusal.says("alias"):
                raise UserError(
                    "SINK_HAS_ALIASES",
                    f"{want.full_name} at the sink cannot be dropped: {refusal.text}; drop or move "
                    "the alias there",
                ) from refusal
            if not refusal.not_found:
                raise self._client.error(refusal) from refusal

    async def _may_hold_rows(self, want: Collection) -> bool:
        """False only when it is certainly empty.

        A flush seals growing segments and names them and those sealed before, so no segment means
        no row, loaded or not. Segments may hold deleted rows only: a loaded collection is counted.
        """
        names = {"db_name": want.database, "collection_name": want.name}
        flushed = await self._client.call(
            "Flush",
            milvus_pb2.FlushRequest(db_name=want.database, collection_names=[want.name]),
            timeout=DDL_SECONDS,
            database=want.database,
        )
        sealed = flushed.coll_segIDs[want.name].data
        older = flushed.flush_coll_segIDs[want.name].data
        if not sealed and not older:
            statistics = await self._client.call(
                "GetCollectionStatistics",
                milvus_pb2.GetCollectionStatisticsRequest(**names),
                database=want.database,
            )
            return any(p.key == "row_count" and p.value != "0" for p in statistics.stats)
        if not await self._objects.is_loaded(want):
            return True
        counts = (await self.capabilities()).count
        key = schemas.key_field(schemas.parse(want)).name
        answer = await self._client.call(
            "Query",
            milvus_pb2.QueryRequest(
                **names,
                expr="" if counts else requests.any_key(want),
                output_fields=["count(*)" if counts else key],
                query_params=[] if counts else [common_pb2.KeyValuePair(key="limit", value="1")],
                consistency_level=common_pb2.ConsistencyLevel.Strong,
            ),
            timeout=DDL_SECONDS,
            database=want.database,
        )
        if counts:
            return bool(answer.fields_data[0].scalars.long_data.data[0])
        return any(
            column.scalars.long_data.data or column.scalars.string_data.data
            for column in answer.fields_data
        )

    # ---- rows

    def target(self, want: Collection) -> CollectionTarget:
        return requests.target_of(want)

    async def write(
        self, target: CollectionTarget, batch: AnyBatch, timeout_seconds: float
    ) -> None:
        if not isinstance(target, requests.MilvusTarget) or isinstance(batch, Batch):
            raise BugError("FOREIGN_TARGET", "a target or batch of another sink")
        await self._rows.write(target, batch, timeout_seconds)

    async def copies(
        self, target: CollectionTarget, partition: str, keys: Sequence[Key]
    ) -> Copies | None:
        return await copies(self._client, await self.capabilities(), target, partition, keys)


def _is_other(there: Any, sink_collection_id: int) -> bool:
    """Ids differ, where both are told."""
    return bool(
        sink_collection_id and there.collectionID and there.collectionID != sink_collection_id
    )


def _not_empty(database: str, what: str) -> UserError:
    return UserError(
        "SINK_DATABASE_NOT_EMPTY",
        f"database {database!r} was dropped at the source, but holds {what} at the sink; drop them "
        "there if they are not needed",
    )
