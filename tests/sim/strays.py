"""What hand-off safety assumes cannot be, and a recount mends: a request of a machine that died
takes effect when the next owner has written the same rows.

Laws: the machine dies while the request is under way, so nobody repeats it. It is an insert or a
delete: an older upsert over a newer value leaves the count of a key as it is, and is not found
(ARCHITECTURE.md, "Recount"). It comes before keys are counted, and never to another collection or
partition that was given the same name.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milvus_cdc.errors import CdcError
from milvus_cdc.sink import CollectionTarget, DeleteBatch, Op, RowBatch

from tests.sim.sink import Rows, Writer, at_once
from tests.sim.source import Partition, Table

if TYPE_CHECKING:
    from tests.sim.world import World

SHARE = 0.3
"""Of the worlds in which no rows come late at the source."""
LATEST_SECONDS = 25.0
"""After the next owner was named: keys are counted 30 s after it has begun."""
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Stray:
    """A request on its way."""

    writer: Writer
    target: CollectionTarget
    batch: RowBatch | DeleteBatch
    table: Table
    partition: Partition | None

    @property
    def welcome(self) -> bool:
        """What it was sent to is still there."""
        gone = self.partition is not None and self.partition.dropped
        return not gone and not self.table.dropped_ts


class Strays:
    """Of one world."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.count = 0
        """Requests that took effect after their time."""
        self._world = world
        self._rng = rng
        self._armed = False

    def plan(self, start: float, end: float) -> None:
        """In some worlds; nothing else of a world is drawn otherwise for it."""
        if self._rng.random() >= SHARE or self._world.keeps_reach or self._world.parts:
            return
        for _ in range(self._rng.choice((1, 1, 2))):
            self._world.clockwork.at(self._rng.uniform(start, end), self._arm)

    def _arm(self) -> None:
        self._armed = True
        self._world.hurry()

    def catches(
        self, writer: Writer, target: CollectionTarget, batch: RowBatch | DeleteBatch
    ) -> bool:
        """As a request arrives. True: whoever sent it has died, and it waits."""
        world, rng = self._world, self._rng
        if not self._armed or (isinstance(batch, RowBatch) and batch.op is not Op.INSERT):
            return False
        host = next(each for each in world.replicators if each.host == writer.host)
        table = world.referee.table(writer.assignment_id)
        if table is None or world.peace or host.replicator is None:
            return False
        self._armed = False
        partition = None
        if batch.partition:
            partition = next(
                p for p in table.partitions if p.name == batch.partition and not p.dropped
            )
        world.say("FAULT", f"{host.host} dies with its {Rows(target, batch)} on the way")
        host.kill()
        world.restart(host, rng.choice((0.2, 2, 8, 45)) * (0.5 + rng.random()))
        self._await_owner(Stray(writer, target, batch, table, partition))
        return True

    def _await_owner(self, stray: Stray) -> None:
        world, rng = self._world, self._rng
        grant = world.referee.grants.get(stray.writer.assignment_id)
        if grant is None or not grant.instance or grant.epoch == stray.writer.epoch:
            world.clockwork.after(LOOK_SECONDS, self._await_owner, stray)
            return
        world.clockwork.after(rng.uniform(0, LATEST_SECONDS), self._land, stray)
        if rng.random() < 0.4:
            world.clockwork.after(rng.uniform(0.5, 20), self._crash_next, stray)

    def _crash_next(self, stray: Stray) -> None:
        """Before it can have counted."""
        grant = self._world.referee.grants.get(stray.writer.assignment_id)
        for host in self._world.replicators:
            if grant is not None and host.host == grant.owner:
                host.kill()
                self._world.restart(host, 2.0)

    def _land(self, stray: Stray) -> None:
        if not stray.welcome:
            return
        rows = Rows(stray.target, stray.batch)
        self._world.say("FAULT", f"{stray.writer.host}'s {rows} takes effect now")
        self._world.referee.strayed(stray.table, rows.keys)
        with contextlib.suppress(CdcError):
            at_once(self._world.sink.memory.write(stray.target, stray.batch, 1.0))
            self.count += 1
