"""The two services as processes: what is shipped, put together as their commands do, each on a loop
and a clock of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milvus_cdc.catalog import CatalogueWatcher, Layout
from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.model import Drift
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.selection import Selection
from milvus_cdc.sink import Sink
from milvus_cdc.source import LogSource
from milvus_cdc_controller.catalogues import Catalogues, Closable, Watcher
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.core.task import StartAt, TaskSpec
from milvus_cdc_controller.loop import ControlLoop
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.replication_service import ReplicationService, Streams
from milvus_cdc_controller.store import LeadershipLost
from milvus_cdc_controller.store.election import Election, Member
from milvus_cdc_controller.store.etcd import EtcdStore
from milvus_cdc_controller.store.records import decode
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.session import Replicator, run_until
from milvus_cdc_replicator.settings import Settings, WriteSettings
from milvuscdc.v1 import task_pb2

from tests.sim.clockwork import HostClock, Loop
from tests.sim.etcd import Client
from tests.sim.queue import QueueClient
from tests.sim.sink import InFlight, SinkClient, Writer
from tests.sim.streams import Channel

if TYPE_CHECKING:
    from tests.sim.world import World

LEASES = Leases(ttl_ms=15_000, heartbeat_ms=3_000, margin_ms=2_000)
PROGRESS_MS = 2_000
LEADER_SECONDS = 5
SILENCE_MS = 10_000
TASK = "tasks/copy"
SOURCE = task_pb2.Source(nats=task_pb2.NatsQueue(url="nats://queue:4222"))
SINK = task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://sink:19530"))
_METRICS = Metrics()


class Host:
    """A machine that runs one process, again and again."""

    def __init__(self, world: World, host: str, rate: float) -> None:
        self.world = world
        self.host = host
        self.clock = HostClock(world.clockwork, rate)
        self.loop: Loop | None = None
        self.starts = 0
        self._stop: asyncio.Event | None = None

    @property
    def running(self) -> bool:
        return self.loop is not None

    @property
    def frozen(self) -> bool:
        return self.loop is not None and self.loop.frozen

    def start(self) -> None:
        if self.loop is not None:
            return
        self.starts += 1
        loop = Loop(self.world.clockwork, self.clock, self.host)  # type: ignore[abstract]
        self.loop = loop
        self.world.say(self.host, f"starts ({self.starts})")
        loop.create_task(self._live(loop))

    def kill(self, why: str = "is killed") -> None:
        """kill -9."""
        loop = self.loop
        if loop is None or (self.world.peace and why == "is killed"):
            return
        self.world.say(self.host, why)
        self.loop = None
        loop.kill()
        self._gone(loop)

    def terminate(self) -> None:
        """SIGTERM."""
        if self.loop is not None and self._stop is not None:
            self.world.say(self.host, "is told to stop")
            self.loop.call_soon(self._stop.set)

    def freeze(self) -> None:
        if self.loop is not None and not self.world.peace:
            self.world.say(self.host, "is frozen")
            self.loop.freeze()

    def thaw(self) -> None:
        if self.loop is not None and self.loop.frozen:
            self.world.say(self.host, "wakes up")
            self.loop.thaw()

    async def _live(self, loop: Loop) -> None:
        self._stop = asyncio.Event()
        try:
            await self._main(self._stop)
        except CdcError as error:
            if not loop.dead:
                self.world.say(self.host, f"ends: {error}")
        except Exception as error:
            if not loop.dead:
                self.world.referee.fail(f"{self.host} broke: {error!r}")
        if not loop.dead:
            self.world.clockwork.after(0, self._exited, loop)

    def _exited(self, loop: Loop) -> None:
        if self.loop is loop:
            self.kill("has ended")
            self.world.restart(self, self.world.rng.uniform(0.5, 3))

    def _gone(self, loop: Loop) -> None:
        self.world.bury(loop)
        self.world.front.died(loop)

    async def _main(self, stop: asyncio.Event) -> None:
        raise NotImplementedError


class ReplicatorHost(Host):
    """Runs a replicator."""

    def __init__(self, world: World, host: str, rate: float) -> None:
        super().__init__(world, host, rate)
        self.replicator: Replicator | None = None
        self.in_flight = InFlight()

    async def _main(self, stop: asyncio.Event) -> None:
        assert self.loop is not None
        loop = self.loop
        settings = Settings(
            controller=("controllers",),
            name=self.host,
            writes=WriteSettings(rows_per_request=6, in_flight_per_collection=3),
        )
        self.in_flight = InFlight()
        connections = SimConnections(self, loop)
        attempts = 0

        def dial(_address: str) -> Any:
            nonlocal attempts
            attempts += 1
            hosts = self.world.front.hosts
            return Channel(self.world.front, loop, self.host, hosts[attempts % len(hosts)])

        self.replicator = Replicator(settings, "1", connections, dial=dial)
        try:
            await run_until(self.replicator, stop, settings.shutdown_seconds)
        finally:
            if not loop.dead:
                await connections.close()

    def _gone(self, loop: Loop) -> None:
        self.replicator = None
        # What it had sent is under way all the same.
        self.world.orphans.append((self.host, self.in_flight))
        self.in_flight = InFlight()
        self.world.queue.forget(self.host)
        super()._gone(loop)

    def may_write(self, assignment_id: str, epoch: int) -> str:
        """How it could still write as an owner before `epoch`; empty when it cannot."""
        if why := self.in_flight.older(assignment_id, epoch, self.world.clockwork.now):
            return why
        replicator = self.replicator
        if replicator is None:
            return ""
        held = replicator._holdings.all().get(assignment_id)
        if held is None or held.epoch >= epoch:
            return ""
        runner = replicator._runners.get(assignment_id)
        if isinstance(runner, CollectionRunner) and runner._state()[0] == "FAILED":
            return ""
        left = replicator._lease.remaining(self.clock.now())
        return f"its lease of epoch {held.epoch} has {left:.3f} s left" if left > 0 else ""


class SimConnections(Connections):
    """With the made-up queue and sink behind them."""

    def __init__(self, host: ReplicatorHost, loop: Loop) -> None:
        super().__init__(SecretResolver(env_prefix="NONE_", folders=()))
        self._host = host
        self._loop = loop
        world = host.world
        self._queue = QueueClient(world.network, host.host, world.queue)

    async def source(self, spec: task_pb2.Source) -> LogSource:
        return self._queue

    async def sink(self, spec: task_pb2.Sink, origin: Callable[[], Any] | None = None) -> Sink:
        host, world = self._host, self._host.world
        runner = getattr(origin, "__self__", None)
        writer: Callable[[], Writer] | None = None
        if runner is not None:
            assert host.replicator is not None
            instance = host.replicator._instance_id
            assignment_id, epoch = runner.assignment.assignment_id, runner.assignment.epoch

            def writer() -> Writer:
                return Writer(host.host, instance, assignment_id, epoch)

        return SinkClient(world.network, self._loop, host.host, world.sink, host.in_flight, writer)


@dataclass(slots=True)
class Outward:
    """Where a controller's effects go; nobody watches tasks here."""

    streams: Streams
    catalogues: Catalogues

    def send(self, stream: int, message: fx.StreamMessage) -> None:
        self.streams.send(stream, message)

    def close_stream(self, effect: fx.CloseStream) -> None:
        self.streams.close(effect)

    def publish(self, effect: fx.Publish) -> None:
        pass

    def source(
        self, effect: fx.OpenSource | fx.CloseSource | fx.RefreshSource | fx.ReadPartition
    ) -> None:
        self.catalogues.handle(effect)


class ControllerHost(Host):
    """Runs a controller on the shared etcd: leads, or waits for its turn."""

    def __init__(self, world: World, host: str, rate: float) -> None:
        super().__init__(world, host, rate)
        self.control: ControlLoop | None = None

    @property
    def leads(self) -> bool:
        return self.control is not None

    async def _main(self, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait())
        election = Election(["etcd:2379"], "milvus-cdc", LEADER_SECONDS, self._member())
        election.join()
        try:
            await self._stand(election, stopping)
        finally:
            stopping.cancel()
            if self.loop is not None and not self.loop.dead:
                await election.leave()

    async def _stand(self, election: Election, stopping: asyncio.Task[bool]) -> None:
        world = self.world
        opening = asyncio.create_task(self._open(election))
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
            return
        store = opening.result()
        records = [decode(key, value) for key, value in (await store.load()).items()]
        controller = Controller(LEASES, records)
        controller.world.inherited_ttl_ms = store.inherited_ms
        streams = Streams()
        loop = ControlLoop(controller, store, _METRICS)
        catalogues = Catalogues(loop.post, controller.world.source_records.get, self._connect)
        service = ReplicationService(loop, streams, self.host, LEASES, PROGRESS_MS, SILENCE_MS)
        done = asyncio.create_task(loop.run(Outward(streams, catalogues)))
        lost = asyncio.create_task(store.lost())
        assert self.loop is not None
        self.control = loop
        world.front.serving[self.host] = self.loop, service
        world.say(self.host, f"leads ({store.incarnation})")
        creating = asyncio.create_task(self._create_task(loop))
        await asyncio.wait({stopping, done, lost}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not (done.done() or lost.done()):
            streams.close_all("CONTROLLER_STOPS", "The controller stops; connect anew.")
            await asyncio.sleep(0.1)
            world.front.serving.pop(self.host, None)
            await catalogues.close()
            await loop.drain(5.0)
        world.front.serving.pop(self.host, None)
        creating.cancel()
        done.cancel()
        lost.cancel()
        await asyncio.wait({done})
        if not done.cancelled() and (broken := done.exception()) is not None:
            # A group of the loop's tasks; a deposed leader is one thing, a bug is another.
            assert isinstance(broken, BaseExceptionGroup)
            if broken.split(CdcError)[1] is not None:
                raise broken
        await store.close()

    def _member(self) -> Member:
        return Member(f"{self.host}-{self.starts}", f"{self.host}:7070", "1", self.host, 0)

    async def _open(self, election: Election) -> EtcdStore:
        while True:
            term = await election.win()
            try:
                return await EtcdStore.open(
                    election, term, ["etcd:2379"], "milvus-cdc", LEASES.ttl_ms
                )
            except (RetryableError, LeadershipLost):
                await asyncio.sleep(1)

    async def _create_task(self, loop: ControlLoop) -> None:
        if loop.controller.world.tasks:
            return
        spec = TaskSpec(
            TASK,
            (),
            Selection(("*.*",)),
            SOURCE.SerializeToString(),
            "source",
            SINK.SerializeToString(),
            "sink",
            StartAt.EARLIEST,
            drift=Drift.REPAIR,
        )
        await loop.call(lambda at, call: ev.CreateTask(at, call, "uid", spec, "r", "f", True))

    def _connect(self, _source: task_pb2.Source) -> tuple[Closable, Watcher]:
        client: Any = Client(self.world.network, self.host, self.world.source_etcd)
        return client, CatalogueWatcher(client, Layout("by-dev"))

    def _gone(self, loop: Loop) -> None:
        self.control = None
        self.world.front.serving.pop(self.host, None)
        super()._gone(loop)
