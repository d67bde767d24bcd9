"""What changed, for WatchTasks: a bounded history and the watchers that follow it.

Laws: revisions grow over restarts of the controller; a revision older than the history, or of an
earlier process, is refused instead of leaving a gap; a watcher that does not keep up is ended,
never skipped ahead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from milvuscdc.v1 import task_pb2
from milvuscdc.v1 import task_service_pb2 as pb

from milvus_cdc_controller.api_errors import ApiError

HISTORY_MAX = 10_000
BACKLOG_MAX = 2_000
BOOKMARK_SECONDS = 10.0
WATCHES_MAX = 1_000
_START_BITS = 32


class WatchHub:
    """Filled by the control loop. `snapshot` lists every task as it is."""

    def __init__(
        self,
        incarnation: int,
        snapshot: Callable[[], list[task_pb2.Task]],
        watches_max: int = WATCHES_MAX,
    ) -> None:
        self._first = incarnation << _START_BITS
        self.revision = self._first
        self._snapshot = snapshot
        self._history: deque[pb.WatchTasksResponse] = deque(maxlen=HISTORY_MAX)
        self._shown: dict[str, bytes] = {}
        self._watchers: set[asyncio.Queue[pb.WatchTasksResponse | None]] = set()
        self._watches_max = watches_max
        self._closed = False

    def changed(self, task: task_pb2.Task) -> None:
        face = task.SerializeToString(deterministic=True)
        before = self._shown.get(task.uid)
        if before == face:
            return
        self._shown[task.uid] = face
        kind = (
            pb.WatchTasksResponse.TYPE_ADDED
            if before is None
            else pb.WatchTasksResponse.TYPE_MODIFIED
        )
        self._tell(kind, task)

    def deleted(self, task: task_pb2.Task) -> None:
        self._shown.pop(task.uid, None)
        self._tell(pb.WatchTasksResponse.TYPE_DELETED, task)

    def close(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            _end(watcher)

    def _tell(self, kind: pb.WatchTasksResponse.Type.ValueType, task: task_pb2.Task) -> None:
        self.revision += 1
        event = pb.WatchTasksResponse(type=kind, task=task, revision=self.revision)
        self._history.append(event)
        for watcher in self._watchers:
            try:
                watcher.put_nowait(event)
            except asyncio.QueueFull:
                _end(watcher)

    async def watch(self, revision: int, name: str) -> AsyncIterator[pb.WatchTasksResponse]:
        """Raises ApiError WATCH_TOO_OLD, WATCH_ENDED, TOO_MANY_WATCHES."""
        if len(self._watchers) >= self._watches_max:
            raise ApiError(
                "RESOURCE_EXHAUSTED",
                "TOO_MANY_WATCHES",
                f"{self._watches_max} watch tasks already; end one, or raise limits.watches in the "
                "controller's configuration.",
            )
        queue: asyncio.Queue[pb.WatchTasksResponse | None] = asyncio.Queue(BACKLOG_MAX)
        past = self._past(revision)
        snapshot = [] if past is not None else self._snapshot()
        now = self.revision
        self._watchers.add(queue)
        if self._closed:
            queue.put_nowait(None)
        try:
            for task in snapshot:
                if name in ("", task.name):
                    yield pb.WatchTasksResponse(
                        type=pb.WatchTasksResponse.TYPE_ADDED, task=task, revision=now
                    )
            for event in past or ():
                if name in ("", event.task.name):
                    yield event
            yield _bookmark(now)
            while True:
                try:
                    async with asyncio.timeout(BOOKMARK_SECONDS):
                        following = await queue.get()
                except TimeoutError:
                    yield _bookmark(self.revision)
                    continue
                if following is None:
                    raise ApiError(
                        "UNAVAILABLE",
                        "WATCH_ENDED",
                        "The watch fell behind or the controller stops; watch again from the last "
                        "revision seen.",
                    )
                if name in ("", following.task.name):
                    yield following
        finally:
            self._watchers.discard(queue)

    def _past(self, revision: int) -> list[pb.WatchTasksResponse] | None:
        """Events after a revision; None when a snapshot is asked for."""
        if revision == 0:
            return None
        oldest = self._history[0].revision if self._history else self.revision + 1
        if revision < oldest - 1 or revision < self._first or revision > self.revision:
            raise ApiError(
                "OUT_OF_RANGE",
                "WATCH_TOO_OLD",
                f"Revision {revision} is not in the history any more; watch again without one.",
                field="revision",
            )
        return [event for event in self._history if event.revision > revision]


def _bookmark(revision: int) -> pb.WatchTasksResponse:
    return pb.WatchTasksResponse(type=pb.WatchTasksResponse.TYPE_BOOKMARK, revision=revision)


def _end(watcher: asyncio.Queue[pb.WatchTasksResponse | None]) -> None:
    while not watcher.empty():
        watcher.get_nowait()
    watcher.put_nowait(None)
