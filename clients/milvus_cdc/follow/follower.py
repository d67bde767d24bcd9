"""Follows the collections of a Milvus through its etcd and its queue, without any service.

Laws: one event loop, one program behind it. Nothing is dropped because it cannot be seen
(`milvus_cdc.catalog.guard`). Trouble that may pass is borne for a while, then raised; who asks
again goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import structlog

from milvus_cdc.catalog import CatalogueWatcher, KnownSource, Layout, judge, learn
from milvus_cdc.errors import BugError, CdcError, RetryableError, UserError
from milvus_cdc.etcd import EtcdClient, EtcdSecurity
from milvus_cdc.follow.followed import BatchLimits, Followed
from milvus_cdc.follow.intake import Intake
from milvus_cdc.follow.items import ChangeBatch, EventKind, Item, SchemaEvent
from milvus_cdc.follow.positions import CollectionPosition, Positions
from milvus_cdc.model import Catalogue, Collection, ObjectState
from milvus_cdc.rows import Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.selection import Selection, selects_nothing
from milvus_cdc.sink.writer import Checkpoint
from milvus_cdc.source import LogSource, QueueConfig
from milvus_cdc.source.registry import open_source

log = structlog.get_logger()

MEMORY_BYTES = 256 * 1024 * 1024


class Catalogues(Protocol):
    """What is there, again and again; `milvus_cdc.catalog.CatalogueWatcher` is one."""

    def watch(self) -> AsyncGenerator[Catalogue | CdcError, None]: ...


class Follower:
    """An asynchronous context manager and iterator of `Item`s.

    Everything handed out counts as dealt with when the program asks for the next item; see
    `positions`.
    """

    def __init__(
        self,
        *,
        etcd: Sequence[str] | Catalogues,
        queue: QueueConfig | LogSource,
        select: Sequence[str],
        exclude: Sequence[str] = (),
        root_path: str = "by-dev",
        meta_sub_path: str = "meta",
        etcd_security: EtcdSecurity | None = None,
        positions: Positions | None = None,
        rows_per_batch: int = 10_000,
        bytes_per_batch: int = 8 * 1024 * 1024,
        memory_bytes: int = MEMORY_BYTES,
        patience_seconds: float = 60.0,
        secrets: SecretResolver | None = None,
    ) -> None:
        """`etcd`: endpoints (`host:port`) of the source's etcd, `root_path` and `meta_sub_path`
        (`etcd.rootPath`, `etcd.metaSubPath` of its configuration); `select`, `exclude`: globs over
        `database.collection`; `positions`: saved ones, without them every collection is read from
        its beginning. `memory_bytes` bounds log bytes held, decoded columns come on top.
        `etcd_security`: TLS and login where `etcd` are endpoints. `secrets`: which secrets `queue`
        may refer to; none without it. `patience_seconds`: trouble that lasts longer, with nothing
        left to hand out, is raised. Raises UserError INVALID_FIELD.
        """
        self._selection = Selection(_texts(select), _texts(exclude))
        _check(self._selection)
        self._etcd = [etcd] if isinstance(etcd, str) else etcd
        self._etcd_security = etcd_security
        self._layout = Layout(root_path, meta_sub_path)
        self._queue = queue
        self._secrets = secrets
        self._start = positions or Positions()
        self._limits = BatchLimits(rows_per_batch, bytes_per_batch)
        self._memory_bytes = memory_bytes
        self._patience_seconds = patience_seconds
        self._known: KnownSource | None = self._start.source
        self._followed: dict[int, Followed] = {}
        self._unseen: dict[int, CollectionPosition] = dict(self._start.collections)
        """Saved, and not found in the metadata, or not yet."""
        self._over: set[int] = set()
        """Collections whose drop was handed out."""
        self._events: deque[SchemaEvent] = deque()
        self._renames: dict[int, tuple[str, str]] = {}
        self._in_hand: Item | None = None
        self._changed = asyncio.Event()
        self._troubles: dict[str, RetryableError] = {}
        self._trouble_since = 0.0
        self._failure: CdcError | None = None
        self._intake: Intake
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Connects in the background; what is wrong is raised by the iteration."""
        if isinstance(self._etcd, Sequence):
            client = await self._closing.enter_async_context(
                EtcdClient(self._etcd, security=self._etcd_security)
            )
            catalogues: Catalogues = CatalogueWatcher(client, self._layout)
        else:
            catalogues = self._etcd
        if isinstance(self._queue, QueueConfig):
            source = open_source(self._queue, self._secrets)
            self._closing.push_async_callback(source.close)
        else:
            source = self._queue
        self._intake = Intake(
            source,
            self._memory_bytes,
            on_news=self._changed.set,
            on_trouble=self._on_trouble,
            on_failure=self._fail,
        )
        self._closing.push_async_callback(self._intake.close)
        self._tasks = [
            asyncio.create_task(self._guarded(self._watch(catalogues)), name="follow metadata"),
            asyncio.create_task(
                self._guarded(self._intake.look_for_log_ends()), name="follow log ends"
            ),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._closing.aclose()

    # ---- for the program

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        """The next item; it never ends by itself. Raises UserError (LOG_TRUNCATED, LOG_RESET,
        ETCD_AUTH, the doubts of `milvus_cdc.catalog.guard`, ...), BugError, and a RetryableError
        for trouble that has outlasted the patience.
        """
        self._settle()
        while True:
            if self._failure is not None:
                raise self._failure
            if (item := self._next()) is not None:
                self._in_hand = item
                if isinstance(item, ChangeBatch):
                    self._intake.hold(sum(each.size for each in item.changes))
                return item
            await self._wait()

    def positions(self, *, including: Item | None = None) -> Positions:
        """Where everything stands, to be saved and given to the next follower: behind all that was
        handed out before the last item; `including=item`: that item has been dealt with as well.
        """
        if including is not None and including is not self._in_hand:
            raise BugError("NOT_IN_HAND", "only the item handed out last can be included")
        if including is not None:
            self._settle()
        collections = dict(self._unseen)
        for collection_id, followed in self._followed.items():
            if not (followed.begun or followed.resumed):
                continue  # the program does not know of it yet
            self._intake.note_incarnations(followed)
            collections[collection_id] = followed.position()
        return Positions(collections, self._known)

    def begin_at(self, table: Table, checkpoints: Iterable[Checkpoint]) -> None:
        """While its COLLECTION_FOUND is the last item: leaves out what is at or below these, where
        they are further than the saved positions. For who keeps checkpoints with the rows.
        """
        item = self._in_hand
        if not isinstance(item, SchemaEvent) or item.kind is not EventKind.COLLECTION_FOUND:
            raise BugError("NOT_IN_HAND", "the last item is no COLLECTION_FOUND")
        if item.table.collection_id != table.collection_id:
            raise BugError("NOT_IN_HAND", f"{table.full_name} is not the collection just found")
        for checkpoint in checkpoints:
            self._followed[table.collection_id].resume(checkpoint)

    # ---- handing out

    def _next(self) -> Item | None:
        if self._events:
            return self._events.popleft()
        for collection_id, names in list(self._renames.items()):
            del self._renames[collection_id]
            followed = self._followed.get(collection_id)
            if followed is not None and (told := followed.renamed(*names)) is not None:
                return told
        return self._intake.next_item(self._limits)

    def _settle(self) -> None:
        """The last item has been dealt with."""
        item, self._in_hand = self._in_hand, None
        if item is None:
            return
        collection_id = item.table.collection_id
        followed = self._followed.get(collection_id)
        kind = item.kind if isinstance(item, SchemaEvent) else None
        if kind is EventKind.COLLECTION_DROPPED:
            self._forget(collection_id)
        elif followed is not None:
            followed.settle()
            if kind is EventKind.COLLECTION_FOUND:
                self._intake.begin(followed)
        self._intake.hold(0)

    async def _wait(self) -> None:
        self._changed.clear()
        self._intake.starve(True)
        loop = asyncio.get_running_loop()
        until = self._trouble_since + self._patience_seconds if self._troubles else None
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            if self._troubles:
                self._trouble_since = loop.time()
                error = next(iter(self._troubles.values()))
                raise RetryableError(error.reason, error.message) from error
        finally:
            self._intake.starve(False)

    def _forget(self, collection_id: int) -> None:
        self._unseen.pop(collection_id, None)
        self._over.add(collection_id)
        if self._followed.pop(collection_id, None) is not None:
            self._intake.forget(collection_id)

    # ---- metadata

    async def _watch(self, catalogues: Catalogues) -> None:
        async with contextlib.aclosing(catalogues.watch()) as seen:
            async for each in seen:
                if isinstance(each, RetryableError):
                    self._on_trouble("metadata", each)
                elif isinstance(each, CdcError):
                    self._fail(each)
                else:
                    self._on_trouble("metadata", None)
                    self._see(each)

    def _see(self, catalogue: Catalogue) -> None:
        if (objection := judge(self._known, catalogue)) is not None:
            self._fail(UserError(objection.doubt.value, objection.message))
            return
        alive = {
            each.collection_id: each
            for each in catalogue.collections
            if each.state is ObjectState.CREATED
        }
        for collection_id, collection in alive.items():
            if collection_id in self._followed:
                self._renames[collection_id] = (collection.database, collection.name)
            elif collection_id not in self._over:
                self._find(collection)
        first = self._known is self._start.source
        self._known = learn(catalogue, {*self._followed, *self._unseen})
        if first:
            for collection_id, saved in self._unseen.items():
                table = _lost(collection_id, saved)
                self._events.append(SchemaEvent(EventKind.COLLECTION_DROPPED, table))
        for collection_id, followed in self._followed.items():
            followed.vanished = collection_id not in alive
        self._changed.set()

    def _find(self, collection: Collection) -> None:
        saved = self._unseen.get(collection.collection_id)
        if saved is None and not self._selection.selects(collection.full_name):
            return
        followed = Followed(collection, saved)
        self._followed[collection.collection_id] = followed
        self._unseen.pop(collection.collection_id, None)
        self._events.append(
            SchemaEvent(EventKind.COLLECTION_FOUND, followed.table, resumed=followed.resumed)
        )
        self._renames[collection.collection_id] = (collection.database, collection.name)

    # ---- trouble

    def _on_trouble(self, where: str, error: RetryableError | None) -> None:
        if error is None:
            self._troubles.pop(where, None)
            return
        if not self._troubles:
            self._trouble_since = asyncio.get_running_loop().time()
        self._troubles[where] = error
        self._changed.set()

    def _fail(self, error: CdcError) -> None:
        self._failure = self._failure or error
        self._changed.set()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Nothing ends without a word."""
        try:
            await work
        except CdcError as error:
            self._fail(error)
        except Exception as error:
            log.exception("following failed unexpectedly")
            self._fail(BugError("FOLLOWER_BUG", repr(error)))


def _texts(globs: Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _check(selection: Selection) -> None:
    if not selection.include:
        raise UserError(
            "INVALID_FIELD", "select names no collection; `*.*` means all", field="select"
        )
    for glob in (*selection.include, *selection.exclude):
        if "." not in glob and "*" not in glob:
            raise UserError(
                "INVALID_FIELD",
                f"{glob!r} names no collection: say `database.collection`, as in default.{glob}",
                field="select",
            )
    if (nothing := selects_nothing(selection)) is not None:
        raise UserError("INVALID_FIELD", f"select[{nothing[0]}]: {nothing[1]}", field="select")


def _lost(collection_id: int, saved: CollectionPosition) -> Table:
    return Table(
        task="",
        task_uid="",
        collection_id=collection_id,
        source_database=saved.database,
        source_collection=saved.name,
        database=saved.database,
        collection=saved.name,
        fields=(),
    )
