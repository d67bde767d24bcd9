"""Partitions, indexes, load state and properties of one sink collection: one look, and one repair.

Laws: a look makes at most five calls and changes nothing; a repair is idempotent, does what its
difference names and nothing else, and waits for no load to finish: loading goes on at the sink
while rows are written. What serves is released only where the server insists.

Facts of 2.3.5, seen: a loaded partition cannot be dropped, nor an index of a loaded collection; a
collection counts as loaded when those of its partitions are that were asked for; the number of
replicas of a loaded collection cannot be changed; creating an equal partition or index succeeds;
DescribeCollection by id finds a renamed collection, and tells its name in the schema only.
AlterCollection merges properties; only 2.5 and later can delete one (`delete_keys`) or change the
description (`collection.description`), only 2.4 and later alter an index.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from milvus_cdc.errors import UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Carry, Collection, ObjectState
from milvus_cdc.sink.differences import (
    DEFAULT_PARTITION,
    DESCRIPTION,
    NEUTRAL,
    Action,
    ObjectDifference,
    Seen,
    compare,
    is_missing,
    missing,
    wanted_properties,
)
from milvus_cdc.sink.milvus.calls import DDL_SECONDS, Calls
from milvus_cdc.sink.milvus.capabilities import Capabilities, unsupported
from milvus_cdc.sink.milvus.indexes import ALTERS_INDEXES, Indexes
from milvus_cdc.sink.milvus.loading import Loading
from milvus_cdc.sink.milvus.schema import has_partition_key, parse

_DELETES_PROPERTIES = (2, 5)


class Objects:
    """Everything of a collection that is not rows."""

    def __init__(
        self, client: MilvusClient, capabilities: Callable[[], Awaitable[Capabilities]]
    ) -> None:
        self._client = client
        self._capabilities = capabilities
        self._calls = Calls(client, capabilities)
        self._loading = Loading(self._calls)
        self._indexes = Indexes(self._calls, self._loading)

    async def is_loaded(self, want: Collection) -> bool:
        """Every partition can be queried."""
        return await self._loading.is_loaded(want)

    # ---- one look

    async def diff(
        self, want: Collection, carry: Carry, sink_collection_id: int
    ) -> tuple[ObjectDifference, ...]:
        known = await self._capabilities()
        carry = replace(carry, load=carry.load and known.load)
        want = known.loadable(want)
        there, name = await self.find(want, sink_collection_id)
        if there is None:
            why = "another collection has its name" if name else "is gone, its rows with it"
            return (missing(want, why),)
        schema = parse(want)
        seen = await self._look(replace(want, name=name), there, carry)
        return compare(
            want,
            seen,
            carry,
            partition_key=has_partition_key(schema),
            description=schema.description,
        )

    async def find(self, want: Collection, sink_collection_id: int) -> tuple[Any | None, str]:
        """The DescribeCollectionResponse of the collection and its name; by its id where somebody
        renamed it. None with a name: another collection has it.
        """
        there = await self.describe(want)
        ours = sink_collection_id or (there.collectionID if there is not None else 0)
        if there is not None and there.collectionID in (ours, 0):
            return there, want.name
        if sink_collection_id:
            renamed = await self._describe_id(want, sink_collection_id)
            if renamed is not None and await self._is_here(want, renamed):
                return renamed, renamed.schema.name
        return None, "" if there is None else want.name

    async def _is_here(self, want: Collection, found: Any) -> bool:
        """Whether what has been found by its id is in the wanted database: 2.3.5 finds ids in all
        of them and does not say in which.
        """
        name = found.schema.name
        if name == want.name:
            return False  # looked for under that name already
        here = await self.describe(replace(want, name=name))
        return here is not None and here.collectionID == found.collectionID

    async def describe(self, want: Collection) -> Any | None:
        """None when it does not exist, or its database. Raises UserError SINK_NAME_IS_ALIAS."""
        try:
            answer = await self._calls.ask("DescribeCollection", want)
        except Refusal as refusal:
            if refusal.not_found or refusal.no_database:
                return None
            raise self._calls.error(refusal) from refusal
        if want.name in answer.aliases:
            raise UserError(
                "SINK_NAME_IS_ALIAS",
                f"{want.full_name} is an alias of another collection at the sink "
                f"({answer.schema.name!r}); drop the alias there or exclude the collection",
            )
        return answer

    async def _describe_id(self, want: Collection, collection_id: int) -> Any | None:
        request = milvus_pb2.DescribeCollectionRequest(
            db_name=want.database, collectionID=collection_id
        )
        try:
            found = await self._client.ask("DescribeCollection", request, database=want.database)
        except Refusal:
            return None  # a server that cannot look for ids says so in its own way
        return found if found.collectionID == collection_id and found.schema.name else None

    async def _look(self, at: Collection, there: Any, carry: Carry) -> Seen:
        """`at` is the collection under the name that it has."""
        known = await self._capabilities()
        partitions = tuple(await self._calls.partitions(at))
        indexes = await self._indexes.seen(at) if carry.index else {}
        loaded: set[str] = set()
        replicas = None
        if carry.load:
            # Where replicas are compared, the empty list of what is in memory must do.
            counted = known.replicas and self._loading.counts_replicas(at)
            loaded = await self._loading.partitions(at, ask_state=not counted)
            if counted and loaded:
                replicas = await self._loading.replicas(at)
        return Seen(
            name=at.name,
            partitions=partitions,
            indexes=indexes,
            loaded=frozenset(loaded),
            properties={pair.key: pair.value for pair in there.properties},
            replicas=replicas,
            description=there.schema.description if known.release >= _DELETES_PROPERTIES else None,
            index_mmap=known.release >= ALTERS_INDEXES,
        )

    # ---- one repair

    async def repair(
        self, want: Collection, difference: ObjectDifference, sink_collection_id: int
    ) -> None:
        """Raises what the sink refuses; of a collection that is gone, SINK_COLLECTION_MISSING or
        SINK_COLLECTION_REPLACED.
        """
        name = difference.name
        drop = difference.action is Action.DROP
        match difference.kind:
            case "collection" if is_missing(difference):
                await self.insist(want, sink_collection_id)
            case "collection":
                await self._rename_back(want, sink_collection_id)
            case "property":
                await self._set_property(want, name, drop)
            case "partition" if drop:
                await self.drop_partition(want, name)
            case "partition":
                await self.create_partition(want, name)
            case "index":
                await self._indexes.mend(want, name)
            case "load":
                await self._loading.mend(want)

    async def insist(self, want: Collection, sink_collection_id: int) -> Any:
        """The collection of this id under its name."""
        there, name = await self.find(want, sink_collection_id)
        if there is None and name:
            raise UserError(
                "SINK_COLLECTION_REPLACED",
                f"{want.full_name} at the sink is not the collection this task made; "
                "`milvus-cdc task resync` replaces it",
            )
        if there is None:
            raise UserError(
                "SINK_COLLECTION_MISSING",
                f"{want.full_name} is gone from the sink, its rows with it; "
                "`milvus-cdc task resync` fills it anew",
            )
        if name != want.name:
            raise UserError(
                "SINK_COLLECTION_MISSING",
                f"{want.full_name} was renamed at the sink to {name!r}; give it its name back and "
                "`milvus-cdc task retry`, or `milvus-cdc task resync` fills another",
            )
        return there

    async def _rename_back(self, want: Collection, sink_collection_id: int) -> None:
        there, name = await self.find(want, sink_collection_id)
        if there is None or name == want.name:
            await self.insist(want, sink_collection_id)
            return
        request = milvus_pb2.RenameCollectionRequest(
            db_name=want.database, oldName=name, newName=want.name, newDBName=want.database
        )
        await self._client.call(
            "RenameCollection", request, timeout=DDL_SECONDS, database=want.database
        )

    # ---- properties

    async def _set_property(self, want: Collection, key: str, drop: bool) -> None:
        if not (known := await self._capabilities()).properties:
            raise unsupported(want, [f"property {key!r}: {known.name} has no properties"])
        if key == DESCRIPTION:
            value: str | None = parse(want).description
        else:
            value = wanted_properties(want).get(key)
        if value is None and drop and (await self._capabilities()).release >= _DELETES_PROPERTIES:
            await self._alter(want, delete_keys=[key])
            return
        if value is None:
            value = NEUTRAL.get(key)
        if value is None:
            raise UserError(
                "SINK_CANNOT_DELETE_PROPERTY",
                f"{want.full_name} has {key!r} at the sink and not at the source, and this sink "
                "cannot delete a property (Milvus 2.5 can); set it at the source too",
            )
        await self._alter(want, properties=[common_pb2.KeyValuePair(key=key, value=value)])

    async def _alter(self, want: Collection, **change: Any) -> None:
        await self._loading.unloaded_if_told("AlterCollection", want, "loaded", "release", **change)

    # ---- partitions

    async def create_partitions(self, want: Collection) -> tuple[str, ...]:
        """All in state CREATED that are missing; which were. A partition-key collection has its
        own.
        """
        if has_partition_key(parse(want)):
            return ()
        there = set(await self._calls.partitions(want))
        made = []
        for partition in want.partitions:
            if partition.state is ObjectState.CREATED and partition.name not in there:
                await self.create_partition(want, partition.name)
                made.append(partition.name)
        return tuple(made)

    async def create_partition(self, want: Collection, partition: str) -> None:
        if not (known := await self._capabilities()).partitions:
            raise unsupported(want, [f"partition {partition!r}: {known.name} has no partitions"])
        try:
            await self._calls.ask("CreatePartition", want, partition_name=partition)
        except Refusal as refusal:
            if refusal.not_found or partition not in await self._partitions(want):
                raise self._calls.error(refusal) from refusal

    async def drop_partition(self, want: Collection, partition: str) -> None:
        try:
            if partition not in await self._partitions(want):
                return
            whole = False
            if partition in await self._loading.partitions(want):
                whole = await self._release_partition(want, partition)
            await self._calls.ask("DropPartition", want, partition_name=partition)
            if whole:
                await self._loading.mend(want)
        except Refusal as refusal:
            if not refusal.not_found:
                raise self._calls.error(refusal) from refusal

    async def _release_partition(self, want: Collection, partition: str) -> bool:
        """Whether all of the collection had to be released: 2.2 knows no partitions of one that was
        loaded whole.
        """
        if not (await self._capabilities()).load_partitions:
            return False  # it drops a partition that serves
        try:
            await self._calls.ask("ReleasePartitions", want, partition_names=[partition])
        except Refusal as refusal:
            if not refusal.says("after load collection"):
                raise self._calls.error(refusal) from refusal
            await self._loading.release(want)
            return True
        return False

    async def _partitions(self, want: Collection) -> list[str]:
        if not (await self._capabilities()).partitions:
            return [DEFAULT_PARTITION]
        return list((await self._calls.ask("ShowPartitions", want)).partition_names)
