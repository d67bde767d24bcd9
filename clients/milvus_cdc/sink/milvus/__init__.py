"""Milvus as a sink in apply mode: the ordinary public API, so the target stays writable and
serving.

Facts of the public API that this module keeps were seen on 2.3.5: creating an equal collection
again succeeds, a key twice in one Upsert is stored twice, `query` hides doubled keys and `count(*)`
does not.
"""

from __future__ import annotations

import time
from typing import Any

import grpc

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_client import MilvusClient, MilvusStatusError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, Opened, RowBatch
from milvus_cdc.sink.milvus import schema as schemas
from milvus_cdc.sink.milvus.objects import DDL_SECONDS, Objects
from milvus_cdc.sink.milvus.writing import delete_expressions, row_requests

AUTO_ID_KEYS = (
    "AUTO_ID_KEYS",
    "the source assigns keys itself; the sink's key field takes them as they are (autoID off). After "
    "a failover writers must bring keys of their own",
)
_CODE_DATABASE_EXISTS_TEXT = "already exist"
_NO_DATABASE_CODES = (800,)


class MilvusSink:
    """One Milvus; see the Sink protocol for what each call promises."""

    def __init__(self, uri: str, token: str | None = None) -> None:
        self._client = MilvusClient(uri, token)
        self._objects = Objects(self._client)
        serialize = _serialize
        self._insert = self._client.raw("Insert", serialize, milvus_pb2.MutationResult.FromString)
        self._upsert = self._client.raw("Upsert", serialize, milvus_pb2.MutationResult.FromString)
        self._delete = self._client.raw(
            "Delete",
            milvus_pb2.DeleteRequest.SerializeToString,
            milvus_pb2.MutationResult.FromString,
        )
        self._defaults: dict[tuple[str, str], frozenset[int]] = {}

    async def probe(self) -> str:
        answer = await self._client.call("GetVersion", milvus_pb2.GetVersionRequest())
        # GetVersion needs no rights; listing shows whether the token is taken.
        await self._client.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())
        return str(answer.version)

    async def ensure_database(self, database: str) -> None:
        if database in ("", "default"):
            return
        try:
            await self._client.call(
                "CreateDatabase",
                milvus_pb2.CreateDatabaseRequest(db_name=database),
                timeout=DDL_SECONDS,
            )
        except MilvusStatusError as error:
            if _CODE_DATABASE_EXISTS_TEXT not in error.message.lower():
                raise

    async def drop_database(self, database: str) -> None:
        if database in ("", "default") or database not in await self._databases():
            return
        shown = await self._client.call(
            "ShowCollections", milvus_pb2.ShowCollectionsRequest(db_name=database)
        )
        if shown.collection_names:
            raise UserError(
                "SINK_DATABASE_NOT_EMPTY",
                f"database {database!r} was dropped at the source, but holds "
                f"{sorted(shown.collection_names)[:5]} at the sink; drop them there if they are not needed",
            )
        await self._client.call(
            "DropDatabase", milvus_pb2.DropDatabaseRequest(db_name=database), timeout=DDL_SECONDS
        )

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
        if opened:
            if there is None:
                raise UserError(
                    "SINK_COLLECTION_MISSING",
                    f"{want.full_name} is gone from the sink, its rows with it; `milvus-cdc task resync` fills it anew",
                )
            if (
                sink_collection_id
                and there.collectionID
                and there.collectionID != sink_collection_id
            ):
                raise UserError(
                    "SINK_COLLECTION_REPLACED",
                    f"{want.full_name} at the sink is not the collection this task made; "
                    "`milvus-cdc task resync` replaces it",
                )
        elif there is not None and recreate:
            await self._drop(want)
            there = None
        adopted = False
        if there is None:
            await self._create(want)
            there = await self._describe(want)
            if there is None:
                raise RetryableError(
                    "SINK_COLLECTION_NOT_READY",
                    f"{want.full_name} was created and is not there yet",
                )
        else:
            schemas.check_fits(want, there.schema)
            if not opened and await self._may_hold_rows(want):
                if not adopt:
                    raise UserError(
                        "COLLECTION_EXISTS",
                        f"{want.full_name} exists at the sink and holds rows; drop it, exclude it from the "
                        "task, or create the task with adoptExisting: true",
                    )
                adopted = True
        await self._objects.create_partitions(want)
        auto_id = schemas.is_auto_id(schemas.parse(want))
        return Opened(
            sink_collection_id=there.collectionID,
            adopted=adopted,
            conditions=(AUTO_ID_KEYS,) if auto_id else (),
        )

    async def drop_collection(self, want: Collection, *, sink_collection_id: int) -> None:
        there = await self._describe(want)
        if there is None:
            return
        if sink_collection_id and there.collectionID and there.collectionID != sink_collection_id:
            return
        await self._drop(want)

    async def create_partition(self, want: Collection, partition: str) -> None:
        await self._objects.create_partition(want, partition)

    async def drop_partition(self, want: Collection, partition: str) -> None:
        await self._objects.drop_partition(want, partition)

    async def reconcile(self, want: Collection) -> None:
        await self._objects.reconcile(want)

    def target(self, want: Collection) -> CollectionTarget:
        parsed = schemas.parse(want)
        self._defaults[(want.database, want.name)] = frozenset(
            f.fieldID for f in parsed.fields if f.HasField("default_value")
        )
        return CollectionTarget(
            database=want.database,
            collection=want.name,
            key_field=schemas.key_field(parsed).name,
            partition_key=schemas.has_partition_key(parsed),
        )

    async def write(
        self, target: CollectionTarget, batch: RowBatch | DeleteBatch, timeout_seconds: float
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        if isinstance(batch, DeleteBatch):
            for expression in delete_expressions(target, batch):
                request = milvus_pb2.DeleteRequest(
                    db_name=target.database,
                    collection_name=target.collection,
                    partition_name="" if target.partition_key else batch.partition,
                    expr=expression,
                )
                await self._send("Delete", self._delete, request, deadline)
            return
        method = "Insert" if batch.op is Op.INSERT else "Upsert"
        call = self._insert if batch.op is Op.INSERT else self._upsert
        marked = self._defaults.get((target.database, target.collection), frozenset())
        sent = 0
        for request in row_requests(target, batch, marked):
            try:
                answer = await self._send(method, call, request, deadline)
            except UnknownOutcomeError:
                raise
            except RetryableError as error:
                if sent:
                    # An earlier part of this batch is there already.
                    raise UnknownOutcomeError(error.reason, error.message) from error
                raise
            sent += 1
            done = answer.insert_cnt or answer.upsert_cnt
            if answer.err_index or done not in (0, request.num_rows):
                raise UnknownOutcomeError(
                    "SINK_PARTIAL_WRITE",
                    f"{method} into {target.database}.{target.collection}: {done} of {request.num_rows} rows",
                )

    async def close(self) -> None:
        await self._client.close()

    async def _send(self, method: str, call: Any, request: Any, deadline: float) -> Any:
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise RetryableError(
                "SINK_TIMEOUT", f"{method}: no time left for the rest of the batch"
            )
        try:
            answer = await call(request, timeout=timeout, metadata=self._client.metadata)
        except grpc.aio.AioRpcError as error:
            raise self._client.rpc_error(method, error, write=True) from error
        status = answer.status
        if status.code or status.error_code:
            error_of: CdcError = self._client.status_error(method, status)
            if isinstance(error_of, RetryableError) and not error_of.reason.endswith(
                ("RATE_LIMITED", "QUOTA")
            ):
                # The server failed on its way; some shards may have taken their rows.
                raise UnknownOutcomeError(error_of.reason, error_of.message)
            raise error_of
        return answer

    async def _describe(self, want: Collection) -> Any | None:
        try:
            return await self._client.call(
                "DescribeCollection",
                milvus_pb2.DescribeCollectionRequest(
                    db_name=want.database, collection_name=want.name
                ),
            )
        except MilvusStatusError as error:
            if error.reason == "SINK_COLLECTION_MISSING" or error.code in _NO_DATABASE_CODES:
                return None
            if "database not found" in error.message.lower():
                return None
            raise

    async def _databases(self) -> list[str]:
        answer = await self._client.call("ListDatabases", milvus_pb2.ListDatabasesRequest())
        return list(answer.db_names)

    async def _create(self, want: Collection) -> None:
        schema = schemas.sink_schema(want)
        partition_key = schemas.has_partition_key(schema)
        request = milvus_pb2.CreateCollectionRequest(
            db_name=want.database,
            collection_name=want.name,
            schema=schema.SerializeToString(),
            shards_num=want.shards,
            consistency_level=want.consistency_level,
            properties=[common_pb2.KeyValuePair(key=k, value=v) for k, v in want.properties],
            num_partitions=len(want.partitions) if partition_key else 0,
        )
        await self._client.call("CreateCollection", request, timeout=DDL_SECONDS)

    async def _drop(self, want: Collection) -> None:
        await self._client.call(
            "DropCollection",
            milvus_pb2.DropCollectionRequest(db_name=want.database, collection_name=want.name),
            timeout=DDL_SECONDS,
        )

    async def _may_hold_rows(self, want: Collection) -> bool:
        """False only when it is certainly empty. A loaded collection counts; in one that is not
        loaded growing rows count nowhere, so they are flushed first.
        """
        names = {"db_name": want.database, "collection_name": want.name}
        state = await self._client.call(
            "GetLoadState",
            milvus_pb2.GetLoadStateRequest(**names),
        )
        if state.state == common_pb2.LoadStateLoaded:
            answer = await self._client.call(
                "Query",
                milvus_pb2.QueryRequest(
                    **names,
                    output_fields=["count(*)"],
                    consistency_level=common_pb2.Strong,
                ),
                timeout=DDL_SECONDS,
            )
            count: int = answer.fields_data[0].scalars.long_data.data[0]
            return count > 0
        flushed = await self._client.call(
            "Flush",
            milvus_pb2.FlushRequest(db_name=want.database, collection_names=[want.name]),
            timeout=DDL_SECONDS,
        )
        segments = flushed.coll_segIDs[want.name].data
        if segments:
            return True
        statistics = await self._client.call(
            "GetCollectionStatistics", milvus_pb2.GetCollectionStatisticsRequest(**names)
        )
        rows = {p.key: p.value for p in statistics.stats}.get("row_count", "0")
        return rows != "0"


def _serialize(request: Any) -> bytes:
    return bytes(request.SerializeToString())
