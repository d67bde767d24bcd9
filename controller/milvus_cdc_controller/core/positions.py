"""Positions set by hand, and the watch over those that nobody reads from.

Laws: positions are set all or none, and only while nobody holds anything of the task; a horizon
never goes back, so rows that may have been written are upserted again. A position that has fallen
out of the queue is said at once, not when somebody wants to read on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from milvus_cdc_controller.core.collection import (
    Checkpoint,
    CollectionProgress,
    CollectionRecord,
    start_checkpoints,
)
from milvus_cdc_controller.core.effects import Refusal
from milvus_cdc_controller.core.jobs import (
    Job,
    JobPayload,
    JobResult,
    Located,
    LocateDone,
    LocateJob,
    LocateTarget,
)
from milvus_cdc_controller.core.parts import held_grants
from milvus_cdc_controller.core.retention import NO_LIMIT, Retention, Seen, least
from milvus_cdc_controller.core.task import Failure, TaskRecord
from milvus_cdc_controller.core.world import World

LOST_PLACE = frozenset({"LOG_TRUNCATED", "LOG_RESET"})
"""Failures that another position mends."""


def held(world: World, task: TaskRecord) -> bool:
    return world.is_held(task.uid)


def by_vchannel(world: World, task: TaskRecord) -> dict[str, CollectionRecord]:
    return {
        vchannel.vchannel: record
        for record in world.collections[task.uid].values()
        for vchannel in record.want.vchannels
    }


def refuse_task(world: World, task: TaskRecord) -> Refusal | None:
    if task.paused and not held(world, task):
        return None
    return Refusal(
        "FAILED_PRECONDITION",
        "TASK_NOT_PAUSED",
        f"Positions of {task.spec.name} can be set only while it is PAUSED and replicators have "
        "let go of it; pause it, and wait until its state is PAUSED.",
        "name",
    )


def refuse_place(
    record: CollectionRecord | None, task: TaskRecord, vchannel: str
) -> Refusal | None:
    if record is None:
        return Refusal(
            "INVALID_ARGUMENT",
            "UNKNOWN_VCHANNEL",
            f"{vchannel} is no vchannel of a collection that {task.spec.name} follows.",
            "positions",
            (("vchannel", vchannel),),
        )
    if record.dropping or record.deselected:
        return Refusal(
            "FAILED_PRECONDITION",
            "COLLECTION_DROPPING",
            f"{record.source_name} is being dropped or given up; there is nothing to read again.",
            "positions",
            (("vchannel", vchannel),),
        )
    if record.resync or record.recreate:
        return Refusal(
            "FAILED_PRECONDITION",
            "COLLECTION_RESYNCING",
            f"{record.source_name} is to be filled anew from its beginning; resume the task first.",
            "positions",
            (("vchannel", vchannel),),
        )
    return None


def set_positions(world: World, task: TaskRecord, positions: tuple[Located, ...]) -> Refusal | None:
    """Sets them, or says why not and changes nothing."""
    refusal = refuse_task(world, task)
    if refusal is not None:
        return refusal
    records = by_vchannel(world, task)
    wanted: dict[int, dict[str, Located]] = {}
    for position in positions:
        record = records.get(position.vchannel)
        refusal = refuse_place(record, task, position.vchannel)
        if refusal is not None:
            return refusal
        assert record is not None
        wanted.setdefault(record.collection_id, {})[position.vchannel] = position
    for collection_id, places in wanted.items():
        record = world.collections[task.uid][collection_id]
        missing = {v.vchannel for v in record.want.vchannels} - places.keys()
        if missing and not record.started:
            return Refusal(
                "FAILED_PRECONDITION",
                "COLLECTION_NOT_STARTED",
                f"{record.source_name} has no positions yet: give one for each of its vchannels, "
                f"{min(missing)} is missing.",
                "positions",
            )
    for collection_id, places in wanted.items():
        _set(world, world.collections[task.uid][collection_id], places)
    world.work[task.uid].check_after_ms = 0
    return None


def _set(world: World, record: CollectionRecord, places: dict[str, Located]) -> None:
    progress = world.progress[record.assignment_id]
    points = progress.checkpoints if record.started else start_checkpoints(record.want)
    progress = replace(
        progress,
        checkpoints=tuple(_placed(point, places.get(point.vchannel)) for point in points),
        recount=None,
    )
    world.put_progress(progress)
    world.holds.uncover(record.assignment_id)
    seen = world.retention.setdefault(record.assignment_id, {})
    for vchannel, place in places.items():
        seen.pop(vchannel, None)
        if place.retention is not None:
            seen[vchannel] = Seen(place.retention, world.now.wall_ms)
    failure = record.failure
    if failure is not None and failure.reason in LOST_PLACE:
        failure = None
    if failure is not record.failure or not record.started:
        world.put_collection(replace(record, started=True, failure=failure))


def _placed(point: Checkpoint, place: Located | None) -> Checkpoint:
    if place is None:
        return point
    return replace(
        point,
        read_from=place.read_from,
        resolved_ts=place.resolved_ts,
        closed=False,
        incarnation=place.incarnation or point.incarnation,
    )


# What is known of the queue's limits.


def note(world: World, assignment_id: str, vchannel: str, retention: Retention) -> None:
    world.retention.setdefault(assignment_id, {})[vchannel] = Seen(retention, world.now.wall_ms)


def retention_of(world: World, progress: CollectionProgress, key: str) -> Retention:
    """The least over the open shards, as of now."""
    seen = world.retention.get(key)
    if not seen:
        return NO_LIMIT
    return least(
        seen[point.vchannel].now(world.now.wall_ms)
        for point in progress.checkpoints
        if not point.closed and point.vchannel in seen
    )


# Collections that nobody reads.


def look_after(world: World, start_job: Callable[[World, TaskRecord, JobPayload], str]) -> None:
    """Has the places of resting collections looked at, every `World.check_every_ms`."""
    for task in world.tasks.values():
        work = world.work[task.uid]
        if work.check_job or world.now.mono_ms < work.check_after_ms:
            continue
        if task.deleting or not task.probed:
            continue
        if task.paused and held(world, task):
            continue  # in a moment it rests as a whole
        work.check_after_ms = world.now.mono_ms + world.check_every_ms
        targets = tuple(
            LocateTarget(
                point.vchannel,
                point.pchannel,
                point.read_from,
                point.resolved_ts,
                incarnation=point.incarnation,
                stored=True,
            )
            for record in world.collections[task.uid].values()
            if _rests(world, record)
            for point in world.progress[record.assignment_id].checkpoints
            if not point.closed
        )
        if targets:
            work.check_job = start_job(world, task, LocateJob(task.spec.source, targets))


def _rests(world: World, record: CollectionRecord) -> bool:
    """Its places count, and nobody holds it who would notice that one is gone."""
    return (
        record.started
        and not (record.deselected or record.resync or record.drop_granted)
        and not held_grants(world, record)
    )


def looked_after(world: World, task: TaskRecord, job: Job, result: JobResult) -> None:
    """The end of such a job. A collection that somebody took meanwhile, or whose place has
    changed, is left alone.
    """
    world.work[task.uid].check_job = ""
    if not isinstance(result, LocateDone) or not isinstance(job.payload, LocateJob):
        return
    records = by_vchannel(world, task)
    for target, found in zip(job.payload.targets, result.located, strict=False):
        record = records.get(target.vchannel)
        if record is None or not _rests(world, record):
            continue
        points = world.progress[record.assignment_id].checkpoints
        if not any(
            (p.vchannel, p.read_from) == (target.vchannel, target.read_from) for p in points
        ):
            continue
        if found.retention is not None:
            note(world, record.assignment_id, target.vchannel, found.retention)
        if found.reason and record.failure is None:
            text = f"{found.message}. Resync the collection, or set another position."
            failed = replace(record, failure=Failure(found.reason, text))
            world.put_collection(failed)
            records.update({v.vchannel: failed for v in record.want.vchannels})
