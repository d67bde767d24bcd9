"""Troubles that meet: each part of them is harmless where the other is not."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from tests.sim.trouble import Trouble, Victim, move_to

if TYPE_CHECKING:
    from tests.sim.world import World


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
            world.ask(partial(move_to, assignment_id, to))
        world.clockwork.after(pause, another_leads)

    def another_leads() -> None:
        for host in world.controllers:
            if host.control is not None:
                host.terminate()

    def end() -> None:
        world.sink.slow = 0.0

    return Trouble("a release that its asker does not hear", begin, end, rng.uniform(9, 13))
