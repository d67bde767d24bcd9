"""Milvus as a sink in apply mode: the ordinary public API, so that the target stays writable and
serving.

Facts of the public API that this module keeps, seen on 2.3.5: creating an equal collection again
succeeds; a key twice in one Upsert is stored twice; `query` hides doubled keys and `count(*)` does
not; rows of a collection that is not loaded are counted nowhere before a flush; a name may be an
alias of another collection.
"""

from __future__ import annotations

import time
from typing import Any

from milvus_cdc.errors import BugError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_client import MessageTooLargeError, MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import DATABASE_NOT_FOUND
from milvus_cdc.model import Collection
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Opened, RowBatch
from milvus_cdc.sink.milvus import requests
from milvus_cdc.sink.milvus import schema as schemas
from milvus_cdc.sink.milvus.objects import DDL_SECONDS, Objects

__all__ = ["MilvusSink"]


class MilvusSink:
    """One Milvus; see the Sink protocol for what each call promises."""

    def __init__(self, uri: str, token: str | None = None) -> None:
        self._client = MilvusClient(uri, token)
        self._objects = Objects(self._client)

    async def close(self) -> None:
        await self._client.close()

    async def probe(self) -> str:
        answer = await self._client.call("GetVersion", milvus_pb2.GetVersionRequest())
        # Some versions tell their version to anybody; listing shows whether the token is taken.
        await self._client.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())
        return str(answer.version)

    # ---- databases

    async def ensure_database(self, database: str) -> None:
        if database in ("", "default"):
            return
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
        if database in ("", "default"):
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
            if not _no_database(refusal):
                raise self._client.error(refusal) from refusal

    async def _collections(self, database: str) -> list[str] | None:
        """None when there is no such database."""
        request = milvus_pb2.ShowCollectionsRequest(db_name=database)
        try:
            answer = await self._client.ask("ShowCollections", request, database=database)
        except Refusal as refusal:
            if _no_database(refusal):
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
    ) -> Opened:
        there = await self._describe(want)
        adopted = False
        if opened:
            there = _still_ours(want, there, sink_collection_id)
            schemas.check_fits(want, there.schema)
        else:
            if there is not None and recreate:
                await self._drop(want)
                there = None
            if there is None:
                there = await self._create(want)
            else:
                schemas.check_fits(want, there.schema)
                adopted = await self._may_hold_rows(want)
                if adopted and not adopt:
                    raise UserError(
                        "COLLECTION_EXISTS",
                        f"{want.full_name} exists at the sink and holds rows; drop it there, "
                        "exclude it from the task, or create the task with adoptExisting: true",
                    )
        await self._objects.create_partitions(want)
        return Opened(
            sink_collection_id=there.collectionID,
            adopted=adopted,
            conditions=schemas.conditions(want),
        )

    async def drop_collection(self, want: Collection, *, sink_collection_id: int) -> None:
        there = await self._describe(want)
        if there is not None and not _is_other(there, sink_collection_id):
            await self._drop(want)

    async def create_partition(self, want: Collection, partition: str) -> None:
        await self._objects.create_partition(want, partition)

    async def drop_partition(self, want: Collection, partition: str) -> None:
        await self._objects.drop_partition(want, partition)

    async def reconcile(self, want: Collection) -> None:
        await self._objects.reconcile(want)

    async def _describe(self, want: Collection) -> Any | None:
        """None when it does not exist, or its database."""
        request = milvus_pb2.DescribeCollectionRequest(
            db_name=want.database, collection_name=want.name
        )
        try:
            answer = await self._client.ask("DescribeCollection", request, database=want.database)
        except Refusal as refusal:
            if refusal.not_found or _no_database(refusal):
                return None
            raise self._client.error(refusal) from refusal
        if want.name in answer.aliases:
            raise UserError(
                "SINK_NAME_IS_ALIAS",
                f"{want.full_name} is an alias of another collection at the sink "
                f"({answer.schema.name!r}); drop the alias there or exclude the collection",
            )
        return answer

    async def _create(self, want: Collection) -> Any:
        await self._client.call(
            "CreateCollection",
            schemas.create_request(want),
            timeout=DDL_SECONDS,
            database=want.database,
        )
        there = await self._describe(want)
        if there is None:
            raise RetryableError(
                "SINK_COLLECTION_NOT_READY", f"{want.full_name} was created and is not there yet"
            )
        return there

    async def _drop(self, want: Collection) -> None:
        request = milvus_pb2.DropCollectionRequest(db_name=want.database, collection_name=want.name)
        try:
            await self._client.ask(
                "DropCollection", request, timeout=DDL_SECONDS, database=want.database
            )
        except Refusal as refusal:
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
        answer = await self._client.call(
            "Query",
            milvus_pb2.QueryRequest(
                **names,
                output_fields=["count(*)"],
                consistency_level=common_pb2.ConsistencyLevel.Strong,
            ),
            timeout=DDL_SECONDS,
            database=want.database,
        )
        return bool(answer.fields_data[0].scalars.long_data.data[0])

    # ---- rows

    def target(self, want: Collection) -> CollectionTarget:
        return requests.target_of(want)

    async def write(
        self, target: CollectionTarget, batch: RowBatch | DeleteBatch, timeout_seconds: float
    ) -> None:
        if not isinstance(target, requests.MilvusTarget):
            raise BugError("FOREIGN_TARGET", "a target of another sink")
        deadline = time.monotonic() + timeout_seconds
        if isinstance(batch, DeleteBatch):
            for request in requests.delete_requests(target, batch):
                await self._send("Delete", target, request, deadline)
        else:
            await self._write_rows(target, batch, deadline)

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
                    raise UserError(
                        "SINK_ROW_TOO_LARGE",
                        f"one row of {target.database}.{target.collection} exceeds what the sink "
                        f"takes ({error}); raise proxy.grpc.serverMaxRecvSize there",
                    ) from error
                waiting += halves[::-1]
            except UnknownOutcomeError:
                raise
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


def _still_ours(want: Collection, there: Any | None, sink_collection_id: int) -> Any:
    if there is None:
        raise UserError(
            "SINK_COLLECTION_MISSING",
            f"{want.full_name} is gone from the sink, its rows with it; "
            "`milvus-cdc task resync` fills it anew",
        )
    if _is_other(there, sink_collection_id):
        raise UserError(
            "SINK_COLLECTION_REPLACED",
            f"{want.full_name} at the sink is not the collection this task made; "
            "`milvus-cdc task resync` replaces it",
        )
    return there


def _is_other(there: Any, sink_collection_id: int) -> bool:
    """Ids differ, where both are told."""
    return bool(
        sink_collection_id and there.collectionID and there.collectionID != sink_collection_id
    )


def _no_database(refusal: Refusal) -> bool:
    """2.3 says 65535 "database:NAME not found", later versions 800."""
    return refusal.code == DATABASE_NOT_FOUND or (
        refusal.says("database") and refusal.says("not found") and not refusal.says("collection")
    )


def _not_empty(database: str, what: str) -> UserError:
    return UserError(
        "SINK_DATABASE_NOT_EMPTY",
        f"database {database!r} was dropped at the source, but holds {what} at the sink; drop them "
        "there if they are not needed",
    )
