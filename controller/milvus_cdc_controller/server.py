"""A controller that serves: what listens for the whole process, and one reign after the other
behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from milvus_cdc.errors import RetryableError
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.listening import add_port
from milvus_cdc.trust.scraping import Scraping

from milvus_cdc_controller.access import ControllerGuard, authenticator
from milvus_cdc_controller.catalogues import Connect, etcd_connector
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.forwarding import MESSAGE_BYTES_MAX, Forwarder
from milvus_cdc_controller.front import Front
from milvus_cdc_controller.loop import ControlLoop
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.reign import Reign
from milvus_cdc_controller.sealing import Seals
from milvus_cdc_controller.store import LeadershipLost, Store
from milvus_cdc_controller.store.election import Election, Member, Term
from milvus_cdc_controller.store.etcd import EtcdStore

log = structlog.get_logger(__name__)

SERVICES = (
    "milvuscdc.v1.TaskService",
    "milvuscdc.v1.FleetService",
    "milvuscdc.v1.ReplicationService",
)
STOP_SECONDS = 5.0
AGAIN_SECONDS = 1.0
"""After a reign that could not begin or was lost, so that another controller may lead."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Replicators and watchers ping an idle stream to notice a dead middlebox.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Who opens a connection and says nothing is let go.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 10_000),
    # A second controller on the port must fail, not share its calls.
    ("grpc.so_reuseport", 0),
)
_STOPS = LeadershipLost("The controller stops; connect anew.", "CONTROLLER_STOPS")


@dataclass(frozen=True, slots=True)
class Running:
    """A controller that leads. `done` ends only when something is broken."""

    port: int
    done: asyncio.Task[None]
    loop: ControlLoop
    metrics: Metrics


class _Ear:
    """What listens: the port, health, reflection, metrics."""

    def __init__(self, config: Config, front: Front, metrics: Metrics) -> None:
        self._config = config
        self._front = front
        self._metrics = metrics
        self._health = health_aio.HealthServicer()
        self._authenticator = authenticator(config)
        guard = ControllerGuard(self._authenticator, config.limits.quotas)
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=(guard,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, reflection.SERVICE_NAME, "grpc.health.v1.Health"), self._server
        )
        self._server.add_generic_rpc_handlers([front])
        self._scraping: Scraping | None = None
        self._stopping = False
        self.port = add_port(self._server, config.listen, config.tls)

    async def open(self) -> None:
        if self._authenticator is not None:
            self._authenticator.start()
        if self._config.metrics is not None:
            self._scraping = Scraping(
                self._config.metrics, self._config.scraped_with, self._metrics.registry
            )
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.tell()

    async def tell(self) -> None:
        """What the health of the services is now."""
        self._metrics.leader.set(self._front.leads)
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self._front.answers
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in SERVICES:
            await self._health.set(service, status)

    async def stop_serving(self) -> None:
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        await self._server.stop(STOP_SECONDS)
        if self._authenticator is not None:
            await self._authenticator.close()
        if self._scraping is not None:
            await asyncio.to_thread(self._scraping.close)


@asynccontextmanager
async def serve(
    config: Config, store: Store, connect: Connect | None = None
) -> AsyncIterator[Running]:
    """Leads on a store that only this process has, until the block is left. The store is the
    caller's to close; `connect` opens sources.

    Raises UserError ADDRESS_UNUSABLE, and what decoding the store's records raises.
    """
    metrics = Metrics()
    reign = await Reign.prepare(
        config, store, metrics, connect or etcd_connector(config.secrets.resolver)
    )
    me = _member(config.advertised)
    front = Front(lambda: [(me, True)], Forwarder(me.id))
    ear = _Ear(config, front, metrics)
    front.reign = reign
    reign.start()
    try:
        await ear.open()
        log.info("controller serves", address=config.listen, tasks=reign.tasks)
        yield Running(ear.port, reign.done, reign.loop, metrics)
    finally:
        await ear.stop_serving()
        reign.close_streams(_STOPS.reason, _STOPS.message)
        await ear.close()
        await reign.end(_STOPS, drain=True)


class Elected:
    """One of several controllers on one etcd: leads when elected, else passes calls on."""

    def __init__(self, config: Config, connect: Connect | None = None) -> None:
        assert config.store.etcd is not None
        self._config = config
        self._etcd = config.store.etcd
        self._connect = connect or etcd_connector(config.secrets.resolver)
        self._metrics = Metrics()
        self.me = _member(config.advertised)
        self._forwarder = Forwarder(
            self.me.id,
            Credentials(
                tls=config.controller_tls,
                token_from=config.controller_token,
                insecure=config.insecure,
                prefix="controller",
            ),
        )
        self._election = Election(
            self._etcd.endpoints,
            self._etcd.prefix,
            self._etcd.lease_seconds,
            self.me,
            self._etcd.security,
        )
        self._election.on_change = self._changed
        Seals.read(config.secrets_keys)  # a key that cannot be read is told now, not when elected
        self._front = Front(self._roster, self._forwarder)
        self._told = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> bool:
        """Until `stop`; False when something is broken. Raises UserError."""
        ear = _Ear(self._config, self._front, self._metrics)
        self._election.join()
        telling = asyncio.create_task(self._tell(ear), name="health")
        stopping = asyncio.create_task(stop.wait())
        try:
            await ear.open()
            log.info("controller serves", address=self._config.listen, as_address=self.me.address)
            while not stop.is_set():
                winning = asyncio.create_task(self._election.win())
                await asyncio.wait({winning, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not winning.done():
                    winning.cancel()
                    await asyncio.wait({winning})
                    break
                if not await self._reign(winning.result(), stopping):
                    return False
                if not stop.is_set():
                    await asyncio.wait({stopping}, timeout=AGAIN_SECONDS)
            return True
        finally:
            stopping.cancel()
            telling.cancel()
            await asyncio.gather(telling, stopping, return_exceptions=True)
            await ear.stop_serving()
            await self._forwarder.close()
            await self._election.leave()
            await ear.close()

    async def _reign(self, term: Term, stopping: asyncio.Task[bool]) -> bool:
        """From the election to the end of the term; False when something of ours broke."""
        began = time.monotonic()
        try:
            store = await EtcdStore.open(
                self._election,
                term,
                self._etcd.endpoints,
                self._etcd.prefix,
                self._config.lease.leases.ttl_ms,
                self._etcd.security,
            )
        except (RetryableError, LeadershipLost) as error:
            log.warning("leadership could not begin", reason=error.reason, error=error.message)
            return True
        lost = asyncio.create_task(store.lost())
        forgetting = asyncio.create_task(self._forget_inherited(store), name="inherited leases")
        try:
            reign = await Reign.prepare(
                self._config, store, self._metrics, self._connect, store.inherited_ms
            )
            reign.start()
            self._front.reign = reign
            self._told.set()
            log.info(
                "controller leads",
                incarnation=store.incarnation,
                tasks=reign.tasks,
                loading_seconds=round(time.monotonic() - began, 3),
            )
            await asyncio.wait({stopping, reign.done, lost}, return_when=asyncio.FIRST_COMPLETED)
            broken = reign.done.done() and store.certain
            if broken:
                log.critical("controller ends: its loop broke", exc_info=reign.done.exception())
            elif not store.certain:
                log.warning("controller leads no more", error=term.lost().message)
            else:
                log.info("controller stops")
            self._front.reign = None
            self._told.set()
            await reign.end(
                _STOPS if store.certain else term.lost(), drain=store.certain and not broken
            )
            self._metrics.forget()
            return not broken
        except RetryableError as error:
            log.warning("leadership could not begin", reason=error.reason, error=error.message)
            return True
        finally:
            self._front.reign = None
            self._told.set()
            for task in (lost, forgetting):
                task.cancel()
            await asyncio.gather(lost, forgetting, return_exceptions=True)
            await store.close()

    async def _forget_inherited(self, store: EtcdStore) -> None:
        leases = self._config.lease.leases
        if store.inherited_ms > leases.ttl_ms:
            await asyncio.sleep((store.inherited_ms + leases.margin_ms) / 1000)
            with contextlib.suppress(RetryableError, LeadershipLost):
                await store.forget_inherited()

    def _changed(self) -> None:
        """Somebody else leads, or nobody."""
        leader = self._election.leader
        # At our own address it is an earlier start of ours, whose lease has yet to end.
        others = leader is not None and leader.address != self.me.address
        self._forwarder.aim(leader if others else None, self._election.term)
        self._told.set()

    async def _tell(self, ear: _Ear) -> None:
        while True:
            await self._told.wait()
            self._told.clear()
            await ear.tell()

    def _roster(self) -> list[tuple[Member, bool]]:
        leader = self._election.leader
        known = {self.me.id: self.me, **self._election.members}
        if leader is not None:
            known[leader.id] = leader
        return [
            (member, self._front.leads if member.id == self.me.id else member == leader)
            for member in known.values()
        ]


def _member(address: str) -> Member:
    return Member(
        str(uuid.uuid4()),
        address,
        version("milvus-cdc"),
        socket.gethostname(),
        time.time_ns() // 1_000_000,
    )
