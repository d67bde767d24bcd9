"""One run: a world made from a seed, faults in it, peace at the end, and the verdict."""

from __future__ import annotations

import contextlib
import random
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import prometheus_client
import structlog
from milvus_cdc.errors import CdcError
from milvus_cdc.source.positions import decode as decode_position
from milvus_cdc_controller import loop as control_loop
from milvus_cdc_controller import reign, server
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.metrics import Metrics as ControllerMetrics
from milvus_cdc_controller.store import election
from milvus_cdc_controller.store import etcd as etcd_store
from milvus_cdc_replicator import reader, session

from tests.sim import faults, latecomers
from tests.sim.clockwork import Clockwork, Loop, virtual
from tests.sim.etcd import Client, Etcd
from tests.sim.network import Network, Server
from tests.sim.processes import ControllerHost, Ear, Host, ReplicatorHost
from tests.sim.queue import Queue
from tests.sim.referee import Referee
from tests.sim.sink import InFlight, SinkServer
from tests.sim.source import Milvus, Table
from tests.sim.strays import Strays
from tests.sim.streams import Front

DRIFT = 0.04
"""Clocks differ from the true one by no more than this part: see "Hand-off safety"."""
CALM_SECONDS = 150.0
"""When nothing goes wrong any more everything has caught up in this time."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one seed."""

    seed: int
    violation: str
    simulated: float
    """Seconds."""
    spent: float
    """Seconds of CPU."""
    steps: int
    rows: int
    takeovers: int
    parts: int = 0
    splits: int = 0
    """New owners of parts."""
    late: int = 0
    """Messages behind a tick that covers them."""
    strays: int = 0
    """Requests of lost owners that took effect when there was another."""
    excused: int = 0
    """Looks at keys of which no owner could know (ARCHITECTURE.md, "Late messages")."""
    story: list[str] = field(default_factory=list)


class World:
    """Everything there is."""

    def __init__(self, seed: int, *, telling: bool = False, parts: int = 0) -> None:
        self.seed = seed
        self.parts = parts
        """The task's split: at most so many parts."""
        self.rng = random.Random(f"world {seed}")
        self.telling = telling
        self.story: list[str] = []
        self.clockwork = Clockwork()
        self.clockwork.on_spin = lambda loop: self.referee.fail(f"{loop.name} spins")
        self.network = Network(self.clockwork, random.Random(f"network {seed}"))
        self.own_etcd = Etcd("etcd", self.clockwork, 1)
        self.source_etcd = Etcd("source-etcd", self.clockwork, 7)
        self.queue = Queue(self.clockwork)
        self.sink = SinkServer()
        self.servers: list[Server] = [self.own_etcd, self.source_etcd, self.queue, self.sink]
        self.milvus = Milvus(
            self.clockwork,
            self.source_etcd,
            self.queue,
            random.Random(f"milvus {seed}"),
            random.Random(f"latecomers {seed}"),
        )
        self.milvus.late_drops = bool(parts)  # where it matters most: parts stand just there
        self.referee = Referee(self.milvus, self.sink, self.say)
        self.own_etcd.on_commit = self.referee.committed
        self.sink.before = self.referee.before_write
        self.sink.after = self.referee.after_write
        self.sink.on_drop = self.referee.dropping
        self.strays = Strays(self, random.Random(f"strays {seed}"))
        self.sink.holds = self.strays.catches
        self.front = Front(self.network)
        self.front.on_response = self.referee.told
        self.orphans: list[tuple[str, InFlight]] = []
        self._graves: list[Loop] = []
        self.peace = False
        self.keeps_reach = False
        """The queue keeps what late messages may belong before."""
        rng = self.rng
        self.controllers = [
            ControllerHost(self, f"c{n}", self._pace()) for n in (1, 2)[: rng.choice((1, 2))]
        ]
        self.replicators = [
            ReplicatorHost(self, f"r{n}", self._pace()) for n in (1, 2, 3)[: rng.choice((2, 2, 3))]
        ]
        self.hosts: list[Host] = [*self.controllers, *self.replicators]
        self.front.hosts = [host.host for host in self.controllers]
        self.referee.replicators = self.replicators
        self.referee.orphans = self.orphans
        self._busy = 1.0
        self._paused = False

    def _pace(self) -> float:
        return 1 + self.rng.choice((-1, -0.5, 0, 0.5, 1)) * DRIFT

    # ---- the story

    def say(self, who: str, text: str) -> None:
        if self.telling:
            self.story.append(f"{self.clockwork.now:9.3f}  {who:8}  {text}")

    def heard(self, _logger: Any, level: str, event: MutableMapping[str, Any]) -> Any:
        """What a process writes to its log."""
        loop = self.clockwork.running
        if loop is None or loop.dead:
            raise structlog.DropEvent
        details = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("event", "exc_info"))
        text = f"{event['event']} {details}"
        # Of a collection that failed the store tells, unless its owner was none any more.
        if level in ("error", "exception", "critical") and event["event"] != "collection failed":
            if event.get("exc_info"):
                text += "\n" + traceback.format_exc()
            self.referee.fail(f"{loop.name} says: {text}")
        self.say(loop.name, text)
        raise structlog.DropEvent

    # ---- what happens in it

    def run(self, minutes: float) -> None:
        """Faults for so long, then peace."""
        rng, clockwork = self.rng, self.clockwork
        end = minutes * 60
        self.create_table("t1")
        self._load()
        self._mind_pause()
        for host in self.hosts:
            clockwork.after(rng.uniform(0, 2), host.start)
        chaos = random.Random(f"faults {self.seed}")
        count = chaos.randint(2, max(3, round(minutes * 3)))
        faults.plan(self, chaos, 15.0, end, count)
        latecomers.plan(self, random.Random(f"restarts {self.seed}"), 15.0, end)
        self.strays.plan(15.0, end)
        # Where collections are split every change takes the parts back.
        changes = rng.randint(3, 10) if self.parts else rng.randint(0, 3)
        for at in (rng.uniform(20, end) for _ in range(changes)):
            clockwork.at(at, self.change_schema)
        clockwork.run(end, self._over)
        self._make_peace()
        calm = clockwork.now + CALM_SECONDS
        while not self._over() and clockwork.now < calm:
            clockwork.run(clockwork.now + 2.0, self._over)
            self._look_at_loops()
            if not self.referee.behind():
                break
        if not self._over() and (behind := self.referee.behind()):
            self.referee.fail(f"{CALM_SECONDS:.0f} s after the last fault: {behind}")

    def _over(self) -> bool:
        return self.referee.violation is not None

    def _make_peace(self) -> None:
        self.peace, self._paused = True, False
        self.say("FAULT", "peace: nothing goes wrong any more")
        for each in self.servers:
            each.down, each.slow = False, 0.0
        self.network.heal()
        for host in self.hosts:
            host.thaw()
            host.start()

    def _look_at_loops(self) -> None:
        for host in self.hosts:
            if host.loop is not None and host.loop.broken:
                self.referee.fail(f"{host.host}: nobody caught {host.loop.broken[0]}")

    def _load(self) -> None:
        """Users at work, in spells; ticks all the time."""
        rng = self.rng
        if rng.random() < 0.15:
            self._busy = rng.choice((0.0, 0.0, 0.5, 1.0, 2.0))
        if not self.peace:
            for table in self.milvus.tables:
                if not table.dropped_ts:
                    for _ in range(rng.randint(0, round(2 * self._busy))):
                        self.milvus.work(table)
        for pchannel in self.queue.topics:
            if self.peace or rng.random() < 0.9:
                self.milvus.tick(pchannel)
        self.referee.look()
        self._look_at_loops()
        seconds = rng.uniform(0.5, 2.5) if self._busy and not self.peace else rng.uniform(2, 5)
        self.clockwork.after(seconds, self._load)

    def change_schema(self) -> None:
        """A user makes or drops something; often a name is given again at once."""
        rng, milvus = self.rng, self.milvus
        if self.peace:
            return
        tables = [table for table in milvus.tables if not table.dropped_ts]
        choice = rng.random()
        if choice < 0.2 and len(tables) < 3:
            free = [n for n in ("t1", "t2", "t3") if n not in {table.name for table in tables}]
            self.create_table(rng.choice(free))
        elif choice < 0.4 and len(tables) > 1:
            table = rng.choice(tables)
            self.say("source", f"drops {table.name} ({table.collection_id})")
            milvus.drop(table)
            if rng.random() < 0.5:
                self.create_table(table.name)
        else:
            self.change_partitions(rng.choice(tables))

    def create_table(self, name: str) -> None:
        shards = self.rng.sample(("dml_0", "dml_1"), self.rng.choice((1, 2, 2)))
        table = self.milvus.create(name, shards)
        self.say("source", f"creates {name} ({table.collection_id}) on {', '.join(shards)}")

    def change_partitions(self, table: Table) -> None:
        added = [p for p in table.partitions[1:] if not p.dropped]
        if added and self.rng.random() < 0.5:
            partition = self.rng.choice(added)
            self.say("source", f"drops partition {partition.name} of {table.name}")
            self.milvus.drop_partition(table, partition)
        else:
            taken = {p.name for p in added}
            name = self.rng.choice([n for n in ("p1", "p2", "p3", "p4") if n not in taken] or [""])
            if name:
                self.say("source", f"creates partition {name} of {table.name}")
                self.milvus.add_partition(table, name)

    def owner(self) -> ReplicatorHost | None:
        """Some replicator that holds a collection."""
        for assignment_id, grant in self.referee.grants.items():
            if grant.instance and not assignment_id.endswith(".metadata"):
                return next((r for r in self.replicators if r.host == grant.owner), None)
        return None

    def hurry(self) -> None:
        """There is work for a while."""
        self._busy = 2.0

    def truncate(self) -> None:
        """The queue forgets what no checkpoint needs any more, and no recount: it may find that all
        since its start must be written again.
        """
        needed: dict[str, int] = {}
        for table in self.milvus.tables:
            for pchannel, start in table.starts.items():
                if self.referee.assignment_of(table) is None:
                    place = decode_position(start)
                    needed[pchannel] = min(place, needed.get(pchannel, place))
        for progress in self.referee.progress.values():
            for point in progress.checkpoints:
                place = decode_position(point.read_from)
                needed[point.pchannel] = min(place, needed.get(point.pchannel, place))
            # It may have to be written again from there, whatever checkpoints say by then.
            if progress.recount is not None:
                pchannels = {point.vchannel: point.pchannel for point in progress.checkpoints}
                for vchannel, start, _ in progress.recount.starts:
                    pchannel, place = pchannels[vchannel], decode_position(start)
                    needed[pchannel] = min(place, needed.get(pchannel, place))
        for pchannel, first in needed.items():
            if self.keeps_reach:
                first = self.queue.before(pchannel, first, latecomers.REACH_SECONDS)
            self.queue.truncate(pchannel, first)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def _mind_pause(self) -> None:
        """A user who asks until the task is as he wants it; there may be no leader now."""
        task = self.referee.tasks.get("uid")
        if task is not None and task.paused is not self._paused:
            kind = ev.PauseTask if self._paused else ev.ResumeTask
            self.ask(lambda at, call: kind(at, call, "tasks/copy", ""))
        if self.peace:
            for host in self.replicators:
                self.let_back(host.host)
        self.clockwork.after(2.0, self._mind_pause)

    def ask(self, command: Callable[[Any, Any], Any]) -> None:
        """Once, of whoever leads; nobody may, and it may be refused."""
        for host in self.controllers:
            if host.loop is not None and not host.loop.frozen:
                host.loop.create_task(_ask(host, command))

    def let_back(self, name: str) -> None:
        """The replicator may have assignments again."""
        self.ask(lambda at, call: ev.CancelDrain(at, call, name))
        self.ask(lambda at, call: ev.UncordonReplicator(at, call, name))

    def restart(self, host: Host, seconds: float) -> None:
        """Whoever minds the processes starts it again."""
        self.clockwork.after(seconds, host.start)

    def bury(self, loop: Loop) -> None:
        self._graves.append(loop)

    def end(self) -> None:
        for host in self.hosts:
            if host.loop is not None:
                host.loop.kill()
                self._graves.append(host.loop)
                host.loop = None
        for loop in self._graves:
            loop.bury()


async def _ask(host: ControllerHost, command: Callable[[Any, Any], Any]) -> None:
    """In the controller's own loop: only by its own clock may it say whether it leads."""
    control = host.control
    if control is not None:
        with contextlib.suppress(CdcError, control_loop.Refused):
            await control.call(command)


def _nothing(*_: object) -> None:
    pass


@contextlib.contextmanager
def _made_up(world: World) -> Iterator[None]:
    """Time, chance and logs are the world's."""
    ids = random.Random(f"ids {world.seed}")

    def own_etcd(_endpoints: list[str], *, call_seconds: float = 5.0, **_: Any) -> Client:
        assert world.clockwork.running is not None
        name = world.clockwork.running.name
        return Client(world.network, name, world.own_etcd, call_seconds, stray=True)

    def new_id() -> uuid.UUID:
        return uuid.UUID(int=ids.getrandbits(128))

    state = random.getstate()
    random.seed(world.seed)
    structlog.configure(
        processors=[world.heard],
        wrapper_class=structlog.make_filtering_bound_logger(20 if world.telling else 40),
        cache_logger_on_first_use=False,
    )
    try:
        with (
            virtual(world.clockwork),
            mock.patch.object(uuid, "uuid4", new_id),
            mock.patch.object(etcd_store, "EtcdClient", own_etcd),
            mock.patch.object(election, "EtcdClient", own_etcd),
            mock.patch.object(server, "_Ear", lambda _, front, __: Ear(world, front)),
            # Nobody reads figures or watches tasks here.
            mock.patch.object(ControllerMetrics, "observe", _nothing),
            mock.patch.object(reign._Outward, "publish", _nothing),
            mock.patch.object(prometheus_client.Gauge, "set", _nothing),
            mock.patch.object(prometheus_client.Counter, "inc", _nothing),
            mock.patch.object(prometheus_client.Histogram, "observe", _nothing),
            # Coarser than shipped: a run is mostly waiting, and every wake-up costs real time.
            mock.patch.object(control_loop, "TICK_SECONDS", 1.0),
            mock.patch.object(session, "HOUSEKEEPING_SECONDS", 1.0),
            mock.patch.object(reader, "READ_WAIT_SECONDS", 5.0),
        ):
            yield
    finally:
        random.setstate(state)


def run(
    seed: int,
    *,
    minutes: float = 4.0,
    telling: bool = False,
    parts: int = 0,
    break_it: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Result:
    """One seed from beginning to end."""
    started = time.process_time()
    world = World(seed, telling=telling, parts=parts)
    with _made_up(world), break_it():
        try:
            world.run(minutes)
        finally:
            world.end()
    return Result(
        seed,
        str(world.referee.violation or ""),
        world.clockwork.now,
        time.process_time() - started,
        world.clockwork.steps,
        world.referee.rows,
        world.referee.takeovers,
        parts,
        world.referee.splits,
        world.milvus.latecomers.count,
        world.strays.count,
        world.referee.excused,
        world.story,
    )
