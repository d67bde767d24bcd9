"""SetTaskPositions: wishes become places, a replicator examines them, the core sets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milvus_cdc.model import ms_to_tso
from milvuscdc.v1 import sink_kafka_pb2, task_pb2
from milvuscdc.v1 import task_service_pb2 as pb

from milvus_cdc_controller import clock
from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.asking import single
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.effects import Refusal
from milvus_cdc_controller.core.positions import by_vchannel, refuse_place, refuse_task
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.loop import Refused
from milvus_cdc_controller.verification import chosen

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

MESSAGES_MAX = 5


async def set_positions(
    loop: ControlLoop, task: TaskRecord, request: pb.SetTaskPositionsRequest
) -> tuple[TaskRecord | None, tuple[jobs.Located, ...]]:
    """The task as it is now, and the places as set (or as they would be)."""
    world = loop.controller.world
    if request.etag and request.etag != task.etag:
        raise ApiError(
            "ABORTED",
            "ETAG_MISMATCH",
            f"{task.spec.name} has changed since it was read; get it again and repeat.",
            field="etag",
        )
    _refuse(refuse_task(world, task))
    if await _sink_holds_them(loop, task):
        raise ApiError(
            "FAILED_PRECONDITION",
            "SINK_HOLDS_CHECKPOINTS",
            f"{task.spec.name}'s sink stores its positions together with the rows, so that each "
            "change takes effect once; they cannot be set. `milvus-cdc task resync` begins anew.",
            field="sink",
        )
    if request.WhichOneof("to") == "positions":
        targets = _by_place(loop, task, request)
    else:
        targets = _by_time(loop, task, request)
    if not targets:
        return task, ()
    locate = jobs.LocateJob(task.spec.source, targets)
    result = await single(loop, locate, task.spec.replicator_labels)
    if not isinstance(result, jobs.LocateDone) or len(result.located) != len(targets):
        raise ApiError("INTERNAL", "BAD_JOB_RESULT", "A locate job answered with something else.")
    bad = [place for place in result.located if place.reason]
    if bad:
        said = "; ".join(f"{place.vchannel}: {place.message}" for place in bad[:MESSAGES_MAX])
        more = f"; and {len(bad) - MESSAGES_MAX} more" if len(bad) > MESSAGES_MAX else ""
        raise ApiError(
            "FAILED_PRECONDITION",
            bad[0].reason,
            f"Nothing was set, for {len(bad)} of {len(targets)} places are not good: {said}{more}.",
            field="positions",
            metadata={"vchannel": bad[0].vchannel},
        )
    if request.validate_only:
        return task, result.located
    # What was examined is set only if the task is still the one that was looked at.
    set_task = await loop.call(
        lambda at, call: ev.SetPositions(at, call, task.spec.name, task.etag, result.located)
    )
    return set_task, result.located


def holds_checkpoints(sink: task_pb2.Sink) -> bool:
    """The sink's own checkpoints count, so far as its kind tells; of a plugin nobody knows."""
    match sink.WhichOneof("kind"):
        case "kafka":
            return sink.kafka.delivery == sink_kafka_pb2.KAFKA_DELIVERY_EXACTLY_ONCE
        case "files" | "postgres":
            return True
        case _:
            return False


async def _sink_holds_them(loop: ControlLoop, task: TaskRecord) -> bool:
    sink = task_pb2.Sink.FromString(task.spec.sink)
    if sink.WhichOneof("kind") != "plugin":
        return holds_checkpoints(sink)
    # Only who has it installed knows.
    probe = jobs.ProbeJob(task.spec.source, task.spec.sink)
    result = await single(loop, probe, task.spec.replicator_labels)
    return isinstance(result, jobs.ProbeDone) and result.sink_holds_checkpoints


def _refuse(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise Refused(refusal)


def _by_place(
    loop: ControlLoop, task: TaskRecord, request: pb.SetTaskPositionsRequest
) -> tuple[jobs.LocateTarget, ...]:
    if request.collections:
        raise ApiError(
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "collections: goes with `at`; a list of positions names its vchannels itself",
            field="collections",
        )
    records = by_vchannel(loop.controller.world, task)
    targets: dict[str, jobs.LocateTarget] = {}
    for position in request.positions.positions:
        record = records.get(position.vchannel)
        _refuse(refuse_place(record, task, position.vchannel))
        assert record is not None
        if position.vchannel in targets:
            raise ApiError(
                "INVALID_ARGUMENT",
                "VCHANNEL_TWICE",
                f"{position.vchannel} has two positions; give one.",
                field="positions",
            )
        pchannels = {v.vchannel: v.pchannel for v in record.want.vchannels}
        targets[position.vchannel] = jobs.LocateTarget(
            position.vchannel,
            pchannels[position.vchannel],
            position.read_from,
            position.resolved_ts,
        )
    return tuple(targets.values())


def _by_time(
    loop: ControlLoop, task: TaskRecord, request: pb.SetTaskPositionsRequest
) -> tuple[jobs.LocateTarget, ...]:
    at_ms = request.at.ToMilliseconds()
    if at_ms > clock.now().wall_ms:
        raise ApiError(
            "INVALID_ARGUMENT",
            "TIME_IN_FUTURE",
            f"{request.at.ToJsonString()} is still to come.",
            field="at",
        )
    targets: list[jobs.LocateTarget] = []
    ts = max(ms_to_tso(at_ms + 1) - 1, 0)
    for record in chosen(loop, task, list(request.collections)):
        for vchannel in record.want.vchannels:
            _refuse(refuse_place(record, task, vchannel.vchannel))
            if ts < record.want.create_ts:
                # From its beginning: nothing of it is older.
                target = jobs.LocateTarget(
                    vchannel.vchannel, vchannel.pchannel, vchannel.start_position
                )
            else:
                target = jobs.LocateTarget(vchannel.vchannel, vchannel.pchannel, ts=ts)
            targets.append(target)
    return tuple(targets)
