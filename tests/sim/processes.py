"""The two services as processes: what is shipped, put together as their commands do, each on a loop
and a clock of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from milvus_cdc.catalog import CatalogueWatcher, Layout
from milvus_cdc.errors import CdcError
from milvus_cdc.model import Drift
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.selection import Selection
from milvus_cdc.sink import Sink
from milvus_cdc.source import LogSource
from milvus_cdc_controller.catalogues import Closable, Watcher
from milvus_cdc_controller.config import Config
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.task import StartAt, TaskSpec
from milvus_cdc_controller.front import Front
from milvus_cdc_controller.loop import ControlLoop, Refused
from milvus_cdc_controller.server import Elected
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

CONFIG = {
    "metrics": None,
    "insecure": True,
    "store": {"etcd": {"endpoints": ["etcd:2379"], "leaseSeconds": 5}},
    # Reports are rarer than by default: a run is mostly waiting, and each costs real time.
    "lease": {"ttl": 15.0, "heartbeat": 3.0, "clockMargin": 2.0, "progress": 2.0},
}
TASK = "tasks/copy"
SOURCE = task_pb2.Source(nats=task_pb2.NatsQueue(url="nats://queue:4222"))
SINK = task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://sink:19530"))


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
            controller=tuple(f"{host}:7070" for host in self.world.front.hosts),
            name=self.host,
            writes=WriteSettings(rows_per_request=6, in_flight_per_collection=3),
        )
        self.in_flight = InFlight()
        connections = SimConnections(self, loop)

        def dial(address: str) -> Any:
            return Channel(self.world.front, loop, self.host, address.partition(":")[0])

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
        held = replicator._assigned.holdings.all().get(assignment_id)
        if held is None or held.epoch >= epoch:
            return ""
        runner = replicator._assigned.runners.get(assignment_id)
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


class Ear:
    """In place of what listens: the front is reached through the made-up network."""

    def __init__(self, world: World, front: Front) -> None:
        self._world = world
        self._front = front
        loop = world.clockwork.running
        assert loop is not None
        self._loop = loop
        self.port = 0

    async def open(self) -> None:
        self._world.front.serving[self._loop.name] = self._loop, self._front

    async def tell(self) -> None:
        """Who leads has changed. The first one to do so finds that there is no task."""
        reign = self._front.reign
        if reign is not None and not reign.tasks:
            self._loop.create_task(create_task(reign.loop, self._world.parts))

    async def stop_serving(self) -> None:
        self._world.front.serving.pop(self._loop.name, None)

    async def close(self) -> None:
        self._world.front.serving.pop(self._loop.name, None)


async def create_task(loop: ControlLoop, parts: int) -> None:
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
        max_parts=parts,
    )
    with contextlib.suppress(CdcError, Refused):
        await loop.call(lambda at, call: ev.CreateTask(at, call, "uid", spec, "r", "f", True))


class ControllerHost(Host):
    """Runs a controller on the shared etcd, as elected or not."""

    def __init__(self, world: World, host: str, rate: float) -> None:
        super().__init__(world, host, rate)
        self._elected: Elected | None = None

    @property
    def control(self) -> ControlLoop | None:
        """While it leads."""
        if self._elected is None or self.loop is None or self.loop.frozen:
            return None
        reign = self._elected._front.reign
        return reign.loop if reign is not None and reign.leads else None

    async def _main(self, stop: asyncio.Event) -> None:
        config = Config.model_validate({**CONFIG, "listen": f"{self.host}:7070"})
        fault = config.fault()
        assert fault is None, fault
        self._elected = Elected(config, self._connect)
        if not await self._elected.run(stop):
            raise AssertionError("a reign broke")

    def _connect(self, _source: task_pb2.Source) -> tuple[Closable, Watcher]:
        client: Any = Client(self.world.network, self.host, self.world.source_etcd)
        return client, CatalogueWatcher(client, Layout("by-dev"))

    def _gone(self, loop: Loop) -> None:
        self._elected = None
        self.world.front.serving.pop(self.host, None)
        super()._gone(loop)
