"""One trouble of a world: what it is, whom it meets, how it begins and ends."""

from __future__ import annotations

import random
from collections.abc import Callable
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


def nothing() -> None:
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


def move_to(assignment_id: str, name: str, at: ev.Instant, call: int) -> ev.MoveAssignment:
    return ev.MoveAssignment(at, call, assignment_id, name)
