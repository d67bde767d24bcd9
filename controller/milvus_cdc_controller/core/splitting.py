"""When a collection is split, and when a split one that lacks replicators is made whole again.

Laws: nothing is split before somebody is known for each part, by the task's limits too, and never
between less than two replicators; one after the other, because each pauses for as long as a
hand-off takes. A look costs what is in trouble, and no more than so many of those in one piece.
"""

from __future__ import annotations

from milvus_cdc.model import part_of_assignment

from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.granting import wanted
from milvus_cdc_controller.core.parts import is_for_one, parts_of, whole_of, whole_past_horizons
from milvus_cdc_controller.core.placement import Candidate, place
from milvus_cdc_controller.core.placing import candidates, need_of
from milvus_cdc_controller.core.spreading import spread_of
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World

LOOK_MS = 1_000
SETTLED_MS = 3_000
"""A whole is split when its owner has had it for so long."""
LACKING_MS = 15_000
"""A part without an owner for so long makes it whole again: one replicator carries all of it rather
than none a part of it.
"""
AT_ONCE = 4
"""So many collections are split at most with one look."""
LOOKED_AT_ONCE = 500
"""So many are looked at; the others in their turn."""
TRIED_AT_ONCE = 20
"""For so many of them replicators are looked for."""
TRY_AGAIN_MS = 5_000
"""After a look that found none for any of them: it goes over everything that is held."""


def look(world: World) -> None:
    """Splits what may be split and finds owners; makes whole again what lacks one for a part."""
    if world.now.mono_ms < world.look_at_parts_ms:
        return
    world.look_at_parts_ms = world.now.mono_ms + LOOK_MS
    tasks = [task for task in world.tasks.values() if task.spec.max_parts > 1 and task.active]
    world.lacking = _lacking(world, tasks)
    held = [world.standing[task.uid].running for task in tasks if task.uid in world.standing]
    whole = [keys[0] for running in held for keys in running.values() if len(keys) == 1]
    if whole and world.now.mono_ms >= world.split_after_ms:
        _split_some(world, whole)


def _lacking(world: World, tasks: list[TaskRecord]) -> dict[str, int]:
    """Since when parts of collections wait for an owner; after a while they are made whole."""
    lacking: dict[str, int] = {}
    for task in tasks:
        unplaced = world.unplaced.get(task.uid, {}).values()
        parts = {whole_of(key) for keys in unplaced for key in keys if part_of_assignment(key)}
        for whole in sorted(parts):
            lacking[whole] = world.lacking.get(whole, world.now.mono_ms)
            if world.now.mono_ms - lacking[whole] >= LACKING_MS:
                world.put_progress(whole_past_horizons(world.progress[whole]))
                world.touch_one(whole)
    return lacking


def _split_some(world: World, whole: list[str]) -> None:
    """Of collections that run in one piece, beginning where the last look has ended."""
    start = world.parts_turn % len(whole)
    takers = world.takers()
    if len(takers) < 2:
        return
    free: list[Candidate] | None = None
    room, tries, seen = AT_ONCE, TRIED_AT_ONCE, 0
    for key in (whole[start:] + whole[:start])[:LOOKED_AT_ONCE]:
        if not room or not tries:
            break
        seen += 1
        record = world.record_of(key)
        if record is None or not _may_be_split(world, world.tasks[record.task_uid], record):
            continue
        tries -= 1
        if free is None:
            free = candidates(world, takers)
        if _has_owners(world, world.tasks[record.task_uid], record, free):
            room -= 1
            world.divided.add(key)
            world.touch_one(key)
    world.parts_turn = start + seen
    if tries < TRIED_AT_ONCE and room == AT_ONCE:
        world.split_after_ms = world.now.mono_ms + TRY_AGAIN_MS


def _may_be_split(world: World, task: TaskRecord, record: CollectionRecord) -> bool:
    whole = record.assignment_id
    grant = world.grants.get(whole)
    if grant is None or not grant.instance or wanted(task, record):
        return False
    seen = world.seen(whole)
    if seen.revoking or seen.state is not ReportedState.RUNNING or whole in world.moves:
        return False
    if world.now.wall_ms - grant.assign_time_ms < SETTLED_MS:
        return False
    progress = world.progress[whole]
    return not is_for_one(record, progress, parts_of(task, progress))


def _has_owners(
    world: World, task: TaskRecord, record: CollectionRecord, free: list[Candidate]
) -> bool:
    """Several replicators can take all the parts."""
    spreads = {}
    if task.spec.limits.replicators:
        spreads[task.uid] = spread_of(world, task, apart_from=record.assignment_id)
    parts = parts_of(task, world.progress[record.assignment_id])
    found = place((need_of(world, part) for part in parts), free, spreads)
    return len(found) == len(parts) and len(set(found.values())) > 1
