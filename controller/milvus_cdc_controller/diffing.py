"""DiffTask: have a replicator look at the sink, and pass on what differs, rows aside.

Law: nothing is changed by it, and nothing has to replicate for it: a paused or failed task can be
looked at too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from milvuscdc.v1 import diff_pb2, task_pb2
from milvuscdc.v1 import replication_service_pb2 as stream_pb
from milvuscdc.v1 import task_service_pb2 as pb

from milvus_cdc_controller.asking import events
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.specs import carry_message, collection_spec, metadata_spec
from milvus_cdc_controller.verification import check_comparable, chosen

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop


async def diff(
    loop: ControlLoop, task: TaskRecord, request: pb.DiffTaskRequest
) -> AsyncIterator[pb.DiffTaskResponse]:
    check_comparable(task, "which has none of what diff looks at")
    job = _job(loop, task, list(request.collections))
    verdict = diff_pb2.DiffVerdict(collections=len(job.collections))
    payload = jobs.DiffJob(task.spec.source, job.SerializeToString())
    asked = events(loop, payload, task.spec.replicator_labels, jobs.DiffEvent)
    async with aclosing(asked) as told:
        async for body in told:
            update = stream_pb.DiffUpdate.FromString(body)
            match update.WhichOneof("event"):
                case "progress":
                    yield pb.DiffTaskResponse(progress=update.progress)
                case "difference":
                    verdict.differences += 1
                    yield pb.DiffTaskResponse(difference=update.difference)
                case _:
                    pass
    yield pb.DiffTaskResponse(verdict=verdict)


def _job(loop: ControlLoop, task: TaskRecord, names: list[str]) -> stream_pb.DiffJob:
    world = loop.controller.world
    job = stream_pb.DiffJob(
        source=task_pb2.Source.FromString(task.spec.source),
        sink=task_pb2.Sink.FromString(task.spec.sink),
        collections=[
            collection_spec(record, world.progress[record.assignment_id])
            for record in chosen(loop, task, names)
        ],
        carry=carry_message(task.spec.carry),
    )
    if not names:
        job.metadata.CopyFrom(metadata_spec(world.metadata[task.uid], task.spec.carry))
    return job
