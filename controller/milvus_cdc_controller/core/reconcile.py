"""From a reading of the source's metadata to the collections and databases a task wants at the
sink.

Laws: level-triggered: the same reading twice changes nothing. A partition once seen stays in the
record as DROPPED, so that rows of it that are still in the log can be told from rows of one not
yet known. A collection that is dropped at first sight has never been at the sink and is left out.
What is DROPPING keeps its last contents: Milvus takes the keys apart piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from milvus_cdc.model import Catalogue, Collection, ObjectState, Partition

from milvus_cdc_controller.core.collection import CollectionRecord, changed
from milvus_cdc_controller.core.task import DatabaseWish, MetadataRecord, TaskRecord


@dataclass(frozen=True, slots=True)
class Changes:
    """Only what differs from the records given. `metadata` is None when it does not."""

    saved: tuple[CollectionRecord, ...] = ()
    metadata: MetadataRecord | None = None


def merge_partitions(
    known: tuple[Partition, ...], read: tuple[Partition, ...]
) -> tuple[Partition, ...]:
    """Everything read, and everything known that is no longer there, as dropped; in the order
    first seen.
    """
    fresh = {partition.partition_id: partition for partition in read}
    merged: list[Partition] = []
    for old in known:
        new = fresh.pop(old.partition_id, None)
        if old.state is ObjectState.DROPPED and not (
            # asked for before the metadata showed it
            not old.name and new is not None and new.state is ObjectState.CREATED
        ):
            keep = old
            if new is not None and new.state is ObjectState.DROPPED and not old.drop_ts:
                keep = replace(old, drop_ts=new.drop_ts, name=new.name or old.name)
            merged.append(keep)
        elif new is None:
            merged.append(replace(old, state=ObjectState.DROPPED))
        else:
            merged.append(new)
    merged.extend(sorted(fresh.values(), key=lambda p: (p.create_ts, p.partition_id)))
    return tuple(merged)


def merge_collection(record: CollectionRecord, read: Collection | None) -> CollectionRecord:
    """The record after a trusted reading; `read` is None when the collection is not there any
    more.
    """
    if record.dropping:
        return record
    if read is None or read.state is ObjectState.DROPPED:
        want = record.want
        if read is not None and read.drop_ts:
            want = replace(want, drop_ts=read.drop_ts)
        return changed(record, dropping=True, want=want)
    want = replace(
        read,
        database=record.want.database,
        name=record.want.name,
        partitions=merge_partitions(record.want.partitions, read.partitions),
    )
    if want != record.want:
        return changed(record, want=want, source_name=read.full_name)
    if read.full_name != record.source_name:
        return replace(record, source_name=read.full_name)
    return record


def reconcile(
    task: TaskRecord,
    records: Mapping[int, CollectionRecord],
    metadata: MetadataRecord,
    catalogue: Catalogue,
) -> Changes:
    """What a trusted reading changes for one task."""
    read = {c.collection_id: c for c in catalogue.collections}
    selection = task.spec.selection
    saved: list[CollectionRecord] = []
    for record in records.values():
        new = merge_collection(record, read.get(record.collection_id))
        # A renamed collection stays selected: its name at the sink has not changed.
        new_deselected = not selection.selects(new.sink_name)
        if new_deselected != new.deselected:
            new = replace(new, deselected=new_deselected)
        if new != record:
            saved.append(new)
    for collection in sorted(read.values(), key=lambda c: (c.create_ts, c.collection_id)):
        if collection.collection_id in records or collection.state is ObjectState.DROPPED:
            continue
        if selection.selects(collection.full_name):
            saved.append(
                CollectionRecord(
                    task_uid=task.uid,
                    collection_id=collection.collection_id,
                    version=1,
                    want=collection,
                    source_name=collection.full_name,
                )
            )
    alive = {**records, **{record.collection_id: record for record in saved}}
    busy = {record.want.database for record in alive.values()}
    databases = _databases(task, metadata, catalogue, busy)
    if databases == metadata.databases:
        return Changes(tuple(saved))
    return Changes(
        tuple(saved), replace(metadata, databases=databases, version=metadata.version + 1)
    )


def _databases(
    task: TaskRecord, metadata: MetadataRecord, catalogue: Catalogue, busy: set[str]
) -> tuple[DatabaseWish, ...]:
    """Databases to exist, then those to go: one goes only once the task has nothing left in it."""
    there = {
        d.database_id: DatabaseWish(d.database_id, d.name)
        for d in catalogue.databases
        if d.state is ObjectState.CREATED and task.spec.selection.selects_database(d.name)
    }
    names = {wish.name for wish in there.values()}
    kept: list[DatabaseWish] = []
    for wish in metadata.databases:
        if wish.database_id in there or wish.name in names:
            continue
        read = next((d for d in catalogue.databases if d.database_id == wish.database_id), None)
        if read is not None and read.state is ObjectState.CREATED:
            continue  # alive at the source and no longer selected: the sink's stays
        if wish.dropped:
            if metadata.applied_version < metadata.version:
                kept.append(wish)
        elif wish.name in busy:
            kept.append(wish)
        else:
            kept.append(replace(wish, dropped=True))
    return tuple(sorted(there.values(), key=lambda wish: wish.database_id)) + tuple(kept)
