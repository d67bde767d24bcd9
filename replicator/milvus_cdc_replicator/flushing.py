"""What a user flushed at the source is flushed at the sink, once every row before that is there.

Law: a flush that is refused stops no rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from milvus_cdc.errors import UserError
from milvus_cdc.model import Collection
from milvus_cdc.sink import Sink

from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.sink_work import SinkWork

FLUSH_AGAIN_SECONDS = 10.0
"""Milvus takes one flush of a collection in ten seconds."""


class Flushing:
    """Bound to one collection of one owner; `placed`: what is wanted now, with the name that it has
    at the sink.
    """

    def __init__(
        self,
        core: AssignmentCore,
        sink: Sink,
        work: SinkWork,
        *,
        placed: Callable[[], Collection],
        halt: asyncio.Event,
        conditions: dict[str, str],
        post: Callable[[Callable[[], None]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
        log: Any,
    ) -> None:
        self._core = core
        self._sink = sink
        self._work = work
        self._placed = placed
        self._halt = halt
        self._conditions = conditions
        self._post = post
        self._spawn = spawn
        self._changed = changed
        self.log = log
        self.flushed_ts = 0
        """Of the newest flush carried out."""
        self.under_way = False
        self._flush_after = 0.0

    def act(self, flush_ts: int) -> None:
        """Begins it when it is due."""
        if flush_ts <= self.flushed_ts or self.under_way or self._halt.is_set():
            return
        if not self._core.opened or self._core.held_back:
            return
        lanes = self._core.lanes.values()
        if any(not lane.closed and lane.resolved_ts < flush_ts for lane in lanes):
            return
        if time.monotonic() >= self._flush_after:
            self.under_way = True
            self._spawn(self._flush(flush_ts))

    async def _flush(self, flush_ts: int) -> None:
        done = False
        try:
            done = await self._work.attempt("flush", partial(self._sink.flush, self._placed()))
        except UserError as error:
            # It asks for files, not for rows: refused, it must not stop them.
            self._conditions["FLUSH_REFUSED"] = error.message
            self.log.warning("flush refused", reason=error.reason, error=error.message)
            done = True
        finally:
            self._post(partial(self._flush_tried, flush_ts, done))

    def _flush_tried(self, flush_ts: int, done: bool) -> None:
        self.under_way = False
        if not done:
            self._flush_after = time.monotonic() + FLUSH_AGAIN_SECONDS
            return
        self.flushed_ts = flush_ts
        self._changed()
