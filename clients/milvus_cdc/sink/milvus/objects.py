"""Partitions, indexes and load state of one sink collection, moved towards what is wanted.

Laws: every call is idempotent, nothing is done when nothing differs, and nothing waits for a load
to finish: loading goes on at the sink while rows are written.

Facts of 2.3.5, seen: a loaded partition cannot be dropped, nor an index of a loaded collection; a
collection counts as loaded when those of its partitions are that were asked for; the number of
replicas of a loaded collection cannot be changed; creating an equal partition or index succeeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import structlog

from milvus_cdc.errors import RetryableError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import INDEX_NOT_FOUND
from milvus_cdc.model import Collection, Index, LoadKind, ObjectState
from milvus_cdc.sink.milvus.schema import has_partition_key, parse

log = structlog.get_logger()

DDL_SECONDS = 30.0
_TYPE_PARAMS = frozenset({"dim", "max_length", "max_capacity"})
_NOT_COMPARED = _TYPE_PARAMS | {"params", "mmap.enabled"}
_CASELESS = ("index_type", "metric_type")


class Objects:
    """Everything of a collection that is not rows."""

    def __init__(self, client: MilvusClient) -> None:
        self._client = client

    # ---- partitions

    async def create_partitions(self, want: Collection) -> None:
        """All in state CREATED that are missing; a partition-key collection has its own."""
        if has_partition_key(parse(want)):
            return
        there = set(await self._partitions(want))
        for partition in want.partitions:
            if partition.state is ObjectState.CREATED and partition.name not in there:
                await self.create_partition(want, partition.name)

    async def create_partition(self, want: Collection, partition: str) -> None:
        try:
            await self._ask("CreatePartition", want, partition_name=partition)
        except Refusal as refusal:
            if refusal.not_found or partition not in await self._partitions(want):
                raise self._client.error(refusal) from refusal

    async def drop_partition(self, want: Collection, partition: str) -> None:
        try:
            if partition not in await self._partitions(want):
                return
            if partition in await self._loaded_partitions(want):
                await self._call("ReleasePartitions", want, partition_names=[partition])
            await self._ask("DropPartition", want, partition_name=partition)
        except Refusal as refusal:
            if not refusal.not_found:
                raise self._client.error(refusal) from refusal

    async def _partitions(self, want: Collection) -> list[str]:
        return list((await self._ask("ShowPartitions", want)).partition_names)

    # ---- indexes

    async def reconcile(self, want: Collection) -> None:
        """Creates what is missing, drops what is surplus, loads or releases."""
        await self._reconcile_indexes(want)
        match want.load.kind:
            case LoadKind.NONE:
                await self._release(want)
            case LoadKind.COLLECTION:
                await self._load_all(want)
            case LoadKind.PARTITIONS:
                await self._load_some(want)

    async def _reconcile_indexes(self, want: Collection) -> None:
        there = await self._indexes(want)
        wanted = {index.name: index for index in want.indexes}
        kept = {
            name
            for name, found in there.items()
            if name in wanted and same_index(wanted[name], found)
        }
        for name, found in there.items():
            if name in kept:
                continue
            log.info("dropping index", collection=want.full_name, index=name)
            await self._drop_index(want, found)
        for name, index in wanted.items():
            if name not in kept:
                await self._create_index(want, index)

    async def _indexes(self, want: Collection) -> dict[str, Any]:
        try:
            answer = await self._ask("DescribeIndex", want)
        except Refusal as refusal:
            if refusal.code == INDEX_NOT_FOUND or refusal.says("index not found"):
                return {}
            raise self._client.error(refusal) from refusal
        return {found.index_name: found for found in answer.index_descriptions}

    async def _drop_index(self, want: Collection, found: Any) -> None:
        names = {"field_name": found.field_name, "index_name": found.index_name}
        try:
            await self._ask("DropIndex", want, **names)
        except Refusal as refusal:
            # What serves is released only where the server insists.
            if not refusal.says("release"):
                raise self._client.error(refusal) from refusal
            await self._release(want)
            await self._call("DropIndex", want, **names)

    async def _create_index(self, want: Collection, index: Index) -> None:
        log.info("creating index", collection=want.full_name, index=index.name)
        params = [
            common_pb2.KeyValuePair(key=key, value=value)
            for key, value in index.params
            if key not in _TYPE_PARAMS
        ]
        await self._call(
            "CreateIndex",
            want,
            field_name=index.field_name,
            index_name=index.name,
            extra_params=params,
        )

    # ---- load state

    async def _load_all(self, want: Collection) -> None:
        loaded = await self._loaded_partitions(want)
        if not loaded or not loaded.issuperset(await self._call_partitions(want)):
            await self._load("LoadCollection", want, bool(loaded))

    async def _load_some(self, want: Collection) -> None:
        names = {
            partition.name
            for partition in want.partitions
            if partition.state is ObjectState.CREATED
            and partition.partition_id in want.load.partition_ids
        }
        names.intersection_update(await self._call_partitions(want))
        if not names:
            # Their names have not arrived yet: no reason to release what serves.
            return
        loaded = await self._loaded_partitions(want)
        if missing := sorted(names - loaded):
            await self._load("LoadPartitions", want, bool(loaded), partition_names=missing)
        # Afterwards: a collection whose last loaded partition is released loses its replicas.
        if surplus := sorted(loaded - names):
            await self._call("ReleasePartitions", want, partition_names=surplus)

    async def _load(self, method: str, want: Collection, partly: bool, **fields: Any) -> None:
        replicas = await self._replicas(want) if partly else want.load.replicas
        try:
            await self._ask(method, want, replica_number=max(1, replicas), **fields)
        except Refusal as refusal:
            if replicas <= 1 or not refusal.says("replica", "not enough", "insufficient"):
                raise self._client.error(refusal) from refusal
            log.warning(
                "the sink cannot hold so many replicas, it serves from one",
                collection=want.full_name,
                replicas=replicas,
                error=refusal.text,
            )
            await self._call(method, want, replica_number=1, **fields)

    async def _replicas(self, want: Collection) -> int:
        return len((await self._call("GetReplicas", want)).replicas)

    async def _release(self, want: Collection) -> None:
        if await self._load_state(want) != common_pb2.LoadStateNotLoad:
            await self._call("ReleaseCollection", want)

    async def is_loaded(self, want: Collection) -> bool:
        """Every partition can be queried."""
        if await self._load_state(want) != common_pb2.LoadStateLoaded:
            return False
        return set(await self._call_partitions(want)) <= await self._loaded_partitions(want)

    async def _loaded_partitions(self, want: Collection) -> set[str]:
        """Loaded or being loaded."""
        if await self._load_state(want) == common_pb2.LoadStateNotLoad:
            return set()
        try:
            answer = await self._ask("ShowPartitions", want, type=milvus_pb2.ShowType.InMemory)
        except Refusal as refusal:
            if refusal.says("not loaded"):
                return set()  # released in between
            raise self._client.error(refusal) from refusal
        return set(answer.partition_names)

    async def _load_state(self, want: Collection) -> int:
        state = int((await self._call("GetLoadState", want)).state)
        if state == common_pb2.LoadStateNotExist:
            raise RetryableError(
                "SINK_COLLECTION_NOT_READY",
                f"the sink cannot tell yet if {want.full_name} is loaded",
            )
        return state

    # ---- calls

    async def _call_partitions(self, want: Collection) -> list[str]:
        return list((await self._call("ShowPartitions", want)).partition_names)

    async def _call(self, method: str, want: Collection, **fields: Any) -> Any:
        try:
            return await self._ask(method, want, **fields)
        except Refusal as refusal:
            raise self._client.error(refusal) from refusal

    async def _ask(self, method: str, want: Collection, **fields: Any) -> Any:
        request = getattr(milvus_pb2, f"{method}Request")(
            db_name=want.database, collection_name=want.name, **fields
        )
        return await self._client.ask(method, request, timeout=DDL_SECONDS, database=want.database)


def same_index(wanted: Index, found: Any) -> bool:
    """Whether the milvus_pb2.IndexDescription `found` is this index.

    Servers differ in what they show of an index, so only what both sides say can differ: else an
    index would be dropped and made again for ever.
    """
    ours = _flat(dict(wanted.params))
    theirs = _flat({pair.key: pair.value for pair in found.params})
    return wanted.field_name == found.field_name and all(
        ours[key] == theirs[key] for key in ours.keys() & theirs.keys()
    )


def _flat(params: Mapping[str, str]) -> dict[str, str]:
    """Build parameters beside the others, wherever a version keeps them: flat, or in `params`."""
    flat = {key: value for key, value in params.items() if key not in _NOT_COMPARED}
    try:
        nested = json.loads(params.get("params") or "{}")
    except ValueError:
        nested = {}
    if isinstance(nested, dict):
        flat.update((key, _text(value)) for key, value in nested.items())
    for key in _CASELESS:
        if key in flat:
            flat[key] = flat[key].upper()
    return flat


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
