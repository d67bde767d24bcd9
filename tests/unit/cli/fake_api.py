"""An API server with just enough behind it to see what the command sends and shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from milvuscdc.v1 import (
    diff_pb2,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    hold_pb2,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
    verify_pb2,
)


async def refuse(
    context: Any, code: grpc.StatusCode, reason: str, message: str, field: str = ""
) -> None:
    details = []
    info = error_details_pb2.ErrorInfo(reason=reason, domain="milvuscdc.io", metadata={"k": "v"})
    details.append(any_pb2.Any())
    details[-1].Pack(info)
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(any_pb2.Any())
        details[-1].Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(code.name), message=message, details=details
    )
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, message, trailing_metadata=trailing)


class FakeTasks(task_service_pb2_grpc.TaskServiceServicer):
    def __init__(self) -> None:
        self.tasks: dict[str, task_pb2.Task] = {}
        self.requests: list[Any] = []
        self.fleet: FakeFleet
        self.fail_creates = 0
        self.equal = True
        self.watch_breaks = 0
        self.collections: list[task_pb2.TaskCollection] | None = None
        self.watch_break: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
        """How it breaks; None = as if it had come to its end."""

    async def CreateTask(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if self.fail_creates:
            self.fail_creates -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        if request.task.name in self.tasks:
            await refuse(
                context, grpc.StatusCode.ALREADY_EXISTS, "TASK_EXISTS", "it is there", "task.name"
            )
        task = task_pb2.Task()
        task.CopyFrom(request.task)
        task.state = task_pb2.TASK_STATE_RUNNING
        task.etag = "e1"
        if not request.validate_only:
            self.tasks[task.name] = task
        return task_service_pb2.CreateTaskResponse(task=task)

    async def _find(self, name: str, context: Any) -> task_pb2.Task:
        if name not in self.tasks:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND", f"no {name}")
        return self.tasks[name]

    async def GetTask(self, request: Any, context: Any) -> Any:
        return task_service_pb2.GetTaskResponse(task=await self._find(request.name, context))

    async def ListTasks(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        names = sorted(self.tasks)
        at = int(request.page_token or 0)
        token = str(at + 1) if at + 1 < len(names) else ""
        found = [self.tasks[name] for name in names[at : at + 1]]
        return task_service_pb2.ListTasksResponse(tasks=found, next_page_token=token)

    async def UpdateTask(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        task = await self._find(request.task.name, context)
        for path in request.update_mask.paths:
            if path == "labels":
                task.labels.clear()
                task.labels.update(request.task.labels)
        return task_service_pb2.UpdateTaskResponse(task=task)

    async def PauseTask(self, request: Any, context: Any) -> Any:
        task = await self._find(request.name, context)
        task.state = task_pb2.TASK_STATE_PAUSED
        return task_service_pb2.PauseTaskResponse(task=task)

    async def ResumeTask(self, request: Any, context: Any) -> Any:
        task = await self._find(request.name, context)
        task.state = task_pb2.TASK_STATE_RUNNING
        return task_service_pb2.ResumeTaskResponse(task=task)

    async def RetryTask(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return task_service_pb2.RetryTaskResponse(task=await self._find(request.name, context))

    async def DeleteTask(self, request: Any, context: Any) -> Any:
        await self._find(request.name, context)
        del self.tasks[request.name]
        return task_service_pb2.DeleteTaskResponse()

    async def ResyncCollection(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        task = await self._find(request.name, context)
        return task_service_pb2.ResyncCollectionResponse(task=task)

    async def SetTaskPositions(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        task = await self._find(request.name, context)
        return task_service_pb2.SetTaskPositionsResponse(
            task=task, positions=request.positions.positions
        )

    async def ListTaskCollections(self, request: Any, context: Any) -> Any:
        await self._find(request.parent, context)
        if self.collections is not None:
            return task_service_pb2.ListTaskCollectionsResponse(collections=self.collections)
        one = task_pb2.TaskCollection(
            database="default",
            collection="c",
            state=task_pb2.COLLECTION_STATE_FAILED,
            reason="LOG_TRUNCATED",
            message="resync it",
            rows_inserted=12,
        )
        return task_service_pb2.ListTaskCollectionsResponse(collections=[one])

    async def WatchTasks(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        event = task_service_pb2.WatchTasksResponse
        if not request.revision:
            for task in self.tasks.values():
                yield event(type=event.TYPE_ADDED, task=task, revision=5)
            yield event(type=event.TYPE_BOOKMARK, revision=5)
        if self.watch_breaks:
            self.watch_breaks -= 1
            if self.watch_break is None:
                return
            await context.abort(self.watch_break, "cut")
        task = task_pb2.Task(name="tasks/late", state=task_pb2.TASK_STATE_PAUSED)
        yield event(type=event.TYPE_MODIFIED, task=task, revision=6)
        await refuse(context, grpc.StatusCode.OUT_OF_RANGE, "REVISION_COMPACTED", "too old")

    async def DiffTask(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        await self._find(request.name, context)
        answer = task_service_pb2.DiffTaskResponse
        yield answer(progress=diff_pb2.DiffProgress(collections_done=1, collections_total=1))
        if not self.equal:
            yield answer(
                difference=diff_pb2.ObjectDifference(
                    action=diff_pb2.ObjectDifference.ACTION_DROP,
                    kind="index",
                    database="default",
                    collection="c",
                    name="odd",
                    detail="the source has no such index",
                )
            )
        yield answer(
            verdict=diff_pb2.DiffVerdict(collections=1, differences=0 if self.equal else 1)
        )

    async def VerifyTask(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        await self._find(request.name, context)
        answer = task_service_pb2.VerifyTaskResponse
        yield answer(progress=verify_pb2.VerifyProgress(phase="WAITING_FOR_SINK"))
        if not self.equal:
            yield answer(
                difference=verify_pb2.VerifyDifference(
                    collection="default.c",
                    partition="_default",
                    kind=verify_pb2.VerifyDifference.KIND_DIFFERENT,
                    key="7",
                    fields=["v"],
                )
            )
        yield answer(
            collection=verify_pb2.VerifyCollectionResult(
                collection="default.c",
                equal=self.equal,
                rows_source=10,
                rows_sink=10,
                different=0 if self.equal else 1,
            )
        )
        yield answer(
            verdict=verify_pb2.VerifyVerdict(
                equal=self.equal, collections=1, collections_equal=int(self.equal), rows_compared=10
            )
        )


class FakeFleet(fleet_service_pb2_grpc.FleetServiceServicer):
    def __init__(self, requests: list[Any]) -> None:
        self.requests = requests
        self.drain_ends_as = fleet_service_pb2.Drain.STATE_DONE

    def _one(self, **fields: Any) -> fleet_service_pb2.Replicator:
        alive = fleet_service_pb2.REPLICATOR_STATE_ALIVE
        return fleet_service_pb2.Replicator(
            **{"name": "replicators/r1", "state": alive, "version": "0.1.0", **fields}
        )

    async def CordonReplicator(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        one = self._one(cordoned=True)
        return fleet_service_pb2.CordonReplicatorResponse(replicator=one)

    async def UncordonReplicator(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return fleet_service_pb2.UncordonReplicatorResponse(replicator=self._one())

    async def DrainReplicator(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if request.name == "replicators/last":
            text = "would stop 2: a.b, a.c"
            code = grpc.StatusCode.FAILED_PRECONDITION
            await refuse(context, code, "NO_OTHER_REPLICATOR", text, "name")
        return fleet_service_pb2.DrainReplicatorResponse(replicator=self._one())

    async def CancelDrain(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return fleet_service_pb2.CancelDrainResponse(replicator=self._one())

    async def WatchReplicators(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        event, drain = fleet_service_pb2.WatchReplicatorsResponse, fleet_service_pb2.Drain
        running = drain(state=drain.STATE_RUNNING, total=3, left=2)
        yield event(type=event.TYPE_ADDED, replicator=self._one(drain=running))
        yield event(type=event.TYPE_BOOKMARK)
        left = 0 if self.drain_ends_as == drain.STATE_DONE else 1
        ended = drain(state=self.drain_ends_as, total=3, left=left)
        yield event(type=event.TYPE_MODIFIED, replicator=self._one(drain=ended))
        await refuse(context, grpc.StatusCode.OUT_OF_RANGE, "WATCH_TOO_OLD", "no more")

    async def MoveAssignment(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        one = fleet_service_pb2.AssignmentInfo(
            name=request.name, task="tasks/t", epoch=2, replicator="replicators/r0"
        )
        return fleet_service_pb2.MoveAssignmentResponse(assignment=one)

    async def RebalanceAssignments(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        plan = fleet_service_pb2.RebalancePlan()
        plan.moves.add(assignment="assignments/u.1", collection="a.b", to="replicators/r2")
        plan.loads.add(replicator="replicators/r2", before=0, after=1)
        return fleet_service_pb2.RebalanceAssignmentsResponse(plan=plan)

    async def ListReplicators(self, request: Any, context: Any) -> Any:
        return fleet_service_pb2.ListReplicatorsResponse(replicators=[self._one()])

    async def ListControllers(self, request: Any, context: Any) -> Any:
        one = fleet_service_pb2.Controller(
            name="controllers/7",
            role=fleet_service_pb2.CONTROLLER_ROLE_LEADER,
            address="10.0.0.1:7070",
        )
        return fleet_service_pb2.ListControllersResponse(controllers=[one])

    async def GetReplicator(self, request: Any, context: Any) -> Any:
        one = fleet_service_pb2.Replicator(name=request.name)
        return fleet_service_pb2.GetReplicatorResponse(replicator=one)

    async def ListAssignments(self, request: Any, context: Any) -> Any:
        one = fleet_service_pb2.AssignmentInfo(
            name="assignments/u.1",
            task=request.task,
            collection="a.b",
            epoch=3,
            state="ACCEPTED",
            replicator="replicators/r1",
        )
        return fleet_service_pb2.ListAssignmentsResponse(assignments=[one])

    async def ListHolds(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        kept = hold_pb2.Hold(
            name="holds/milvus-cdc-1-a/dml_0",
            state=hold_pb2.HOLD_STATE_KEPT,
            tasks=["tasks/copy"],
            backlog_entries=7,
            backlog_bytes=900,
        )
        found = [kept]
        if request.task or request.HasField("source"):
            orphan = hold_pb2.HOLD_STATE_ORPHAN
            name = "holds/milvus-cdc-2-b/dml_0"
            found.append(hold_pb2.Hold(name=name, state=orphan, backlog_bytes=-1))
        return hold_pb2.ListHoldsResponse(holds=found)

    async def DeleteHold(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if request.name == "holds/milvus-cdc-1-a/dml_0":
            code = grpc.StatusCode.FAILED_PRECONDITION
            await refuse(context, code, "HOLD_IN_USE", "keeps the log for tasks/copy", "name")
        return hold_pb2.DeleteHoldResponse()


async def serve(tasks: FakeTasks) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
    tasks.fleet = FakeFleet(tasks.requests)
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(tasks.fleet, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
