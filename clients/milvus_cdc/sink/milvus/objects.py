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

import structlog

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.milvus_status import INDEX_NOT_FOUND
from milvus_cdc.model import Carry, Collection, Index, LoadKind, ObjectState
from milvus_cdc.sink.differences import (
    DEFAULT_PARTITION,
    DESCRIPTION,
    MMAP,
    NEUTRAL,
    TYPE_PARAMS,
    Action,
    ObjectDifference,
    Seen,
    SeenIndex,
    compare,
    index_differs,
    is_missing,
    loaded_partitions,
    missing,
    wanted_properties,
)
from milvus_cdc.sink.milvus.capabilities import Capabilities, unsupported
from milvus_cdc.sink.milvus.schema import has_partition_key, parse

log = structlog.get_logger()

DDL_SECONDS = 30.0
_DELETES_PROPERTIES = (2, 5)
_ALTERS_INDEXES = (2, 4)


class Objects:
    """Everything of a collection that is not rows."""

    def __init__(
        self, client: MilvusClient, capabilities: Callable[[], Awaitable[Capabilities]]
    ) -> None:
        self._client = client
        self._capabilities = capabilities
        self._too_many_replicas: dict[str, int] = {}
        """Collections of which the sink refused that many."""

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
            answer = await self._ask("DescribeCollection", want)
        except Refusal as refusal:
            if refusal.not_found or refusal.no_database:
                return None
            raise self._client.error(refusal) from refusal
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
        partitions = tuple(await self._call_partitions(at))
        indexes = await self._indexes(at) if carry.index else {}
        loaded: set[str] = set()
        replicas = None
        if carry.load:
            # Where replicas are compared, the empty list of what is in memory must do.
            counted = known.replicas and self._counts_replicas(at)
            loaded = await self._loaded_partitions(at, ask_state=not counted)
            if counted and loaded:
                replicas = await self._replicas(at)
        return Seen(
            name=at.name,
            partitions=partitions,
            indexes=indexes,
            loaded=frozenset(loaded),
            properties={pair.key: pair.value for pair in there.properties},
            replicas=replicas,
            description=there.schema.description if known.release >= _DELETES_PROPERTIES else None,
            index_mmap=known.release >= _ALTERS_INDEXES,
        )

    def _counts_replicas(self, at: Collection) -> bool:
        wanted = at.load.replicas
        return wanted > 1 and self._too_many_replicas.get(at.full_name) != wanted

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
                await self._mend_index(want, name)
            case "load":
                await self._mend_load(want)

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
        try:
            await self._ask("AlterCollection", want, **change)
        except Refusal as refusal:
            if not refusal.says("loaded", "release"):
                raise self._client.error(refusal) from refusal
            await self._release(want)
            await self._call("AlterCollection", want, **change)

    # ---- partitions

    async def create_partitions(self, want: Collection) -> tuple[str, ...]:
        """All in state CREATED that are missing; which were. A partition-key collection has its
        own.
        """
        if has_partition_key(parse(want)):
            return ()
        try:
            there = set(await self._partitions(want))
        except Refusal as refusal:
            raise self._client.error(refusal) from refusal
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
            await self._ask("CreatePartition", want, partition_name=partition)
        except Refusal as refusal:
            if refusal.not_found or partition not in await self._partitions(want):
                raise self._client.error(refusal) from refusal

    async def drop_partition(self, want: Collection, partition: str) -> None:
        try:
            if partition not in await self._partitions(want):
                return
            whole = False
            if partition in await self._loaded_partitions(want):
                whole = await self._release_partition(want, partition)
            await self._ask("DropPartition", want, partition_name=partition)
            if whole:
                await self._mend_load(want)
        except Refusal as refusal:
            if not refusal.not_found:
                raise self._client.error(refusal) from refusal

    async def _release_partition(self, want: Collection, partition: str) -> bool:
        """Whether all of the collection had to be released: 2.2 knows no partitions of one that was
        loaded whole.
        """
        if not (await self._capabilities()).load_partitions:
            return False  # it drops a partition that serves
        try:
            await self._ask("ReleasePartitions", want, partition_names=[partition])
        except Refusal as refusal:
            if not refusal.says("after load collection"):
                raise self._client.error(refusal) from refusal
            await self._release(want)
            return True
        return False

    async def _partitions(self, want: Collection) -> list[str]:
        if not (await self._capabilities()).partitions:
            return [DEFAULT_PARTITION]
        return list((await self._ask("ShowPartitions", want)).partition_names)

    # ---- indexes

    async def _indexes(self, want: Collection) -> dict[str, SeenIndex]:
        try:
            answer = await self._ask("DescribeIndex", want)
        except Refusal as refusal:
            if refusal.code == INDEX_NOT_FOUND or refusal.says("index not found"):
                return {}
            raise self._client.error(refusal) from refusal
        names = {}
        if not (await self._capabilities()).index_names:
            # It calls each index like its field, whatever name it was given.
            names = {index.field_name: index.name for index in want.indexes}
        return {
            names.get(found.field_name, found.index_name): SeenIndex(
                names.get(found.field_name, found.index_name),
                found.field_name,
                {pair.key: pair.value for pair in found.params},
            )
            for found in answer.index_descriptions
        }

    async def _mend_index(self, want: Collection, name: str) -> None:
        """From where it is to what is wanted, looked at anew: dropped, altered, made."""
        wanted = next((index for index in want.indexes if index.name == name), None)
        found = (await self._indexes(want)).get(name)
        if wanted is not None and found is not None and not index_differs(wanted, found):
            if (await self._capabilities()).release >= _ALTERS_INDEXES:
                await self._alter_index(want, wanted)
            return
        if found is not None:
            await self._drop_index(want, found)
        if wanted is not None:
            await self._create_index(want, wanted)

    async def _alter_index(self, want: Collection, index: Index) -> None:
        value = dict(index.params).get(MMAP)
        change: dict[str, Any] = {"delete_keys": [MMAP]}
        if value is not None:
            change = {"extra_params": [common_pb2.KeyValuePair(key=MMAP, value=value)]}
        try:
            await self._ask("AlterIndex", want, index_name=index.name, **change)
        except Refusal as refusal:
            if not refusal.says("loaded", "release"):
                raise self._client.error(refusal) from refusal
            await self._release(want)
            await self._call("AlterIndex", want, index_name=index.name, **change)

    async def _drop_index(self, want: Collection, found: SeenIndex) -> None:
        names = {"field_name": found.field_name, "index_name": found.name}
        try:
            await self._ask("DropIndex", want, **names)
        except Refusal as refusal:
            if not refusal.says("release"):
                raise self._client.error(refusal) from refusal
            await self._release(want)
            await self._call("DropIndex", want, **names)

    async def _create_index(self, want: Collection, index: Index) -> None:
        known = await self._capabilities()
        types = {field.name: field.data_type for field in parse(want).fields}
        if why := known.index_violation(index, types.get(index.field_name, 0)):
            raise unsupported(want, [why])
        params = [
            common_pb2.KeyValuePair(key=key, value=value)
            for key, value in index.params
            if key not in TYPE_PARAMS
        ]
        await self._call(
            "CreateIndex",
            want,
            field_name=index.field_name,
            index_name=index.name,
            extra_params=params,
        )

    # ---- load state

    async def _mend_load(self, want: Collection) -> None:
        want = (await self._capabilities()).loadable(want)
        match want.load.kind:
            case LoadKind.NONE:
                await self._release(want)
            case LoadKind.COLLECTION:
                await self._load_all(want)
            case LoadKind.PARTITIONS:
                await self._load_some(want)

    async def _load_all(self, want: Collection) -> None:
        loaded = await self._loaded_partitions(want)
        if not loaded or not loaded.issuperset(await self._call_partitions(want)):
            await self._load("LoadCollection", want, bool(loaded))
        elif self._counts_replicas(want):
            await self._more_replicas(want)

    async def _load_some(self, want: Collection) -> None:
        names = loaded_partitions(want) & set(await self._call_partitions(want))
        if not names:
            return
        loaded = await self._loaded_partitions(want)
        if missing_ones := sorted(names - loaded):
            await self._load("LoadPartitions", want, bool(loaded), partition_names=missing_ones)
        elif not loaded - names and self._counts_replicas(want):
            await self._more_replicas(want)
        # Afterwards: a collection whose last loaded partition is released loses its replicas.
        if surplus := sorted(loaded - names):
            await self._call("ReleasePartitions", want, partition_names=surplus)

    async def _load(self, method: str, want: Collection, partly: bool, **fields: Any) -> None:
        replicas = await self._replicas(want) or 1 if partly else want.load.replicas
        try:
            await self._ask(method, want, replica_number=max(1, replicas), **fields)
        except Refusal as refusal:
            if replicas <= 1 or not refusal.says("replica", "not enough", "insufficient"):
                raise self._client.error(refusal) from refusal
            self._no_more_replicas(want, refusal)
            await self._call(method, want, replica_number=1, **fields)

    async def _more_replicas(self, want: Collection) -> None:
        """Of what serves already: later versions can, others refuse, and go on serving."""
        if (await self._replicas(want) or 0) >= want.load.replicas:
            return
        try:
            await self._ask("LoadCollection", want, replica_number=want.load.replicas)
        except Refusal as refusal:
            if not refusal.says("replica", "not enough", "insufficient"):
                raise self._client.error(refusal) from refusal
            self._no_more_replicas(want, refusal)

    def _no_more_replicas(self, want: Collection, refusal: Refusal) -> None:
        self._too_many_replicas[want.full_name] = want.load.replicas
        log.warning(
            "the sink cannot hold so many replicas, it serves from fewer",
            collection=want.full_name,
            replicas=want.load.replicas,
            error=refusal.text,
        )

    async def _replicas(self, want: Collection) -> int | None:
        """None where the server does not tell."""
        try:
            return len((await self._ask("GetReplicas", want)).replicas)
        except (Refusal, CdcError):
            return None

    async def _release(self, want: Collection) -> None:
        if await self._load_state(want) != common_pb2.LoadStateNotLoad:
            await self._call("ReleaseCollection", want)

    async def is_loaded(self, want: Collection) -> bool:
        """Every partition can be queried."""
        if await self._load_state(want) != common_pb2.LoadStateLoaded:
            return False
        return set(await self._call_partitions(want)) <= await self._loaded_partitions(want)

    async def _loaded_partitions(self, want: Collection, *, ask_state: bool = True) -> set[str]:
        """Loaded or being loaded."""
        if not (await self._capabilities()).load:
            return set(await self._call_partitions(want))
        if ask_state and await self._load_state(want) == common_pb2.LoadStateNotLoad:
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
        if not (await self._capabilities()).partitions:
            return [DEFAULT_PARTITION]
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
