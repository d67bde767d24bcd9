"""VerifyTask: wait until the sink has passed the source's time, have a replicator compare, give
the verdict.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from milvuscdc.v1 import replication_service_pb2, task_pb2, verify_pb2
from milvuscdc.v1 import task_service_pb2 as pb

from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.asking import events, single
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.collection import CollectionRecord, CollectionState
from milvus_cdc_controller.core.mapping import split
from milvus_cdc_controller.core.status import collection_status, rename_pending
from milvus_cdc_controller.core.task import TaskRecord, TaskState

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

MAX_DIFFERENCES = 10
LOOK_SECONDS = 0.2
SAY_EVERY = 10
NAMED_LOOKS = 150
_STOPPED = (CollectionState.FAILED, CollectionState.PAUSED)


def check_comparable(task: TaskRecord, why: str) -> None:
    """Raises ApiError SINK_NOT_COMPARABLE unless the sink is a Milvus."""
    kind = task_pb2.Sink.FromString(task.spec.sink).WhichOneof("kind")
    if kind != "milvus":
        raise ApiError(
            "FAILED_PRECONDITION",
            "SINK_NOT_COMPARABLE",
            f"{task.spec.name} writes to {kind}, {why}; it compares two Milvus.",
            field="sink",
        )


async def verify(
    loop: ControlLoop, task: TaskRecord, request: pb.VerifyTaskRequest
) -> AsyncIterator[pb.VerifyTaskResponse]:
    records = chosen(loop, task, list(request.collections))
    check_comparable(task, "which verify cannot read")
    if not task_pb2.Source.FromString(task.spec.source).HasField("milvus"):
        raise ApiError(
            "FAILED_PRECONDITION",
            "SOURCE_API_MISSING",
            f"{task.spec.name} has no source.milvus; verify compares through the public APIs.",
            field="source.milvus",
        )
    if task.state in (TaskState.PAUSED, TaskState.FAILED, TaskState.DELETING):
        raise ApiError(
            "FAILED_PRECONDITION",
            f"TASK_{task.state}",
            f"{task.spec.name} does not replicate ({task.state.lower()}), so its sink would never "
            "be in step; resume or retry it first.",
        )
    if not records:
        yield pb.VerifyTaskResponse(verdict=verify_pb2.VerifyVerdict(equal=True))
        return
    yield _waiting()
    source_ts = await _source_ts(loop, task, records)
    async for event in _until_passed(loop, task, records, source_ts):
        yield event
    await _until_named(loop, task, records)
    targets = tuple(
        jobs.VerifyTarget(
            split(_now(loop, record).source_name), split(_now(loop, record).now_at_sink)
        )
        for record in records
    )
    job = jobs.VerifyJob(
        task.spec.source, task.spec.sink, targets, request.max_differences or MAX_DIFFERENCES
    )
    async for event in _compare(loop, job, task.spec.replicator_labels):
        yield event


def chosen(loop: ControlLoop, task: TaskRecord, names: list[str]) -> list[CollectionRecord]:
    """The collections of a task that are followed, or those named. Raises ApiError."""
    records = [
        record
        for record in loop.controller.world.collections[task.uid].values()
        if not record.dropping and not record.deselected
    ]
    if not names:
        return records
    chosen = []
    for name in dict.fromkeys(names):
        found = [record for record in records if record.source_name == name]
        if not found:
            raise ApiError(
                "NOT_FOUND",
                "COLLECTION_NOT_FOUND",
                f"{task.spec.name} follows no collection {name!r}.",
                field="collections",
            )
        chosen.extend(found)
    return chosen


async def _source_ts(loop: ControlLoop, task: TaskRecord, records: list[CollectionRecord]) -> int:
    """The source's time now: rows acknowledged before are at or below it."""
    logs = tuple(sorted({v.pchannel for record in records for v in record.want.vchannels}))
    resolve = jobs.ResolveJob(task.spec.source, logs)
    result = await single(loop, resolve, task.spec.replicator_labels)
    if not isinstance(result, jobs.ResolveDone):
        raise ApiError("INTERNAL", "BAD_JOB_RESULT", "A resolve job answered with something else.")
    if not result.source_ts:
        raise ApiError(
            "UNAVAILABLE", "SOURCE_TIME_UNKNOWN", "The source did not tell its time; try again."
        )
    return result.source_ts


def _now(loop: ControlLoop, record: CollectionRecord) -> CollectionRecord:
    """The record as it is by now; it may be gone."""
    loop.check()
    records = loop.controller.world.collections.get(record.task_uid, {})
    now = records.get(record.collection_id)
    if now is None:
        raise ApiError(
            "FAILED_PRECONDITION",
            "COLLECTION_GONE",
            f"{record.source_name} is no longer followed; verify again.",
        )
    return now


async def _until_passed(
    loop: ControlLoop, task: TaskRecord, records: list[CollectionRecord], source_ts: int
) -> AsyncIterator[pb.VerifyTaskResponse]:
    looks = 0
    while True:
        behind = 0
        for record in records:
            now = _now(loop, record)
            state, reason, message = collection_status(loop.controller.world, now)
            if state in _STOPPED:
                raise ApiError(
                    "FAILED_PRECONDITION",
                    f"COLLECTION_{state}",
                    f"{now.source_name} does not replicate ({reason or state}): "
                    f"{message or 'resume it first'}",
                    metadata={"collection": now.source_name},
                )
            progress = loop.controller.world.progress[now.assignment_id]
            behind += progress.resolved_ts < source_ts and not progress.closed
            # What is written once more is older than the checkpoint until that is reached again.
            behind += progress.recount is not None and progress.recount.again
        if not behind:
            return
        if looks % SAY_EVERY == 0:
            yield _waiting()
        looks += 1
        await asyncio.sleep(LOOK_SECONDS)


async def _until_named(
    loop: ControlLoop, task: TaskRecord, records: list[CollectionRecord]
) -> None:
    """Names that are on their way arrive first: a comparison of many rows looks for each by its
    name. What is held up for longer is compared under the name that it has.
    """
    world = loop.controller.world
    for _ in range(NAMED_LOOKS if task.spec.carry.schema else 0):
        if not any(rename_pending(world, _now(loop, record)) for record in records):
            return
        await asyncio.sleep(LOOK_SECONDS)


def _waiting() -> pb.VerifyTaskResponse:
    return pb.VerifyTaskResponse(progress=verify_pb2.VerifyProgress(phase="WAITING_FOR_SINK"))


async def _compare(
    loop: ControlLoop, job: jobs.VerifyJob, labels: tuple[tuple[str, str], ...]
) -> AsyncIterator[pb.VerifyTaskResponse]:
    verdict = verify_pb2.VerifyVerdict(equal=True, collections=len(job.targets))
    compared = 0
    async with aclosing(events(loop, job, labels, jobs.VerifyEvent)) as told:
        async for body in told:
            update = replication_service_pb2.VerifyUpdate.FromString(body)
            match update.WhichOneof("event"):
                case "progress":
                    yield pb.VerifyTaskResponse(progress=update.progress)
                case "difference":
                    yield pb.VerifyTaskResponse(difference=update.difference)
                case "collection":
                    compared += 1
                    verdict.collections_equal += update.collection.equal
                    verdict.rows_compared += update.collection.rows_source
                    yield pb.VerifyTaskResponse(collection=update.collection)
                case _:
                    pass
    verdict.equal = verdict.collections_equal == verdict.collections == compared
    yield pb.VerifyTaskResponse(verdict=verdict)
