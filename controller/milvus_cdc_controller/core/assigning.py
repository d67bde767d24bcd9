"""Assignments brought towards what is wanted: names taken, versions sent, owners found.

Law: what is held and healthy stays where it is unless somebody wants it moved (`moves`).
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import metadata_assignment_id

from milvus_cdc_controller.core.collection import (
    CollectionProgress,
    CollectionRecord,
    changed,
    named,
    start_checkpoints,
    target_name,
)
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.granting import metadata_wanted, revoke, send_assign, wanted
from milvus_cdc_controller.core.index import Touched
from milvus_cdc_controller.core.mapping import split
from milvus_cdc_controller.core.metadata_work import drop_waits_for_alias, settle_metadata
from milvus_cdc_controller.core.names import Kind, Owner
from milvus_cdc_controller.core.parts import held_grants, settle_shape
from milvus_cdc_controller.core.placing import place_waiting
from milvus_cdc_controller.core.reconcile import name_fault
from milvus_cdc_controller.core.standing import in_order
from milvus_cdc_controller.core.task import StartAt, TaskRecord
from milvus_cdc_controller.core.world import World

MOVING = "milvus_cdc_moving_"
"""Begins the name of a collection that makes way for others; its source id follows."""


def settle(world: World) -> Touched:
    """Brings what is dirty towards what is wanted, places what waits, and says what it has looked
    at.
    """
    looked_at, since_placed = Touched(), Touched()
    rounds = 0
    while world.dirty:
        rounds += 1
        assert rounds < 100, "settling does not settle"
        for uid in sorted(world.dirty):
            collection_ids = world.dirty.take(uid)
            since_placed.add(uid, collection_ids)
            if uid in world.tasks:
                _settle_task(world, world.tasks[uid], collection_ids)
        if not world.dirty:
            looked_at.merge(since_placed)
            place_waiting(world, since_placed)
            since_placed = Touched()
    return looked_at


def _settle_task(world: World, task: TaskRecord, collection_ids: set[int] | None) -> None:
    settle_metadata(world, task)
    take_names(world)
    for record in in_order(world.collections[task.uid], collection_ids):
        _settle_collection(world, task, record)
    grant = world.grants.get(metadata_assignment_id(task.uid))
    if grant is not None and grant.instance:
        _settle_grant(world, grant, metadata_wanted(world, task), world.metadata[task.uid].version)
    if task.deleting and not world.is_held(task.uid):
        world.drop_task(task)


def _settle_collection(world: World, task: TaskRecord, record: CollectionRecord) -> None:
    if not record.started and _start_is_known(task, record):
        record = replace(record, started=True)
        _reset(world, record, CollectionProgress(task.uid, record.collection_id))
        world.put_collection(record)
    record = _aim(world, task, record)
    grant = world.grants.get(record.assignment_id)
    owned = held_grants(world, record)
    if not owned:
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
    keys = settle_shape(world, task, record)
    if owned:
        unwanted = wanted(task, record)
        other = "DIVIDING" if len(keys) > 1 else "JOINING"
        for grant in owned:
            fits = grant.assignment_id in keys
            _settle_grant(world, grant, unwanted or ("" if fits else other), record.version)


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
    parts = tuple(
        replace(part, current=replace(part.current, rows_refused=0), conditions=())
        for part in progress.parts
    )
    world.put_progress(
        replace(
            progress,
            checkpoints=points,
            conditions=(),
            past=past,
            current=current,
            recount=None,
            parts=parts,
            whole_until_ts=0,
        )
    )
    world.holds.uncover(record.assignment_id)


def _settle_grant(world: World, grant: Grant, unwanted: str, version: int) -> None:
    if unwanted:
        revoke(world, grant, unwanted)
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
    untried = grant is None or (record.failure is not None and not held_grants(world, record))
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
