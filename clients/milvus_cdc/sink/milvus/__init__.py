"""Milvus as a sink in apply mode: the ordinary public API, so that the target stays writable and
serving.

Facts of the public API that this module keeps, seen on 2.3.5: creating an equal collection again
succeeds; a key twice in one Upsert is stored twice; `query` hides doubled keys and `count(*)` does
not; rows of a collection that is not loaded are counted nowhere before a flush; a name may be an
alias of another collection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from milvus_cdc.errors import (
    BugError,
    RetryableError,
    RowRefusedError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.milvus_client import MessageTooLargeError, MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import MilvusStatusError
from milvus_cdc.model import Carry, Collection
from milvus_cdc.sink import AnyBatch, CollectionTarget, DeleteBatch, Op, Opened, RowBatch
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.metadata import CredentialChange, MetadataDiff, MetadataWish
from milvus_cdc.sink.milvus import capabilities as able
from milvus_cdc.sink.milvus import requests
from milvus_cdc.sink.milvus import schema as schemas
from milvus_cdc.sink.milvus.aliases import Aliases
from milvus_cdc.sink.milvus.calls import DDL_SECONDS
from milvus_cdc.sink.milvus.metadata import Metadata
from milvus_cdc.sink.milvus.objects import Objects
from milvus_cdc.sink.milvus.renaming import rename
from milvus_cdc.sink.writer import Batch

__all__ = ["MilvusSink"]


class MilvusSink:
    """One Milvus; see the Sink protocol for what each call promises."""

    def __init__(self, uri: str, token: str | None = None) -> None:
        self._client = MilvusClient(uri, token)
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
        self._writers: dict[tuple[str, str], asyncio.Lock] = {}

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
        deadline = time.monotonic() + timeout_seconds
        known = await self.capabilities()
        if known.unsafe_in_keys:
            keys = batch.keys if isinstance(batch, DeleteBatch) else requests.keys_of(target, batch)
            known.check_keys(f"{target.database}.{target.collection}", keys)
        async with self._writing(known, target.database, target.collection):
            if isinstance(batch, DeleteBatch):
                await self._delete(known, target, batch, deadline)
                return
            if batch.op is Op.UPSERT and not known.upsert:
                batch = await self._make_room(known, target, batch, deadline)
            await self._write_rows(target, batch, deadline)

    def _writing(
        self, known: able.Capabilities, database: str, collection: str
    ) -> contextlib.AbstractAsyncContextManager[Any]:
        if not known.serial_writes:
            return contextlib.nullcontext()
        return self._writers.setdefault((database, collection), asyncio.Lock())

    async def _delete(
        self,
        known: able.Capabilities,
        target: requests.MilvusTarget,
        batch: DeleteBatch,
        deadline: float,
    ) -> None:
        for request in requests.delete_requests(target, batch, sums=known.constant_sums):
            await self._send("Delete", target, request, deadline)

    async def _make_room(
        self,
        known: able.Capabilities,
        target: requests.MilvusTarget,
        batch: RowBatch,
        deadline: float,
    ) -> RowBatch:
        """The rows of an upsert as inserts, once their keys are gone from the partition that an
        upsert would have looked in.

        Whatever ends this in between is repeated as an upsert, which begins with the deletes again:
        a delete takes only rows older than itself, so at the end each key is there once.
        """
        await self._delete(
            known, target, DeleteBatch(batch.partition, requests.keys_of(target, batch)), deadline
        )
        return RowBatch(Op.INSERT, batch.partition, batch.chunks)

    async def _write_rows(
        self, target: requests.MilvusTarget, batch: RowBatch, deadline: float
    ) -> None:
        waiting = requests.split_rows(batch, requests.REQUEST_BYTES_MAX)[::-1]
        written = False
        while waiting:
            part = waiting.pop()
            if not part.num_rows:
                continue
            try:
                await self._write_part(target, part, deadline)
            except MessageTooLargeError as error:
                halves = requests.halve_rows(part)
                if len(halves) == 1:
                    raise RowRefusedError(
                        "SINK_ROW_TOO_LARGE",
                        f"one row of {target.database}.{target.collection} exceeds what the sink "
                        f"takes ({error}); raise proxy.grpc.serverMaxRecvSize there",
                    ) from error
                waiting += halves[::-1]
            except UnknownOutcomeError:
                raise
            except MilvusStatusError as error:
                if error.reason != "SINK_REFUSED":
                    raise
                raise RowRefusedError(error.reason, error.message) from error
            except RetryableError as error:
                if written:
                    # An earlier part of the same batch is there already.
                    raise UnknownOutcomeError(error.reason, error.message) from error
                raise
            else:
                written = True

    async def _write_part(
        self, target: requests.MilvusTarget, part: RowBatch, deadline: float
    ) -> None:
        method = requests.method(part)
        answer = await self._send(method, target, requests.rows_request(target, part), deadline)
        done = answer.insert_cnt or answer.upsert_cnt
        if answer.err_index or done not in (0, part.num_rows):
            raise UnknownOutcomeError(
                "SINK_PARTIAL_WRITE",
                f"{method} into {target.database}.{target.collection}: the sink says that it took "
                f"{done} of {part.num_rows} rows",
            )

    async def _send(
        self, method: str, target: requests.MilvusTarget, request: bytes, deadline: float
    ) -> Any:
        # Taken last, so that the time to build the request counts.
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise RetryableError(
                "SINK_TIMEOUT",
                f"{method} into {target.database}.{target.collection}: no time left to send it",
            )
        return await self._client.write(method, request, timeout=timeout, database=target.database)


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
