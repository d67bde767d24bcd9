"""Owners for what nobody holds, and what is known of everybody who could be one.

Laws: what a process still has from an earlier epoch waits until it has let go; what was let go to
move goes where it was to go, if that one still takes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from milvus_cdc.model import (
    metadata_assignment_id,
    part_of_assignment,
    split_assignment_id,
)

from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.granting import give, is_held, metadata_wanted, wanted
from milvus_cdc_controller.core.holding import waits
from milvus_cdc_controller.core.index import Touched
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.parts import may_be_given, points_of, shape
from milvus_cdc_controller.core.placement import SLACK, Candidate, Labels, Log, Need, place
from milvus_cdc_controller.core.rates import IDLE
from milvus_cdc_controller.core.spreading import spreads
from milvus_cdc_controller.core.standing import in_order
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World

PLACED_AT_ONCE = 500
"""More wait for the next tick, so that heartbeats are answered in between."""
TAKES_PARTS: Labels = frozenset({("(takes parts)", "")})
"""No label that anybody can give: an older replicator would take a part for the whole."""
PART_WEIGHT = 2 * SLACK
"""Of an idle part at least: so parts of one collection go to different replicators while these
carry as much as each other.
"""


def place_waiting(world: World, looked_at: Touched) -> None:
    """Finds owners for what is wanted and held by nobody: it has just been looked at, or found none
    before and there may be room now.
    """
    uids = {uid for uid in looked_at if uid in world.tasks}
    if world.room:
        uids |= world.unplaced.keys()
    waiting: list[str] = []
    # A process that still has it from an earlier epoch must let go (or its lease must end) first.
    stale = {key for known in world.sessions.values() for key, _ in known.stale}
    for task in sorted((world.tasks[uid] for uid in uids), key=lambda t: (t.create_time_ms, t.uid)):
        waiting += _waiting(world, task, looked_at, stale)
    sessions = world.takers()
    if not sessions:
        return
    if world.room:
        world.room = world.more = False
    rest = [key for key in waiting if key not in world.moves or not _moved(world, key)]
    if rest:
        needs = (need_of(world, key) for key in rest)
        free = candidates(world, sessions)
        placed = place(needs, free, spreads(world), most=PLACED_AT_ONCE)
        for assignment_id, instance in placed.items():
            give(world, assignment_id, world.sessions[instance])
        world.more |= len(placed) == PLACED_AT_ONCE


def _waiting(world: World, task: TaskRecord, looked_at: Touched, stale: set[str]) -> list[str]:
    """What of a task wants an owner now, of all that is to be considered; noted as unplaced until
    it is looked at again.
    """
    unplaced = world.unplaced.pop(task.uid, {})
    if not task.active:
        return []
    numbers = looked_at.of(task.uid) if task.uid in looked_at else set()
    if numbers is not None and world.room:
        numbers = numbers.union(n for n in unplaced if n is not None)
    found = []
    key = metadata_assignment_id(task.uid)
    if key not in stale and not is_held(world, key) and not metadata_wanted(world, task):
        found.append(key)
    records = world.collections[task.uid]
    for record in in_order(records, numbers):
        if wanted(task, record):
            continue
        keys = shape(world, task, record)
        free = [key for key in keys if may_be_given(world, key, keys, record, stale)]
        if free and not waits(world, record):
            found += free
    if numbers is None:
        unplaced.clear()
    else:
        for number in (*numbers, None):
            unplaced.pop(number, None)
    for key in found:
        unplaced.setdefault(split_assignment_id(key)[1], []).append(key)
    if unplaced:
        world.unplaced[task.uid] = unplaced
    return found


def _moved(world: World, assignment_id: str) -> bool:
    """It was on its way to somebody, and is there now."""
    move = world.moves[assignment_id]
    need = need_of(world, assignment_id)
    session = world.sessions.get(move.target) if move.begun else None
    if session is None or not session.takes_work(world.leases, world.now.mono_ms):
        return False
    full = session.capacity and held_by(world, session) >= session.capacity
    if full or not need.labels <= labels_of(session):
        return False
    give(world, need.assignment_id, session)
    return True


def held_by(world: World, session: Session) -> int:
    return len(world.held.by(session.instance))


def weight_of(world: World, assignment_id: str) -> float:
    rate = world.rates.get(assignment_id)
    if rate is not None:
        weight = rate.weight
    else:
        weight = IDLE.weight if world.record_of(assignment_id) is not None else 0.0
    return max(weight, PART_WEIGHT) if part_of_assignment(assignment_id) else weight


def need_of(world: World, assignment_id: str) -> Need:
    uid, _ = split_assignment_id(assignment_id)
    task = world.tasks[uid]
    record = world.record_of(assignment_id)
    labels = frozenset(task.spec.replicator_labels)
    if record is None:
        return Need(assignment_id, weight=0.0, labels=labels)
    weight = weight_of(world, assignment_id)
    if part_of_assignment(assignment_id) is None:
        return Need(assignment_id, _logs(task, record), weight, labels)
    points = points_of(assignment_id, world.progress[record.assignment_id])
    logs = frozenset((task.spec.source_id, point.pchannel) for point in points)
    return Need(assignment_id, logs, weight, labels | TAKES_PARTS)


def _logs(task: TaskRecord, record: CollectionRecord) -> frozenset[Log]:
    return frozenset((task.spec.source_id, v.pchannel) for v in record.want.vchannels)


def candidates(world: World, sessions: Iterable[Session]) -> list[Candidate]:
    return [
        candidate(session, [need_of(world, key) for key in world.held.by(session.instance)])
        for session in sessions
    ]


def candidate(session: Session, held: list[Need]) -> Candidate:
    return Candidate(
        session.instance,
        session.capacity,
        len(held),
        sum(need.weight for need in held),
        frozenset(log for need in held for log in need.logs),
        labels_of(session),
    )


def labels_of(session: Session) -> Labels:
    """What it says of itself, and that it takes parts of collections if it does."""
    labels = frozenset(session.labels)
    return labels | TAKES_PARTS if session.takes_parts else labels
