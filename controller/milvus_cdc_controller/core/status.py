"""What a task and its collections look like from outside: states derived from the facts, never
set by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from milvus_cdc.model import metadata_assignment_id

from milvus_cdc_controller.core.collection import (
    NO_ROWS,
    CollectionProgress,
    CollectionRecord,
    CollectionState,
    Counters,
    target_name,
)
from milvus_cdc_controller.core.effects import Publish, Save
from milvus_cdc_controller.core.grant import Grant, GrantState, Observed, ReportedState
from milvus_cdc_controller.core.granting import metadata_wanted, wanted
from milvus_cdc_controller.core.holding import failing, waits
from milvus_cdc_controller.core.liveness import SessionState
from milvus_cdc_controller.core.names import Kind
from milvus_cdc_controller.core.parts import held_grants, shape
from milvus_cdc_controller.core.placing import labels_of
from milvus_cdc_controller.core.reconcile import name_fault
from milvus_cdc_controller.core.standing import Standing, first
from milvus_cdc_controller.core.store_keys import task_key
from milvus_cdc_controller.core.task import TaskRecord, TaskState, move
from milvus_cdc_controller.core.world import World

Status = tuple[CollectionState, str, str]

_WAITS = {
    "NOT_PROBED": "Waiting until a replicator has reached queue and sink.",
    "WAITING_FOR_START": "Waiting for a replicator to name the end of the log.",
    "RESYNC": "Being taken back before it is filled anew.",
    "DESELECTED": "No longer selected; being taken back.",
}


def collection_status(world: World, record: CollectionRecord) -> Status:
    status = outline(world, record)
    if status is None:
        return CollectionState.PENDING, *_why_pending(world, record)
    return status


def _why_pending(world: World, record: CollectionRecord) -> tuple[str, str]:
    """Why nobody is to have it, or has it though he should."""
    task = world.tasks[record.task_uid]
    reason = wanted(task, record)
    if reason == "WAITING_FOR_NAME":
        return reason, waiting_for(world, record, record.sink_name)
    if reason:
        return reason, _WAITS.get(reason, "")
    if not world.alive():
        return "NO_REPLICATOR", "No replicator is connected."
    if waits(world, record):
        wrong = failing(world, task) or "A replicator makes sure that the queue keeps its log."
        return "WAITING_FOR_HOLD", wrong
    return _no_taker(world, task)


def outline(world: World, record: CollectionRecord) -> Status | None:
    """The status of a collection; None while it is pending because nobody has it, or is to."""
    task = world.tasks[record.task_uid]
    if record.failure is not None and not record.resync:
        return CollectionState.FAILED, record.failure.reason, record.failure.message
    if task.paused:
        return CollectionState.PAUSED, "", ""
    key = record.assignment_id
    if not world.parts.get(key):
        return _owned(world, task, record, key)
    found = [_owned(world, task, record, each) for each in shown_as(world, task, record)]
    whole = (each for each in found if each is None or each[0] is not CollectionState.RUNNING)
    return next(whole, found[0])


def shown_as(world: World, task: TaskRecord, record: CollectionRecord) -> tuple[str, ...]:
    """The assignments that it is held as now, those that nobody has yet included."""
    keys = shape(world, task, record)
    others = {grant.assignment_id for grant in held_grants(world, record)}.difference(keys)
    return tuple(sorted(others)) or keys


def _owned(world: World, task: TaskRecord, record: CollectionRecord, key: str) -> Status | None:
    """As `outline`, of one of its assignments."""
    grant = world.grants.get(key)
    if grant is None or not grant.instance or wanted(task, record):
        return None
    session = world.owner(grant)
    if session is None or session.state(world.leases, world.now.mono_ms) is SessionState.SUSPECT:
        return (
            CollectionState.RETRYING,
            "REPLICATOR_LOST",
            f"{grant.owner} is silent; it goes elsewhere when its lease has ended.",
        )
    seen = world.seen(key)
    if seen.revoking:
        move = world.moves.get(key)
        target = world.sessions.get(move.target) if move is not None else None
        if target is not None:
            return CollectionState.PENDING, "MOVING", f"From {grant.owner} to {target.name}."
        return CollectionState.PENDING, "REVOKING", f"{grant.owner} is letting go."
    if seen.state is ReportedState.RETRYING:
        return CollectionState.RETRYING, seen.reason, seen.message
    if record.dropping:
        return CollectionState.DROPPING, "", ""
    if seen.state is ReportedState.NONE:
        return CollectionState.PENDING, "ASSIGNING", f"{grant.owner} is beginning."
    return CollectionState.RUNNING, "", ""


def _no_taker(world: World, task: TaskRecord) -> tuple[str, str]:
    """Why nobody takes what waits, though somebody is connected."""
    labels = frozenset(task.spec.replicator_labels)
    if not any(labels <= labels_of(session) for session in world.alive()):
        wanted_ = ", ".join(f"{key}={value}" for key, value in sorted(labels))
        return (
            "NO_MATCHING_REPLICATOR",
            f"No connected replicator has the labels that the task asks for: {wanted_}. Start one "
            "that has, or change replicator_labels.",
        )
    most = task.spec.limits.replicators
    if most and len(world.holders(task.uid)) >= most:
        return (
            "NO_CAPACITY",
            f"By its limits (requestsInFlight, connections) the task is with {most} replicators at "
            "most, and these are full, cordoned, draining or silent; raise the limits, uncordon "
            "one or raise a capacity.",
        )
    return (
        "NO_CAPACITY",
        "Every connected replicator that may have it is full, cordoned or draining; start another, "
        "uncordon one or raise a capacity.",
    )


def beyond_limits(world: World, task: TaskRecord) -> str:
    """Why more replicators have something of the task than its limits allow; else empty."""
    most = task.spec.limits.replicators
    if not most or len(now := world.holders(task.uid)) <= most:
        return ""
    names = sorted({s.name for each in now if (s := world.sessions.get(each)) is not None})
    return (
        f"By its limits the task may be with {most} replicators, and is with {len(now)} "
        f"({', '.join(names)}) until what it has to give away has been taken over. If that does "
        "not end by itself, the others have no room for it."
    )


def waiting_for(world: World, record: CollectionRecord, name: str) -> str:
    """Who still has a name at the sink that this collection is to get."""
    task = world.tasks[record.task_uid]
    for owner in sorted(world.names.holders(task.spec.sink_id, name) - {record.owner}):
        what = f"alias {owner.what}"
        if owner.kind is Kind.COLLECTION:
            holder = world.collections[owner.task_uid][int(owner.what)]
            what = f"{holder.source_name} (id {owner.what} at the source"
            what += ", dropped there)" if holder.dropping else ")"
            if holder.failure is not None:
                what += f", which has failed: {holder.failure.reason}"
        if owner.task_uid != record.task_uid:
            what += f" of {world.tasks[owner.task_uid].spec.name}"
        return f"{name} at the sink is still held by {what}."
    return f"Waiting for the name {name} at the sink."


def rename_pending(world: World, record: CollectionRecord) -> str:
    """Why its name at the sink is not yet the one it should have; empty when it is."""
    if not record.opened or record.dropping:
        return ""
    target = target_name(world.tasks[record.task_uid], record)
    if target == record.now_at_sink:
        return ""
    text = f"It is to be called {target} at the sink and still is {record.now_at_sink}: "
    if not world.tasks[record.task_uid].spec.carry.schema:
        return f"{text}the task does not carry `schema`."
    if record.renaming:
        return f"{text}rows that are older than the rename come first."
    fault = name_fault(target, record.source_name)
    if fault is not None:
        return text + fault.message
    if record.failure is not None:
        return f"{text}it has failed; retry it."
    return text + waiting_for(world, record, target)


def grant_state(world: World, grant: Grant) -> GrantState:
    if not grant.instance:
        return GrantState.WAITING
    session = world.owner(grant)
    if session is None or session.state(world.leases, world.now.mono_ms) is SessionState.SUSPECT:
        return GrantState.FENCED
    seen = world.seen(grant.assignment_id)
    if seen.revoking:
        return GrantState.REVOKING
    accepted = seen.accepted_version and seen.accepted_version >= seen.sent_version
    return GrantState.ACCEPTED if accepted else GrantState.ASSIGNED


def look(world: World, uid: str, collection_ids: set[int] | None) -> None:
    """Brings a task's standing in line with the facts; None stands for all of its collections."""
    if uid not in world.tasks:
        return
    if collection_ids is None or uid not in world.standing:
        collection_ids = None
        world.standing[uid] = Standing()
    standing, records = world.standing[uid], world.collections[uid]
    for number in records if collection_ids is None else collection_ids:
        standing.forget(number)
        record = records.get(number)
        if record is None:
            continue
        keys = _held_as(world, record)
        if any([(seen := world.observed.get(key)) is not None and seen.revoking for key in keys]):
            standing.revoking.add(number)
        status = outline(world, record)
        state = status[0] if status is not None else CollectionState.PENDING
        if state in (CollectionState.RUNNING, CollectionState.DROPPING):
            standing.running[number] = keys
        elif state is CollectionState.RETRYING:
            standing.retrying.add(number)
        elif state is CollectionState.FAILED:
            standing.failed.add(number)


def _held_as(world: World, record: CollectionRecord) -> tuple[str, ...]:
    """The whole, or the parts that somebody has."""
    key = record.assignment_id
    if not world.parts.get(key):
        return (key,)
    return tuple([grant.assignment_id for grant in held_grants(world, record)]) or (key,)


def lag_ms(world: World, record: CollectionRecord) -> int:
    """The worst of what is held of it; -1 while nobody has said it."""
    seen = [world.observed.get(key) for key in _held_as(world, record)]
    return max([each.lag_ms for each in seen if each is not None], default=-1)


def refresh(world: World, uid: str, collection_ids: set[int] | None = None) -> None:
    """Moves the task to the state that the facts say; saved and published when it changes.
    `collection_ids`: those of which something has changed; None stands for all.
    """
    task = world.tasks.get(uid)
    if task is None:
        return
    look(world, uid, collection_ids)
    state, reason, message = _derive(world, task)
    new = move(task, state, reason, message, world.now.wall_ms)
    if state in (TaskState.RUNNING, TaskState.RETRYING) and not new.created and task.probed:
        new = replace(new, created=_settled(world, task))
    if not world.standing[uid].revoking and not _metadata_revoking(world, uid):
        new = replace(new, observed_generation=new.generation)
    if new != task:
        world.tasks[uid] = new
        world.effects.append(Save(task_key(uid), new))
        world.effects.append(Publish(uid))


def _metadata_revoking(world: World, uid: str) -> bool:
    seen = world.observed.get(metadata_assignment_id(uid))
    return seen is not None and bool(seen.revoking)


def _settled(world: World, task: TaskRecord) -> bool:
    return task.baseline is not None and not world.unstarted[task.uid]


def _derive(world: World, task: TaskRecord) -> tuple[TaskState, str, str]:
    if task.deleting:
        return TaskState.DELETING, "", ""
    if task.failure is not None:
        return TaskState.FAILED, task.failure.reason, task.failure.message
    if task.paused:
        if world.is_held(task.uid):
            # A failed task has nothing left to run: it counts as paused while the last ones let go.
            pausing = TaskState.PAUSED if task.state is TaskState.FAILED else task.state
            return pausing, "PAUSING", "Replicators are letting go."
        return TaskState.PAUSED, "", ""
    waiting = TaskState.RETRYING if task.created else TaskState.CREATING
    source = world.sources.get(task.spec.source_id)
    work = world.work[task.uid]
    if source is not None and source.reason:
        return waiting, source.reason, source.message
    if not task.probed or not _settled(world, task):
        if task.baseline is None:
            return waiting, "READING_CATALOGUE", "Reading the source's metadata."
        if not world.alive():
            return waiting, "NO_REPLICATOR", "No replicator is connected; start one."
        if work.reason:
            return waiting, work.reason, work.message
        if wrong := failing(world, task):
            return waiting, "HOLD_FAILING", wrong
        if not task.created:
            reason = "PROBING" if not task.probed else "RESOLVING"
            return waiting, reason, "A replicator is looking at queue and sink."
    return _running(world, task)


def _running(world: World, task: TaskRecord) -> tuple[TaskState, str, str]:
    standing, records = world.standing[task.uid], world.collections[task.uid]
    if len(standing.failed) < len(records) and not world.alive():
        return TaskState.RETRYING, "NO_REPLICATOR", "No replicator is connected; start one."
    if (record := first(records, standing.retrying)) is not None:
        _, reason, message = collection_status(world, record)
        return TaskState.RETRYING, reason, f"{record.source_name}: {message}"
    key = metadata_assignment_id(task.uid)
    seen = world.observed.get(key)
    if not metadata_wanted(world, task) and seen and seen.state is ReportedState.RETRYING:
        return TaskState.RETRYING, seen.reason, seen.message
    if (record := first(records, standing.failed)) is not None:
        assert record.failure is not None
        return (
            TaskState.RUNNING,
            "COLLECTIONS_FAILED",
            f"{len(standing.failed)} failed, {record.source_name} first: {record.failure.message} "
            "Retry or resync leads out; the others go on.",
        )
    failure = world.metadata[task.uid].failure
    if failure is not None:
        return TaskState.RUNNING, failure.reason, f"Databases: {failure.message}"
    return TaskState.RUNNING, "", ""


@dataclass(frozen=True, slots=True)
class TaskTotals:
    """Sums over a task's collections; `lag_ms` -1 before the first checkpoint."""

    collections: int = 0
    running: int = 0
    failed: int = 0
    lag_ms: int = -1
    counters: Counters = NO_ROWS


def task_totals(world: World, uid: str) -> TaskTotals:
    standing, observed = world.standing.get(uid) or Standing(), world.observed
    lags = [observed[key].lag_ms for keys in standing.running.values() for key in keys]
    return TaskTotals(
        len(world.collections[uid]),
        len(standing.running),
        len(standing.failed),
        max(lags, default=-1),
        world.rows.of(uid),
    )


@dataclass(frozen=True, slots=True)
class CollectionView:
    record: CollectionRecord
    progress: CollectionProgress
    status: Status
    grant: Grant
    observed: Observed
    lag_ms: int
    parts: tuple[Grant, ...] = ()
    """While it is held in parts."""


def collection_view(world: World, record: CollectionRecord) -> CollectionView:
    key = record.assignment_id
    keys = shown_as(world, world.tasks[record.task_uid], record)
    parts = tuple(world.grants.get(part) or Grant(part) for part in keys) if keys != (key,) else ()
    return CollectionView(
        record,
        world.progress[key],
        collection_status(world, record),
        world.grants.get(key) or Grant(key),
        world.seen(keys[0]),
        lag_ms(world, record),
        parts,
    )
