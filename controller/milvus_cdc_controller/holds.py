"""Holds shown and removed for people: the stored ones, and what else is found at a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milvuscdc.v1 import hold_pb2 as pb
from milvuscdc.v1 import task_pb2

from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.asking import outcome
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.hold import HoldRecord
from milvus_cdc_controller.core.holding import users
from milvus_cdc_controller.core.jobs import HoldDone, HoldJob, HoldPlace, HoldSeen, JobFailed
from milvus_cdc_controller.core.world import World
from milvus_cdc_controller.present import timestamp

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

LOOK_SECONDS = 30.0
_Way = tuple[bytes, tuple[tuple[str, str], ...]]
"""The source, and the labels that a replicator needs to reach it."""


async def list_holds(loop: ControlLoop, request: pb.ListHoldsRequest) -> list[pb.Hold]:
    """Raises ApiError for a queue that cannot be looked at."""
    way = _way(loop, request.task, request.source if request.HasField("source") else None)
    found = (await _run(loop, way, look=True)).found if way is not None else ()
    world = loop.controller.world
    known = world.holds.records
    shown = [_known(world, record) for record in known.values()]
    shown += [_orphan(seen) for seen in found if f"{seen.name}/{seen.pchannel}" not in known]
    return sorted(shown, key=lambda hold: hold.name)


async def delete_hold(loop: ControlLoop, request: pb.DeleteHoldRequest) -> None:
    """Raises ApiError for one that is in use, or cannot be reached."""
    world = loop.controller.world
    key = request.name.partition("/")[2]
    record = world.holds.records.get(key)
    if record is not None:
        if not record.releasing:
            names = ", ".join(task.spec.name for task in users(world, record))
            raise ApiError(
                "FAILED_PRECONDITION",
                "HOLD_IN_USE",
                f"{request.name} keeps the log for {names or 'a task that has just gone'}; it goes "
                "with the last task that reads it.",
                field="name",
            )
        if not request.forget:
            raise ApiError(
                "FAILED_PRECONDITION",
                "HOLD_RELEASING",
                f"{request.name} is being removed already. If its queue is gone for good, forget "
                "it.",
                field="forget",
            )
        await loop.call(lambda at, call: ev.ForgetHold(at, call, key))
        return
    way = _way(loop, request.task, request.source if request.HasField("source") else None)
    if way is None:
        raise ApiError(
            "NOT_FOUND",
            "HOLD_NOT_FOUND",
            f"This controller has no {request.name}. For an orphan, name a task or a source whose "
            "queue it is at.",
            field="name",
        )
    name, _, pchannel = key.partition("/")
    done = await _run(loop, way, HoldPlace(pchannel, name, release=True))
    for seen in done.places:
        if seen.reason:
            raise ApiError("FAILED_PRECONDITION", seen.reason, seen.message, field="name")


def _way(loop: ControlLoop, task: str, source: task_pb2.Source | None) -> _Way | None:
    world = loop.controller.world
    if task:
        uid = world.uid_by_name.get(task)
        if uid is None:
            raise ApiError("NOT_FOUND", "TASK_NOT_FOUND", f"There is no {task}.", field="task")
        spec = world.tasks[uid].spec
        source, labels = task_pb2.Source.FromString(spec.source), spec.replicator_labels
    else:
        labels = ()
    if source is None:
        return None
    if source.WhichOneof("queue") != "pulsar":
        raise ApiError(
            "INVALID_ARGUMENT",
            "NO_HOLDS",
            "Only a log on Pulsar is held; the other queues keep what their limits say.",
            field="task" if task else "source.pulsar",
        )
    return source.SerializeToString(deterministic=True), labels


async def _run(loop: ControlLoop, way: _Way, *places: HoldPlace, look: bool = False) -> HoldDone:
    source, labels = way
    late = JobFailed("HOLD_TIMEOUT", f"The queue did not answer within {LOOK_SECONDS:.0f} s.")
    job = HoldJob(source, places, look)
    result = await outcome(loop, job, labels, seconds=LOOK_SECONDS, late=late)
    if isinstance(result, HoldDone):
        return result
    assert isinstance(result, JobFailed)
    raise ApiError("FAILED_PRECONDITION", result.reason, result.message)


def _known(world: World, record: HoldRecord) -> pb.Hold:
    seen = world.holds.seen.get(record.key, HoldSeen(record.pchannel, record.name))
    state = pb.HOLD_STATE_RELEASING
    if not record.releasing:
        made = record.key in world.holds.made
        state = pb.HOLD_STATE_KEPT if made else pb.HOLD_STATE_MAKING
    return pb.Hold(
        name=f"holds/{record.key}",
        state=state,
        tasks=sorted(task.spec.name for task in users(world, record)),
        backlog_entries=seen.backlog_entries,
        backlog_bytes=seen.backlog_bytes,
        reason=seen.reason,
        message=seen.message,
        create_time=timestamp(record.create_time_ms),
    )


def _orphan(seen: HoldSeen) -> pb.Hold:
    return pb.Hold(
        name=f"holds/{seen.name}/{seen.pchannel}",
        state=pb.HOLD_STATE_ORPHAN,
        backlog_entries=seen.backlog_entries,
        backlog_bytes=seen.backlog_bytes,
        message="Not of this controller: left over, or kept by another installation.",
    )
