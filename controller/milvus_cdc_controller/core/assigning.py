"""Giving out, changing and taking back assignments.

Laws: an assignment changes hands only when its owner has released it or the owner's lease has
certainly ended; every new owner gets a new epoch, saved before it hears of it; what is held and
healthy stays where it is.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import metadata_assignment_id, split_assignment_id

from milvus_cdc_controller.core.collection import (
    CollectionProgress,
    CollectionRecord,
    changed,
    named,
    start_checkpoints,
    target_name,
)
from milvus_cdc_controller.core.effects import Assign, Revoke
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.mapping import split
from milvus_cdc_controller.core.metadata_work import drop_waits_for_alias, settle_metadata
from milvus_cdc_controller.core.names import Kind, Owner
from milvus_cdc_controller.core.placement import Candidate, Need, place
from milvus_cdc_controller.core.reconcile import name_fault
from milvus_cdc_controller.core.recount import owner_begins
from milvus_cdc_controller.core.task import StartAt, TaskRecord
from milvus_cdc_controller.core.world import World

MOVING = "milvus_cdc_moving_"
"""Begins the name of a collection that makes way for others; its source id follows."""


def wanted(task: TaskRecord, record: CollectionRecord) -> str:
    """Empty when the collection should be running; else why not."""
    if task.deleting:
        return "DELETING"
    if task.failure is not None:
        return "TASK_FAILED"
    if task.paused:
        return "PAUSED"
    if not task.probed:
        return "NOT_PROBED"
    if record.deselected:
        return "DESELECTED"
    if record.failure is not None:
        return "FAILED"
    if record.resync:
        return "RESYNC"
    if not record.started:
        return "WAITING_FOR_START"
    if not record.holds_name:
        return "WAITING_FOR_NAME"
    return ""


def metadata_wanted(world: World, task: TaskRecord) -> str:
    if not task.active:
        return "DELETING" if task.deleting else "PAUSED" if task.paused else "TASK_FAILED"
    metadata = world.metadata[task.uid]
    if not task.probed:
        return "NOT_PROBED"
    if metadata.failure is not None:
        return "FAILED"
    if not metadata.version:
        return "EMPTY"
    return ""


def send_assign(world: World, grant: Grant) -> None:
    """The whole resource to its owner, if it is connected."""
    session = world.owner(grant)
    if session is None or not session.stream:
        return
    uid, _ = split_assignment_id(grant.assignment_id)
    task = world.tasks[uid]
    record = world.record_of(grant.assignment_id)
    observed = world.seen(grant.assignment_id)
    if record is None:
        metadata = world.metadata[uid]
        observed.sent_version = metadata.version
        message = Assign(
            grant.assignment_id, grant.epoch, metadata.version, task, metadata=metadata
        )
    else:
        observed.sent_version = record.version
        message = Assign(
            grant.assignment_id,
            grant.epoch,
            record.version,
            task,
            collection=record,
            progress=world.progress[grant.assignment_id],
        )
    world.send(session.stream, message)


def revoke(world: World, grant: Grant, reason: str) -> None:
    """Asks the owner to let go; once per epoch and stream. The grant stays until it does or its
    lease ends.
    """
    observed = world.seen(grant.assignment_id)
    if observed.revoking:
        return
    observed.revoking = reason
    world.touch(split_assignment_id(grant.assignment_id)[0])
    session = world.owner(grant)
    if session is not None:
        world.send(session.stream, Revoke(grant.assignment_id, grant.epoch, reason))


def let_go(world: World, grant: Grant) -> None:
    """Nobody holds it any more; the epoch stays spent."""
    world.put_grant(replace(grant, owner="", instance=""))


def settle(world: World) -> set[str]:
    """Brings every dirty task's assignments towards what is wanted, places what waits, and names
    the tasks.
    """
    looked_at: set[str] = set()
    rounds = 0
    while world.dirty:
        rounds += 1
        assert rounds < 100, "settling does not settle"
        for uid in sorted(world.dirty):
            world.dirty.discard(uid)
            looked_at.add(uid)
            if uid in world.tasks:
                _settle_task(world, world.tasks[uid])
        if not world.dirty:
            place_waiting(world, looked_at)
    return looked_at


def _settle_task(world: World, task: TaskRecord) -> None:
    settle_metadata(world, task)
    take_names(world)
    for record in list(world.collections[task.uid].values()):
        _settle_collection(world, task, record)
    grant = world.grants.get(metadata_assignment_id(task.uid))
    if grant is not None and grant.instance:
        _settle_grant(world, grant, metadata_wanted(world, task), world.metadata[task.uid].version)
    if task.deleting and not any(grant.instance for grant in world.grants_of(task.uid)):
        world.drop_task(task)


def _settle_collection(world: World, task: TaskRecord, record: CollectionRecord) -> None:
    if not record.started and _start_is_known(task, record):
        record = replace(record, started=True)
        _reset(world, record, CollectionProgress(task.uid, record.collection_id))
        world.put_collection(record)
    record = _aim(world, task, record)
    grant = world.grants.get(record.assignment_id)
    held = grant is not None and bool(grant.instance)
    if not held:
        # A replicator that had it may have made the sink object without living to say so: only what
        # nobody ever had, or what failed before it was ours, needs no drop at the sink.
        untried = grant is None or record.failure is not None
        never_ours = not record.opened and not record.recreate and untried
        if record.deselected or (record.dropping and never_ours):
            world.drop_collection(record)
            return
        if record.resync:
            record = replace(
                record,
                version=record.version + 1,
                resync=False,
                recreate=True,
                opened=False,
                sink_collection_id=0,
                applied=None,
                failure=None,
                started=True,
                drop_granted=False,
            )
            _reset(world, record, world.progress[record.assignment_id])
            world.put_collection(record)
    if not record.drop_granted and record.dropping and record.opened:
        waits = drop_waits_for_alias(world, task.uid, record.collection_id)
        if world.progress[record.assignment_id].closed and not waits:
            record = replace(record, version=record.version + 1, drop_granted=True)
            world.put_collection(record)
    if held:
        assert grant is not None
        _settle_grant(world, grant, wanted(task, record), record.version)


def _start_is_known(task: TaskRecord, record: CollectionRecord) -> bool:
    """From the metadata alone: EARLIEST, or created after the task."""
    if task.baseline is None or not record.want.vchannels:
        return False
    return task.spec.start is StartAt.EARLIEST or record.collection_id not in task.baseline


def _reset(world: World, record: CollectionRecord, progress: CollectionProgress) -> None:
    """To the collection's beginning, which lies in the topic that was read so far: in one made
    later the same position is another place.
    """
    topics = {point.vchannel: point.incarnation for point in progress.checkpoints}
    points = tuple(
        replace(point, incarnation=topics.get(point.vchannel, b""))
        for point in start_checkpoints(record.want)
    )
    past, current = (replace(c, rows_refused=0) for c in (progress.past, progress.current))
    world.put_progress(
        replace(
            progress, checkpoints=points, conditions=(), past=past, current=current, recount=None
        )
    )


def _settle_grant(world: World, grant: Grant, unwanted: str, version: int) -> None:
    session = world.owner(grant)
    if unwanted:
        revoke(world, grant, unwanted)
    elif session is not None and session.draining:
        revoke(world, grant, "DRAINING")
    else:
        observed = world.seen(grant.assignment_id)
        if not observed.revoking and observed.sent_version != version:
            send_assign(world, grant)


def take_names(world: World) -> None:
    """Gives the names that are free to those that wait for them, and opens rings."""
    for claim in world.names.ready():
        record = _of_owner(world, claim.owner)
        if record is not None:
            _take(world, record, claim.waits)
    for ring in world.names.rings():
        records = [_of_owner(world, owner) for owner in ring]
        # Not before each of them would move at once: what makes way is without a name meanwhile.
        if all(record is not None and _reached(world, record) for record in records):
            first = records[0]
            assert first is not None
            database, _ = split(first.sink_name)
            _take(world, first, f"{database}.{MOVING}{first.collection_id}")


def _of_owner(world: World, owner: Owner) -> CollectionRecord | None:
    """None for an alias."""
    if owner.kind is not Kind.COLLECTION:
        return None
    return world.collections[owner.task_uid][int(owner.what)]


def _reached(world: World, record: CollectionRecord) -> bool:
    """Its owner would rename it at once."""
    if not record.opened or not world.tasks[record.task_uid].active:
        return False
    progress = world.progress[record.assignment_id]
    return progress.closed or progress.resolved_ts >= record.want.alter_ts


def _take(world: World, record: CollectionRecord, name: str) -> None:
    if not record.opened:
        # Nothing of it is at the sink yet.
        world.put_collection(replace(record, holds_name=True))
        return
    want = named(record.want, name)
    world.put_collection(changed(record, want=want, rename_ts=record.want.alter_ts))


def _aim(world: World, task: TaskRecord, record: CollectionRecord) -> CollectionRecord:
    """A collection of which nothing can be at the sink simply takes its newest name."""
    grant = world.grants.get(record.assignment_id)
    held = grant is not None and bool(grant.instance)
    untried = grant is None or (record.failure is not None and not held)
    if record.opened or record.recreate or record.at_sink or not untried:
        return record
    target = target_name(task, record)
    failure = name_fault(target, record.source_name)
    if target != record.sink_name:
        want = named(record.want, target)
        record = changed(record, want=want, holds_name=False, failure=failure)
        world.put_collection(record)
    elif failure is not None and record.failure is None:
        record = replace(record, failure=failure)
        world.put_collection(record)
    return record


def place_waiting(world: World, looked_at: set[str]) -> None:
    """Finds owners for everything that is wanted and held by nobody: it is of a task just looked
    at, or found none before.
    """
    sessions = world.alive()
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
        if key not in stale and not _held(world, key) and not metadata_wanted(world, task):
            needs.append(Need(key))
        for record in world.collections[task.uid].values():
            key = record.assignment_id
            if key not in stale and not _held(world, key) and not wanted(task, record):
                logs = frozenset((task.spec.source_id, v.pchannel) for v in record.want.vchannels)
                needs.append(Need(key, logs))
        if len(needs) > before:
            waiting.add(task.uid)
    world.unplaced = waiting
    if not needs:
        return
    for assignment_id, instance in place(needs, _candidates(world, sessions)).items():
        give(world, assignment_id, world.sessions[instance])


def give(world: World, assignment_id: str, session: Session) -> None:
    """A new owner: next epoch, saved, then sent."""
    old = world.grants.get(assignment_id) or Grant(assignment_id)
    assert not old.instance, "an assignment has one owner"
    grant = Grant(assignment_id, old.epoch + 1, session.name, session.instance, world.now.wall_ms)
    world.put_grant(grant)
    owner_begins(world, assignment_id)
    send_assign(world, grant)


def _held(world: World, assignment_id: str) -> bool:
    grant = world.grants.get(assignment_id)
    return grant is not None and bool(grant.instance)


def _candidates(world: World, sessions: list[Session]) -> list[Candidate]:
    held: dict[str, list[CollectionRecord]] = {s.instance: [] for s in sessions}
    count: dict[str, int] = {s.instance: 0 for s in sessions}
    logs: dict[str, set[tuple[str, str]]] = {s.instance: set() for s in sessions}
    for grant in world.grants.values():
        if grant.instance not in held:
            continue
        count[grant.instance] += 1
        record = world.record_of(grant.assignment_id)
        if record is not None:
            held[grant.instance].append(record)
            source = world.tasks[record.task_uid].spec.source_id
            logs[grant.instance].update((source, v.pchannel) for v in record.want.vchannels)
    return [
        Candidate(
            s.instance,
            s.capacity,
            count[s.instance],
            len(held[s.instance]),
            frozenset(logs[s.instance]),
        )
        for s in sessions
    ]
