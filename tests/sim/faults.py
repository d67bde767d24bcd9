"""What goes wrong, when and for how long, drawn from the seed.

Law: everything that is done to the world is undone in time, so that afterwards it must come right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from milvus_cdc_controller.core import events as ev

if TYPE_CHECKING:
    from tests.sim.processes import ReplicatorHost
    from tests.sim.world import World

Change = Callable[[], object]


class Trouble(NamedTuple):
    """What it is, how it begins, how it ends, and after how many seconds."""

    text: str
    begin: Change
    end: Change
    seconds: float


Fault = Callable[["World", random.Random], Trouble]


def _nothing() -> None:
    pass


class Victim:
    """A replicator, mostly one that has something to lose, at a time when there is work."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._owner = rng.random() < 0.8
        self.host = rng.choice(world.replicators)

    def meet(self) -> ReplicatorHost:
        self._world.hurry()
        if self._owner:
            self.host = self._world.owner() or self.host
        return self.host


def crash_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    seconds = rng.choice((0.2, 2, 8, 25, 45)) * (0.5 + rng.random())
    return Trouble("crash", lambda: victim.meet().kill(), lambda: victim.host.start(), seconds)


def stop_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    return Trouble("clean stop", lambda: victim.meet().terminate(), _nothing, 1.0)


def freeze_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    seconds = rng.choice((1, 6, 14, 18, 22, 30, 50)) * (0.8 + rng.random() / 2)
    return Trouble("freeze", lambda: victim.meet().freeze(), lambda: victim.host.thaw(), seconds)


def crash_controller(world: World, rng: random.Random) -> Trouble:
    host = rng.choice(world.controllers)
    return Trouble(f"crash of {host.host}", host.kill, host.start, rng.uniform(0.2, 20))


def stop_controller(world: World, rng: random.Random) -> Trouble:
    host = rng.choice(world.controllers)
    return Trouble(f"stop of {host.host}", host.terminate, _nothing, 1.0)


def freeze_controller(world: World, rng: random.Random) -> Trouble:
    host = rng.choice(world.controllers)
    return Trouble(f"freeze of {host.host}", host.freeze, host.thaw, rng.choice((1, 7, 9, 14, 30)))


def _cut(world: World, rng: random.Random, pairs: list[tuple[str, str]], seconds: float) -> Trouble:
    way = rng.choice(("both", "there", "back"))
    ways = []
    for a, b in pairs:
        ways += [(a, b)] if way == "there" else [(b, a)] if way == "back" else [(a, b), (b, a)]

    def begin() -> None:
        for each in ways:
            world.network.cut(*each)

    def end() -> None:
        for each in ways:
            world.network.mend(*each)

    text = ", ".join(f"{a} to {b}" for a, b in ways)
    return Trouble(f"cut: {text}", begin, end, seconds)


def cut_from_controllers(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    way = rng.choice(("both", "there", "back"))
    ways: list[tuple[str, str]] = []

    def begin() -> None:
        host = victim.meet().host
        for each in world.controllers:
            if way != "back":
                ways.append((host, each.host))
            if way != "there":
                ways.append((each.host, host))
        for one in ways:
            world.network.cut(*one)

    def end() -> None:
        for one in ways:
            world.network.mend(*one)

    text = f"a replicator is cut off from the controllers ({way})"
    return Trouble(text, begin, end, rng.choice((2, 8, 12, 20, 25, 40)))


def cut_one_pair(world: World, rng: random.Random) -> Trouble:
    pair = rng.choice(world.replicators).host, rng.choice(world.controllers).host
    return _cut(world, rng, [pair], rng.choice((1, 5, 12, 25)))


def cut_from_server(world: World, rng: random.Random) -> Trouble:
    if rng.random() < 0.6:
        pair = rng.choice(world.replicators).host, rng.choice(("sink", "sink", "queue"))
    else:
        pair = rng.choice(world.controllers).host, rng.choice(("etcd", "etcd", "source-etcd"))
    return _cut(world, rng, [pair], rng.choice((1, 4, 9, 20)))


def server_down(world: World, rng: random.Random) -> Trouble:
    server = rng.choice(world.servers)

    def set_down(down: bool) -> None:
        server.down = down

    return Trouble(
        f"{server.name} down",
        lambda: set_down(True),
        lambda: set_down(False),
        rng.uniform(0.5, 15),
    )


def slow_sink(world: World, rng: random.Random) -> Trouble:
    most = rng.choice((1.0, 4.0, 9.0, 14.0))

    def set_slow(seconds: float) -> None:
        world.sink.slow = seconds

    return Trouble(
        f"slow sink ({most:.0f} s)",
        lambda: set_slow(most),
        lambda: set_slow(0.0),
        rng.uniform(5, 25),
    )


def bad_network(world: World, rng: random.Random) -> Trouble:
    network = world.network
    loss, lag = rng.choice((0.0, 0.02, 0.1)), rng.choice((0.0, 0.02, 0.1))
    host, slow = rng.choice(world.hosts).host, rng.choice((0.0, 0.3, 2.0))

    def set_bad(now: bool) -> None:
        network.loss, network.lag = (loss, lag) if now else (0.0, 0.0)
        network.slow = {host: slow} if now else {}

    text = f"bad network: {loss:.0%} lost, {lag:.0%} late, {host} slow by {slow} s"
    return Trouble(text, lambda: set_bad(True), lambda: set_bad(False), rng.uniform(5, 40))


def compaction(world: World, rng: random.Random) -> Trouble:
    """While the watcher cannot hear it, or in its sight."""
    etcd = world.source_etcd
    ways = [(etcd.name, host.host) for host in world.controllers]
    deaf = rng.random() < 0.7

    def begin() -> None:
        if deaf:
            for way in ways:
                world.network.cut(*way)
        world.change_schema()

    def end() -> None:
        etcd.compact()
        if deaf:
            for way in ways:
                world.network.mend(*way)

    return Trouble(
        f"compaction of the source's etcd{', unseen' if deaf else ''}",
        begin,
        end,
        rng.uniform(1, 12),
    )


def retention(world: World, rng: random.Random) -> Trouble:
    return Trouble(
        "the queue forgets what every checkpoint has passed", world.truncate, _nothing, 1.0
    )


def pause_task(world: World, rng: random.Random) -> Trouble:
    return Trouble("a user pauses the task", world.pause, world.resume, rng.uniform(1, 20))


def drain(world: World, rng: random.Random) -> Trouble:
    name = rng.choice(world.replicators).host
    return Trouble(
        f"a user drains {name}",
        lambda: world.ask(lambda at, call: ev.DrainReplicator(at, call, name, force=True)),
        lambda: world.let_back(name),
        rng.uniform(2, 40),
    )


def move(world: World, rng: random.Random) -> Trouble:
    """Of everything with rows, to one replicator."""
    name = rng.choice(world.replicators).host

    def begin() -> None:
        for assignment_id in list(world.referee.progress):
            world.ask(partial(_move, assignment_id, name))

    return Trouble(f"a user moves all to {name}", begin, _nothing, 1.0)


def _move(assignment_id: str, name: str, at: ev.Instant, call: int) -> ev.MoveAssignment:
    return ev.MoveAssignment(at, call, assignment_id, name)


def crash_twice(world: World, rng: random.Random) -> Trouble:
    """Of both services at about the same time."""
    replicator, controller = rng.choice(world.replicators), rng.choice(world.controllers)

    def begin() -> None:
        replicator.kill()
        world.clockwork.after(rng.uniform(0, 2), controller.kill)

    def end() -> None:
        replicator.start()
        controller.start()

    return Trouble(
        f"crash of {replicator.host} and {controller.host}", begin, end, rng.uniform(1, 10)
    )


def zombie(world: World, rng: random.Random) -> Trouble:
    """Rows it has read and not written wait in a frozen process past its lease."""
    victim = Victim(world, rng)
    pause = rng.uniform(0.5, 4)

    def begin() -> None:
        world.sink.slow = 12.0
        host = victim.meet()
        world.clockwork.after(pause, host.freeze)

    def end() -> None:
        world.sink.slow = 0.0
        victim.host.thaw()

    return Trouble("an owner becomes a zombie", begin, end, pause + rng.uniform(17, 30))


def turned_cut(world: World, rng: random.Random) -> Trouble:
    """Answers to a replicator are held up; when they arrive it can say nothing any more."""
    victim = Victim(world, rng)
    held = rng.uniform(2.2, 7)
    cut: list[tuple[str, str]] = []

    def begin() -> None:
        host = victim.meet().host
        cut.extend((each.host, host) for each in world.controllers)
        for way in cut:
            world.network.cut(*way)
        world.clockwork.after(held, turn)

    def turn() -> None:
        there = [(host, controller) for controller, host in cut]
        end()
        cut.extend(there)
        for way in cut:
            world.network.cut(*way)

    def end() -> None:
        for way in cut:
            world.network.mend(*way)
        cut.clear()

    return Trouble("a replicator is cut off, first back, then there", begin, end, held + 25)


def lonely_owner(world: World, rng: random.Random) -> Trouble:
    """It reaches a sink that has become slow, and no controller, until its lease is over."""
    victim = Victim(world, rng)
    ways: list[tuple[str, str]] = []

    def begin() -> None:
        world.sink.slow = 9.0
        host = victim.meet().host
        for each in world.controllers:
            ways.extend(((host, each.host), (each.host, host)))
        for way in ways:
            world.network.cut(*way)

    def end() -> None:
        world.sink.slow = 0.0
        for way in ways:
            world.network.mend(*way)

    return Trouble("an owner alone with a slow sink", begin, end, rng.uniform(18, 26))


def slow_etcd(world: World, rng: random.Random) -> Trouble:
    etcd = rng.choice((world.own_etcd, world.source_etcd))
    most = rng.choice((0.5, 1.5, 3.0))

    def set_slow(seconds: float) -> None:
        etcd.slow = seconds
        world.change_schema()

    return Trouble(
        f"slow {etcd.name} ({most} s)", lambda: set_slow(most), lambda: set_slow(0.0), 12.0
    )


def divided(world: World, rng: random.Random) -> Trouble:
    """The leader is cut off from etcd, and with one replicator from everybody else."""
    victim = Victim(world, rng)
    ways: list[tuple[str, str]] = []

    def begin() -> None:
        kept = victim.meet()
        leader = next((c for c in world.controllers if c.control is not None), None)
        if leader is None:
            return
        others = [r.host for r in world.replicators if r is not kept]
        for other in (*others, world.own_etcd.name):
            ways.extend(((leader.host, other), (other, leader.host)))
        for way in ways:
            world.network.cut(*way)

    def end() -> None:
        for way in ways:
            world.network.mend(*way)

    return Trouble("a leader alone with an owner", begin, end, rng.uniform(24, 32))


def release_unheard(world: World, rng: random.Random) -> Trouble:
    """What is to be moved is being let go, slowly; whoever asked for it leads no more."""
    victim = Victim(world, rng)
    to = rng.choice(world.replicators).host
    pause = rng.uniform(0.1, 1)

    def begin() -> None:
        world.sink.slow = 9.0
        victim.meet()
        world.clockwork.after(pause, ask)

    def ask() -> None:
        for assignment_id in list(world.referee.progress):
            world.ask(partial(_move, assignment_id, to))
        world.clockwork.after(pause, another_leads)

    def another_leads() -> None:
        for host in world.controllers:
            if host.control is not None:
                host.terminate()

    def end() -> None:
        world.sink.slow = 0.0

    return Trouble("a release that its asker does not hear", begin, end, rng.uniform(9, 13))


FAULTS: tuple[tuple[int, Fault], ...] = (
    (4, crash_replicator),
    (2, stop_replicator),
    (4, freeze_replicator),
    (3, crash_controller),
    (1, stop_controller),
    (3, freeze_controller),
    (3, cut_from_controllers),
    (2, cut_one_pair),
    (3, cut_from_server),
    (2, server_down),
    (2, slow_sink),
    (3, bad_network),
    (2, compaction),
    (2, retention),
    (1, pause_task),
    (2, drain),
    (3, move),
    (2, crash_twice),
    (4, zombie),
    (2, turned_cut),
    (2, lonely_owner),
    (2, slow_etcd),
    (2, divided),
    (2, release_unheard),
)


def plan(world: World, rng: random.Random, start: float, end: float, count: int) -> None:
    """So many faults between the two times, all over at the second."""
    kinds = [fault for _, fault in FAULTS]
    weights = [weight for weight, _ in FAULTS]
    for _ in range(count):
        fault = rng.choices(kinds, weights)[0]
        text, begin, finish, seconds = fault(world, rng)
        at = rng.uniform(start, end - 5)
        until = min(at + seconds, end)
        world.clockwork.at(at, _begin, world, text, begin)
        world.clockwork.at(until, _end, world, text, finish)


def _begin(world: World, text: str, begin: Change) -> None:
    world.say("FAULT", text)
    begin()


def _end(world: World, text: str, finish: Change) -> None:
    if finish is not _nothing:
        world.say("FAULT", f"over: {text}")
        finish()
