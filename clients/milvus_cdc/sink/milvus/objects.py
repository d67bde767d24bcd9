"""Indexes, load state and partitions of one sink collection, moved towards what is wanted.

Laws: every call is idempotent, nothing is done when nothing differs, and nothing waits for a load
to finish: loading goes on at the sink while rows are written.
"""

from __future__ import annotations

import json
from typing import Any

import structlog

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.milvus_client import MilvusClient, MilvusStatusError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Collection, Index, LoadKind, ObjectState
from milvus_cdc.sink.milvus.schema import has_partition_key, parse

log = structlog.get_logger()

DDL_SECONDS = 30.0
_CODE_INDEX_NOT_FOUND = 700
_TYPE_PARAMS = ("dim", "max_length", "max_capacity")
DEFAULT_PARTITION = "_default"


class Objects:
    """Everything of a collection that is not rows."""

    def __init__(self, client: MilvusClient) -> None:
        self._client = client

    # ---- partitions

    async def partitions(self, want: Collection) -> list[str]:
        answer = await self._client.call(
            "ShowPartitions",
            milvus_pb2.ShowPartitionsRequest(db_name=want.database, collection_name=want.name),
        )
        return list(answer.partition_names)

    async def create_partitions(self, want: Collection) -> None:
        """All in state CREATED that are missing."""
        if has_partition_key(parse(want)):
            return
        there = set(await self.partitions(want))
        for partition in want.partitions:
            if partition.state is ObjectState.CREATED and partition.name not in there:
                await self.create_partition(want, partition.name)

    async def create_partition(self, want: Collection, partition: str) -> None:
        try:
            await self._client.call(
                "CreatePartition",
                milvus_pb2.CreatePartitionRequest(
                    db_name=want.database, collection_name=want.name, partition_name=partition
                ),
                timeout=DDL_SECONDS,
            )
        except MilvusStatusError:
            if partition not in await self.partitions(want):
                raise

    async def drop_partition(self, want: Collection, partition: str) -> None:
        if partition not in await self.partitions(want):
            return
        names = {"db_name": want.database, "collection_name": want.name}
        if await self._load_state(want, partition) != common_pb2.LoadStateNotLoad:
            # Milvus refuses to drop a loaded partition.
            await self._client.call(
                "ReleasePartitions",
                milvus_pb2.ReleasePartitionsRequest(**names, partition_names=[partition]),
                timeout=DDL_SECONDS,
            )
        await self._client.call(
            "DropPartition",
            milvus_pb2.DropPartitionRequest(**names, partition_name=partition),
            timeout=DDL_SECONDS,
        )

    # ---- indexes and load state

    async def reconcile(self, want: Collection) -> None:
        """Creates what is missing, drops what is surplus, loads or releases."""
        there = await self.indexes(want)
        wanted = {index.name: index for index in want.indexes}
        for name, found in there.items():
            index = wanted.get(name)
            if index is None or not _same_index(index, found):
                log.info("dropping index", collection=want.full_name, index=name)
                await self._release(want)
                await self._client.call(
                    "DropIndex",
                    milvus_pb2.DropIndexRequest(
                        db_name=want.database,
                        collection_name=want.name,
                        field_name=found.field_name,
                        index_name=name,
                    ),
                    timeout=DDL_SECONDS,
                )
        for name, index in wanted.items():
            if name not in there or not _same_index(index, there[name]):
                await self._create_index(want, index)
        await self._reconcile_load(want)

    async def indexes(self, want: Collection) -> dict[str, Any]:
        try:
            answer = await self._client.call(
                "DescribeIndex",
                milvus_pb2.DescribeIndexRequest(db_name=want.database, collection_name=want.name),
            )
        except MilvusStatusError as error:
            if error.code == _CODE_INDEX_NOT_FOUND or "index not found" in error.message.lower():
                return {}
            raise
        return {found.index_name: found for found in answer.index_descriptions}

    async def _create_index(self, want: Collection, index: Index) -> None:
        log.info("creating index", collection=want.full_name, index=index.name)
        await self._client.call(
            "CreateIndex",
            milvus_pb2.CreateIndexRequest(
                db_name=want.database,
                collection_name=want.name,
                field_name=index.field_name,
                index_name=index.name,
                extra_params=[
                    common_pb2.KeyValuePair(key=k, value=v)
                    for k, v in index.params
                    if k not in _TYPE_PARAMS
                ],
            ),
            timeout=DDL_SECONDS,
        )

    async def _reconcile_load(self, want: Collection) -> None:
        names = {"db_name": want.database, "collection_name": want.name}
        state = await self._load_state(want)
        match want.load.kind:
            case LoadKind.NONE:
                if state != common_pb2.LoadStateNotLoad:
                    await self._release(want)
            case LoadKind.COLLECTION:
                if state == common_pb2.LoadStateNotLoad:
                    await self._load(
                        "LoadCollection",
                        lambda replicas: milvus_pb2.LoadCollectionRequest(
                            **names, replica_number=replicas
                        ),
                        want,
                    )
            case LoadKind.PARTITIONS:
                await self._reconcile_partitions(want)

    async def _reconcile_partitions(self, want: Collection) -> None:
        names = {"db_name": want.database, "collection_name": want.name}
        loaded = set(want.load.partition_ids)
        to_load: list[str] = []
        to_release: list[str] = []
        there = set(await self.partitions(want))
        for partition in want.partitions:
            if partition.state is not ObjectState.CREATED or partition.name not in there:
                continue
            state = await self._load_state(want, partition.name)
            if partition.partition_id in loaded and state == common_pb2.LoadStateNotLoad:
                to_load.append(partition.name)
            elif partition.partition_id not in loaded and state != common_pb2.LoadStateNotLoad:
                to_release.append(partition.name)
        if to_release:
            await self._client.call(
                "ReleasePartitions",
                milvus_pb2.ReleasePartitionsRequest(**names, partition_names=to_release),
                timeout=DDL_SECONDS,
            )
        if to_load:
            await self._load(
                "LoadPartitions",
                lambda replicas: milvus_pb2.LoadPartitionsRequest(
                    **names, partition_names=to_load, replica_number=replicas
                ),
                want,
            )

    async def _load(self, method: str, request: Any, want: Collection) -> None:
        replicas = max(1, want.load.replicas)
        try:
            await self._client.call(method, request(replicas), timeout=DDL_SECONDS)
        except CdcError as error:
            if replicas == 1 or "replica" not in error.message.lower():
                raise
            # A smaller sink cannot hold as many replicas: it serves from one.
            log.warning(
                "the sink cannot hold so many replicas",
                collection=want.full_name,
                replicas=replicas,
                error=error.message,
            )
            await self._client.call(method, request(1), timeout=DDL_SECONDS)

    async def _release(self, want: Collection) -> None:
        if await self._load_state(want) == common_pb2.LoadStateNotLoad:
            return
        await self._client.call(
            "ReleaseCollection",
            milvus_pb2.ReleaseCollectionRequest(db_name=want.database, collection_name=want.name),
            timeout=DDL_SECONDS,
        )

    async def _load_state(self, want: Collection, *partitions: str) -> int:
        answer = await self._client.call(
            "GetLoadState",
            milvus_pb2.GetLoadStateRequest(
                db_name=want.database, collection_name=want.name, partition_names=partitions
            ),
        )
        if answer.state == common_pb2.LoadStateNotExist:
            raise RetryableError(
                "SINK_COLLECTION_NOT_READY",
                f"{want.full_name} is not known to the sink's query coordinator",
            )
        return int(answer.state)


def _same_index(index: Index, found: Any) -> bool:
    there = {p.key: p.value for p in found.params}
    return index.field_name == found.field_name and all(
        _same_value(value, there.get(key)) for key, value in index.params if key not in _TYPE_PARAMS
    )


def _same_value(wanted: str, found: str | None) -> bool:
    if wanted == found:
        return True
    if found is None:
        return wanted in ("", "{}", "null")
    try:
        return bool(json.loads(wanted) == json.loads(found))
    except ValueError:
        return False
