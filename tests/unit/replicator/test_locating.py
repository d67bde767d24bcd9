"""Places by time: on logs as careless as a source may write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.codec.messages import Insert, Tick
from milvus_cdc.codec.msgstream import decode
from milvus_cdc.errors import LogTruncatedError, UserError
from milvus_cdc.model import ms_to_tso, tso_to_ms
from milvus_cdc.source.memory import MemorySource
from milvus_cdc_replicator.locating import CLOCK_MARGIN_MS, check, locate, newest_tick_ts

from tests.unit.replicator.test_runner import PCHANNEL, insert, tick

BEGIN_MS = 1_700_000_000_000
Entry = tuple[int, int]


@st.composite
def logs(draw: st.DrawFn) -> tuple[MemorySource, int]:
    """A log whose ticks are late and whose messages are out of order, within what is promised: a
    message is newer than the ticks before it, and was never taken before its own time but by as
    much as the queue's clock is behind.
    """
    source = MemorySource()
    behind = draw(st.integers(-CLOCK_MARGIN_MS, CLOCK_MARGIN_MS))
    late = draw(st.sampled_from((0, 300, 5_000, 40_000)))
    now, ticked = BEGIN_MS, BEGIN_MS - 1
    source.create(PCHANNEL)
    for _ in range(draw(st.integers(1, 60))):
        now += draw(st.sampled_from((0, 1, 200, 3_000)))
        if draw(st.booleans()):
            ticked = max(ticked, now - draw(st.integers(0, late)))
            payload = tick(ms_to_tso(ticked))
        else:
            payload = insert(ms_to_tso(max(draw(st.integers(ticked, now)), ticked)) + 1, [1])
        source.append(PCHANNEL, payload, at_ms=now - behind)
    return source, now


@settings(max_examples=60, deadline=None)
@given(logs(), st.data())
async def test_nothing_newer_than_the_tick_lies_before_the_place(
    log: tuple[MemorySource, int], data: st.DataObject
) -> None:
    source, now = log
    tso = ms_to_tso(data.draw(st.integers(BEGIN_MS, now + 10)))
    entries = source._topics[PCHANNEL].entries
    messages = [(source.order(e.position), decode(e)) for e in entries]
    ticks = [m.ts for _, m in messages if isinstance(m, Tick) and m.ts <= tso]
    if not ticks:
        with pytest.raises(LogTruncatedError):
            await locate(source, PCHANNEL, tso)
        return
    read_from, resolved_ts = await locate(source, PCHANNEL, tso)
    assert resolved_ts == max(ticks)
    before = [m for order, m in messages if order < source.order(read_from)]
    assert not [m for m in before if isinstance(m, Insert) and m.ts > resolved_ts]
    # And such a place passes the examination.
    await check(source, PCHANNEL, read_from, resolved_ts, await newest_tick_ts(source, PCHANNEL))


def steady(seconds: int) -> MemorySource:
    """A tick a second, each after a row of its time."""
    source = MemorySource()
    for n in range(seconds):
        at_ms = BEGIN_MS + 1_000 * n
        source.append(PCHANNEL, insert(ms_to_tso(at_ms) + 1, [n]), at_ms=at_ms + 5)
        source.append(PCHANNEL, tick(ms_to_tso(at_ms) + 2), at_ms=at_ms + 9)
    return source


async def test_a_log_that_forgot_its_beginning_tells_only_what_it_can_be_sure_of() -> None:
    source = steady(120)
    source.truncate(PCHANNEL, source.back((await source.log_range(PCHANNEL)).end, 120))
    for second in (30, 60, 65):
        with pytest.raises(LogTruncatedError, match="choose a later time"):
            await locate(source, PCHANNEL, ms_to_tso(BEGIN_MS + second * 1_000 + 500))
    read_from, ts = await locate(source, PCHANNEL, ms_to_tso(BEGIN_MS + 100_500))
    assert tso_to_ms(ts) == BEGIN_MS + 100_000
    assert source.order(read_from) == 180


async def test_a_place_that_would_leave_rows_out_is_refused() -> None:
    source = steady(60)
    found = await source.log_range(PCHANNEL)
    newest = await newest_tick_ts(source, PCHANNEL)
    read_from, ts = await locate(source, PCHANNEL, ms_to_tso(BEGIN_MS + 30_500))
    await check(source, PCHANNEL, read_from, ts, newest)
    await check(source, PCHANNEL, found.first, ts, newest)
    await check(source, PCHANNEL, found.end, newest, newest)
    await check(source, PCHANNEL, found.end, 0, newest)
    for position, resolved_ts in ((found.end, ts), (read_from, newest + 1)):
        with pytest.raises(UserError, match="POSITION_MISMATCH"):
            await check(source, PCHANNEL, position, resolved_ts, newest)
    source.append(PCHANNEL, tick(newest + 1))
    beyond = source.append(PCHANNEL, tick(newest + 2))
    source._topics[PCHANNEL].entries[-2:] = []
    with pytest.raises(UserError, match="POSITION_NOT_FOUND"):
        await check(source, PCHANNEL, beyond, 0, newest)
    source.truncate(PCHANNEL, read_from)
    with pytest.raises(LogTruncatedError):
        await check(source, PCHANNEL, found.first, ts, newest)
