"""What goes wrong, when and for how long, drawn from the seed.

Law: everything that is done to the world is undone in time, so that afterwards it must come right.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from milvus_cdc_controller.core import events as ev

from tests.sim.combinations import (
    crash_twice,
    divided,
    lonely_owner,
    release_unheard,
    turned_cut,
    zombie,
)
from tests.sim.trouble import Change, Fault, Trouble, Victim, move_to, nothing

if TYPE_CHECKING:
    from tests.sim.world import World


def crash_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    seconds = rng.choice((0.2, 2, 8, 25, 45)) * (0.5 + rng.random())
    return Trouble("crash", lambda: victim.meet().kill(), lambda: victim.host.start(), seconds)


def stop_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    return Trouble("clean stop", lambda: victim.meet().terminate(), nothing, 1.0)


def freeze_replicator(world: World, rng: random.Random) -> Trouble:
    victim = Victim(world, rng)
    seconds = rng.choice((1, 6, 14, 18, 22, 30, 50)) * (0.8 + rng.random() / 2)
    return Trouble("freeze", lambda: victim.meet().freeze(), lambda: victim.host.thaw(), seconds)


def crash_controller(world: World, rng: random.Random) -> Trouble:
    host = rng.choice(world.controllers)
    return Trouble(f"crash of {host.host}", host.kill, host.start, rng.uniform(0.2, 20))


def stop_controller(world: World, rng: random.Random) -> Trouble:
    host = rng.choice(world.controllers)
    return Trouble(f"stop of {host.host}", host.terminate, nothing, 1.0)


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
        "the queue forgets what every checkpoint has passed", world.truncate, nothing, 1.0
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
            world.ask(partial(move_to, assignment_id, name))

    return Trouble(f"a user moves all to {name}", begin, nothing, 1.0)


def slow_etcd(world: World, rng: random.Random) -> Trouble:
    etcd = rng.choice((world.own_etcd, world.source_etcd))
    most = rng.choice((0.5, 1.5, 3.0))

    def set_slow(seconds: float) -> None:
        etcd.slow = seconds
        world.change_schema()

    return Trouble(
        f"slow {etcd.name} ({most} s)", lambda: set_slow(most), lambda: set_slow(0.0), 12.0
    )


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
    if finish is not nothing:
        world.say("FAULT", f"over: {text}")
        finish()
