"""The job that keeps the holds of one source's log, one answer for each hold.

Law: an answer comes in time, also of a queue that gives none: what is still under way then is told
as such, and ends soon after.
"""

from __future__ import annotations

import asyncio

from milvus_cdc.errors import BugError, CdcError, RetryableError, UserError
from milvus_cdc.source import LogSource
from milvus_cdc.source.holds import HeldLog, HeldSource, Holds
from milvuscdc.v1 import replication_service_pb2 as pb

AT_ONCE = 4
HOLD_SECONDS = 40.0


async def keep_holds(source: LogSource, job: pb.HoldJob) -> pb.HoldResult:
    """In the order asked. Raises UserError HOLDS_NOT_LISTED."""
    if not isinstance(source, HeldSource):
        raise BugError("NO_HOLDS", "the logs of this queue need no holds")
    holds = source.holds
    room = asyncio.Semaphore(AT_ONCE)

    async def one(place: pb.HoldPlace) -> pb.HeldLog:
        async with room:
            return await _keep(source, holds, place)

    tasks = [asyncio.create_task(one(place)) for place in job.places]
    result = pb.HoldResult()
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=HOLD_SECONDS)
        for place, task in zip(job.places, tasks, strict=True):
            result.places.append(task.result() if task.done() else _late(place))
        kept = [place.pchannel for place in job.places if not place.release]
        if kept:
            found = await holds.warnings(kept[0])
            result.warnings.extend(pb.HoldWarning(reason=r, message=m) for r, m in found)
        if job.look:
            result.found.extend(map(_told, await holds.find()))
    finally:
        for task in tasks:
            task.cancel()
    return result


async def _keep(source: LogSource, holds: Holds, place: pb.HoldPlace) -> pb.HeldLog:
    hold = holds.hold(place.pchannel, place.name)
    try:
        if place.release:
            await hold.release()
            return pb.HeldLog(pchannel=place.pchannel, name=place.name)
        position = min(place.keep_from, key=source.order) if place.keep_from else None
        await hold.advance(position)
    except CdcError as error:
        return _failed(place, error)
    try:
        return _told(await hold.look())
    except (RetryableError, UserError):
        # How much it keeps is worth knowing, and nothing to fail for.
        return _told(HeldLog(place.pchannel, place.name))


def _told(held: HeldLog) -> pb.HeldLog:
    return pb.HeldLog(
        pchannel=held.pchannel,
        name=held.name,
        backlog_entries=held.entries,
        backlog_bytes=held.size,
    )


def _failed(place: pb.HoldPlace, error: CdcError) -> pb.HeldLog:
    return pb.HeldLog(
        pchannel=place.pchannel,
        name=place.name,
        backlog_entries=-1,
        backlog_bytes=-1,
        reason=error.reason,
        message=error.message,
    )


def _late(place: pb.HoldPlace) -> pb.HeldLog:
    text = f"the queue did not answer within {HOLD_SECONDS:.0f} s"
    return _failed(place, RetryableError("QUEUE_UNREACHABLE", text))
