"""Readings of the sources' metadata: one watch for each distinct source, judged before the core
hears of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from milvus_cdc.catalog import CatalogueWatcher, Doubt, KnownSource, Layout, judge
from milvus_cdc.errors import CdcError
from milvus_cdc.etcd import EtcdClient, EtcdSecurity
from milvus_cdc.model import Catalogue
from milvus_cdc.secrets import SecretResolver, resolve
from milvus_cdc.tls import Fields, TlsFiles
from milvuscdc.v1 import task_pb2

from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.task import SourceRecord

log = structlog.get_logger(__name__)

Post = Callable[[Callable[[ev.Instant], ev.Event]], Awaitable[None]]
Known = Callable[[str], SourceRecord | None]


class Closable(Protocol):
    async def close(self) -> None: ...


class Watcher(Protocol):
    """As milvus_cdc.catalog.CatalogueWatcher."""

    async def read(self) -> Catalogue: ...

    def watch(self) -> AsyncGenerator[Catalogue | CdcError]: ...


Connect = Callable[[task_pb2.Source], tuple[Closable, Watcher]]

PROBE_SECONDS = 30.0
"""Ten thousand collections take seconds to read; an etcd that is not there is found out sooner."""
REREAD_SECONDS = 1.0
_FIELDS = Fields("source.etcd")


@dataclass(slots=True)
class _Open:
    client: Closable
    watcher: Watcher
    task: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Readings are judged and delivered one after the other."""
    revision: int = 0
    """Of the last one delivered."""


class Catalogues:
    """Opens and closes watches as the core says. `known` gives what is remembered of a source."""

    def __init__(self, post: Post, known: Known, connect: Connect) -> None:
        self._connect = connect
        self._post = post
        self._known = known
        self._open: dict[str, _Open] = {}
        self._errands: set[asyncio.Task[None]] = set()

    def handle(
        self, effect: fx.OpenSource | fx.CloseSource | fx.RefreshSource | fx.ReadPartition
    ) -> None:
        match effect:
            case fx.OpenSource(source_id=source_id, source=source):
                client, watcher = self._connect(task_pb2.Source.FromString(source))
                opened = _Open(client, watcher)
                self._open[source_id] = opened
                opened.task = asyncio.create_task(self._follow(source_id, opened))
            case fx.CloseSource(source_id=source_id):
                if source_id in self._open:
                    self._errand(_shut(self._open.pop(source_id)))
            case fx.RefreshSource(source_id=source_id):
                if source_id in self._open:
                    self._errand(self._refresh(source_id, self._open[source_id]))
            case fx.ReadPartition(source_id=source_id):
                if source_id in self._open:
                    self._errand(self._partition(effect, self._open[source_id]))

    async def probe(self, source: task_pb2.Source) -> Catalogue:
        """One reading of a source that is not followed yet. Raises CdcError with the field to
        blame.
        """
        client, watcher = self._connect(source)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                catalogue = await watcher.read()
        except TimeoutError:
            raise CdcError(
                "SOURCE_ETCD_UNAVAILABLE",
                f"The source's etcd did not answer within {PROBE_SECONDS:.0f} s; "
                "check its endpoints and that the controller may reach them.",
                field="task.source.etcd.endpoints",
            ) from None
        except CdcError as error:
            raise CdcError(
                error.reason,
                error.message,
                field=f"task.{error.field}" if error.field else "task.source.etcd.endpoints",
            ) from error
        finally:
            await client.close()
        objection = judge(None, catalogue)
        if objection is not None:
            raise CdcError(
                objection.doubt.value, objection.message, field="task.source.etcd.root_path"
            )
        return catalogue

    async def close(self) -> None:
        for opened in self._open.values():
            await _shut(opened)
        self._open.clear()
        for errand in list(self._errands):
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)

    async def _follow(self, source_id: str, opened: _Open) -> None:
        try:
            async with aclosing(opened.watcher.watch()) as readings:
                async for reading in readings:
                    if isinstance(reading, CdcError):
                        await self._unavailable(source_id, reading)
                    else:
                        await self._deliver(source_id, opened, reading)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the watch of a source's metadata broke", source=source_id)
            await self._unavailable(source_id, CdcError("SOURCE_WATCH_BROKEN", str(error)))

    async def _deliver(
        self, source_id: str, opened: _Open, catalogue: Catalogue, *, confirmed: bool = False
    ) -> None:
        async with opened.lock:
            if catalogue.revision < opened.revision:
                # A reading on request may have overtaken the watch; only a fresh one tells whether
                # the metadata really went back.
                catalogue = await opened.watcher.read()
            opened.revision = catalogue.revision
            await self._post(self._judged(source_id, catalogue, confirmed))

    def _judged(
        self, source_id: str, catalogue: Catalogue, confirmed: bool
    ) -> Callable[[ev.Instant], ev.Event]:
        objection = judge(_known(self._known(source_id)), catalogue)
        if objection is not None and objection.doubt is Doubt.SOURCE_MASS_DROP and confirmed:
            log.warning("a person confirms drops", source=source_id, what=objection.message)
            objection = None
        if objection is None:
            return lambda at: ev.CatalogueSeen(at, source_id, catalogue)
        log.warning("a source's metadata is not trusted", source=source_id, why=objection.message)
        reason, message = objection.doubt.value, objection.message
        if objection.doubt is Doubt.SOURCE_MASS_DROP:
            message += ", by RetryTask (milvus-cdc task retry)"
        return lambda at: ev.CatalogueSeen(at, source_id, catalogue, False, reason, message)

    async def _unavailable(self, source_id: str, error: CdcError) -> None:
        log.warning("a source's metadata cannot be read", source=source_id, error=str(error))
        await self._post(
            lambda at: ev.SourceUnavailable(at, source_id, error.reason, error.message)
        )

    async def _refresh(self, source_id: str, opened: _Open) -> None:
        try:
            reading = await opened.watcher.read()
            await self._deliver(source_id, opened, reading, confirmed=True)
        except CdcError as error:
            await self._unavailable(source_id, error)

    async def _partition(self, effect: fx.ReadPartition, opened: _Open) -> None:
        """The row waits at the replicator, so this ends only with an answer."""
        while effect.source_id in self._open:
            try:
                await self._deliver(effect.source_id, opened, await opened.watcher.read())
            except CdcError as error:
                await self._unavailable(effect.source_id, error)
                await asyncio.sleep(REREAD_SECONDS)
                continue
            await self._post(
                lambda at: ev.PartitionRead(at, effect.assignment_id, effect.partition_id)
            )
            return

    def _errand(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)


def etcd_connector(secrets: SecretResolver) -> Connect:
    """Makes what reads a source's etcd. What is wrong with files or secrets is raised by readings,
    so that it is told like any other trouble, and mended without a restart.
    """

    def connect(source: task_pb2.Source) -> tuple[Closable, Watcher]:
        etcd = source.etcd
        client = EtcdClient(list(etcd.endpoints), security=_security(etcd, secrets))
        layout = Layout(etcd.root_path or "by-dev", etcd.meta_sub_path or "meta")
        return client, CatalogueWatcher(client, layout)

    return connect


def _security(etcd: task_pb2.EtcdMetadata, secrets: SecretResolver) -> EtcdSecurity:
    def password() -> str:
        return resolve(secrets, etcd.password, _FIELDS.name("password")) or ""

    tls = TlsFiles.of(etcd.tls, Fields(_FIELDS.name("tls"))) if etcd.HasField("tls") else None
    return EtcdSecurity(tls, etcd.username, password, _FIELDS)


async def _shut(opened: _Open) -> None:
    if opened.task is not None:
        opened.task.cancel()
        await asyncio.gather(opened.task, return_exceptions=True)
    await opened.client.close()


def _known(record: SourceRecord | None) -> KnownSource | None:
    if record is None:
        return None
    return KnownSource(
        cluster_id=record.cluster_id,
        revision=record.revision,
        tso=record.tso,
        databases_keyed=record.databases_keyed,
        incarnation=record.incarnation,
        alive=frozenset(record.alive),
    )
