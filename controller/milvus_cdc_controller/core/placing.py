"""Owners for what nobody holds, and what is known of everybody who could be one.

Laws: what a process still has from an earlier epoch waits until it has let go; what was let go to
move goes where it was to go, if that one still takes it.
"""

from __future__ import annotations

from collections.abc import Iterable

from milvus_cdc.model import metadata_assignment_id, split_assignment_id

from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.granting import give, is_held, metadata_wanted, wanted
from milvus_cdc_controller.core.holding import waits
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.placement import Candidate, Labels, Log, Need, place
from milvus_cdc_controller.core.rates import IDLE
from milvus_cdc_controller.core.spreading import spreads
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def place_waiting(world: World, looked_at: set[str]) -> None:
    """Finds owners for everything that is wanted and held by nobody: it is of a task just looked
    at, or found none before.
    """
    sessions = world.takers()
    uids = (looked_at | world.unplaced) & world.tasks.keys()
    if not sessions:
        world.unplaced = uids
        return
    # A process that still has it from an earlier epoch must let go (or its lease must end) first.
    stale = {key for known in world.sessions.values() for key, _ in known.stale}
    needs: list[Need] = []
    waiting: set[str] = set()
    for task in sorted((world.tasks[uid] for uid in uids), key=lambda t: (t.create_time_ms, t.uid)):
        if not task.active:
            continue
        before = len(needs)
        key = metadata_assignment_id(task.uid)
        if key not in stale and not is_held(world, key) and not metadata_wanted(world, task):
            needs.append(need_of(world, key))
        for record in world.collections[task.uid].values():
            key = record.assignment_id
            if key in stale or is_held(world, key) or wanted(task, record):
                continue
            if not waits(world, record):
                needs.append(need_of(world, key))
        if len(needs) > before:
            waiting.add(task.uid)
    world.unplaced = waiting
    if not needs:
        return
    rest = [need for need in needs if not _moved(world, need)]
    if rest:
        for assignment_id, instance in place(
            rest, candidates(world, sessions), spreads(world)
        ).items():
            give(world, assignment_id, world.sessions[instance])


def _moved(world: World, need: Need) -> bool:
    """It was on its way to somebody, and is there now."""
    move = world.moves.get(need.assignment_id)
    session = world.sessions.get(move.target) if move is not None and move.begun else None
    if session is None or not session.takes_work(world.leases, world.now.mono_ms):
        return False
    full = session.capacity and held_by(world, session) >= session.capacity
    if full or not need.labels <= labels_of(session):
        return False
    give(world, need.assignment_id, session)
    return True


def held_by(world: World, session: Session) -> int:
    return sum(grant.instance == session.instance for grant in world.grants.values())


def need_of(world: World, assignment_id: str) -> Need:
    uid, _ = split_assignment_id(assignment_id)
    task = world.tasks[uid]
    record = world.record_of(assignment_id)
    labels = frozenset(task.spec.replicator_labels)
    if record is None:
        return Need(assignment_id, weight=0.0, labels=labels)
    weight = world.rates.get(assignment_id, IDLE).weight
    return Need(assignment_id, _logs(task, record), weight, labels)


def _logs(task: TaskRecord, record: CollectionRecord) -> frozenset[Log]:
    return frozenset((task.spec.source_id, v.pchannel) for v in record.want.vchannels)


def candidates(world: World, sessions: Iterable[Session]) -> list[Candidate]:
    held: dict[str, list[Need]] = {s.instance: [] for s in sessions}
    for grant in world.grants.values():
        if grant.instance in held:
            held[grant.instance].append(need_of(world, grant.assignment_id))
    return [candidate(world.sessions[instance], needs) for instance, needs in held.items()]


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
    return frozenset(session.labels)
