"""A collection given out in parts, each with some of its vchannels, so that several replicators
write it at once.

Laws: the whole and its parts are never held at the same time. Parts write rows; what is no row
(drops, renames, indexes, flushes, recounts) is done by whoever has the whole, exactly as where
nothing is ever split. So a part that comes to such a thing stands before it; when all do, they are
taken back, and `whole_until_ts` is stored with that: until every vchannel has passed it nothing is
split again. Which of the two shapes is held is told by grants alone; a collection of which nothing
is held begins as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from milvus_cdc.model import (
    collection_assignment_id,
    part_assignment_id,
    part_of_assignment,
    split_assignment_id,
)

from milvus_cdc_controller.core.collection import Checkpoint, CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.events import ProgressReported
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.granting import is_held, wanted
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def whole_of(assignment_id: str) -> str:
    uid, collection_id = split_assignment_id(assignment_id)
    return assignment_id if collection_id is None else collection_assignment_id(uid, collection_id)


def parts_of(task: TaskRecord, progress: CollectionProgress) -> tuple[str, ...]:
    """The assignments that it is split into, if it is; none where it cannot be."""
    count = min(task.spec.max_parts, len(_topics(progress)))
    if count < 2:
        return ()
    whole = collection_assignment_id(progress.task_uid, progress.collection_id)
    return tuple(part_assignment_id(whole, number + 1, count) for number in range(count))


def points_of(assignment_id: str, progress: CollectionProgress) -> tuple[Checkpoint, ...]:
    """The vchannels of an assignment: all, or those of a part."""
    part = part_of_assignment(assignment_id)
    if part is None:
        return progress.checkpoints
    number, count = part
    own = _topics(progress)[number - 1 :: count]
    return tuple(point for point in progress.checkpoints if point.pchannel in own)


def _topics(progress: CollectionProgress) -> tuple[str, ...]:
    """What a part has whole: a delete of Milvus 2.2 names no shard, and is understood only by who
    has all of its collection's on the topic.
    """
    return tuple(dict.fromkeys(point.pchannel for point in progress.checkpoints))


def compares(assignment_id: str, record: CollectionRecord) -> bool:
    """Of the parts the one that compares the sink, rows aside: only what nobody has to wait for
    is left to do.
    """
    part = part_of_assignment(assignment_id)
    return part is None or (part[0] == 1 and _settled(record))


def family(world: World, record: CollectionRecord) -> Iterator[Grant]:
    """The grants of the whole and of all parts there ever were."""
    for key in (record.assignment_id, *world.parts.get(record.assignment_id, ())):
        grant = world.grants.get(key)
        if grant is not None:
            yield grant


def held_grants(world: World, record: CollectionRecord) -> list[Grant]:
    return [grant for grant in family(world, record) if grant.instance]


def shape(world: World, task: TaskRecord, record: CollectionRecord) -> tuple[str, ...]:
    """The assignments as which it is to be held."""
    whole = record.assignment_id
    if task.spec.max_parts < 2:
        return (whole,)
    progress = world.progress[whole]
    parts = parts_of(task, progress)
    divided = whole in world.divided or any(is_held(world, part) for part in parts)
    return parts if divided and not is_for_one(record, progress, parts) else (whole,)


def settle_shape(world: World, task: TaskRecord, record: CollectionRecord) -> tuple[str, ...]:
    """As `shape`; remembered, so that parts that change hands all at once stay parts."""
    keys = shape(world, task, record)
    if len(keys) > 1 and not wanted(task, record):
        world.divided.add(record.assignment_id)
    else:
        world.divided.discard(record.assignment_id)
    return keys


def may_be_given(
    world: World, key: str, keys: tuple[str, ...], record: CollectionRecord, stale: set[str]
) -> bool:
    """Nobody has it, and nobody has anything of the other shape."""
    if key in stale or is_held(world, key):
        return False
    others = {grant.assignment_id for grant in family(world, record)}.difference(keys)
    return not any(other in stale or is_held(world, other) for other in others)


def is_for_one(
    record: CollectionRecord, progress: CollectionProgress, parts: tuple[str, ...]
) -> bool:
    """Something is to be done that only who has all vchannels may do."""
    if not parts or not record.opened or record.recreate or record.resync or record.dropping:
        return True
    if record.renaming or progress.recount is not None:
        return True
    if 0 < record.flush_ts <= progress.resolved_ts:
        return True
    # Before the first checkpoint it cannot be told which drops are still ahead.
    first = max(1, progress.whole_until_ts)
    if any(point.closed or point.resolved_ts < first for point in progress.checkpoints):
        return True
    return not _settled(record) and progress.resolved_ts >= _due_ts(record)


def _settled(record: CollectionRecord) -> bool:
    """The newest indexes, load state and properties have been carried out."""
    done, want = record.applied, record.want
    if done is None or done.touched_indexes or done.touched_load:
        return False
    return (done.indexes, done.load, done.alter_ts) == (want.indexes, want.load, want.alter_ts)


def _due_ts(record: CollectionRecord) -> int:
    """When every row at or below it is there they are."""
    newest = max((index.create_ts for index in record.want.indexes), default=0)
    return max(newest, record.want.alter_ts)


# What parts say.


def reported(
    world: World, event: ProgressReported, progress: CollectionProgress
) -> CollectionProgress:
    """After a report of a part: with what it is to be made whole for, if that is so."""
    seen = world.seen(event.assignment_id)
    seen.stands_ts = event.stands_ts
    if event.whole_now:
        return whole_past_horizons(progress)
    record = world.record_of(event.assignment_id)
    assert record is not None
    keys = parts_of(world.tasks[record.task_uid], progress)
    newest = max((world.seen(key).stands_ts for key in keys), default=0)
    if newest and all(_waits_before(world, key, progress, newest) for key in keys):
        return replace(progress, whole_until_ts=max(newest, progress.whole_until_ts))
    return progress


def _waits_before(world: World, key: str, progress: CollectionProgress, ts: int) -> bool:
    """It has nothing more to do before that."""
    if world.seen(key).stands_ts or not is_held(world, key):
        return True
    return all(p.closed or p.resolved_ts >= ts for p in points_of(key, progress))


def whole_past_horizons(progress: CollectionProgress) -> CollectionProgress:
    """What any part may have begun is behind it then; never where all stand already."""
    newest = max(max(point.horizon_ts, point.resolved_ts + 1) for point in progress.checkpoints)
    return replace(progress, whole_until_ts=max(newest, progress.whole_until_ts))


def turns(world: World, task: TaskRecord, record: CollectionRecord) -> bool:
    """It is held otherwise than it is to be."""
    keys = shape(world, task, record)
    return any(grant.assignment_id not in keys for grant in held_grants(world, record))
