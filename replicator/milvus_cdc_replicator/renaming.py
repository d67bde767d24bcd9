"""A collection that was renamed at the source is renamed at the sink, between two rows.

Law: nothing of it is under way at the sink meanwhile; rows go on under whichever name it has then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from milvus_cdc.model import Collection, ObjectState
from milvus_cdc.sink import Sink

from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.opening import name_of
from milvus_cdc_replicator.sink_work import SinkWork
from milvus_cdc_replicator.spec import CollectionAssignment

RENAME_AGAIN_SECONDS = 2.0


class Renaming:
    """Bound to one collection of one owner: `assignment` and `placed` are what is wanted now, and
    the same with the name that it has at the sink; `renamed` hears the new one.
    """

    def __init__(
        self,
        core: AssignmentCore,
        sink: Sink,
        work: SinkWork,
        *,
        assignment: Callable[[], CollectionAssignment],
        placed: Callable[[], Collection],
        halt: asyncio.Event,
        post: Callable[[Callable[[], None]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        renamed: Callable[[tuple[str, str]], None],
    ) -> None:
        self._core = core
        self._sink = sink
        self._work = work
        self._assignment = assignment
        self._placed = placed
        self._halt = halt
        self._post = post
        self._spawn = spawn
        self._renamed = renamed
        self.under_way = False
        self._rename_after = 0.0

    def act(self, *, busy: bool) -> None:
        """Once everything older than the rename is in the sink, and nothing is under way there.
        `busy`: something is that the core does not know of.
        """
        assignment = self._assignment()
        want = assignment.want
        if name_of(want) == name_of(self._placed()) or self.under_way or self._halt.is_set():
            return
        over = self._core.closed or want.state is ObjectState.DROPPED
        if not self._core.opened or over or not assignment.carry.schema:
            self._core.held_back = False
            return
        lanes = self._core.lanes.values()
        late = any(not lane.closed and lane.resolved_ts < assignment.rename_ts for lane in lanes)
        if late or busy or time.monotonic() < self._rename_after:
            return
        self._core.held_back = True
        if self._core.at_rest:
            self.under_way = True
            self._spawn(self._rename(want))

    async def _rename(self, want: Collection) -> None:
        done = False
        try:
            done = await self._work.attempt("rename", partial(self._rename_at, self._sink, want))
        finally:
            self._post(partial(self._rename_tried, want, done))

    async def _rename_at(self, sink: Sink, want: Collection) -> None:
        await sink.ensure_database(want.database)
        assignment = self._assignment()
        await sink.rename_collection(
            want,
            renamed_from=name_of(self._placed()),
            sink_collection_id=assignment.sink_collection_id,
            ts=assignment.rename_ts,
        )

    def _rename_tried(self, want: Collection, done: bool) -> None:
        self.under_way = self._core.held_back = False
        if not done:
            self._rename_after = time.monotonic() + RENAME_AGAIN_SECONDS
            return
        self._renamed(name_of(want))
