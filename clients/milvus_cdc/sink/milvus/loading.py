"""Which partitions of a sink collection are loaded, and from how many replicas they serve.

Law: nothing waits for a load to finish; loading goes on at the sink while rows are written.
"""

from __future__ import annotations

from typing import Any

import structlog

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.milvus_client import Refusal
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Collection, LoadKind
from milvus_cdc.sink.differences import loaded_partitions
from milvus_cdc.sink.milvus.calls import Calls

log = structlog.get_logger()


class Loading:
    """Of one server's collections."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._too_many_replicas: dict[str, int] = {}
        """Collections of which the sink refused that many."""

    async def unloaded_if_told(
        self, method: str, want: Collection, *words: str, **fields: Any
    ) -> None:
        """A call that a server may refuse while the collection serves, which it says in `words`:
        then it is released first.
        """
        try:
            await self._calls.ask(method, want, **fields)
        except Refusal as refusal:
            if not refusal.says(*words):
                raise self._calls.error(refusal) from refusal
            await self.release(want)
            await self._calls.call(method, want, **fields)

    async def mend(self, want: Collection) -> None:
        want = (await self._calls.capabilities()).loadable(want)
        match want.load.kind:
            case LoadKind.NONE:
                await self.release(want)
            case LoadKind.COLLECTION:
                await self._load_all(want)
            case LoadKind.PARTITIONS:
                await self._load_some(want)

    async def _load_all(self, want: Collection) -> None:
        loaded = await self.partitions(want)
        if not loaded or not loaded.issuperset(await self._calls.partitions(want)):
            await self._load("LoadCollection", want, bool(loaded))
        elif self.counts_replicas(want):
            await self._more_replicas(want)

    async def _load_some(self, want: Collection) -> None:
        names = loaded_partitions(want) & set(await self._calls.partitions(want))
        if not names:
            return
        loaded = await self.partitions(want)
        if missing_ones := sorted(names - loaded):
            await self._load("LoadPartitions", want, bool(loaded), partition_names=missing_ones)
        elif not loaded - names and self.counts_replicas(want):
            await self._more_replicas(want)
        # Afterwards: a collection whose last loaded partition is released loses its replicas.
        if surplus := sorted(loaded - names):
            await self._calls.call("ReleasePartitions", want, partition_names=surplus)

    async def _load(self, method: str, want: Collection, partly: bool, **fields: Any) -> None:
        replicas = await self.replicas(want) or 1 if partly else want.load.replicas
        try:
            await self._calls.ask(method, want, replica_number=max(1, replicas), **fields)
        except Refusal as refusal:
            if replicas <= 1 or not refusal.says("replica", "not enough", "insufficient"):
                raise self._calls.error(refusal) from refusal
            self._no_more_replicas(want, refusal)
            await self._calls.call(method, want, replica_number=1, **fields)

    async def _more_replicas(self, want: Collection) -> None:
        """Of what serves already: later versions can, others refuse, and go on serving."""
        if (await self.replicas(want) or 0) >= want.load.replicas:
            return
        try:
            await self._calls.ask("LoadCollection", want, replica_number=want.load.replicas)
        except Refusal as refusal:
            if not refusal.says("replica", "not enough", "insufficient"):
                raise self._calls.error(refusal) from refusal
            self._no_more_replicas(want, refusal)

    def _no_more_replicas(self, want: Collection, refusal: Refusal) -> None:
        self._too_many_replicas[want.full_name] = want.load.replicas
        log.warning(
            "the sink cannot hold so many replicas, it serves from fewer",
            collection=want.full_name,
            replicas=want.load.replicas,
            error=refusal.text,
        )

    async def replicas(self, want: Collection) -> int | None:
        """None where the server does not tell."""
        try:
            return len((await self._calls.ask("GetReplicas", want)).replicas)
        except (Refusal, CdcError):
            return None

    async def release(self, want: Collection) -> None:
        if await self._load_state(want) != common_pb2.LoadStateNotLoad:
            await self._calls.call("ReleaseCollection", want)

    async def is_loaded(self, want: Collection) -> bool:
        """Every partition can be queried."""
        if await self._load_state(want) != common_pb2.LoadStateLoaded:
            return False
        return set(await self._calls.partitions(want)) <= await self.partitions(want)

    async def partitions(self, want: Collection, *, ask_state: bool = True) -> set[str]:
        """Loaded or being loaded."""
        if not (await self._calls.capabilities()).load:
            return set(await self._calls.partitions(want))
        if ask_state and await self._load_state(want) == common_pb2.LoadStateNotLoad:
            return set()
        try:
            answer = await self._calls.ask(
                "ShowPartitions", want, type=milvus_pb2.ShowType.InMemory
            )
        except Refusal as refusal:
            if refusal.says("not loaded"):
                return set()  # released in between
            raise self._calls.error(refusal) from refusal
        return set(answer.partition_names)

    async def _load_state(self, want: Collection) -> int:
        state = int((await self._calls.call("GetLoadState", want)).state)
        if state == common_pb2.LoadStateNotExist:
            raise RetryableError(
                "SINK_COLLECTION_NOT_READY",
                f"the sink cannot tell yet if {want.full_name} is loaded",
            )
        return state

    def counts_replicas(self, at: Collection) -> bool:
        wanted = at.load.replicas
        return wanted > 1 and self._too_many_replicas.get(at.full_name) != wanted
