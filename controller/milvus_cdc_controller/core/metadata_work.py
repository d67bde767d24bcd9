"""Keeps each task's metadata assignment in line with what is known, and takes in what it reports.

Law: what a report says of the operations channel is stored together with the place up to which the
channel has been read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from milvus_cdc.model import split_assignment_id

from milvus_cdc_controller.core.collection import changed
from milvus_cdc_controller.core.events import FlushSeen, ProgressReported
from milvus_cdc_controller.core.metadata import (
    Facts,
    alias_names,
    flushed_collections,
    holds_back_drop,
    wanted_metadata,
)
from milvus_cdc_controller.core.names import alias_owner
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def settle_metadata(world: World, task: TaskRecord) -> None:
    """From the last trusted reading; before the first one everything stays as it is."""
    view = world.sources.get(task.spec.source_id)
    if view is None or view.catalogue is None or view.doubted or not task.active:
        return
    metadata = world.metadata[task.uid]
    wanted = wanted_metadata(
        metadata,
        Facts(
            task,
            world.collections[task.uid],
            lambda record: world.progress[record.assignment_id],
            view.catalogue,
            lambda name: bool(
                world.names.holders(task.spec.sink_id, name) - {alias_owner(task.uid, name)}
            ),
        ),
    )
    world.work[task.uid].awaited = frozenset(wanted.awaited)
    for collection_id, ts in wanted.awaited.items():
        record = world.collections[task.uid][collection_id]
        if record.awaited_ts < ts:
            world.put_collection(changed(record, awaited_ts=ts))
    if wanted.metadata != metadata:
        world.put_metadata(wanted.metadata)


def drop_waits_for_alias(world: World, uid: str, collection_id: int) -> bool:
    return holds_back_drop(world.metadata[uid], collection_id)


def awaits(world: World, assignment_id: str) -> bool:
    """An alias may come once this collection has come further."""
    uid, collection_id = split_assignment_id(assignment_id)
    return collection_id in world.work[uid].awaited


def metadata_reported(world: World, uid: str, event: ProgressReported) -> bool:
    """Whether more of the assignment is done than before."""
    metadata = world.metadata[uid]
    new = replace(
        metadata,
        applied_version=max(metadata.applied_version, event.applied_version),
        aliases_version=max(metadata.aliases_version, event.aliases_version),
        conditions=event.conditions,
        operations_read_from=event.operations_read_from or metadata.operations_read_from,
    )
    _note_flushes(world, uid, event.flushes)
    if new == metadata:
        return False
    world.put_metadata(new)
    if alias_names(metadata) - alias_names(new):
        # Names that aliases held are free, for collections of other tasks too.
        sink_id = world.tasks[uid].spec.sink_id
        for task in world.tasks.values():
            if task.spec.sink_id == sink_id:
                world.touch_state(task.uid)
    return new.applied_version > metadata.applied_version


def _note_flushes(world: World, uid: str, flushes: Iterable[FlushSeen]) -> None:
    task = world.tasks[uid]
    view = world.sources.get(task.spec.source_id)
    aliases = view.catalogue.aliases if view is not None and view.catalogue is not None else ()
    for flush in flushes:
        named = flushed_collections(
            world.collections[uid].values(), aliases, flush.database, flush.collections
        )
        for collection_id in sorted(named):
            record = world.collections[uid][collection_id]
            if record.want.create_ts <= flush.ts and record.flush_ts < flush.ts:
                world.put_collection(changed(record, flush_ts=flush.ts))


def flushed(world: World, uid: str, collection_id: int, flushed_ts: int) -> None:
    """The owner has carried out a flush: nothing waits for it any more."""
    record = world.collections[uid].get(collection_id)
    if record is not None and 0 < record.flush_ts <= flushed_ts:
        world.put_collection(replace(record, flush_ts=0))
