"""Places in a pchannel's log: the one that belongs to a time, and whether a given one is good.

Laws: a place (`read_from`, `resolved_ts`) is good when every message newer than `resolved_ts` lies
at or behind `read_from`. The queue's clock only helps to find a tick quickly; which one is right is
known from the ticks. A message newer than a tick may lie before it, but never was there before its
own time: hence reading begins with what the queue took `CLOCK_MARGIN_MS` before the tick's time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from milvus_cdc.codec.messages import Tick
from milvus_cdc.codec.msgstream import decode
from milvus_cdc.errors import LogTruncatedError, RetryableError, UserError
from milvus_cdc.model import tso_to_ms
from milvus_cdc.source import LogRange, LogSource

CLOCK_MARGIN_MS = 10_000
"""How far the queue's clock may be behind the one that makes timestamps, unless the tick itself
shows that it is more.
"""
FIRST_LOOK_ENTRIES = 64
READ_BYTES = 4 * 1024 * 1024
READ_SECONDS = 10.0

TickPlace = tuple[bytes, int]
"""Position and TSO of a tick."""


async def locate(source: LogSource, pchannel: str, tso: int) -> TickPlace:
    """Where to read from, and the last tick at or before `tso`.

    Raises LogTruncatedError when the log no longer reaches back far enough to be sure, and what
    LogSource raises.
    """
    limits = await source.limits(pchannel)
    found = limits.range
    around = await source.seek(pchannel, tso_to_ms(tso))
    best = await last_tick(source, pchannel, found, around, at_most=tso)
    async with aclosing(_ticks(source, pchannel, around, source.order(found.end))) as ticks:
        async for position, ts in ticks:
            if ts > tso:
                break
            best = position, ts
    if best is None:
        raise _begins_later(source, pchannel, found)
    position, ts = best
    margin_ms = CLOCK_MARGIN_MS // 2
    # A tick is never there before its time: where the queue's clock says so, it is behind.
    while source.order(await source.seek(pchannel, tso_to_ms(ts) - margin_ms)) > source.order(
        position
    ):
        margin_ms *= 4
    reach = await source.seek(pchannel, tso_to_ms(ts) - 2 * margin_ms)
    if not limits.whole and source.order(reach) <= source.order(found.first):
        raise _begins_later(source, pchannel, found)
    return reach, ts


async def check(
    source: LogSource, pchannel: str, read_from: bytes, resolved_ts: int, newest_ts: int
) -> None:
    """Whether reading from there leaves out nothing newer than `resolved_ts` (0 = whatever lies
    before is left out on purpose). `newest_ts` is the log's last tick.

    Raises UserError POSITION_NOT_FOUND, POSITION_MISMATCH or LOG_TRUNCATED, BugError BAD_POSITION.
    """
    found = await source.log_range(pchannel)
    place = source.text(read_from)
    if source.order(read_from) > source.order(found.end):
        raise UserError(
            "POSITION_NOT_FOUND",
            f"position {place} lies beyond the end of topic {pchannel}, whose next entry will be "
            f"{source.text(found.end)}",
        )
    await (await source.open(pchannel, read_from)).close()
    if not resolved_ts:
        return
    if resolved_ts > newest_ts:
        raise UserError(
            "POSITION_MISMATCH",
            f"timestamp {resolved_ts} is newer than anything in topic {pchannel}, whose last tick "
            f"is {newest_ts}: rows still to come would be left out",
        )
    before = await last_tick(source, pchannel, found, read_from)
    if before is not None and before[1] > resolved_ts:
        raise UserError(
            "POSITION_MISMATCH",
            f"position {place} of topic {pchannel} lies behind the tick {before[1]}, so rows after "
            f"timestamp {resolved_ts} would be left out; give the position that belongs to it, or "
            "timestamp 0 to leave them out on purpose",
        )


async def last_tick(
    source: LogSource, pchannel: str, found: LogRange, before: bytes, *, at_most: int = 1 << 64
) -> TickPlace | None:
    """The last tick in front of a position, of those at or before a TSO; None when there is
    none.
    """
    end = source.order(before)
    entries = FIRST_LOOK_ENTRIES
    while end > source.order(found.first):
        start = max(source.back(before, entries), found.first, key=source.order)
        best = None
        async with aclosing(_ticks(source, pchannel, start, end)) as ticks:
            async for position, ts in ticks:
                if ts <= at_most:
                    best = position, ts
        if best is not None:
            return best
        end = source.order(start)
        entries *= 8
    return None


async def first_tick_ts(source: LogSource, pchannel: str, start: bytes) -> int:
    """TSO of the first tick at or behind a position; 0 when none came yet."""
    found = await source.log_range(pchannel)
    start = max(start, found.first, key=source.order)
    async with aclosing(_ticks(source, pchannel, start, source.order(found.end))) as ticks:
        async for _, ts in ticks:
            return ts
    return 0


async def newest_tick_ts(source: LogSource, pchannel: str) -> int:
    """TSO of the log's last tick; 0 when there is none."""
    found = await source.log_range(pchannel)
    newest = await last_tick(source, pchannel, found, found.end)
    return newest[1] if newest is not None else 0


async def _ticks(
    source: LogSource, pchannel: str, start: bytes, end: int
) -> AsyncGenerator[TickPlace, None]:
    """Those from `start` up to the entry of order `end`, which is in the log or its end."""
    at = source.order(start) - 1
    if at + 1 >= end:
        return
    reader = await source.open(pchannel, start)
    try:
        while at + 1 < end:
            entries = await reader.read(READ_BYTES, READ_SECONDS)
            if not entries:
                raise RetryableError(
                    "QUEUE_UNREACHABLE",
                    f"topic {pchannel} brought nothing within {READ_SECONDS:.0f} s",
                )
            for entry in entries:
                at = source.order(entry.position)
                if at >= end:
                    return
                message = decode(entry)
                if isinstance(message, Tick):
                    yield entry.position, message.ts
    finally:
        await reader.close()


def _begins_later(source: LogSource, pchannel: str, found: LogRange) -> LogTruncatedError:
    return LogTruncatedError(
        f"topic {pchannel} does not reach back that far: its first entry is "
        f"{source.text(found.first)}; choose a later time, or resync"
    )
