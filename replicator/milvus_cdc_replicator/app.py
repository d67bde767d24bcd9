"""The `milvus-cdc-replicator` command: configuration, logs, health, metrics, signals."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from milvus_cdc import logs
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.trust.authentication import Authenticator
from milvus_cdc.trust.guard import EVERYWHERE, Guard
from milvus_cdc.trust.listening import add_port
from milvus_cdc.trust.scraping import Scraping

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.session import Replicator, run_until
from milvus_cdc_replicator.settings import Settings, load

log = structlog.get_logger()

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MALLOC_OPTIONS = (
    (_M_ARENA_MAX, 2),
    (_M_MMAP_THRESHOLD, 1 << 20),
    (_M_TRIM_THRESHOLD, 8 << 20),
)


_HEALTH_OPTIONS = (
    # Health and reflection take little.
    ("grpc.max_receive_message_length", 65_536),
    ("grpc.max_concurrent_streams", 100),
    # A peer that vanished, or never says anything, is let go.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="milvus-cdc-replicator",
        description="Reads a Milvus source's message queue and writes its rows to the sink.",
    )
    parser.add_argument("--config", type=Path, help="YAML file; every key has a default")
    parser.add_argument("--version", action="version", version=version("milvus-cdc"))
    arguments = parser.parse_args(argv)
    try:
        settings = load(arguments.config)
    except UserError as error:
        print(f"milvus-cdc-replicator: {error.message}", file=sys.stderr)
        return 2
    logs.configure(settings.log.format, settings.log.level)
    _calm_collector()
    _give_memory_back()
    try:
        code: int = uvloop.run(_serve(settings))
        return code
    except UserError as error:
        print(f"milvus-cdc-replicator: {error.message}", file=sys.stderr)
        return 2


def _calm_collector() -> None:
    """Rows in transit hold no cycles, but a collection for every 700 new objects walks all that
    was ever imported: seen to be a third of the CPU of a catch-up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _give_memory_back() -> None:
    """Requests are blocks of megabytes. glibc raises its thresholds as soon as one is freed, keeps
    the next ones in its heaps, one per thread, and those only grow: seen to cost 80 MiB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    for option, value in _MALLOC_OPTIONS:
        mallopt(option, value)


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    scraping = Scraping(settings.metrics, settings.scraped_with)
    authenticator = Authenticator(settings.auth) if settings.auth is not None else None
    server, health_servicer = await _health_server(settings, authenticator)
    connections = Connections(
        SecretResolver(env_prefix=settings.secrets.env_prefix, folders=settings.secrets.folders)
    )
    replicator = Replicator(settings, version("milvus-cdc"), connections)
    watcher = asyncio.create_task(_report_health(replicator, health_servicer))
    rotation = asyncio.create_task(connections.look_after())
    log.info(
        "replicator started",
        name=settings.name,
        controller=", ".join(settings.controller),
        listen=settings.listen,
        metrics=settings.metrics,
    )
    try:
        await run_until(replicator, stop, settings.shutdown_seconds)
    finally:
        watcher.cancel()
        rotation.cancel()
        await connections.close()
        await server.stop(0.5)
        if authenticator is not None:
            await authenticator.close()
        await asyncio.to_thread(scraping.close)
        log.info("replicator stopped")
    return 0


async def _health_server(
    settings: Settings, authenticator: Authenticator | None
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    server = grpc.aio.server(
        interceptors=(Guard(EVERYWHERE, authenticator),), options=_HEALTH_OPTIONS
    )
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(
        (health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
        server,
    )
    add_port(server, settings.listen, settings.tls)
    if authenticator is not None:
        authenticator.start()
    await server.start()
    return server, servicer


async def _report_health(replicator: Replicator, servicer: health.aio.HealthServicer) -> None:
    """Live always ("" service), ready ("replicator" service) while connected to a controller."""
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    while True:
        ready = replicator.connected.is_set()
        await servicer.set(
            "replicator",
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else health_pb2.HealthCheckResponse.NOT_SERVING,
        )
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
