"""What users ask for: checked, stored, answered."""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.selection import overlap, selects_nothing

from milvus_cdc_controller.core import positions
from milvus_cdc_controller.core.collection import changed
from milvus_cdc_controller.core.effects import Effect, RefreshSource, Refusal, Reply
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
from milvus_cdc_controller.core.mapping import check_rules, meeting
from milvus_cdc_controller.core.sources import adopt_catalogue
from milvus_cdc_controller.core.task import TaskRecord, TaskSpec, echo
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
    )
    if not command.validate_only:
        world.put_task(task)
        world.watch_sources()
        adopt_catalogue(world, task.uid)
        world.touch(task.uid)
    _answer(world, command, task)


def find_repeated(world: World, command: CreateTask) -> Effect | None:
    """The answer to a request id seen before."""
    if not command.request_id:
        return None
    for task in world.tasks.values():
        if task.request_id == command.request_id:
            if task.fingerprint == command.fingerprint:
                return Reply(command.call, task)
            return Reply(
                command.call,
                refusal=Refusal(
                    "ALREADY_EXISTS",
                    "REQUEST_ID_REUSED",
                    f"The request id was used for {task.spec.name} with other contents; "
                    "use a new one.",
                    "request_id",
                ),
            )
    return None


def check_create(world: World, command: CreateTask) -> Refusal | None:
    if len(world.tasks) >= world.tasks_max:
        return Refusal(
            "RESOURCE_EXHAUSTED",
            "TOO_MANY_TASKS",
            f"There are {len(world.tasks)} tasks; delete one, or raise limits.tasks in the "
            "controller's configuration.",
            "task",
        )
    if command.spec.name in world.uid_by_name:
        return Refusal(
            "ALREADY_EXISTS",
            "TASK_EXISTS",
            f"{command.spec.name} exists already; choose another name or update it.",
            "task.name",
        )
    return _check_names(world, command.spec, own_uid="")


def _check_names(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    return (
        _nothing(spec)
        or _collision(spec, updating=bool(own_uid))
        or _overlap(world, spec, own_uid)
        or _echo(world, spec, own_uid)
    )


def _nothing(spec: TaskSpec) -> Refusal | None:
    found = selects_nothing(spec.selection)
    if found is None:
        return None
    index, why = found
    return Refusal(
        "INVALID_ARGUMENT",
        "SELECTS_NOTHING",
        f"{spec.selection.include[index]!r} can never select a collection: {why}.",
        f"task.selection.include[{index}]",
    )


def _collision(spec: TaskSpec, *, updating: bool) -> Refusal | None:
    fault = check_rules(spec.rename, spec.selection)
    if fault is None:
        return None
    # The rules stand since creation: what is to be changed is at fault.
    field = "task.selection.include" if updating else f"task.rename[{fault.rule}]"
    rule = spec.rename[fault.rule]
    return Refusal(
        "INVALID_ARGUMENT",
        fault.reason,
        f"rename[{fault.rule}] ({rule.source} -> {rule.sink}): {fault.message}.",
        field,
        (("rule", str(fault.rule)), ("from", rule.source), ("to", rule.sink)),
    )


def _echo(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    """Refuses what would come back to its own source through other tasks."""
    others = [
        task.spec for task in world.tasks.values() if task.uid != own_uid and not task.deleting
    ]
    way = echo(spec, others)
    if way is None:
        return None
    names = ", ".join(other.name for other in way)
    return Refusal(
        "FAILED_PRECONDITION",
        "SELF_FEEDING",
        f"What this task writes would come back to its source by {names}, and round again for "
        "ever. Select different collections in each direction, or give them other names by "
        "rename.",
        "task.selection.include",
        tuple(("task", other.name) for other in way[:1]),
    )


def _overlap(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    for uid in world.reach.candidates(spec):
        task = world.tasks[uid]
        if uid == own_uid:
            continue
        if spec.rename or task.spec.rename:
            pair = meeting(spec.naming, task.spec.naming)
        else:
            pair = overlap(spec.selection, task.spec.selection)
        if pair is None:
            continue
        mine, theirs = pair
        return Refusal(
            "FAILED_PRECONDITION",
            "SINK_OVERLAP",
            f"{task.spec.name} writes to the same sink, and its {theirs!r} can reach a name there "
            f"that {mine!r} can reach: two tasks may not own one sink collection. Narrow one of "
            "them, for example by exclude.",
            "task.selection.include",
            (("task", task.spec.name), ("pattern", mine), ("other_pattern", theirs)),
        )
    return None


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
        refusal = _check_names(world, spec, own_uid=task.uid)
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
        and world.seen(record.assignment_id).state is ReportedState.RETRYING
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
