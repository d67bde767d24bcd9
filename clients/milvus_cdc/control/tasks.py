"""The calls about tasks and their collections.

Laws: a create carries a request id, so repeating it when the connection breaks cannot make two
tasks. A watch survives broken connections and proxies that cut it: it goes on after the last
revision it saw.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime

import grpc
from google.protobuf import field_mask_pb2
from milvuscdc.v1 import task_pb2, task_service_pb2

from milvus_cdc.control.connection import MAX_BACKOFF_SECONDS, PAGE_SIZE, Connection
from milvus_cdc.control.names import task_name
from milvus_cdc.control.refusal import ApiError, api_error, was_cut

_CREATE_ATTEMPTS = 4


class TaskCalls(Connection):
    """Half of a ControlClient."""

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
                if not (began and was_cut(err)):
                    raise api_error(err) from err
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

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
