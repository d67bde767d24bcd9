"""The job that finds or examines places in the log, one answer for each place.

Law: what is wrong with one place is said of it; only trouble with the queue fails the job.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.source import LogLimits, LogSource
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_replicator.locating import check, first_tick_ts, locate, newest_tick_ts
from milvus_cdc_replicator.retention import retention

TOPICS_AT_ONCE = 4

Place = tuple[bytes, int]


async def locate_targets(source: LogSource, job: pb.LocateJob) -> pb.LocateResult:
    """In the order asked. Raises RetryableError."""
    topics: dict[str, list[int]] = defaultdict(list)
    for number, target in enumerate(job.targets):
        topics[target.pchannel].append(number)
    found: dict[int, pb.LocatedVchannel] = {}
    room = asyncio.Semaphore(TOPICS_AT_ONCE)

    async def one(pchannel: str, numbers: list[int]) -> None:
        async with room:
            topic = _Topic(source, pchannel)
            for number in numbers:
                found[number] = await topic.answer(job.targets[number])

    tasks = [asyncio.create_task(one(*topic)) for topic in topics.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return pb.LocateResult(located=[found[number] for number in range(len(job.targets))])


class _Topic:
    """One pchannel, asked once for what many of its places need."""

    def __init__(self, source: LogSource, pchannel: str) -> None:
        self._source = source
        self._pchannel = pchannel
        self._limits: LogLimits | None = None
        self._newest_ts = 0
        self._by_ts: dict[int, Place] = {}
        self._examined: dict[tuple[bytes, int, bytes, bool], CdcError | None] = {}
        self._times: dict[bytes, int] = {}

    async def answer(self, target: pb.LocateTarget) -> pb.LocatedVchannel:
        result = pb.LocatedVchannel(vchannel=target.vchannel)
        try:
            read_from, resolved_ts = await self._place(target)
            assert self._limits is not None
            result.read_from, result.resolved_ts = read_from, resolved_ts
            result.incarnation = self._limits.range.incarnation
            ts = resolved_ts or await self._time(read_from)
            result.retention.CopyFrom(retention(self._source, self._limits, read_from, ts))
        except RetryableError:
            raise
        except CdcError as error:
            result.reason, result.message = error.reason, error.message
        return result

    async def _place(self, target: pb.LocateTarget) -> Place:
        if self._limits is None:
            self._limits = await self._source.limits(self._pchannel)
        if target.WhichOneof("by") == "ts":
            if target.ts not in self._by_ts:
                self._by_ts[target.ts] = await locate(self._source, self._pchannel, target.ts)
            return self._by_ts[target.ts]
        key = (target.read_from, target.resolved_ts, target.incarnation, target.stored)
        if key not in self._examined:
            try:
                self._examined[key] = None
                await self._examine(target)
            except RetryableError:
                raise
            except CdcError as error:
                self._examined[key] = error
        if (error_found := self._examined[key]) is not None:
            raise error_found
        return target.read_from, target.resolved_ts

    async def _examine(self, target: pb.LocateTarget) -> None:
        assert self._limits is not None
        if target.stored:
            reader = await self._source.open(self._pchannel, target.read_from, target.incarnation)
            await reader.close()
            return
        if target.resolved_ts and not self._newest_ts:
            self._newest_ts = await newest_tick_ts(self._source, self._pchannel)
        await check(
            self._source, self._pchannel, target.read_from, target.resolved_ts, self._newest_ts
        )

    async def _time(self, read_from: bytes) -> int:
        if read_from not in self._times:
            self._times[read_from] = await first_tick_ts(self._source, self._pchannel, read_from)
        return self._times[read_from]
