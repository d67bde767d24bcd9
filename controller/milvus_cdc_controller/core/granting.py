"""One assignment given, changed and taken back.

Laws: an assignment changes hands only when its owner has released it or the owner's lease has
certainly ended; every new owner gets a new epoch, saved before it hears of it.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import split_assignment_id

from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.effects import Assign, Revoke
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.recount import owner_begins
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def wanted(task: TaskRecord, record: CollectionRecord) -> str:
    """Empty when the collection should be running; else why not."""
    if task.deleting:
        return "DELETING"
    if task.failure is not None:
        return "TASK_FAILED"
    if task.paused:
        return "PAUSED"
    if not task.probed:
        return "NOT_PROBED"
    if record.deselected:
        return "DESELECTED"
    if record.failure is not None:
        return "FAILED"
    if record.resync:
        return "RESYNC"
    if not record.started:
        return "WAITING_FOR_START"
    if not record.holds_name:
        return "WAITING_FOR_NAME"
    return ""


def metadata_wanted(world: World, task: TaskRecord) -> str:
    if not task.active:
        return "DELETING" if task.deleting else "PAUSED" if task.paused else "TASK_FAILED"
    metadata = world.metadata[task.uid]
    if not task.probed:
        return "NOT_PROBED"
    if metadata.failure is not None:
        return "FAILED"
    if not metadata.version:
        return "EMPTY"
    return ""


def send_assign(world: World, grant: Grant) -> None:
    """The whole resource to its owner, if it is connected."""
    session = world.owner(grant)
    if session is None or not session.stream:
        return
    uid, _ = split_assignment_id(grant.assignment_id)
    task = world.tasks[uid]
    record = world.record_of(grant.assignment_id)
    observed = world.seen(grant.assignment_id)
    if record is None:
        metadata = world.metadata[uid]
        observed.sent_version = metadata.version
        message = Assign(
            grant.assignment_id, grant.epoch, metadata.version, task, metadata=metadata
        )
    else:
        observed.sent_version = record.version
        message = Assign(
            grant.assignment_id,
            grant.epoch,
            record.version,
            task,
            collection=record,
            progress=world.progress[record.assignment_id],
        )
    world.send(session.stream, message)


def revoke(world: World, grant: Grant, reason: str) -> None:
    """Asks the owner to let go; once per epoch and stream. The grant stays until it does or its
    lease ends.
    """
    observed = world.seen(grant.assignment_id)
    if observed.revoking:
        return
    observed.revoking = reason
    world.touch_one(grant.assignment_id)
    session = world.owner(grant)
    if session is not None:
        world.send(session.stream, Revoke(grant.assignment_id, grant.epoch, reason))


def let_go(world: World, grant: Grant) -> None:
    """Nobody holds it any more; the epoch stays spent."""
    world.put_grant(replace(grant, owner="", instance=""))


def give(world: World, assignment_id: str, session: Session) -> None:
    """A new owner: next epoch, saved, then sent."""
    old = world.grants.get(assignment_id) or Grant(assignment_id)
    assert not old.instance, "an assignment has one owner"
    grant = Grant(assignment_id, old.epoch + 1, session.name, session.instance, world.now.wall_ms)
    world.put_grant(grant)
    owner_begins(world, assignment_id)
    send_assign(world, grant)


def is_held(world: World, assignment_id: str) -> bool:
    grant = world.grants.get(assignment_id)
    return grant is not None and bool(grant.instance)
