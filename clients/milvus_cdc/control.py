"""Python client of the controller's API: asynchronous, typed by the generated messages.

Every failure is an ApiError with the server's `google.rpc.ErrorInfo` and, for a refused field, its
path. A create carries a request id, so repeating it when the connection breaks cannot make two
tasks. A watch survives broken connections and proxies that cut it: it goes on after the last
revision it saw.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2, status_pb2
from milvuscdc.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    hold_pb2,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)

from milvus_cdc.errors import CdcError
from milvus_cdc.trust.dialing import Credentials, Line, Showing

DEFAULT_ADDRESS = "127.0.0.1:7070"
PAGE_SIZE = 1000
_STATUS_DETAILS = "grpc-status-details-bin"
_CREATE_ATTEMPTS = 4
_MAX_BACKOFF_SECONDS = 5.0
# How gRPC shows a stream that something on the way has cut: RST_STREAM, GOAWAY, a time limit.
_CUT = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)


class ApiError(CdcError):
    """The controller refused, or could not be reached (`unreachable`)."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason, message, field=field)
        self.code = code
        self.metadata = dict(metadata or {})

    @property
    def unreachable(self) -> bool:
        """No answer came from a controller (as opposed to an answer that says no)."""
        unanswered = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.code in unanswered and self.reason in ("UNREACHABLE", "TIMEOUT")


def api_error(err: grpc.aio.AioRpcError) -> ApiError:
    """What an RPC error says, with the details the server attached."""
    code, message, reason, field = err.code(), err.details() or "", "", ""
    metadata: dict[str, str] = {}
    for key, value in err.trailing_metadata() or ():
        if key != _STATUS_DETAILS:
            continue
        status = status_pb2.Status.FromString(value)
        message = status.message or message
        for detail in status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                reason = info.reason
                metadata.update(info.metadata)
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
                said = [v.description for v in bad.field_violations]
                message = "; ".join([message, *(text for text in said if text not in message)])
    if not reason:
        reason = {
            grpc.StatusCode.UNAVAILABLE: "UNREACHABLE",
            grpc.StatusCode.DEADLINE_EXCEEDED: "TIMEOUT",
        }.get(code, code.name)
    field = field or metadata.get("field", "")
    return ApiError(code, reason, message, field=field, metadata=metadata)


def _was_cut(err: grpc.aio.AioRpcError) -> bool:
    """The connection is to blame, not the request: all that a controller refuses has details."""
    refused = any(key == _STATUS_DETAILS for key, _ in err.trailing_metadata() or ())
    return err.code() is grpc.StatusCode.UNAVAILABLE or (err.code() in _CUT and not refused)


def replicator_name(name: str) -> str:
    """The resource name of a replicator given by it or by its last part."""
    return name if name.startswith("replicators/") else f"replicators/{name}"


def assignment_name(name: str) -> str:
    """The same of an assignment."""
    return name if name.startswith("assignments/") else f"assignments/{name}"


def task_name(name: str) -> str:
    """The resource name of a task given by it or by its last part."""
    return name if name.startswith("tasks/") else f"tasks/{name}"


class ControlClient:
    """One connection to a controller; every unary call ends within `timeout_seconds`."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_seconds: float = 30.0,
        credentials: Credentials | None = None,
    ) -> None:
        """`credentials`: TLS and a token, see `milvus_cdc.trust`; plaintext without. Raises
        UserError TOKEN_IN_CLEAR.
        """
        self.address = address
        self._timeout = timeout_seconds
        self._credentials = credentials or Credentials()
        self._line = Line(address, self._credentials)

    # The generated stubs are typed for synchronous channels. A new channel comes when certificates
    # have changed, so they are made for each call; that costs microseconds.
    @property
    def _tasks(self) -> Any:
        return Showing(task_service_pb2_grpc.TaskServiceStub, self._line, self._credentials)

    @property
    def _fleet(self) -> Any:
        return Showing(fleet_service_pb2_grpc.FleetServiceStub, self._line, self._credentials)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._line.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as err:
            raise api_error(err) from err

    async def create_task(
        self, task: task_pb2.Task, *, request_id: str = "", validate_only: bool = False
    ) -> task_pb2.Task:
        """Repeats the call under one request id while the controller cannot be reached."""
        request = task_service_pb2.CreateTaskRequest(
            task=task, request_id=request_id or str(uuid.uuid4()), validate_only=validate_only
        )
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                answer = await self._call(self._tasks.CreateTask, request)
            except ApiError as err:
                if err.code != grpc.StatusCode.UNAVAILABLE or attempt == _CREATE_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
            else:
                created: task_pb2.Task = answer.task
                return created
        raise AssertionError("unreachable")

    async def get_task(self, name: str) -> task_pb2.Task:
        request = task_service_pb2.GetTaskRequest(name=task_name(name))
        task: task_pb2.Task = (await self._call(self._tasks.GetTask, request)).task
        return task

    async def list_tasks(
        self,
        *,
        states: Sequence[task_pb2.TaskState.ValueType] = (),
        labels: Mapping[str, str] | None = None,
    ) -> list[task_pb2.Task]:
        """Every page."""
        request = task_service_pb2.ListTasksRequest(
            page_size=PAGE_SIZE, states=states, labels=labels or {}
        )
        return [t async for t in self._pages(self._tasks.ListTasks, request, "tasks")]

    async def update_task(
        self, task: task_pb2.Task, mask: Sequence[str], *, validate_only: bool = False
    ) -> task_pb2.Task:
        """Changes the fields of `mask` (snake_case paths) of the task named in `task`."""
        request = task_service_pb2.UpdateTaskRequest(
            task=task,
            update_mask=field_mask_pb2.FieldMask(paths=mask),
            validate_only=validate_only,
        )
        updated: task_pb2.Task = (await self._call(self._tasks.UpdateTask, request)).task
        return updated

    async def pause_task(self, name: str, *, etag: str = "") -> task_pb2.Task:
        request = task_service_pb2.PauseTaskRequest(name=task_name(name), etag=etag)
        task: task_pb2.Task = (await self._call(self._tasks.PauseTask, request)).task
        return task

    async def resume_task(self, name: str, *, etag: str = "") -> task_pb2.Task:
        request = task_service_pb2.ResumeTaskRequest(name=task_name(name), etag=etag)
        task: task_pb2.Task = (await self._call(self._tasks.ResumeTask, request)).task
        return task

    async def delete_task(self, name: str, *, etag: str = "", allow_missing: bool = False) -> None:
        request = task_service_pb2.DeleteTaskRequest(
            name=task_name(name), etag=etag, allow_missing=allow_missing
        )
        await self._call(self._tasks.DeleteTask, request)

    async def retry_task(self, name: str, *, collection: str = "") -> task_pb2.Task:
        request = task_service_pb2.RetryTaskRequest(name=task_name(name), collection=collection)
        task: task_pb2.Task = (await self._call(self._tasks.RetryTask, request)).task
        return task

    async def resync_collection(self, name: str, collection: str) -> task_pb2.Task:
        request = task_service_pb2.ResyncCollectionRequest(
            name=task_name(name), collection=collection
        )
        task: task_pb2.Task = (await self._call(self._tasks.ResyncCollection, request)).task
        return task

    async def set_positions(
        self,
        name: str,
        *,
        positions: Sequence[task_service_pb2.VchannelPosition] = (),
        at: datetime | None = None,
        collections: Sequence[str] = (),
        validate_only: bool = False,
        etag: str = "",
    ) -> list[task_service_pb2.VchannelPosition]:
        """Puts a paused task elsewhere in the log: at `positions`, else (the vchannels of
        `collections`, or all) at the time `at`. All or none; what was set comes back.
        """
        request = task_service_pb2.SetTaskPositionsRequest(
            name=task_name(name), etag=etag, collections=collections, validate_only=validate_only
        )
        if at is None:
            request.positions.positions.extend(positions)
        else:
            request.at.FromDatetime(at)
        return list((await self._call(self._tasks.SetTaskPositions, request)).positions)

    async def list_collections(self, name: str) -> list[task_pb2.TaskCollection]:
        """Every page."""
        request = task_service_pb2.ListTaskCollectionsRequest(
            parent=task_name(name), page_size=PAGE_SIZE
        )
        pages = self._pages(self._tasks.ListTaskCollections, request, "collections")
        return [c async for c in pages]

    async def list_controllers(self) -> list[fleet_service_pb2.Controller]:
        """All that run; none is the leader while one is being elected."""
        request = fleet_service_pb2.ListControllersRequest()
        return list((await self._call(self._fleet.ListControllers, request)).controllers)

    async def list_replicators(self) -> list[fleet_service_pb2.Replicator]:
        request = fleet_service_pb2.ListReplicatorsRequest(page_size=PAGE_SIZE)
        return [r async for r in self._pages(self._fleet.ListReplicators, request, "replicators")]

    async def list_assignments(
        self, *, task: str = "", replicator: str = ""
    ) -> list[fleet_service_pb2.AssignmentInfo]:
        request = fleet_service_pb2.ListAssignmentsRequest(
            page_size=PAGE_SIZE, task=task_name(task) if task else "", replicator=replicator
        )
        return [a async for a in self._pages(self._fleet.ListAssignments, request, "assignments")]

    async def list_holds(
        self, *, task: str = "", source: task_pb2.Source | None = None
    ) -> list[hold_pb2.Hold]:
        """With a task or a source, orphans at its queue, too."""
        request = hold_pb2.ListHoldsRequest(task=task_name(task) if task else "", source=source)
        return list((await self._call(self._fleet.ListHolds, request)).holds)

    async def delete_hold(
        self,
        name: str,
        *,
        task: str = "",
        source: task_pb2.Source | None = None,
        forget: bool = False,
    ) -> None:
        """An orphan, at the queue of a task or source; or `forget` one whose queue is gone."""
        request = hold_pb2.DeleteHoldRequest(
            name=name, task=task_name(task) if task else "", source=source, forget=forget
        )
        await self._call(self._fleet.DeleteHold, request)

    async def get_replicator(self, name: str) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.GetReplicatorRequest(name=replicator_name(name))
        return await self._replicator(self._fleet.GetReplicator, request)

    async def cordon_replicator(
        self, name: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.Replicator:
        """It gets nothing new until it is uncordoned; the mark belongs to the name."""
        request = fleet_service_pb2.CordonReplicatorRequest(
            name=replicator_name(name), validate_only=validate_only
        )
        return await self._replicator(self._fleet.CordonReplicator, request)

    async def uncordon_replicator(
        self, name: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.UncordonReplicatorRequest(
            name=replicator_name(name), validate_only=validate_only
        )
        return await self._replicator(self._fleet.UncordonReplicator, request)

    async def drain_replicator(
        self,
        name: str,
        *,
        within_seconds: float = 0.0,
        force: bool = False,
        validate_only: bool = False,
    ) -> fleet_service_pb2.Replicator:
        """Begins it; `drain` of the replicator (see `watch_replicators`) says how far it is."""
        request = fleet_service_pb2.DrainReplicatorRequest(
            name=replicator_name(name), force=force, validate_only=validate_only
        )
        if within_seconds:
            request.timeout.FromMilliseconds(round(within_seconds * 1000))
        return await self._replicator(self._fleet.DrainReplicator, request)

    async def cancel_drain(self, name: str) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.CancelDrainRequest(name=replicator_name(name))
        return await self._replicator(self._fleet.CancelDrain, request)

    async def _replicator(self, method: Any, request: Any) -> fleet_service_pb2.Replicator:
        replicator: fleet_service_pb2.Replicator = (await self._call(method, request)).replicator
        return replicator

    async def move_assignment(
        self, name: str, replicator: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.AssignmentInfo:
        """Begins it; the assignment's `epoch` grows when it has a new owner."""
        request = fleet_service_pb2.MoveAssignmentRequest(
            name=assignment_name(name),
            replicator=replicator_name(replicator),
            validate_only=validate_only,
        )
        answer = await self._call(self._fleet.MoveAssignment, request)
        assignment: fleet_service_pb2.AssignmentInfo = answer.assignment
        return assignment

    async def rebalance(
        self, *, max_moves: int = 0, validate_only: bool = False
    ) -> fleet_service_pb2.RebalancePlan:
        """The moves that even out the load; they begin unless `validate_only`."""
        request = fleet_service_pb2.RebalanceAssignmentsRequest(
            max_moves=max_moves, validate_only=validate_only
        )
        answer = await self._call(self._fleet.RebalanceAssignments, request)
        plan: fleet_service_pb2.RebalancePlan = answer.plan
        return plan

    async def watch_replicators(
        self, name: str = ""
    ) -> AsyncIterator[fleet_service_pb2.WatchReplicatorsResponse]:
        """All (or the one) as they are, then every change, for ever; begins anew by itself when
        the connection breaks, with all as they are then.
        """
        backoff, began = 0.2, False
        request = fleet_service_pb2.WatchReplicatorsRequest(
            name=replicator_name(name) if name else ""
        )
        while True:
            try:
                async for event in self._fleet.WatchReplicators(request):
                    backoff, began = 0.2, True
                    yield event
            except grpc.aio.AioRpcError as err:
                if not (began and _was_cut(err)):
                    raise api_error(err) from err
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    async def _pages(self, method: Any, request: Any, items: str) -> AsyncIterator[Any]:
        while True:
            answer = await self._call(method, request)
            for item in getattr(answer, items):
                yield item
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def watch_tasks(
        self, *, name: str = "", revision: int = 0
    ) -> AsyncIterator[task_service_pb2.WatchTasksResponse]:
        """A snapshot, then every change, for ever; goes on by itself when the connection breaks or
        a proxy cuts the stream, however that one shows it.

        Raises ApiError when it never could begin, when the server refuses, and with OUT_OF_RANGE
        when the changes after the last revision are no longer there: begin anew without a
        revision.
        """
        backoff, began = 0.2, False
        # A snapshot that broke off is begun anew: only a bookmark or a resumed watch has all of it.
        whole = revision > 0
        while True:
            request = task_service_pb2.WatchTasksRequest(
                revision=revision if whole else 0, name=task_name(name) if name else ""
            )
            try:
                async for event in self._tasks.WatchTasks(request):
                    backoff, began = 0.2, True
                    whole |= event.type == task_service_pb2.WatchTasksResponse.TYPE_BOOKMARK
                    revision = max(revision, event.revision)
                    yield event
            except grpc.aio.AioRpcError as err:
                if not (began and _was_cut(err)):
                    raise api_error(err) from err
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _MAX_BACKOFF_SECONDS)

    async def diff_task(
        self, name: str, *, collections: Sequence[str] = ()
    ) -> AsyncIterator[task_service_pb2.DiffTaskResponse]:
        """Differences as they are found; the verdict is the last. No deadline."""
        request = task_service_pb2.DiffTaskRequest(name=task_name(name), collections=collections)
        try:
            async for event in self._tasks.DiffTask(request):
                yield event
        except grpc.aio.AioRpcError as err:
            raise api_error(err) from err

    async def verify_task(
        self, name: str, *, collections: Sequence[str] = (), max_differences: int = 0
    ) -> AsyncIterator[task_service_pb2.VerifyTaskResponse]:
        """Progress, differences and results as they come; the verdict is the last. No deadline."""
        request = task_service_pb2.VerifyTaskRequest(
            name=task_name(name), collections=collections, max_differences=max_differences
        )
        try:
            async for event in self._tasks.VerifyTask(request):
                yield event
        except grpc.aio.AioRpcError as err:
            raise api_error(err) from err
