"""From a reading of the source's metadata to the collections and databases a task wants at the
sink.

Laws: level-triggered: the same reading twice changes nothing. A partition once seen stays in the
record as DROPPED, so that rows of it that are still in the log can be told from rows of one not
yet known. A collection that is dropped at first sight has never been at the sink and is left out.
What is DROPPING keeps its last contents: Milvus takes the keys apart piece by piece. The name at
the sink is not decided here: a rename only changes `source_name` (see `names.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from milvus_cdc.model import Catalogue, Collection, Import, ObjectState, Partition
from milvus_cdc.selection import Selection, matches

from milvus_cdc_controller.core.collection import CollectionRecord, changed, named
from milvus_cdc_controller.core.mapping import (
    Naming,
    impossible_part,
    possible,
    sink_database,
    sink_name,
    split,
)
from milvus_cdc_controller.core.task import (
    LEFT_MAX,
    DatabaseWish,
    Failure,
    LeftCollection,
    MetadataRecord,
    TaskRecord,
)


@dataclass(frozen=True, slots=True)
class Changes:
    """Only what differs from the records given; None where nothing does."""

    saved: tuple[CollectionRecord, ...] = ()
    metadata: MetadataRecord | None = None
    left: tuple[LeftCollection, ...] | None = None
    """The task's new list of collections that a rename took out of the selection."""


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


def merge_imports(known: tuple[Import, ...], read: tuple[Import, ...]) -> tuple[Import, ...]:
    """Everything ever read: Milvus forgets an import after hours, its rows stay where they are."""
    merged = {each.import_id: each for each in known}
    for each in read:
        before = merged.get(each.import_id, each)
        merged[each.import_id] = Import(
            each.import_id, max(each.rows, before.rows), each.time_ms or before.time_ms
        )
    return tuple(merged[number] for number in sorted(merged))


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
        # Where it is read from goes away after a while.
        alter_ts=max(read.alter_ts, record.want.alter_ts),
        imports=merge_imports(record.want.imports, read.imports),
    )
    if want != record.want:
        return changed(record, want=want, source_name=read.full_name)
    if read.full_name != record.source_name:
        return replace(record, source_name=read.full_name)
    return record


def name_fault(full_name: str, source_name: str) -> Failure | None:
    """Why a collection cannot have this name at a sink, when it comes from a rule."""
    half = impossible_part(full_name)
    if not half or full_name == source_name:
        return None
    return Failure(
        "SINK_NAME_INVALID",
        f"{source_name} would be called {full_name} at the sink, and nothing there can be called "
        f"{half!r}; exclude it, or delete the task and create it with other rename rules.",
    )


def reconcile(
    task: TaskRecord,
    records: Mapping[int, CollectionRecord],
    metadata: MetadataRecord,
    catalogue: Catalogue,
    wall_ms: int = 0,
    before: Catalogue | None = None,
) -> Changes:
    """What a trusted reading changes for one task.

    `before`: the one that the records were brought in line with last. What is the same object in
    both says nothing new: with ten thousand collections one change is work for one. It may be this
    same one, when a record has gone or a name is free: only what has no record is looked at then.
    """
    read = {c.collection_id: c for c in catalogue.collections}
    known = {id(c) for c in before.collections} if before is not None else set()
    selection = task.spec.selection
    saved: list[CollectionRecord] = []
    left = {each.collection_id: each for each in task.left}
    for record in records.values():
        found = read.get(record.collection_id)
        if found is not None and id(found) in known:
            continue
        new = merge_collection(record, found)
        deselected = not selection.selects(new.source_name)
        if deselected != new.deselected:
            new = replace(new, deselected=deselected)
            if deselected and not new.dropping and selection.selects(record.source_name):
                left[new.collection_id] = LeftCollection(
                    new.collection_id, new.source_name, new.now_at_sink, wall_ms
                )
        if new != record:
            saved.append(new)
    if before is catalogue:
        known = set()
    unknown = [c for c in read.values() if c.collection_id not in records and id(c) not in known]
    for collection in sorted(unknown, key=lambda c: (c.create_ts, c.collection_id)):
        if collection.state is ObjectState.DROPPED:
            continue
        if selection.selects(collection.full_name):
            saved.append(_first_seen(task, collection))
    alive = {**records, **{record.collection_id: record for record in saved}}
    still_left = tuple(
        each
        for each in left.values()
        if (collection := read.get(each.collection_id)) is not None  # type: ignore[assignment]
        and collection.state is ObjectState.CREATED
        and not selection.selects(collection.full_name)
    )[-LEFT_MAX:]
    databases = _databases(task, metadata, catalogue, alive.values())
    return Changes(
        tuple(saved),
        None
        if databases == metadata.databases
        else replace(metadata, databases=databases, version=metadata.version + 1),
        None if still_left == task.left else still_left,
    )


def _first_seen(task: TaskRecord, collection: Collection) -> CollectionRecord:
    source_name = collection.full_name
    target = sink_name(task.spec.rename, source_name)
    return CollectionRecord(
        task_uid=task.uid,
        collection_id=collection.collection_id,
        version=1,
        want=named(collection, target),
        source_name=source_name,
        failure=name_fault(target, source_name),
    )


def _databases(
    task: TaskRecord,
    metadata: MetadataRecord,
    catalogue: Catalogue,
    records: Iterable[CollectionRecord],
) -> tuple[DatabaseWish, ...]:
    """Databases to exist, then those to go: one goes only once the task has nothing left in it."""
    there: dict[str, DatabaseWish] = {}
    alive = {d.database_id for d in catalogue.databases if d.state is ObjectState.CREATED}
    for database in sorted(catalogue.databases, key=lambda d: d.database_id):
        home = _home(task.spec.naming, database.name)
        if database.database_id in alive and home:
            there.setdefault(home, DatabaseWish(database.database_id, home))
    busy: set[str] = set()
    known = {wish.name: replace(wish, dropped=False) for wish in metadata.databases}
    for record in records:
        name = record.want.database
        busy |= {name, split(record.now_at_sink)[0]}
        if not (record.dropping or record.deselected or record.failure is not None):
            there.setdefault(name, known.get(name) or DatabaseWish(0, name))
    kept: list[DatabaseWish] = []
    for wish in metadata.databases:
        if wish.name in there or wish.database_id in alive:
            continue  # wanted; or alive at the source and no longer selected: the sink's stays
        if wish.dropped:
            if metadata.applied_version < metadata.version:
                kept.append(wish)
        elif wish.name in busy:
            kept.append(wish)
        elif wish.database_id:
            kept.append(replace(wish, dropped=True))
    wanted = sorted(there.values(), key=lambda wish: (wish.database_id, wish.name))
    return (*wanted, *kept)


@lru_cache(maxsize=4096)
def _home(naming: Naming, database: str) -> str:
    """The sink's database for a source's database as a whole, with or without collections; empty
    when none of its collections could be followed there.
    """
    if not naming.selection.selects_database(database):
        return ""
    home = sink_database(naming.rules, database)
    if not naming.rules:
        return home
    globs = tuple(
        f"{database}.{split(glob)[1]}"
        for glob in naming.selection.include
        if matches(split(glob)[0], database)
    )
    ways = Naming(naming.rules, Selection(globs, naming.selection.exclude)).flows()
    used = possible(home) and any(split(way.sink)[0] == home for way in ways)
    return home if used else ""
