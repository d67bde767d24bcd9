"""Connections shared by all assignments: one per sink, one per queue, one reader hub per
pchannel.

Laws: a secret's file that was replaced counts from then on. A Milvus, asked with its token in every
call, goes on with the new one; what logs in when it connects is opened anew for whoever comes next.
A sink that nobody works with any more is left: only who holds something is connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import structlog
from milvus_cdc.dead_letters import Place
from milvus_cdc.dead_letters.opening import open_place
from milvus_cdc.errors import CdcError
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_endpoint import open_endpoint
from milvus_cdc.secrets import RecordingResolver, SecretResolver, live, resolve
from milvus_cdc.sink import Sink
from milvus_cdc.sink.registry import open_milvus, open_writer
from milvus_cdc.sink.writer import Writer
from milvus_cdc.sink.writer_sink import Origin, WriterSink
from milvus_cdc.source import LogSource, PulsarConfig, QueueConfig
from milvus_cdc.source.registry import open_source
from milvuscdc.v1 import dead_letters_pb2, task_pb2

from milvus_cdc_replicator.core.source_clock import SourceClock
from milvus_cdc_replicator.reader import PchannelHub
from milvus_cdc_replicator.spec import queue_config

log = structlog.get_logger()

LOOK_SECONDS = 5.0
"""Between two looks at the files of secrets, and at sinks that nobody works with."""
UNUSED_SECONDS = 10.0
"""Whoever comes within it finds the sink as it was left."""
CLOSE_SECONDS = 10.0
T = TypeVar("T", Writer, Place)


class _Shared(Generic[T]):
    """What was opened with which secrets, by what a task says of it."""

    def __init__(self, secrets: SecretResolver) -> None:
        self._secrets = secrets
        self._open: dict[bytes, tuple[T, RecordingResolver]] = {}
        self._replaced: list[tuple[bytes, T]] = []

    def get(self, key: bytes, make: Callable[[SecretResolver], T]) -> T:
        found = self._open.get(key)
        if found is not None and not found[1].changed:
            return found[0]
        secrets = RecordingResolver(self._secrets)
        made = make(secrets)
        if found is not None:
            # Others may still be at work with it.
            self._replaced.append((key, found[0]))
        self._open[key] = made, secrets
        return made

    def take(self, key: bytes) -> list[T]:
        """All that were opened by it, for the caller to close."""
        taken = [opened for known, opened in self._replaced if known == key]
        self._replaced = [each for each in self._replaced if each[0] != key]
        if key in self._open:
            taken.append(self._open.pop(key)[0])
        return taken

    async def close(self) -> None:
        keys = {*self._open, *(key for key, _ in self._replaced)}
        for opened in [each for key in keys for each in self.take(key)]:
            with contextlib.suppress(CdcError):
                await opened.close()


class _Token:
    """Of one Milvus; `use` is told when its file holds another one."""

    def __init__(
        self, now: Callable[[], str | None], use: Callable[[str | None], None], who: str
    ) -> None:
        self._now, self._use, self._who = now, use, who
        self._used = now()
        use(self._used)

    def look(self) -> None:
        token = self._now()
        if token != self._used:
            self._used = token
            self._use(token)
            log.info("token replaced", milvus=self._who)


class Connections:
    """Opened on first use, closed with the process."""

    def __init__(self, secrets: SecretResolver) -> None:
        self._secrets = secrets
        self._sinks: dict[bytes, Sink] = {}
        self._uses = Counter[bytes]()
        self._unused: dict[bytes, float] = {}
        """Since when; only what somebody has worked with."""
        self._tokens: dict[tuple[str, bytes], _Token] = {}
        self._writers = _Shared[Writer](secrets)
        self._places = _Shared[Place](secrets)
        self._sources: dict[object, LogSource] = {}
        self._source_clients: dict[bytes, MilvusClient] = {}
        self._hubs: dict[tuple[object, str], PchannelHub] = {}
        self._clocks: dict[object, SourceClock] = {}
        self._lock = asyncio.Lock()

    async def sink(self, spec: task_pb2.Sink, origin: Callable[[], Origin] | None = None) -> Sink:
        """`origin` says whose rows go there, when any do. Raises as `registry.open_sink`."""
        key = spec.SerializeToString(deterministic=True)
        async with self._lock:
            if spec.WhichOneof("kind") == "milvus":
                sink = self._sinks.get(key)
                if sink is None:
                    milvus = open_milvus(spec.milvus, self._secrets)
                    sink = self._sinks[key] = milvus
                    self._watch(key, spec.milvus, "sink.milvus.token", milvus.use_token)
                return sink
            writer = self._writers.get(key, lambda secrets: open_writer(spec, secrets))
            return WriterSink(writer, origin)

    def dead_letters(self, spec: dead_letters_pb2.DeadLetters) -> Place:
        """Raises UserError for settings or secrets that cannot be used."""
        key = spec.SerializeToString(deterministic=True)
        return self._places.get(key, lambda secrets: open_place(spec, secrets))

    def _watch(
        self,
        key: bytes,
        endpoint: task_pb2.MilvusEndpoint,
        field: str,
        use: Callable[[str | None], None],
    ) -> None:
        if endpoint.token.WhichOneof("ref") == "file":
            now = live(self._secrets, endpoint.token, field)
            self._tokens[field, key] = _Token(now, use, endpoint.uri)

    @contextlib.contextmanager
    def using(self, spec: task_pb2.Sink) -> Iterator[None]:
        """For as long as somebody works with that sink it stays connected."""
        key = spec.SerializeToString(deterministic=True)
        self._uses[key] += 1
        self._unused.pop(key, None)
        try:
            yield
        finally:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self._unused[key] = time.monotonic()

    async def look_after(self) -> None:
        """Follows secrets, and disconnects what is not used; goes on until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for token in self._tokens.values():
                token.look()
            now = time.monotonic()
            for key, since in list(self._unused.items()):
                # Somebody may have come while another one was closed.
                if now - since >= UNUSED_SECONDS and self._unused.get(key) == since:
                    await self._disconnect(key)

    async def _disconnect(self, key: bytes) -> None:
        # All is taken out before anything waits: whoever comes meanwhile opens it anew.
        self._unused.pop(key, None)
        self._tokens.pop(("sink.milvus.token", key), None)
        opened: list[Sink | Writer] = [*self._writers.take(key)]
        if key in self._sinks:
            opened.append(self._sinks.pop(key))
        for each in opened:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await each.close()
            except Exception as error:
                # It may be of another package; secrets are to be followed all the same.
                log.warning("a sink was not left in order", error=repr(error))

    def milvus(self, endpoint: task_pb2.MilvusEndpoint, *, who: str) -> MilvusClient:
        """A client of the caller's own; `who` is `sink` or `source`. Raises UserError for a secret
        that cannot be resolved.
        """
        return open_endpoint(endpoint, self._secrets, who=who)

    async def source_client(self, spec: task_pb2.MilvusEndpoint) -> MilvusClient:
        """The source's public API. Raises UserError for a secret that cannot be resolved."""
        key = spec.SerializeToString(deterministic=True)
        client = self._source_clients.get(key)
        if client is None:
            client = self._source_clients[key] = self.milvus(spec, who="source")
            self._watch(key, spec, "source.milvus.token", client.use_token)
        return client

    async def source(self, spec: task_pb2.Source) -> LogSource:
        config = queue_config(spec)
        async with self._lock:
            source = self._sources.get(config)
            if source is None:
                source = open_source(self._with_secrets(config, spec), self._secrets)
                self._sources[config] = source
            return source

    def _with_secrets(self, config: QueueConfig, spec: task_pb2.Source) -> QueueConfig:
        if not isinstance(config, PulsarConfig) or not config.token_from:
            return config
        token, field = spec.pulsar.token, "source.pulsar.token"
        return replace(config, token=lambda: resolve(self._secrets, token, field) or "")

    async def hub(self, spec: task_pb2.Source, pchannel: str) -> PchannelHub:
        source = await self.source(spec)
        key = (queue_config(spec), pchannel)
        hub = self._hubs.get(key)
        if hub is None:
            hub = self._hubs[key] = PchannelHub(source, pchannel, self.clock(spec))
        return hub

    def clock(self, spec: task_pb2.Source) -> SourceClock:
        """Set by whoever reads the source's queue."""
        return self._clocks.setdefault(queue_config(spec), SourceClock())

    async def log_end(self, spec: task_pb2.Source, pchannel: str) -> int:
        """Order of the next entry to be written."""
        source = await self.source(spec)
        return source.order((await source.log_range(pchannel)).end)

    async def check_log(
        self, spec: task_pb2.Source, pchannel: str, position: bytes, incarnation: bytes
    ) -> None:
        """Raises as LogSource.open does."""
        source = await self.source(spec)
        await (await source.open(pchannel, position, incarnation)).close()

    def wake_readers(self) -> None:
        for hub in self._hubs.values():
            hub.wake()

    async def close(self) -> None:
        for hub in self._hubs.values():
            await hub.close()
        for sink in self._sinks.values():
            with contextlib.suppress(CdcError):
                await sink.close()
        await self._writers.close()
        await self._places.close()
        for client in self._source_clients.values():
            await client.close()
        for source in self._sources.values():
            with contextlib.suppress(CdcError):
                await source.close()
