"""Who is there, in which state, who has left, and whether a drain is over.

Law: states move along their table; a drain ends in exactly one way and is stored when it does.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.moving import Cause
from milvus_cdc_controller.core.placing import held_by
from milvus_cdc_controller.core.replicator import (
    Drain,
    DrainState,
    ReplicatorRecord,
    ReplicatorState,
)
from milvus_cdc_controller.core.world import World

DEPARTED_MAX = 100
DEPARTED_MS = 3_600_000
"""So long somebody who ended is shown."""


def look(world: World) -> None:
    """Brings states and drains up to what is true now."""
    _end_drains(world)
    for session in world.sessions.values():
        session.look(world.leases, world.now.mono_ms)
    for instance, session in list(world.departed.items()):
        if world.now.wall_ms - session.ended_ms >= DEPARTED_MS:
            del world.departed[instance]


def depart(world: World, session: Session, state: ReplicatorState) -> None:
    """It has ended: STOPPED in order, or LOST with its lease."""
    del world.sessions[session.instance]
    session.show(state)
    session.ended_ms = world.now.wall_ms
    world.departed[session.instance] = session
    while len(world.departed) > DEPARTED_MAX:
        del world.departed[next(iter(world.departed))]


def arrive(world: World, session: Session) -> None:
    """A new process: what was remembered of its name is over, but for the mark."""
    for instance, old in list(world.departed.items()):
        if old.name == session.name:
            del world.departed[instance]
    mark = world.mark_of(session.name)
    drain = mark.drain
    if drain is not None and session.instance not in drain.instances:
        if drain.state is DrainState.RUNNING:
            # The name is being drained, whatever process has it.
            drain = replace(drain, instances=(*drain.instances, session.instance))
        else:
            drain = None
        mark = replace(mark, drain=drain)
    session.mark = mark
    world.put_replicator(mark)


def _end_drains(world: World) -> None:
    for mark in list(world.replicators.values()):
        if not mark.draining:
            continue
        assert mark.drain is not None
        if not held_under(world, mark.name):
            end_drain(world, mark, DrainState.DONE)
        elif 0 < mark.drain.deadline_ms <= world.now.wall_ms:
            end_drain(world, mark, DrainState.EXPIRED)


def end_drain(world: World, mark: ReplicatorRecord, state: DrainState) -> None:
    """What waits for its turn stays; what has been asked back goes its way."""
    assert mark.drain is not None
    forget_drain(world, mark.name)
    cordoned = mark.cordoned
    if state is DrainState.CANCELLED:
        cordoned = mark.drain.cordoned_before
    drain: Drain = replace(mark.drain, state=state)
    world.put_replicator(replace(mark, cordoned=cordoned, drain=drain))


def forget_drain(world: World, name: str) -> None:
    """Moves of its drain that have not begun."""
    instances = {session.instance for session in world.named(name)}
    for key, move in list(world.moves.items()):
        if move.cause is Cause.DRAIN and not move.begun and move.source in instances:
            del world.moves[key]


def held_under(world: World, name: str) -> int:
    """Assignments of a name, all its processes together."""
    return sum(held_by(world, session) for session in world.named(name))


def why(world: World, session: Session) -> tuple[str, str]:
    """Reason and message of its state; empty when all is well."""
    now_ms = world.now.mono_ms
    state = session.state(world.leases, now_ms)
    if state is ReplicatorState.LOST:
        return "LEASE_ENDED", "Its lease ended without a word; what it held went elsewhere."
    if session.ended_ms:
        return "STOPPED", "Its process has ended in order."
    if state is ReplicatorState.SUSPECT:
        left = max(0, session.lease_end_ms - now_ms) / 1000
        text = f"what it holds goes elsewhere in {left:.0f} s unless it comes back."
        if not session.stream:
            return "STREAM_LOST", f"It is not connected; {text}"
        return "HEARTBEAT_LATE", f"It is connected and silent; {text}"
    if session.draining:
        return "STOPPING", "Its process has been told to end."
    if state is ReplicatorState.DRAINING:
        waiting = held_under(world, session.name)
        moving = sum(move.source == session.instance for move in world.moves.values())
        text = f"{waiting} left to move."
        if not moving and waiting:
            text += " No other replicator can take them now."
        return "DRAIN_ASKED", text
    if state is ReplicatorState.STOPPED:
        return "DRAINED", "It holds nothing and gets nothing until it is uncordoned."
    twins = [s for s in world.named(session.name) if s is not session and world.present(s)]
    if twins:
        return "NAME_SHARED", (
            f"Another process has this name ({twins[0].peer}); give each one its own, because "
            "marks and moves go by name."
        )
    return "", ""
