"""A core with its events made short: time is moved by hand, effects are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from milvus_cdc.model import (
    Catalogue,
    Collection,
    Database,
    ObjectState,
    Partition,
    Vchannel,
    part_of_assignment,
    split_assignment_id,
)
from milvus_cdc.selection import Selection
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.collection import CollectionState, Counters
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.core.effects import Effect, Record
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.granting import is_held
from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.core.parts import whole_of
from milvus_cdc_controller.core.status import collection_status, task_totals
from milvus_cdc_controller.core.task import StartAt, TaskSpec
from milvus_cdc_controller.core.world import World

LEASES = Leases(ttl_ms=15_000, heartbeat_ms=3_000, margin_ms=2_000)
SOURCE = "source-id"

_Message = TypeVar("_Message")


def collection(collection_id: int, name: str = "books", **other: Any) -> Collection:
    pchannel = f"dml_{collection_id % 4}"
    return replace(
        Collection(
            collection_id,
            1,
            "default",
            name,
            b"schema",
            1,
            0,
            collection_id * 10,
            partitions=(Partition(collection_id * 100, "_default", collection_id * 10),),
            vchannels=(Vchannel(f"{pchannel}_{collection_id}v0", pchannel, b"start"),),
        ),
        **other,
    )


def dropped(of: Collection) -> Collection:
    return replace(of, state=ObjectState.DROPPED)


def spec(name: str = "tasks/copy", **other: Any) -> TaskSpec:
    return replace(
        TaskSpec(
            name, (), Selection(("*.*",)), b"source", SOURCE, b"sink", "sink-id", StartAt.EARLIEST
        ),
        **other,
    )


def agree(world: World, uid: str) -> None:
    """What is kept of a task with each change is what looking at all of it says."""
    records = world.collections[uid].values()
    states = {r.collection_id: collection_status(world, r)[0] for r in records}
    standing = world.standing[uid]
    running = (CollectionState.RUNNING, CollectionState.DROPPING)
    assert set(standing.running) == {n for n, state in states.items() if state in running}
    assert standing.failed == {n for n, s in states.items() if s is CollectionState.FAILED}
    assert standing.retrying == {n for n, s in states.items() if s is CollectionState.RETRYING}
    own = {r.collection_id: {r.assignment_id} for r in records}
    for key in filter(part_of_assignment, world.grants):
        assert key in world.parts[whole_of(key)]
        owner, number = split_assignment_id(key)
        if owner == uid and number is not None:
            own[number].add(key)
    assert standing.revoking == {
        number for number, keys in own.items() if any(world.seen(key).revoking for key in keys)
    }
    having = {number: {k for k in keys if is_held(world, k)} for number, keys in own.items()}
    for keys in having.values():
        parts = [part_of_assignment(key) for key in keys]
        assert len({part and part[1] for part in parts}) < 2, "two shapes are held"
    assert all(set(keys) == having[number] for number, keys in standing.running.items())
    lags = [world.seen(key).lag_ms for number in standing.running for key in having[number]]
    assert task_totals(world, uid).lag_ms == max(lags, default=-1)
    assert set(world.unstarted[uid]) == {r.collection_id for r in records if not r.started}
    rows = Counters()
    for record in records:
        rows = rows.plus(world.progress[record.assignment_id].totals)
    assert world.rows.of(uid) == rows
    held = [g for g in world.grants.values() if g.instance]
    assert {g.assignment_id for g in held} == {
        key for session in world.sessions for key in world.held.by(session)
    }
    mine = {g.instance for g in held if split_assignment_id(g.assignment_id)[0] == uid}
    assert world.holders(uid) == mine
    for key in chain(*world.unplaced.get(uid, {}).values()):
        assert not is_held(world, key), "what has an owner waits for one"


class Script:
    """Feeds a core and remembers what it stored, as a store would."""

    def __init__(
        self,
        records: dict[str, Record] | None = None,
        *,
        at_ms: int = 0,
        inherited_ttl_ms: int = 0,
    ) -> None:
        self.stored: dict[str, Record] = dict(records or {})
        self.core = Controller(LEASES, self.stored.values())
        self.core.world.inherited_ttl_ms = inherited_ttl_ms
        self.at_ms = at_ms
        self.revision = 0
        self.calls = 0
        self.seq = 0
        self.last: list[Effect] = []
        self.take(ev.Started(self.now))

    @property
    def now(self) -> ev.Instant:
        return ev.Instant(self.at_ms, 1_700_000_000_000 + self.at_ms)

    def take(self, event: ev.Event) -> list[Effect]:
        self.last = self.core.step(event)
        stored = [isinstance(effect, fx.Save | fx.Forget) for effect in self.last]
        assert stored == sorted(stored, reverse=True), "something was sent before it was stored"
        for effect in self.last:
            match effect:
                case fx.Save(key=key, record=record):
                    self.stored[key] = record
                case fx.Forget(key=key):
                    self.stored.pop(key, None)
        if isinstance(event, ev.Ticked | ev.Started):  # states follow the clock at ticks
            for uid in self.core.world.tasks:
                agree(self.core.world, uid)
        return self.last

    def pass_time(self, milliseconds: int, *, beating: tuple[int, ...] = ()) -> None:
        """In ticks; the streams named go on beating."""
        until = self.at_ms + milliseconds
        while self.at_ms < until:
            self.at_ms = min(until, self.at_ms + 1_000)
            for stream in beating:
                self.take(ev.Heartbeat(self.now, stream, 1, False))
            self.take(ev.Ticked(self.now))

    def create(self, task: TaskSpec | None = None, *, probed: bool = True) -> fx.Reply:
        self.calls += 1
        task = task or spec()
        uid = f"uid-{task.name.partition('/')[2]}"
        self.take(ev.CreateTask(self.now, self.calls, uid, task, "", "f", probed))
        return self.reply()

    def reply(self) -> fx.Reply:
        (reply,) = [effect for effect in self.last if isinstance(effect, fx.Reply)]
        return reply

    def see(self, *collections: Collection, **other: Any) -> list[Effect]:
        self.revision += 1
        fields: dict[str, Any] = {"databases": (Database(1, "default"),), **other}
        catalogue = Catalogue(7, self.revision, 1000, collections=collections, **fields)
        return self.take(ev.CatalogueSeen(self.now, SOURCE, catalogue))

    def hello(
        self, stream: int, name: str, held: tuple[ev.Held, ...] = (), **other: Any
    ) -> list[Effect]:
        fields: dict[str, Any] = {"instance": f"instance-{name}", "capacity": 0, **other}
        return self.take(
            ev.Hello(
                self.now, stream, name, version="1", peer="peer", protocol=1, held=held, **fields
            )
        )

    def ask(self, kind: Any, **fields: Any) -> fx.Reply:
        """A command of the fleet."""
        self.calls += 1
        self.take(kind(self.now, self.calls, **fields))
        return self.reply()

    def report(self, stream: int, assignment_id: str, epoch: int, **other: Any) -> list[Effect]:
        self.seq += 1
        fields: dict[str, Any] = {"state": ReportedState.RUNNING, **other}
        return self.take(
            ev.ProgressReported(self.now, stream, assignment_id, epoch, self.seq, **fields)
        )

    def sent(self, kind: type[_Message], stream: int | None = None) -> list[_Message]:
        """What the last step sent."""
        return [
            effect.message
            for effect in self.last
            if isinstance(effect, fx.Send)
            and stream in (None, effect.stream)
            and isinstance(effect.message, kind)
        ]
