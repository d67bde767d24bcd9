"""TaskService: what users and programs ask for."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from milvus_cdc.errors import CdcError
from milvus_cdc.model import Catalogue, Collection, ObjectState
from milvus_cdc.trust import caller
from milvuscdc.v1 import task_pb2
from milvuscdc.v1 import task_service_pb2 as pb
from milvuscdc.v1 import task_service_pb2_grpc as rpc

from milvus_cdc_controller import clock, present
from milvus_cdc_controller.api_errors import ApiError, streaming, unary
from milvus_cdc_controller.asking import outcome
from milvus_cdc_controller.catalogues import Catalogues
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.admission import check_create, find_repeated
from milvus_cdc_controller.core.collection import named
from milvus_cdc_controller.core.mapping import sink_name
from milvus_cdc_controller.core.task import TaskRecord, TaskSpec
from milvus_cdc_controller.diffing import diff
from milvus_cdc_controller.pages import page
from milvus_cdc_controller.sealing import Seals
from milvus_cdc_controller.setting_positions import set_positions
from milvus_cdc_controller.specs import planned_spec
from milvus_cdc_controller.validation import (
    check,
    check_batching,
    check_globs,
    check_limits,
    check_split,
    check_task_part,
    check_update,
)
from milvus_cdc_controller.validation import (
    check_create as check_create_request,
)
from milvus_cdc_controller.verification import verify
from milvus_cdc_controller.watch import WatchHub

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

PROBE_SECONDS = 10.0
REACHED_SECONDS = 30.0
"""So long a queue and a sink that a replicator has reached need no other look for the next task."""
PLANNED_AT_ONCE = 500
"""Collections told to a replicator in one probe: a message stays far below gRPC's limits."""


class TaskService(rpc.TaskServiceServicer):
    def __init__(
        self, loop: ControlLoop, catalogues: Catalogues, hub: WatchHub, seals: Seals
    ) -> None:
        self._loop = loop
        self._catalogues = catalogues
        self._hub = hub
        self._seals = seals
        self._reached: dict[tuple[bytes, bytes], float] = {}

    @unary
    async def CreateTask(self, request: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        check_create_request(request)
        uid = str(uuid.uuid4())
        fingerprint = self._fingerprint(request.task)
        self._seals.seal_task(request.task, uid)  # nothing below holds a secret in clear
        spec = present.task_spec(request.task)
        creator = caller.current().name

        def command(probed: bool, at: ev.Instant, call: int) -> ev.CreateTask:
            return ev.CreateTask(
                at,
                call,
                uid,
                spec,
                request.request_id,
                fingerprint,
                probed,
                request.validate_only,
                creator,
            )

        world = self._loop.controller.world
        draft = command(False, clock.now(), 0)
        probed = False
        # A repeated or refused request must not wait for other machines.
        if find_repeated(world, draft) is None and check_create(world, draft) is None:
            probed = await self._look(request)
        task = await self._loop.call(lambda at, call: command(probed, at, call))
        return pb.CreateTaskResponse(task=self._message(task))

    def _fingerprint(self, task: task_pb2.Task) -> str:
        marked = task_pb2.Task()
        marked.CopyFrom(task)
        self._seals.mark_literals(marked)
        return present.fingerprint(marked)

    async def _look(self, request: pb.CreateTaskRequest) -> bool:
        """Reads the source's metadata, has a replicator reach queue and sink; False when none is
        there.
        """
        source = request.task.source.SerializeToString(deterministic=True)
        sink = request.task.sink.SerializeToString(deterministic=True)
        now = time.monotonic()
        self._reached = {at: until for at, until in self._reached.items() if until > now}
        known = (source, sink) in self._reached and not request.task.HasField("dead_letters")
        if known and not request.validate_only:
            return True
        try:
            catalogue = await self._catalogues.probe(request.task.source)
        except CdcError as error:
            raise ApiError(
                "FAILED_PRECONDITION", error.reason, error.message, field=error.field
            ) from error
        planned = _planned(present.task_spec(request.task), catalogue)
        # A task that is really wanted begins with what the sink can hold; the rest FAILS by itself.
        asked = planned if request.validate_only else []
        for first in range(0, max(1, len(asked)), PLANNED_AT_ONCE):
            probe = jobs.ProbeJob(
                source,
                sink,
                tuple(map(planned_spec, asked[first : first + PLANNED_AT_ONCE])),
                present.carry(request.task.carry).index,
                present.dead_letters(request.task),
            )
            labels = present.task_spec(request.task).replicator_labels
            if not await self._probe(probe, labels, required=request.validate_only):
                return False
        self._reached[source, sink] = time.monotonic() + REACHED_SECONDS
        return True

    async def _probe(
        self, probe: jobs.ProbeJob, labels: tuple[tuple[str, str], ...], *, required: bool
    ) -> bool:
        """False when no replicator is there and none is `required`."""
        late = jobs.JobFailed(
            "PROBE_TIMEOUT",
            f"Queue and sink did not answer within {PROBE_SECONDS:.0f} s; check their "
            "addresses as the replicator sees them.",
        )
        result = await outcome(self._loop, probe, labels, seconds=PROBE_SECONDS, late=late)
        if not isinstance(result, jobs.JobFailed):
            return True
        if result.reason in ("NO_REPLICATOR", "REPLICATOR_LOST") and not required:
            return False
        field = f"task.{result.field}" if result.field else ""
        raise ApiError("FAILED_PRECONDITION", result.reason, result.message, field=field)

    @unary
    async def GetTask(self, request: pb.GetTaskRequest) -> pb.GetTaskResponse:
        check(request)
        return pb.GetTaskResponse(task=self._message(self._find(request.name)))

    @unary
    async def ListTasks(self, request: pb.ListTasksRequest) -> pb.ListTasksResponse:
        check(request)
        states = set(request.states)
        labels = set(request.labels.items())
        tasks = (
            task
            for task in self._loop.controller.world.tasks.values()
            if (not states or present.TASK_STATES[task.state] in states)
            and labels <= set(task.spec.labels)
        )
        shown, token = page(
            tasks,
            lambda task: task.spec.name,
            request.page_size,
            request.page_token,
            sorted(states),
            sorted(labels),
        )
        return pb.ListTasksResponse(
            tasks=[self._message(task) for task in shown], next_page_token=token
        )

    @unary
    async def UpdateTask(self, request: pb.UpdateTaskRequest) -> pb.UpdateTaskResponse:
        with_labels, with_selection = check_update(request)
        current = self._find(request.task.name)
        whole = self._message(current)
        if with_labels:
            whole.labels.clear()
            whole.labels.update(request.task.labels)
            check_task_part(whole, "labels")
        if with_selection:
            paths = set(request.update_mask.paths)
            if paths & {"selection", "selection.include"}:
                whole.selection.include[:] = request.task.selection.include
            if paths & {"selection", "selection.exclude"}:
                whole.selection.exclude[:] = request.task.selection.exclude
            check_task_part(whole, "selection")
            check_globs(whole)
        paths = set(request.update_mask.paths)
        with_carry = _take_over(request.task.carry, whole.carry, paths, "carry")
        if "drift" in paths:
            whole.drift = request.task.drift
            check_task_part(whole, "drift")
        with_batching = _take_over(request.task.batching, whole.batching, paths, "batching")
        if with_batching:
            check_task_part(whole, "batching")
            check_batching(whole)
        with_limits = _take_over(request.task.limits, whole.limits, paths, "limits")
        if with_limits:
            check_task_part(whole, "limits")
            check_limits(whole)
        with_letters = "dead_letters" in paths
        if with_letters:
            whole.ClearField("dead_letters")
            if request.task.HasField("dead_letters"):
                whole.dead_letters.CopyFrom(request.task.dead_letters)
                check_task_part(whole, "dead_letters")
                self._seals.seal_dead_letters(
                    whole.dead_letters, current.spec.dead_letters, current.uid
                )
                probe = jobs.ProbeJob(b"", b"", dead_letters=present.dead_letters(whole))
                places = tuple(whole.replicator_labels.items())
                await self._probe(probe, places, required=request.validate_only)
        with_places = "replicator_labels" in paths
        if with_places:
            whole.replicator_labels.clear()
            whole.replicator_labels.update(request.task.replicator_labels)
            check_task_part(whole, "replicator_labels")
        with_split = _take_over(request.task.split, whole.split, paths, "split")
        if with_split:
            check_task_part(whole, "split")
            check_split(whole)
        task = await self._loop.call(
            lambda at, call: ev.UpdateTask(
                at,
                call,
                request.task.name,
                # A part of the selection was joined with the task as just read.
                request.task.etag or current.etag,
                tuple(sorted(whole.labels.items())) if with_labels else None,
                present.selection(whole.selection) if with_selection else None,
                request.validate_only,
                present.carry(whole.carry) if with_carry else None,
                present.drift(whole.drift) if "drift" in paths else None,
                present.batching(whole.batching) if with_batching else None,
                present.limits(whole) if with_limits else None,
                present.dead_letters(whole) if with_letters else None,
                tuple(sorted(whole.replicator_labels.items())) if with_places else None,
                whole.split.max_parts if with_split else None,
            )
        )
        return pb.UpdateTaskResponse(task=self._message(task))

    @unary
    async def PauseTask(self, request: pb.PauseTaskRequest) -> pb.PauseTaskResponse:
        check(request)
        task = await self._loop.call(
            lambda at, call: ev.PauseTask(at, call, request.name, request.etag)
        )
        return pb.PauseTaskResponse(task=self._message(task))

    @unary
    async def ResumeTask(self, request: pb.ResumeTaskRequest) -> pb.ResumeTaskResponse:
        check(request)
        task = await self._loop.call(
            lambda at, call: ev.ResumeTask(at, call, request.name, request.etag)
        )
        return pb.ResumeTaskResponse(task=self._message(task))

    @unary
    async def DeleteTask(self, request: pb.DeleteTaskRequest) -> pb.DeleteTaskResponse:
        check(request)
        await self._loop.call(
            lambda at, call: ev.DeleteTask(
                at, call, request.name, request.etag, request.allow_missing
            )
        )
        return pb.DeleteTaskResponse()

    @unary
    async def RetryTask(self, request: pb.RetryTaskRequest) -> pb.RetryTaskResponse:
        check(request)
        task = await self._loop.call(
            lambda at, call: ev.RetryTask(at, call, request.name, request.collection)
        )
        return pb.RetryTaskResponse(task=self._message(task))

    @unary
    async def ResyncCollection(
        self, request: pb.ResyncCollectionRequest
    ) -> pb.ResyncCollectionResponse:
        check(request)
        task = await self._loop.call(
            lambda at, call: ev.ResyncCollection(at, call, request.name, request.collection)
        )
        return pb.ResyncCollectionResponse(task=self._message(task))

    @streaming
    async def WatchTasks(
        self, request: pb.WatchTasksRequest
    ) -> AsyncIterator[pb.WatchTasksResponse]:
        check(request)
        async for event in self._hub.watch(request.revision, request.name):
            yield event

    @unary
    async def ListTaskCollections(
        self, request: pb.ListTaskCollectionsRequest
    ) -> pb.ListTaskCollectionsResponse:
        check(request)
        task = self._find(request.parent, field="parent")
        world = self._loop.controller.world
        shown, token = page(
            world.collections[task.uid].values(),
            lambda record: f"{record.source_name} {record.collection_id:020d}",
            request.page_size,
            request.page_token,
            request.parent,
        )
        return pb.ListTaskCollectionsResponse(
            collections=[present.collection_message(world, record) for record in shown],
            next_page_token=token,
        )

    @streaming
    async def VerifyTask(
        self, request: pb.VerifyTaskRequest
    ) -> AsyncIterator[pb.VerifyTaskResponse]:
        check(request)
        async for event in verify(self._loop, self._find(request.name), request):
            yield event

    @streaming
    async def DiffTask(self, request: pb.DiffTaskRequest) -> AsyncIterator[pb.DiffTaskResponse]:
        check(request)
        async for event in diff(self._loop, self._find(request.name), request):
            yield event

    @unary
    async def SetTaskPositions(
        self, request: pb.SetTaskPositionsRequest
    ) -> pb.SetTaskPositionsResponse:
        check(request)
        task, places = await set_positions(self._loop, self._find(request.name), request)
        return pb.SetTaskPositionsResponse(
            task=self._message(task),
            positions=[
                pb.VchannelPosition(
                    vchannel=place.vchannel,
                    read_from=place.read_from,
                    resolved_ts=place.resolved_ts,
                )
                for place in places
            ],
        )

    def _find(self, name: str, field: str = "name") -> TaskRecord:
        world = self._loop.controller.world
        uid = world.uid_by_name.get(name)
        if uid is None:
            raise ApiError("NOT_FOUND", "TASK_NOT_FOUND", f"There is no {name}.", field=field)
        return world.tasks[uid]

    def _message(self, task: TaskRecord | None) -> task_pb2.Task:
        assert task is not None
        world = self._loop.controller.world
        # The state may have moved since the command was decided; its own wish stands in both.
        newest = world.tasks.get(task.uid, task)
        return present.task_message(world, newest, self._loop.store_error)


def _take_over(given: Message, whole: Message, paths: set[str], name: str) -> bool:
    """Of a message of the task what the paths name; what is not given is cleared. Whether they name
    anything of it.
    """
    if name in paths:
        whole.CopyFrom(given)
        return True
    parts = [path.partition(".")[2] for path in paths if path.startswith(f"{name}.")]
    for part in parts:
        whole.ClearField(part)
        for field, value in given.ListFields():
            if field.name == part and field.message_type is not None:
                getattr(whole, part).CopyFrom(value)
            elif field.name == part:
                setattr(whole, part, value)
    return bool(parts)


def _planned(spec: TaskSpec, catalogue: Catalogue) -> list[Collection]:
    """What the task would bring to the sink now, under the names there."""
    return [
        named(collection, sink_name(spec.rename, collection.full_name))
        for collection in catalogue.collections
        if collection.state is ObjectState.CREATED and spec.selection.selects(collection.full_name)
    ]
