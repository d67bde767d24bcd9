"""Follows a source's metadata in its etcd and says what it is: whole catalogues, or the error that
hides it.

Laws: level-triggered: each Catalogue is complete, and skipping one loses nothing; a Catalogue is
one or more whole etcd revisions, never half of a transaction; trouble never ends the watch and is
never silent: every attempt that fails is yielded as a CdcError, attempts are spaced by a growing
delay, and a lost watch or a compaction leads to a new list.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

from milvus_cdc.catalog.decode import Assembly
from milvus_cdc.catalog.layout import Layout
from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.etcd import Compacted, EtcdClient, Listing, Watch, WatchBatch, WatchLost
from milvus_cdc.model import Catalogue

_FIRST_DELAY_SECONDS = 0.2
_MAX_DELAY_SECONDS = 10.0
_BURST_SECONDS_MAX = 0.5
_KEYS_AT_ONCE = 2_000
_COLLECTIONS_AT_ONCE = 200


class CatalogueWatcher:
    """The metadata of one source. The client is the caller's to close."""

    def __init__(
        self, client: EtcdClient, layout: Layout, *, debounce_seconds: float = 0.05
    ) -> None:
        self._client = client
        self._layout = layout
        self._debounce_seconds = debounce_seconds
        self._reading: asyncio.Task[Catalogue] | None = None
        self._queued: asyncio.Task[Catalogue] | None = None

    async def read(self) -> Catalogue:
        """The metadata as it is now: it contains every write that ended before this call.

        Calls that wait at the same time share one listing. Raises RetryableError
        SOURCE_ETCD_UNAVAILABLE, BugError SOURCE_METADATA_UNDECODABLE, UserError ETCD_AUTH.
        """
        if self._queued is None:
            self._queued = asyncio.ensure_future(self._read_after(self._reading))
            self._queued.add_done_callback(_retrieve)
        return await asyncio.shield(self._queued)

    async def watch(self) -> AsyncGenerator[Catalogue | CdcError, None]:
        """Catalogues as the metadata changes, the first one at once; errors while it cannot be
        seen.

        After a RetryableError it goes on by itself. Other errors (UserError ETCD_AUTH, BugError
        SOURCE_METADATA_UNDECODABLE) are tried again too, since a person may mend them meanwhile. A
        mere advance of the source's clock yields nothing; a clock that goes back or vanishes does.
        Close it with `aclosing`.
        """
        failures = 0
        watch: Watch | None = None
        try:
            while True:
                try:
                    assembly, latest = await self._list()
                    yield latest
                    failures = 0
                    watch = self._client.watch(
                        *self._layout.to_watch(), start_revision=latest.revision + 1
                    )
                    while True:
                        try:
                            latest, changed = await self._follow(watch, assembly, latest)
                        except (Compacted, WatchLost):
                            raise
                        except RetryableError as error:
                            yield _of_source(error)
                            failures += 1
                            await asyncio.sleep(_delay_seconds(failures))
                            continue
                        if changed or failures:
                            yield latest
                        failures = 0
                except CdcError as error:
                    yield _of_source(error)
                    failures += 1
                    await asyncio.sleep(_delay_seconds(failures))
                if watch is not None:
                    await watch.close()
                    watch = None
        finally:
            if watch is not None:
                await watch.close()

    async def _read_after(self, running: asyncio.Task[Catalogue] | None) -> Catalogue:
        # A listing under way may have begun before the write that a new caller wants to see.
        if running is not None:
            await asyncio.wait({running})
        self._reading, self._queued = self._queued, None
        try:
            _, catalogue = await self._list()
        except CdcError as error:
            raise _of_source(error) from error
        return catalogue

    async def _list(self) -> tuple[Assembly, Catalogue]:
        listing: Listing = await self._client.list(*self._layout.to_list())
        assembly = Assembly(self._layout)
        # Whoever shares the loop must not wait for the ten thousandth collection.
        for count, kv in enumerate(listing.kvs):
            assembly.apply(kv.key, kv.value)
            if count % _KEYS_AT_ONCE == 0:
                await asyncio.sleep(0)
        more = True
        while more:
            more = assembly.decode_some(_COLLECTIONS_AT_ONCE)
            await asyncio.sleep(0)
        return assembly, assembly.catalogue(listing.cluster_id, listing.revision)

    async def _follow(
        self, watch: Watch, assembly: Assembly, before: Catalogue
    ) -> tuple[Catalogue, bool]:
        """The catalogue after the next burst of events, and whether it says anything new."""
        clock = asyncio.get_running_loop().time
        batch = await watch.next()
        revision = max(before.revision, _apply(assembly, batch))
        until = clock() + _BURST_SECONDS_MAX
        while clock() < until:
            try:
                async with asyncio.timeout(self._debounce_seconds):
                    batch = await watch.next()
            except TimeoutError:
                break
            except RetryableError:
                # It comes again with the next call; what was heard is whole and is told first.
                break
            revision = max(revision, _apply(assembly, batch))
        after = assembly.catalogue(before.cluster_id, revision)
        return after, _news(before, after)


def _apply(assembly: Assembly, batch: WatchBatch) -> int:
    for event in batch.events:
        assembly.apply(event.key, event.value)
    return batch.revision


def _news(before: Catalogue, after: Catalogue) -> bool:
    return (
        after.tso < before.tso
        or after.databases != before.databases
        or after.collections != before.collections
        or after.aliases != before.aliases
        or after.rbac != before.rbac
        or after.databases_keyed != before.databases_keyed
        or after.incarnation != before.incarnation
    )


def _of_source(error: CdcError) -> CdcError:
    """Says whose etcd it is: the controller may have one of its own."""
    if isinstance(error, RetryableError):
        return RetryableError("SOURCE_ETCD_UNAVAILABLE", error.message)
    return error


def _delay_seconds(failures: int) -> float:
    ceiling = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(failures - 1, 10))
    return ceiling * random.uniform(0.5, 1.0)


def _retrieve(task: asyncio.Task[Catalogue]) -> None:
    """A listing that nobody waits for any more must not be reported as an unhandled error."""
    if not task.cancelled():
        task.exception()
