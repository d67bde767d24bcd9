"""Connections shared by all assignments: one per sink, one per queue, one reader hub per
pchannel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from milvus_cdc.dead_letters import Place
from milvus_cdc.dead_letters.opening import open_place
from milvus_cdc.errors import CdcError
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_endpoint import open_endpoint
from milvus_cdc.secrets import SecretResolver, resolve
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


class Connections:
    """Opened on first use, closed with the process."""

    def __init__(self, secrets: SecretResolver) -> None:
        self._secrets = secrets
        self._sinks: dict[bytes, Sink] = {}
        self._writers: dict[bytes, Writer] = {}
        self._places: dict[bytes, Place] = {}
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
                    sink = self._sinks[key] = open_milvus(spec.milvus, self._secrets)
                return sink
            writer = self._writers.get(key)
            if writer is None:
                writer = self._writers[key] = open_writer(spec, self._secrets)
            return WriterSink(writer, origin)

    def dead_letters(self, spec: dead_letters_pb2.DeadLetters) -> Place:
        """Raises UserError for settings or secrets that cannot be used."""
        key = spec.SerializeToString(deterministic=True)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = open_place(spec, self._secrets)
        return place

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
        for writer in self._writers.values():
            with contextlib.suppress(CdcError):
                await writer.close()
        for place in self._places.values():
            with contextlib.suppress(CdcError):
                await place.close()
        for client in self._source_clients.values():
            await client.close()
        for source in self._sources.values():
            with contextlib.suppress(CdcError):
                await source.close()
