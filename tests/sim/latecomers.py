"""A source that was restarted on a busy machine: for some seconds rows come into its log behind
ticks that cover them, and of one upsert at times only a half.

Laws, Milvus': rows keep their timestamps, and take effect by them wherever they stand. Who waits
for the answer to a request says nothing more of its keys before it is in the log. Where others
write the same keys meanwhile, what is late says nothing that is older than a deletion: with a
change of owner in between a row that nobody would remove could come back (ARCHITECTURE.md, "Late
messages").
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.sim.trouble import Victim

if TYPE_CHECKING:
    from tests.sim.clockwork import Clockwork
    from tests.sim.queue import Queue
    from tests.sim.source import Message
    from tests.sim.world import World

NEVER = 1 << 63
"""No tick is newer: what stands behind it is not in the log yet."""
SHARE = 0.3
"""Of the worlds have such a source."""
REACH_SECONDS = 30.0
"""No message is later than this."""
MOST_SECONDS = 6.0
"""It waits at most so long beyond the tick that should have followed it."""
LATE = 0.6
"""Of the requests while it lasts."""


@dataclass(slots=True, eq=False)
class Held:
    """A message on its way into the log, which ticks do not wait for."""

    pchannel: str
    ts: int
    message: Message
    keys: set[tuple[int, int]]
    deletes: bool


class Latecomers:
    """What the source's proxies hold while ticks go on."""

    def __init__(
        self, clockwork: Clockwork, queue: Queue, last_tick: dict[str, int], rng: random.Random
    ) -> None:
        self.held: list[Held] = []
        self.count = 0
        """Messages that came behind a tick that covers them."""
        self._clockwork = clockwork
        self._queue = queue
        self._last_tick = last_tick
        self._rng = rng
        self._until = 0.0
        self._several = False
        self._newest: dict[tuple[int, int], int] = {}
        """What was said of a key and is in the log, by collection and key."""
        self._deleted: dict[tuple[int, int], int] = {}

    def restart(self, seconds: float, *, several: bool) -> None:
        """For so long. `several`: clients write the same keys at the same time."""
        self._until = self._clockwork.now + seconds
        self._several = several

    def sift(self, pchannel: str, ts: int, request: list[Message]) -> list[Message]:
        """Of what belongs together, what is in the log before the next tick."""
        keys = {(m.table.collection_id, op.key) for m in request if m.table for op in m.ops}
        deletes = bool(keys) and all(op.text is None for m in request for op in m.ops)
        for held in [each for each in self.held if each.keys & keys]:
            if deletes or not self._several:
                self._come(held)
        late: list[Message] = []
        if keys and self._clockwork.now < self._until and self._may_wait(keys, ts):
            if self._rng.random() < LATE:
                late = self._rng.choice((request, request[:1], request[-1:]))
        if len(late) < len(request):
            self._note(keys, ts, deletes=deletes)
        for message in late:
            assert message.table is not None
            for op in message.ops:
                message.table.unlog(op)
                message.table.log(replace(op, behind_ts=NEVER))
            held = Held(pchannel, ts, message, keys, deletes)
            self.held.append(held)
            self._clockwork.after(self._rng.uniform(0.2, MOST_SECONDS), self._come, held)
        now = [message for message in request if message not in late]
        for message in now if late else ():
            # A half of an upsert, which counts by itself.
            assert message.table is not None
            for op in message.ops:
                message.table.unlog(op)
                message.table.log(op)
        return now

    def _may_wait(self, keys: set[tuple[int, int]], ts: int) -> bool:
        said = self._deleted if self._several else self._newest
        return all(said.get(key, 0) < ts for key in keys)

    def _note(self, keys: set[tuple[int, int]], ts: int, *, deletes: bool) -> None:
        for said in (self._newest, self._deleted)[: 1 + deletes]:
            said.update((key, max(said.get(key, 0), ts)) for key in keys)

    def _come(self, held: Held) -> None:
        if held not in self.held:
            return
        self.held.remove(held)
        message, behind = held.message, self._last_tick.get(held.pchannel, 0)
        assert message.table is not None
        self.count += behind >= held.ts
        due = held.ts
        for op in message.ops:
            message.table.unlog(replace(op, behind_ts=NEVER))
            came = replace(op, behind_ts=behind)
            message.table.log(came)
            due = came.due
        self._note(held.keys, held.ts, deletes=held.deletes)
        self._queue.append(held.pchannel, message.payload, message.vchannel, due)
        self._queue.tell(held.pchannel)


def plan(world: World, rng: random.Random, start: float, end: float) -> None:
    """In some worlds, drawn by themselves: nothing else of a world is drawn otherwise for it."""
    if rng.random() >= SHARE or end - REACH_SECONDS <= start:
        return
    for _ in range(rng.choice((1, 1, 2))):
        seconds = rng.uniform(4, 15)
        at = rng.uniform(start, end - REACH_SECONDS)
        world.clockwork.at(at, _restart, world, seconds, rng.random() < 0.3)
        if rng.random() < 0.5:
            away = rng.choice((0.2, 2, 8)) * (0.5 + rng.random())
            crash_at = at + rng.uniform(0, seconds + MOST_SECONDS)
            world.clockwork.at(crash_at, _crash_owner, world, Victim(world, rng), away)
    world.keeps_reach = True


def _restart(world: World, seconds: float, several: bool) -> None:
    whose = "several clients'" if several else "a client's"
    world.say("FAULT", f"the source is restarted: {whose} rows come late for {seconds:.1f} s")
    world.milvus.latecomers.restart(seconds, several=several)


def _crash_owner(world: World, victim: Victim, away: float) -> None:
    host = world.owner() or victim.host
    world.say("FAULT", f"crash of {host.host} while rows come late")
    host.kill()
    world.restart(host, away)
