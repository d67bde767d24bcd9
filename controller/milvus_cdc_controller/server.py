"""The controller put together: store, core, services, metrics, and their end in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from milvus_cdc.errors import UserError
from milvuscdc.v1 import (
    fleet_service_pb2_grpc,
    replication_service_pb2_grpc,
    task_pb2,
    task_service_pb2_grpc,
)

from milvus_cdc_controller import clock, present
from milvus_cdc_controller.catalogues import Catalogues, Connect, connect_etcd
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.fleet_service import FleetService
from milvus_cdc_controller.loop import ControlLoop
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.replication_service import ReplicationService, Streams
from milvus_cdc_controller.retention_alarm import RetentionAlarm
from milvus_cdc_controller.store import Store
from milvus_cdc_controller.store.records import decode
from milvus_cdc_controller.task_service import TaskService
from milvus_cdc_controller.watch import WatchHub

log = structlog.get_logger(__name__)

SERVICES = (
    "milvuscdc.v1.TaskService",
    "milvuscdc.v1.FleetService",
    "milvuscdc.v1.ReplicationService",
)
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
STOP_SECONDS = 5.0
OBSERVE_SECONDS = 2.0
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Replicators and watchers ping an idle stream to notice a dead middlebox.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # A second controller on the port must fail, not share its calls.
    ("grpc.so_reuseport", 0),
)


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


@dataclass(frozen=True, slots=True)
class Running:
    """A controller that serves. `done` ends only when something is broken."""

    port: int
    done: asyncio.Task[None]
    loop: ControlLoop
    metrics: Metrics


@asynccontextmanager
async def serve(
    config: Config, store: Store, connect: Connect = connect_etcd
) -> AsyncIterator[Running]:
    """Serves until the block is left. The store is the caller's to close; `connect` opens sources.

    Raises UserError ADDRESS_UNUSABLE, and what decoding the store's records raises.
    """
    records = [decode(key, value) for key, value in (await store.load()).items()]
    controller = Controller(config.lease.leases, records)
    controller.world.warn_fraction = config.retention.warn_fraction
    controller.world.policy = config.placement.policy
    controller.world.check_every_ms = round(config.retention.check_seconds * 1000)
    metrics = Metrics()
    streams = Streams()
    loop = ControlLoop(controller, store, metrics)
    catalogues = Catalogues(loop.post, controller.world.source_records.get, connect)

    def snapshot() -> list[task_pb2.Task]:
        world = controller.world
        return [
            present.task_message(world, task, loop.store_error)
            for task in sorted(world.tasks.values(), key=lambda task: task.spec.name)
        ]

    hub = WatchHub(store.incarnation, snapshot)
    outward = _Outward(streams, catalogues, hub, loop)
    server = grpc.aio.server(options=_OPTIONS)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(
        TaskService(loop, catalogues, hub), server
    )
    fleet = FleetService(loop)
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
    replication_service_pb2_grpc.add_ReplicationServiceServicer_to_server(
        ReplicationService(
            loop,
            streams,
            str(uuid.uuid4()),
            config.lease.leases,
            round(config.lease.progress * 1000),
            config.cluster,
        ),
        server,
    )
    reflection.enable_server_reflection(
        (*SERVICES, reflection.SERVICE_NAME, "grpc.health.v1.Health"), server
    )
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        raise UserError(
            "ADDRESS_UNUSABLE", f"listen: {config.listen}: {error}", field="listen"
        ) from error
    stop_exporter = _export(config, metrics)
    done = asyncio.create_task(loop.run(outward), name="control loop")
    observing = asyncio.create_task(_observe(metrics, loop), name="metrics")
    await server.start()
    for service in ("", *SERVICES):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    log.info("controller serves", address=config.listen, tasks=len(controller.world.tasks))
    try:
        yield Running(port, done, loop, metrics)
    finally:
        await health.enter_graceful_shutdown()
        hub.close()
        fleet.close()
        streams.close_all("CONTROLLER_STOPS", "The controller stops; connect anew.")
        await server.stop(STOP_SECONDS)
        await catalogues.close()
        await loop.drain(STOP_SECONDS)
        for task in (observing, done):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await asyncio.to_thread(stop_exporter)


def _export(config: Config, metrics: Metrics) -> Callable[[], None]:
    """Serves the metrics, in a thread; what is returned ends it."""
    if config.metrics is None:
        return lambda: None
    host, _, port = config.metrics.rpartition(":")
    try:
        exporter, thread = metrics.serve(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(
            "ADDRESS_UNUSABLE", f"metrics: {config.metrics}: {error}", field="metrics"
        ) from error

    def stop() -> None:
        exporter.shutdown()
        exporter.server_close()
        thread.join()

    return stop


async def _observe(metrics: Metrics, loop: ControlLoop) -> None:
    alarm = RetentionAlarm()
    while True:
        metrics.observe(loop.controller.world, clock.now())
        alarm.observe(loop.controller.world)
        await asyncio.sleep(OBSERVE_SECONDS)
