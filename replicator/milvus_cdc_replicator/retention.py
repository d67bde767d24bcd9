"""How far checkpoints are from falling out of the queue, told now and then with the progress.

Laws: a topic is asked at most every `REFRESH_SECONDS`, for all who read it together; telling never
waits for the answer. Trouble with asking is no trouble of the assignment: its reader meets the
same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog
from google.protobuf import duration_pb2
from milvus_cdc.errors import CdcError
from milvus_cdc.model import tso_to_ms
from milvus_cdc.source import LogLimits, LogSource
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.locating import first_tick_ts
from milvus_cdc_replicator.spec import Assignment, CollectionAssignment, queue_config

log = structlog.get_logger()

REFRESH_SECONDS = 30.0
ASK_SECONDS = 30.0


def retention(source: LogSource, limits: LogLimits, read_from: bytes, ts: int) -> pb.Retention:
    """`ts`: a TSO that is not newer than the entry at `read_from`."""
    result = pb.Retention(left_bytes=-1)
    if limits.max_age_ms:
        age_ms = max(int(time.time() * 1000) - tso_to_ms(ts), 0) if ts else 0
        result.left.CopyFrom(_duration(max(limits.max_age_ms - age_ms, 0)))
        result.limit.CopyFrom(_duration(limits.max_age_ms))
    behind = source.behind(read_from, limits.range.end)
    for limit_bytes in (limits.max_bytes, limits.max_entries * limits.entry_bytes):
        if not limit_bytes:
            continue
        left_bytes = max(limit_bytes - behind * limits.entry_bytes, 0)
        if result.left_bytes < 0 or left_bytes < result.left_bytes:
            result.left_bytes, result.limit_bytes = left_bytes, limit_bytes
    return result


@dataclass(slots=True)
class _Topic:
    asked: float
    source: LogSource | None = None
    limits: LogLimits | None = None


class RetentionWatch:
    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._topics: dict[tuple[object, str], _Topic] = {}
        self._told: dict[tuple[str, str], float] = {}
        self._places: dict[tuple[str, str], tuple[bytes, int]] = {}
        """Of shards without a resolved tick: where they stand, and the time of that place."""
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, progress: pb.Progress, assignment: Assignment) -> None:
        """Puts in what is due and known, and has what is not known asked for."""
        if not isinstance(assignment, CollectionAssignment):
            return
        pchannels = {lane.vchannel: lane.pchannel for lane in assignment.lanes}
        now = time.monotonic()
        for report in progress.vchannels:
            shard = (assignment.assignment_id, report.vchannel)
            pchannel = pchannels.get(report.vchannel)
            if report.closed or pchannel is None:
                self._forget(shard)
            elif now - self._told.get(shard, -REFRESH_SECONDS) >= REFRESH_SECONDS:
                self._tell(report, assignment, pchannel, shard, now)

    def drop(self, assignment: Assignment) -> None:
        """It runs here no more."""
        if isinstance(assignment, CollectionAssignment):
            for lane in assignment.lanes:
                self._forget((assignment.assignment_id, lane.vchannel))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, shard: tuple[str, str]) -> None:
        self._told.pop(shard, None)
        self._places.pop(shard, None)

    def _tell(
        self,
        report: pb.VchannelReport,
        assignment: CollectionAssignment,
        pchannel: str,
        shard: tuple[str, str],
        now: float,
    ) -> None:
        key = (queue_config(assignment.source), pchannel)
        topic = self._topics.setdefault(key, _Topic(now - REFRESH_SECONDS))
        if now - topic.asked >= REFRESH_SECONDS:
            topic.asked = now
            self._spawn(partial(self._ask, topic, assignment, pchannel))
        if topic.source is None or topic.limits is None:
            return
        ts = report.resolved_ts
        if not ts:
            place = self._places.get(shard)
            if place is None or place[0] != report.read_from:
                self._places[shard] = (report.read_from, 0)
                self._spawn(
                    partial(self._ask_time, topic.source, pchannel, shard, report.read_from)
                )
                return
            ts = place[1]
        self._told[shard] = now
        report.retention.CopyFrom(retention(topic.source, topic.limits, report.read_from, ts))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        async def quietly() -> None:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    await work()
            except (CdcError, TimeoutError) as error:
                log.debug("retention is not known", error=repr(error))

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, topic: _Topic, assignment: CollectionAssignment, pchannel: str) -> None:
        source = await self._connections.source(assignment.source)
        topic.limits = await source.limits(pchannel)
        topic.source = source

    async def _ask_time(
        self, source: LogSource, pchannel: str, shard: tuple[str, str], read_from: bytes
    ) -> None:
        ts = await first_tick_ts(source, pchannel, read_from)
        if self._places.get(shard, (b"", 0))[0] == read_from:
            self._places[shard] = (read_from, ts)


def _duration(milliseconds: int) -> duration_pb2.Duration:
    result = duration_pb2.Duration()
    result.FromMilliseconds(milliseconds)
    return result
