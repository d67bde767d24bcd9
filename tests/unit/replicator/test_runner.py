"""A collection assignment on an in-memory log and sink: failures, pressure, the lease, the end."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.codec.messages import Keys
from milvus_cdc.errors import (
    CdcError,
    LogResetError,
    RetryableError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.milvus_protos import common_pb2, schema_pb2
from milvus_cdc.model import Collection, Partition, Vchannel, ms_to_tso
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.source.memory import MemorySource
from milvus_cdc_replicator.assigned import RESTING_SECONDS
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.core.source_clock import SourceClock
from milvus_cdc_replicator.gate import WriteGate, boottime
from milvus_cdc_replicator.reader import PchannelHub, Subscription
from milvus_cdc_replicator.report import Report
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.settings import Limits
from milvus_cdc_replicator.spec import CollectionAssignment, LaneStart
from milvuscdc.internal import milvus_log_pb2 as log_pb2
from milvuscdc.v1 import task_pb2

PCHANNEL, VCHANNEL = "by-dev-rootcoord-dml_0", "by-dev-rootcoord-dml_0_7v0"
START = ms_to_tso(1_000_000)


class Connections:
    """Memory in place of queue and sink."""

    def __init__(self, source: MemorySource, sink: MemorySink) -> None:
        self._source, self._sink = source, sink
        self._clock = SourceClock()
        self._hub = PchannelHub(source, PCHANNEL, self._clock)

    def clock(self, _spec: object) -> SourceClock:
        return self._clock

    async def sink(self, _spec: object, _origin: object = None) -> MemorySink:
        return self._sink

    def using(self, _spec: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def hub(self, _spec: object, _pchannel: str) -> PchannelHub:
        return self._hub

    async def check_log(
        self, _spec: object, pchannel: str, position: bytes, incarnation: bytes
    ) -> None:
        await (await self._source.open(pchannel, position, incarnation)).close()

    async def log_end(self, _spec: object, pchannel: str) -> int:
        return self._source.order((await self._source.log_range(pchannel)).end)

    def wake_readers(self) -> None:
        self._hub.wake()

    async def close(self) -> None:
        await self._hub.close()


def _schema() -> bytes:
    schema = schema_pb2.CollectionSchema(name="c")
    schema.fields.add(fieldID=100, name="id", is_primary_key=True, data_type=schema_pb2.Int64)
    schema.fields.add(fieldID=101, name="text", data_type=schema_pb2.VarChar).type_params.add(
        key="max_length", value="64"
    )
    return bytes(schema.SerializeToString())


def insert(ts: int, keys: list[int], text: str = "x") -> bytes:
    """A log message as Milvus writes it."""
    ids = schema_pb2.FieldData(type=schema_pb2.Int64, field_name="id", field_id=100)
    ids.scalars.long_data.data.extend(keys)
    texts = schema_pb2.FieldData(type=schema_pb2.VarChar, field_name="text", field_id=101)
    texts.scalars.string_data.data.extend([text] * len(keys))
    return log_pb2.LogInsert(
        base=log_pb2.LogBase(msg_type=common_pb2.Insert, timestamp=ts),
        shard_name=VCHANNEL,
        partition_name="_default",
        collection_id=7,
        partition_id=70,
        timestamps=[ts] * len(keys),
        fields_data=[ids.SerializeToString(), texts.SerializeToString()],
        num_rows=len(keys),
        version=1,
    ).SerializeToString()


def tick(ts: int) -> bytes:
    return log_pb2.LogHeader(
        base=log_pb2.LogBase(msg_type=common_pb2.TimeTick, timestamp=ts)
    ).SerializeToString()


class Bench:
    """One runner, with a log to append to and a sink to look into."""

    def __init__(
        self,
        *,
        memory: int = 1 << 20,
        horizon_ts: int = ms_to_tso(10**9),
        source: MemorySource | None = None,
        incarnation: bytes = b"",
        recreate: bool = False,
    ) -> None:
        self.source, self.sink = source or MemorySource(), MemorySink()
        if source is None:
            self.source.create(PCHANNEL)
        self.connections = Connections(self.source, self.sink)
        self.lease = Lease()
        self.lease.configure(1_000)
        self.beat()
        self.gate = WriteGate(self.lease, 8)
        self.budget = Budget(memory)
        assignment = CollectionAssignment(
            assignment_id="uid.7",
            epoch=3,
            version=1,
            task="tasks/t",
            source=task_pb2.Source(nats=task_pb2.NatsQueue(url="nats://127.0.0.1:1")),
            sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
            want=Collection(
                7,
                1,
                "default",
                "c",
                _schema(),
                1,
                2,
                START,
                partitions=(Partition(70, "_default", START),),
                vchannels=(Vchannel(VCHANNEL, PCHANNEL, bytes(8)),),
            ),
            lanes=(LaneStart(VCHANNEL, PCHANNEL, bytes(8), 0, 0, False, incarnation),),
            opened=False,
            sink_collection_id=0,
            adopt_existing=False,
            recreate=recreate,
            drop_granted=False,
        )
        self._limits = Limits(assignment_bytes=memory * 3 // 4)
        self.runner = self._owner(assignment)
        self._horizon_ts = horizon_ts

    def _owner(self, assignment: CollectionAssignment) -> CollectionRunner:
        return CollectionRunner(
            assignment,
            connections=self.connections,  # type: ignore[arg-type]
            gate=self.gate,
            budget=self.budget,
            limits=self._limits,
            notify=lambda _: None,
            query_partition=lambda *_: None,
            on_room=self.connections.wake_readers,
        )

    def next_owner(self, **other: Any) -> CollectionRunner:
        """Of what the controller knows: the last assignment it sent, but for `other`."""
        last = self.runner.assignment
        self.runner = self._owner(replace(last, epoch=last.epoch + 1, **other))
        return self.runner

    def beat(self) -> None:
        self.lease.heartbeat_sent(1, boottime())
        self.lease.heartbeat_acked(1)

    def append(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.source.append(PCHANNEL, payload)

    async def start(self) -> None:
        self.runner.start()
        await until(lambda: self.runner.report().opened is not None)
        self.runner.grant([(VCHANNEL, self._horizon_ts)])

    @property
    def resolved_ts(self) -> int:
        return self.runner.report().lanes[0].resolved_ts

    def count(self) -> int:
        return self.sink.count("default", "c")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def failure(bench: Bench) -> Report:
    await until(lambda: bench.runner.report().state == "FAILED")
    return bench.runner.report()


@contextlib.asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    await bench.start()
    try:
        yield bench
    finally:
        await bench.runner.stop()
        await bench.connections.close()
        assert (bench.budget.held, bench.budget.writable) == (0, 0), "memory is given back"


async def test_rows_become_durable_and_only_then_the_checkpoint_moves() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1, 2]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        assert bench.count() == 2
        report = bench.runner.report()
        assert report.counters.rows_inserted == 2
        assert report.state == "RUNNING"
        assert report.lag_ms >= 0


async def test_an_undecodable_message_fails_the_collection_with_its_place() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 6), b"\xff\x00garbage", tick(START + 9))
        await until(lambda: bench.runner.report().state == "FAILED")
        report = bench.runner.report()
        assert report.reason == "UNDECODABLE_MESSAGE"
        assert PCHANNEL in report.message
        assert "position 2" in report.message
        assert "ff00" in report.message, "the message's first bytes"
        assert report.lanes[0].resolved_ts < START + 9, "never skipped"


async def test_a_truncated_log_fails_the_collection() -> None:
    bench = Bench()
    bench.append(*(tick(START + n) for n in range(10)))
    bench.source.truncate(PCHANNEL, (5).to_bytes(8, "little"))
    bench.runner.start()
    await until(lambda: bench.runner.report().state == "FAILED")
    assert bench.runner.report().reason == "LOG_TRUNCATED"
    await bench.runner.stop()
    await bench.connections.close()


async def test_a_topic_made_again_while_nobody_read_is_no_place_to_go_on() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        incarnation = bench.runner.report().lanes[0].incarnation
        assert incarnation
    assert bench.runner.report().lanes[0].incarnation == incarnation, "the last word, too"
    bench.source.delete(PCHANNEL)
    bench.append(*(tick(START + n) for n in range(10)))
    for recreate in (False, True):
        again = Bench(source=bench.source, incarnation=incarnation, recreate=recreate)
        again.runner.start()
        report = await failure(again)
        assert report.reason == "LOG_RESET"
        assert PCHANNEL in report.message
        assert (report.opened is None) == recreate, "nothing is given up for a log that is gone"
        await again.runner.stop()
        await again.connections.close()


async def test_readers_of_the_old_topic_and_of_the_new_one_do_not_mix() -> None:
    source = MemorySource()
    source.append(PCHANNEL, tick(START))
    old = (await source.log_range(PCHANNEL)).incarnation
    source.delete(PCHANNEL)
    source.append(PCHANNEL, tick(START))
    hub = PchannelHub(source, PCHANNEL)
    errors: dict[bytes, CdcError | None] = {}
    seen: list[bytes] = []

    def subscribe(incarnation: bytes) -> Subscription:
        subscription = Subscription(
            PCHANNEL,
            VCHANNEL,
            7,
            bytes(8),
            -1,
            deliver=lambda *_: seen.append(incarnation),
            has_room=lambda: True,
            on_error=lambda error: errors.update({incarnation: error}),
            incarnation=incarnation,
        )
        hub.subscribe(subscription)
        return subscription

    subscribe(old)
    fresh = subscribe(b"")
    await until(lambda: old in errors and bool(seen))
    assert isinstance(errors[old], LogResetError)
    assert (seen, list(errors)) == ([b""], [old])
    assert fresh.incarnation == (await source.log_range(PCHANNEL)).incarnation
    await hub.close()


async def test_a_lost_answer_is_repeated_as_an_upsert() -> None:
    async with running() as bench:
        lost = [True]

        async def lose(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            if lost.pop() if lost else False:
                raise UnknownOutcomeError("SINK_UNKNOWN_OUTCOME", "the answer was lost")

        bench.sink.after_write = lose
        bench.append(insert(START + 5, [1, 2]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        assert bench.count() == 2, "doubled"


async def test_a_refused_row_fails_the_collection_after_what_is_in_flight() -> None:
    async with running() as bench:
        gate = asyncio.Event()
        calls: list[Keys] = []

        async def refuse(_target: CollectionTarget, batch: RowBatch | DeleteBatch) -> None:
            calls.append(())
            if len(calls) == 1:
                await gate.wait()
            else:
                raise UserError("SINK_REFUSED", "no such field")

        bench.sink.before_write = refuse
        bench.append(insert(START + 5, [1]), tick(START + 6))
        await until(lambda: len(calls) == 1)
        bench.append(insert(START + 7, [2]), tick(START + 8))
        await until(lambda: bench.runner.report().reason == "SINK_REFUSED")
        assert bench.runner.report().state == "RETRYING", "a write is still in flight"
        gate.set()
        await until(lambda: bench.runner.report().state == "FAILED")


async def test_a_stalled_sink_bounds_what_is_held_and_loses_nothing() -> None:
    async with running(memory=1 << 20) as bench:
        stalled = asyncio.Event()

        async def stall(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            await stalled.wait()

        bench.sink.before_write = stall
        text = "y" * 60
        for n in range(400):
            ts = START + 2 * n
            bench.append(insert(ts, list(range(n * 100, n * 100 + 100)), text), tick(ts + 1))
        await asyncio.sleep(0.5)
        helping = 4 << 20  # one read
        assert bench.budget.held <= (1 << 20) + helping
        stalled.set()
        await until(lambda: bench.count() == 40_000)


async def test_an_interval_between_ticks_may_be_larger_than_the_memory() -> None:
    async with running(memory=256 << 10) as bench:
        rng = random.Random(1)
        order = sorted(range(500), key=lambda n: n + rng.uniform(0, 30))
        log = [insert(START + 10 + n, [n * 20 + k for k in range(20)], "y" * 60) for n in order]
        # One request of the source alone is larger than the hard limit.
        log.insert(500, insert(START + 3_000, list(range(50_000, 58_000)), "z" * 60))
        late = insert(START + 9_000, [60_000])
        largest = 0

        async def look(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            nonlocal largest
            largest = max(largest, bench.runner._core.held_bytes)

        bench.sink.before_write = look
        bench.append(*log[:700], late, *log[700:])
        await asyncio.sleep(0.5)
        assert bench.count() == 0, "nothing before its tick"
        bench.append(tick(START + 5_000))
        await until(lambda: bench.count() == 500 * 20 + 8_000)
        bench.append(insert(START + 9_001, [60_001]), tick(START + 9_500))
        await until(lambda: bench.resolved_ts == START + 9_500)
        assert bench.count() == 500 * 20 + 8_000 + 2
        assert bench.runner.report().counters.rows_inserted == bench.count()
        assert sum(map(len, log)) > 1 << 20
        assert largest < 2 * max(map(len, log)), "never more than one request of the source"


async def test_more_messages_between_ticks_than_memory_has_places_for_fail_loudly() -> None:
    async with running(memory=4 << 10) as bench:
        bench.append(*(insert(START + 10 + n, [n]) for n in range(999)))
        report = await failure(bench)
        assert report.reason == "TICK_INTERVAL_TOO_LARGE"
        assert "memoryMiB" in report.message


async def test_without_the_lease_nothing_is_written_and_with_it_again_all_is() -> None:
    async with running() as bench:
        bench.lease._expires_at = boottime()  # as after a freeze
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await asyncio.sleep(0.3)
        assert bench.count() == 0
        bench.beat()
        bench.gate.renewed()
        await until(lambda: bench.count() == 1)


async def test_rows_beyond_the_horizon_wait_for_the_grant() -> None:
    async with running(horizon_ts=START + 5) as bench:
        bench.append(insert(START + 5, [1]), insert(START + 6, [2]), tick(START + 9))
        await until(lambda: bench.count() == 1)
        await asyncio.sleep(0.2)
        assert bench.count() == 1
        wanted = bench.runner.report().lanes[0].wanted_horizon_ts
        assert wanted > START + 6
        bench.runner.grant([(VCHANNEL, wanted)])
        await until(lambda: bench.count() == 2)


async def test_a_queue_that_goes_away_is_shown_and_read_on_when_it_is_back() -> None:
    async with running() as bench:
        bench.source.set_down(True)
        await until(lambda: bench.runner.report().state == "RETRYING")
        bench.source.set_down(False)
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.count() == 1)
        await until(lambda: bench.runner.report().state == "RUNNING")


async def test_stopping_waits_for_what_is_in_flight_and_gives_up_what_is_not() -> None:
    bench = Bench()
    await bench.start()
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hold(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
        entered.set()
        await leave.wait()

    bench.sink.before_write = hold
    bench.append(insert(START + 5, [1]), tick(START + 9))
    await entered.wait()
    stopping = asyncio.create_task(bench.runner.stop())
    await asyncio.sleep(0.1)
    assert not stopping.done()
    leave.set()
    await stopping
    assert bench.resolved_ts == START + 9, "the last word tells what became durable"
    await bench.connections.close()


async def test_a_sink_that_is_down_is_retried_visibly_until_it_is_back() -> None:
    async with running() as bench:
        down = [True]

        async def refuse(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            if down:
                raise RetryableError("SINK_UNAVAILABLE", "connection refused")

        bench.sink.before_write = refuse
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.runner.report().reason == "SINK_UNAVAILABLE")
        assert bench.runner.report().state == "RETRYING"
        down.clear()
        await until(lambda: bench.count() == 1)
        await until(lambda: bench.runner.report().state == "RUNNING")


async def test_lag_grows_while_the_sink_stalls_though_nothing_more_is_read() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        await until(lambda: bench.runner.report().lag_ms < 1_000)
        go_on = asyncio.Event()

        async def stall(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
            await go_on.wait()

        bench.sink.before_write = stall
        late = START + ms_to_tso(5_000)
        bench.append(insert(late - 5, [2]), tick(late))
        await until(lambda: bench.runner.report().lag_ms >= 5_000)
        before = bench.runner.report().lag_ms
        await until(lambda: bench.runner.report().lag_ms > before)
        go_on.set()
        await until(lambda: bench.resolved_ts == late)
        assert bench.runner.report().lag_ms < before


async def test_lag_counts_what_is_not_read_yet() -> None:
    source = MemorySource()
    source.create(PCHANNEL)
    hours = START + ms_to_tso(7_200_000)
    for payload in (tick(START + 9), insert(START + 15, [1]), tick(hours)):
        source.append(PCHANNEL, payload)
    bench = Bench(source=source, horizon_ts=START + 10)
    await bench.start()
    try:
        await until(lambda: bench.resolved_ts == START + 9)
        assert bench.runner.report().lag_ms >= 7_199_000
    finally:
        await bench.runner.stop()
        await bench.connections.close()


async def test_who_rests_says_little_and_stands_on_the_newest_tick_when_it_does() -> None:
    async with running() as bench:
        bench.append(insert(START + 5, [1]), tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)
        bench.runner.report()
        assert not bench.runner.has_news
        later = START + ms_to_tso(60_000)
        bench.append(tick(later - 1), tick(later))
        await until(lambda: bench.resolved_ts == later)
        assert not bench.runner.has_news, "source time alone is no news"
        bench.append(insert(later + 5, [2]), tick(later + 9))
        await until(lambda: bench.runner.has_news)
        await until(lambda: bench.resolved_ts == later + 9)
        assert bench.count() == 2


async def test_a_row_after_a_rest_finds_its_horizon_granted() -> None:
    async with running(horizon_ts=START + ms_to_tso(1_000)) as bench:
        bench.append(tick(START + 9))
        await until(lambda: bench.resolved_ts == START + 9)

        def wanted() -> int:
            return bench.runner.report().lanes[0].wanted_horizon_ts - START - 9

        assert wanted() > 2 * ms_to_tso(int(RESTING_SECONDS * 1000))
        bench.runner.rest(60)
        await until(lambda: wanted() > 2 * ms_to_tso(60_000))


pytestmark = pytest.mark.timeout(60)
