"""What users ask for: checked, stored, answered."""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc_controller.core import positions
from milvus_cdc_controller.core.admission import check_create, check_names, find_repeated
from milvus_cdc_controller.core.collection import changed
from milvus_cdc_controller.core.effects import RefreshSource, Refusal, Reply
from milvus_cdc_controller.core.events import (
    Command,
    CreateTask,
    DeleteTask,
    PauseTask,
    ResumeTask,
    ResyncCollection,
    RetryTask,
    SetPositions,
    UpdateTask,
)
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.parts import held_grants
from milvus_cdc_controller.core.sources import adopt_catalogue
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def create_task(world: World, command: CreateTask) -> None:
    repeated = find_repeated(world, command)
    if repeated is not None:
        world.effects.append(repeated)
        return
    refusal = check_create(world, command)
    if refusal is not None:
        world.effects.append(Reply(command.call, refusal=refusal))
        return
    now = world.now.wall_ms
    task = TaskRecord(
        command.uid,
        command.spec,
        request_id=command.request_id,
        fingerprint=command.fingerprint,
        probed=command.probed,
        state_time_ms=now,
        create_time_ms=now,
        update_time_ms=now,
        creator=command.creator,
    )
    if not command.validate_only:
        world.put_task(task)
        world.watch_sources()
        adopt_catalogue(world, task.uid)
        world.touch(task.uid)
    _answer(world, command, task)


def _find(world: World, command: Command, name: str, etag: str = "") -> TaskRecord | None:
    """The task, or None once a refusal has been answered."""
    uid = world.uid_by_name.get(name)
    if uid is None:
        refusal = Refusal("NOT_FOUND", "TASK_NOT_FOUND", f"There is no {name}.", "name")
    elif etag and etag != world.tasks[uid].etag:
        refusal = Refusal(
            "ABORTED",
            "ETAG_MISMATCH",
            f"{name} has changed since it was read; get it again and repeat.",
            "etag",
        )
    else:
        return world.tasks[uid]
    world.effects.append(Reply(command.call, refusal=refusal))
    return None


def _not_deleting(world: World, command: Command, task: TaskRecord) -> bool:
    if task.deleting:
        _refuse(
            world,
            command,
            Refusal(
                "FAILED_PRECONDITION",
                "TASK_DELETING",
                f"{task.spec.name} is being deleted.",
                "name",
            ),
        )
    return not task.deleting


def _refuse(world: World, command: Command, refusal: Refusal) -> None:
    world.effects.append(Reply(command.call, refusal=refusal))


def _answer(world: World, command: Command, task: TaskRecord) -> None:
    world.effects.append(Reply(command.call, task))


def _change(world: World, task: TaskRecord, **fields: object) -> TaskRecord:
    new = replace(
        task,
        generation=task.generation + 1,
        update_time_ms=world.now.wall_ms,
        **fields,  # type: ignore[arg-type]
    )
    world.put_task(new)
    world.touch(task.uid)
    return new


def update_task(world: World, command: UpdateTask) -> None:
    task = _find(world, command, command.name, command.etag)
    if task is None or not _not_deleting(world, command, task):
        return
    spec = task.spec
    if command.labels is not None:
        spec = replace(spec, labels=command.labels)
    if command.selection is not None:
        spec = replace(spec, selection=command.selection)
        refusal = check_names(world, spec, own_uid=task.uid)
        if refusal is not None:
            _refuse(world, command, refusal)
            return
    if command.carry is not None:
        spec = replace(spec, carry=command.carry)
    if command.drift is not None:
        spec = replace(spec, drift=command.drift)
    if command.batching is not None:
        spec = replace(spec, batching=command.batching)
    if command.limits is not None:
        spec = replace(spec, limits=command.limits)
    if command.dead_letters is not None:
        spec = replace(spec, dead_letters=command.dead_letters)
    if command.replicator_labels is not None:
        spec = replace(spec, replicator_labels=command.replicator_labels)
    if command.max_parts is not None:
        spec = replace(spec, max_parts=command.max_parts)
    if command.validate_only:
        _answer(world, command, replace(task, spec=spec))
        return
    if spec != task.spec:
        retold = (spec.carry, spec.drift) != (task.spec.carry, task.spec.drift)
        before = (task.spec.batching, task.spec.dead_letters)
        arranged = (spec.batching, spec.dead_letters) != before
        # Who changes the selection has seen what a rename had taken out of it.
        left = task.left if spec.selection == task.spec.selection else ()
        task = _change(world, task, spec=spec, left=left)
        if retold or arranged:
            for record in list(world.collections[task.uid].values()):
                world.put_collection(changed(record))
        if retold:
            metadata = world.metadata[task.uid]
            world.put_metadata(replace(metadata, version=metadata.version + 1))
        adopt_catalogue(world, task.uid)
    _answer(world, command, task)


def pause_task(world: World, command: PauseTask) -> None:
    task = _find(world, command, command.name, command.etag)
    if task is None or not _not_deleting(world, command, task):
        return
    if not task.paused:
        task = _change(world, task, paused=True)
    _answer(world, command, task)


def resume_task(world: World, command: ResumeTask) -> None:
    task = _find(world, command, command.name, command.etag)
    if task is None or not _not_deleting(world, command, task):
        return
    if task.paused:
        task = _change(world, task, paused=False)
        adopt_catalogue(world, task.uid)
    _answer(world, command, task)


def delete_task(world: World, command: DeleteTask) -> None:
    if command.allow_missing and command.name not in world.uid_by_name:
        world.effects.append(Reply(command.call))
        return
    task = _find(world, command, command.name, command.etag)
    if task is None:
        return
    if not task.deleting:
        task = _change(world, task, deleting=True)
    _answer(world, command, task)


def retry_task(world: World, command: RetryTask) -> None:
    task = _find(world, command, command.name)
    if task is None or not _not_deleting(world, command, task):
        return
    records = list(world.collections[task.uid].values())
    if command.collection:
        records = [r for r in records if r.source_name == command.collection]
        if not records:
            _refuse(world, command, _no_collection(task, command.collection))
            return
    failed = [record for record in records if record.failure is not None]
    # Something other than rows may have been refused: its owner tries it again at the next version.
    retrying = [
        record
        for record in records
        if record.failure is None
        and any(
            world.seen(grant.assignment_id).state is ReportedState.RETRYING
            for grant in held_grants(world, record)
        )
    ]
    if command.collection and not failed and not retrying and task.failure is None:
        _refuse(
            world,
            command,
            Refusal(
                "FAILED_PRECONDITION",
                "COLLECTION_NOT_FAILED",
                f"{command.collection} has not failed.",
                "collection",
            ),
        )
        return
    for record in failed:
        world.put_collection(replace(record, failure=None))
    for record in retrying:
        world.put_collection(changed(record))
    metadata = world.metadata[task.uid]
    if metadata.failure is not None:
        world.put_metadata(replace(metadata, failure=None))
    work, view = world.work[task.uid], world.sources.get(task.spec.source_id)
    work.not_before_ms = 0
    # What failed for doubt in the source stays failed until a reading can be trusted again.
    work.recheck = task.failure is not None and view is not None and view.catalogue is None
    work.recheck = work.recheck or (task.failure is not None and bool(view and view.doubted))
    task = _change(world, task, failure=task.failure if work.recheck else None)
    world.effects.append(RefreshSource(task.spec.source_id))
    _answer(world, command, task)


def resync_collection(world: World, command: ResyncCollection) -> None:
    task = _find(world, command, command.name)
    if task is None or not _not_deleting(world, command, task):
        return
    matching = [
        record
        for record in world.collections[task.uid].values()
        if record.source_name == command.collection
    ]
    # The holder of the name, when one of the same name waits behind it.
    record = next(iter(sorted(matching, key=lambda r: not r.holds_name)), None)
    if record is None:
        _refuse(world, command, _no_collection(task, command.collection))
        return
    if record.dropping:
        _refuse(
            world,
            command,
            Refusal(
                "FAILED_PRECONDITION",
                "COLLECTION_DROPPING",
                f"{command.collection} is dropped at the source; there is nothing to fill it from.",
                "collection",
            ),
        )
        return
    world.put_collection(replace(record, resync=True, failure=None))
    task = _change(world, task)
    _answer(world, command, task)


def set_positions(world: World, command: SetPositions) -> None:
    task = _find(world, command, command.name, command.etag)
    if task is None or not _not_deleting(world, command, task):
        return
    refusal = positions.set_positions(world, task, command.positions)
    if refusal is not None:
        _refuse(world, command, refusal)
        return
    _answer(world, command, _change(world, task))


def _no_collection(task: TaskRecord, collection: str) -> Refusal:
    return Refusal(
        "NOT_FOUND",
        "COLLECTION_NOT_FOUND",
        f"{task.spec.name} follows no collection {collection!r}.",
        "collection",
    )
