"""What a replicator tells of the queue's limits, and how it examines places for the controller."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.errors import RetryableError
from milvus_cdc.model import ms_to_tso
from milvus_cdc.source.memory import MemorySource
from milvus_cdc.source.positions import encode
from milvus_cdc_replicator.positions import locate_targets
from milvus_cdc_replicator.retention import RetentionWatch
from milvus_cdc_replicator.spec import CollectionAssignment
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.unit.replicator.test_locating import BEGIN_MS, steady
from tests.unit.replicator.test_runner import PCHANNEL, VCHANNEL, Bench, insert, tick

HOUR_MS = 3_600_000


class _Source:
    def __init__(self, source: MemorySource) -> None:
        self._source = source
        self.asked = 0

    async def limits(self, pchannel: str) -> Any:
        self.asked += 1
        return await self._source.limits(pchannel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class _Connections:
    def __init__(self, source: _Source) -> None:
        self._source = source

    async def source(self, _spec: object) -> _Source:
        return self._source


def report(resolved_ts: int, read_from: bytes) -> pb.Progress:
    return pb.Progress(
        vchannels=[
            pb.VchannelReport(vchannel=VCHANNEL, resolved_ts=resolved_ts, read_from=read_from)
        ]
    )


async def told(watch: RetentionWatch, assignment: CollectionAssignment, *of: Any) -> pb.Retention:
    async with asyncio.timeout(5):
        while True:
            progress = report(*of)
            watch.add(progress, assignment)
            if progress.vchannels[0].HasField("retention"):
                return progress.vchannels[0].retention
            await asyncio.sleep(0.01)


async def test_limits_are_asked_once_for_all_who_read_a_topic_and_told_now_and_then() -> None:
    bench = Bench()
    assignment = bench.runner.assignment
    source = bench.source
    source.create(PCHANNEL, max_age_ms=HOUR_MS, max_bytes=1_000)
    now_ms = int(time.time() * 1000)
    position = source.append(PCHANNEL, tick(ms_to_tso(now_ms - 600_000)))
    for _ in range(9):
        source.append(PCHANNEL, bytes(source._topics[PCHANNEL].entries[0].payload))
    queue = _Source(source)
    watch = RetentionWatch(_Connections(queue))  # type: ignore[arg-type]
    retention = await told(watch, assignment, ms_to_tso(now_ms - 600_000), position)
    assert abs(retention.left.ToMilliseconds() - (HOUR_MS - 600_000)) < 60_000
    assert retention.limit.ToMilliseconds() == HOUR_MS
    size = len(source._topics[PCHANNEL].entries[0].payload)
    assert (retention.left_bytes, retention.limit_bytes) == (1_000 - 10 * size, 1_000)
    again = report(ms_to_tso(now_ms), position)
    watch.add(again, assignment)
    assert not again.vchannels[0].HasField("retention"), "now and then is enough"
    for n in range(20):
        other = replace(assignment, assignment_id=f"other.{n}")
        await told(watch, other, ms_to_tso(now_ms), position)
    assert queue.asked == 1
    # Before the first tick is resolved the place itself tells its time.
    fresh = replace(assignment, assignment_id="fresh.1")
    retention = await told(watch, fresh, 0, position)
    assert abs(retention.left.ToMilliseconds() - (HOUR_MS - 600_000)) < 60_000
    await watch.close()
    await bench.connections.close()


async def test_a_queue_that_is_down_keeps_no_report_waiting() -> None:
    bench = Bench()
    bench.source.set_down(True)
    watch = RetentionWatch(_Connections(_Source(bench.source)))  # type: ignore[arg-type]
    progress = report(5, encode(0))
    watch.add(progress, bench.runner.assignment)
    await asyncio.sleep(0.01)
    watch.add(progress, bench.runner.assignment)
    assert not progress.vchannels[0].HasField("retention")
    await watch.close()
    await bench.connections.close()


def target(**fields: Any) -> pb.LocateTarget:
    return pb.LocateTarget(vchannel=fields.pop("vchannel", VCHANNEL), pchannel=PCHANNEL, **fields)


async def test_each_place_has_an_answer_of_its_own_in_the_order_asked() -> None:
    source = steady(60)
    found = await source.log_range(PCHANNEL)
    at = ms_to_tso(BEGIN_MS + 30_500)
    job = pb.LocateJob(
        targets=[
            target(vchannel="a", read_from=encode(10_000), resolved_ts=at),
            target(vchannel="b", ts=at),
            target(vchannel="c", read_from=b"other queue"),
            target(vchannel="d", read_from=found.first, stored=True, resolved_ts=1),
            target(vchannel="e", read_from=found.first, stored=True, incarnation=b"another"),
            pb.LocateTarget(vchannel="f", pchannel="no-such-topic", ts=at),
            target(vchannel="g", read_from=found.first),
        ]
    )
    located = (await locate_targets(source, job)).located
    assert [(place.vchannel, place.reason) for place in located] == [
        ("a", "POSITION_NOT_FOUND"),
        ("b", ""),
        ("c", "BAD_POSITION"),
        ("d", ""),
        ("e", "LOG_RESET"),
        ("f", "LOG_RESET"),
        ("g", ""),
    ]
    assert located[1].resolved_ts == ms_to_tso(BEGIN_MS + 30_000) + 2
    assert {place.incarnation for place in located if not place.reason} == {found.incarnation}
    source.append(PCHANNEL, insert(1, [1]))
    source.set_down(True)
    with pytest.raises(RetryableError):
        await locate_targets(source, job)
