"""All that a controller has only while it leads: the core with what is stored, the replicators'
streams, the sources' metadata, the services.

Law: whatever waits for something of a reign is answered when it ends: calls, jobs, watches and
streams with UNAVAILABLE, so that they are tried again where somebody leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from milvus_cdc.errors import CdcError
from milvuscdc.v1 import (
    fleet_service_pb2_grpc,
    replication_service_pb2_grpc,
    task_pb2,
    task_service_pb2_grpc,
)

from milvus_cdc_controller import clock, present
from milvus_cdc_controller.catalogues import Catalogues, Closable, Connect, Watcher
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.core.effects import Record
from milvus_cdc_controller.fleet_service import FleetService
from milvus_cdc_controller.loop import ControlLoop
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.replication_service import ReplicationService, Streams
from milvus_cdc_controller.retention_alarm import RetentionAlarm
from milvus_cdc_controller.sealing import Seals
from milvus_cdc_controller.store import Store
from milvus_cdc_controller.store.records import decode, encode
from milvus_cdc_controller.task_service import TaskService
from milvus_cdc_controller.watch import WatchHub

log = structlog.get_logger(__name__)

OBSERVE_SECONDS = 2.0
OBSERVE_PART = 0.02
"""Of a core, at most, for the metrics: those of very many collections are looked at more seldom."""
DRAIN_SECONDS = 5.0
DECODED_AT_ONCE = 200


class Handlers:
    """Takes services as a gRPC server does, and finds their methods."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """The same handlers under another form of their name."""

    def find(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        for handler in self._handlers:
            found = handler.service(details)
            if found is not None:
                return found
        return None


@dataclass(slots=True)
class _Outward:
    """Sorts the core's effects to their takers."""

    streams: Streams
    catalogues: Catalogues
    hub: WatchHub
    loop: ControlLoop

    def send(self, stream: int, message: fx.StreamMessage) -> None:
        self.streams.send(stream, message)

    def close_stream(self, effect: fx.CloseStream) -> None:
        self.streams.close(effect)

    def publish(self, effect: fx.Publish) -> None:
        world = self.loop.controller.world
        if effect.deleted is not None:
            self.hub.deleted(present.task_message(world, effect.deleted))
        elif effect.uid in world.tasks:
            task = world.tasks[effect.uid]
            self.hub.changed(present.task_message(world, task, self.loop.store_error))

    def source(
        self, effect: fx.OpenSource | fx.CloseSource | fx.RefreshSource | fx.ReadPartition
    ) -> None:
        self.catalogues.handle(effect)


def _opening(connect: Connect, seals: Seals) -> Connect:
    """The source as it is stored, opened for whoever connects."""

    def opened(source: task_pb2.Source) -> tuple[Closable, Watcher]:
        plain = task_pb2.Source()
        plain.CopyFrom(source)
        seals.open(plain, "source")
        return connect(plain)

    return opened


class Reign:
    """Made with `prepare`, then `start`, at last `end`."""

    def __init__(
        self,
        config: Config,
        store: Store,
        metrics: Metrics,
        connect: Connect,
        controller: Controller,
        seals: Seals,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._streams = Streams(config.limits.streams)
        self.loop = ControlLoop(controller, store, metrics)
        self._catalogues = Catalogues(
            self.loop.post, controller.world.source_records.get, _opening(connect, seals)
        )
        self._hub = WatchHub(store.incarnation, self._snapshot, config.limits.watches)
        self.handlers = Handlers()
        tasks = TaskService(self.loop, self._catalogues, self._hub, seals)
        task_service_pb2_grpc.add_TaskServiceServicer_to_server(tasks, self.handlers)  # type: ignore[arg-type]
        # ListControllers is answered before a call comes here, see `Front`.
        self._fleet = FleetService(self.loop)  # type: ignore[abstract]
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self._fleet, self.handlers)  # type: ignore[arg-type]
        replication_service_pb2_grpc.add_ReplicationServiceServicer_to_server(
            ReplicationService(
                self.loop,
                self._streams,
                str(uuid.uuid4()),
                config.lease.leases,
                round(config.lease.progress * 1000),
                round(config.silence_seconds * 1000),
                config.cluster,
                seals,
            ),
            self.handlers,  # type: ignore[arg-type]
        )
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def prepare(
        cls,
        config: Config,
        store: Store,
        metrics: Metrics,
        connect: Connect,
        inherited_ms: int = 0,
    ) -> Reign:
        """Loads what is stored. `inherited_ms`: the longest lease that replicators may have from
        others.

        Raises what decoding it raises, RetryableError, and UserError for secrets that it cannot
        open.
        """
        seals = Seals.read(config.secrets_keys)
        records: list[Record] = []
        resealed: dict[str, bytes | None] = {}
        for number, (key, value) in enumerate((await store.load()).items()):
            stored = decode(key, value)
            records.append(seals.renewed(stored))
            if records[-1] is not stored:
                resealed[key] = encode(records[-1])
            if number % DECODED_AT_ONCE == 0:
                await asyncio.sleep(0)  # the lease must be renewed meanwhile
        if resealed:
            await store.commit(resealed)
            log.info("secrets encrypted with the first key", tasks=len(resealed))
        controller = Controller(config.lease.leases, records)
        controller.world.warn_fraction = config.retention.warn_fraction
        controller.world.tasks_max = config.limits.tasks
        controller.world.tasks_of_one_max = config.limits.tasks_per_principal
        controller.world.policy = config.placement.policy
        controller.world.inherited_ttl_ms = inherited_ms
        controller.world.check_every_ms = round(config.retention.check_seconds * 1000)
        return cls(config, store, metrics, connect, controller, seals)

    def start(self) -> None:
        outward = _Outward(self._streams, self._catalogues, self._hub, self.loop)
        self.done = asyncio.create_task(self.loop.run(outward), name="control loop")
        self._tasks = [self.done, asyncio.create_task(self._observe(), name="metrics")]

    @property
    def tasks(self) -> int:
        return len(self.loop.controller.world.tasks)

    @property
    def leads(self) -> bool:
        """It may answer."""
        return not self._over and self._store.certain

    def close_streams(self, reason: str, message: str) -> None:
        """Nobody is to wait for what comes later."""
        self._hub.close()
        self._fleet.close()
        self._streams.close_all(reason, message)

    async def end(self, error: CdcError, *, drain: bool) -> None:
        """`drain`: what has happened is stored first. Who still waits is told the error."""
        self._over = True
        self.close_streams(error.reason, error.message)
        await self._catalogues.close()
        if drain:
            await self.loop.drain(DRAIN_SECONDS)
        self.loop.end(error)
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    def _snapshot(self) -> list[task_pb2.Task]:
        world = self.loop.controller.world
        return [
            present.task_message(world, task, self.loop.store_error)
            for task in sorted(world.tasks.values(), key=lambda task: task.spec.name)
        ]

    async def _observe(self) -> None:
        alarm = RetentionAlarm()
        world = self.loop.controller.world
        while True:
            spent = -time.thread_time()
            for _ in self._metrics.observing(world, clock.now()):
                spent += time.thread_time()
                await asyncio.sleep(0)
                spent -= time.thread_time()
            alarm.observe(world)
            spent += time.thread_time()
            await asyncio.sleep(max(OBSERVE_SECONDS, spent / OBSERVE_PART))
