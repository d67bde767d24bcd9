"""A task's limits in one process: the arithmetic, the queue before it, a collection under them."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.model import RateLimits
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.core.pace import Pace
from milvus_cdc_replicator.gate import boottime
from milvus_cdc_replicator.halting import Halted
from milvus_cdc_replicator.pacing import Pacer, Pacers
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.settings import Limits

from tests.unit.replicator.test_runner import START, Bench, insert, tick, until

NONE = RateLimits()
RATES = st.integers(1, 10_000)


@st.composite
def writes(draw: st.DrawFn) -> list[tuple[float, int]]:
    """(seconds after the one before was started, rows)."""
    gaps = st.floats(0, 5, allow_nan=False) | st.just(0.0)
    return draw(st.lists(st.tuples(gaps, st.integers(1, 50_000)), min_size=1, max_size=40))


@given(rate=RATES, asked=writes())
def test_no_more_than_the_limit_over_any_time_and_nothing_waits_for_ever(
    rate: int, asked: list[tuple[float, int]]
) -> None:
    pace, now = Pace(), 0.0
    pace.change(RateLimits(rows_per_second=rate), now)
    started: list[tuple[float, int]] = []
    for gap, rows in asked:
        now += gap
        before = sum(rows for _, rows in started)
        delay = pace.delay(rows, 0, now)
        # All that was asked for before, and a full second's allowance.
        assert delay <= before / rate + 1.0 + 1e-6
        now += delay
        assert pace.delay(rows, 0, now) == 0.0
        pace.take(rows, 0, now)
        started.append((now, rows))
    for first, (begin, _) in enumerate(started):
        total = 0
        for end, rows in started[first:]:
            total += rows
            beyond = max(0, max(rows for _, rows in started) - rate)
            assert total <= rate * (end - begin) + rate + beyond + 1e-3 * (1 + total)


@given(rate=RATES, size=RATES, rows=st.integers(0, 50_000), much=st.integers(0, 50_000))
def test_both_limits_hold(rate: int, size: int, rows: int, much: int) -> None:
    pace = Pace()
    pace.change(RateLimits(rate, size), 0.0)
    pace.take(rows, much, 0.0)
    alone = []
    for limits, of in ((RateLimits(rate, 0), (rows, 0)), (RateLimits(0, size), (0, much))):
        one = Pace()
        one.change(limits, 0.0)
        one.take(*of, 0.0)
        alone.append(one.delay(1, 1, 0.0))
    assert pace.delay(1, 1, 0.0) == max(alone)


def test_without_limits_nothing_waits_and_nothing_is_owed() -> None:
    pace = Pace()
    pace.take(10**9, 10**12, 0.0)
    assert pace.delay(10**9, 10**12, 0.0) == 0.0
    pace.change(RateLimits(rows_per_second=10), 5.0)
    assert pace.delay(10, 0, 5.0) == 0.0, "a second's allowance is there"


def test_what_is_owed_is_paid_at_the_rate_of_the_moment() -> None:
    pace = Pace()
    pace.change(RateLimits(rows_per_second=10), 0.0)
    pace.take(110, 0, 0.0)  # 100 beyond
    assert pace.delay(10, 0, 0.0) == pytest.approx(11.0)
    pace.change(RateLimits(rows_per_second=1000), 0.0)
    assert pace.delay(1000, 0, 0.0) == pytest.approx(1.1)
    pace.change(NONE, 0.0)
    assert pace.delay(1000, 0, 0.0) == 0.0


class Hands:
    """A clock that only a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_writes_start_in_order_of_their_arrival() -> None:
    clock, halt, order = Hands(), asyncio.Event(), list[int]()
    pacer = Pacer(clock)
    pacer.change(RateLimits(rows_per_second=10))
    assert pacer.free(10, 0)
    assert not pacer.free(1, 0)

    async def write(number: int, rows: int) -> None:
        await pacer.wait("tasks/t", rows, 0, halt)
        order.append(number)

    waiting = [asyncio.create_task(write(number, rows)) for number, rows in enumerate((8, 1, 1))]
    await settled()
    clock.now = 0.3  # enough for the small ones, which are not first
    pacer.change(pacer.limits)
    await settled()
    assert order == []
    assert not pacer.free(1, 0), "nobody overtakes"
    clock.now = 1.0
    pacer.change(pacer.limits)
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert order == [0, 1, 2]


async def test_who_is_told_to_halt_or_cancelled_leaves_at_once_and_lets_the_next_go() -> None:
    clock, halt, other = Hands(), asyncio.Event(), asyncio.Event()
    pacer = Pacer(clock)
    pacer.change(RateLimits(rows_per_second=1))
    assert pacer.free(1_000_000, 0)
    halting = asyncio.create_task(pacer.wait("tasks/t", 1, 0, halt))
    cancelled = asyncio.create_task(pacer.wait("tasks/t", 1, 0, other))
    last = asyncio.create_task(pacer.wait("tasks/t", 1, 0, other))
    await settled()
    halt.set()
    with pytest.raises(Halted):
        await asyncio.wait_for(halting, 0.5)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not last.done()
    pacer.change(NONE)
    await asyncio.wait_for(last, 0.5)
    assert pacer.free(1, 0)


def test_limits_that_a_new_stream_does_not_tell_are_over() -> None:
    pacers = Pacers()
    pacers.tell("a", RateLimits(1, 0))
    pacers.tell("b", RateLimits(2, 0))
    pacers.connected()
    assert pacers.of("a").limits == RateLimits(1, 0), "a broken stream changes nothing"
    pacers.tell("b", RateLimits(3, 0))
    pacers.synced()
    assert pacers.of("a").limits == NONE
    assert pacers.of("b").limits == RateLimits(3, 0)


def test_a_task_that_has_nothing_here_is_forgotten_once_its_limits_are_over() -> None:
    pacers = Pacers()
    held, gone, limited = (pacers.of(uid) for uid in ("held", "gone", "limited"))
    pacers.tell("limited", RateLimits(1, 0))
    pacers.forget({"held"})
    assert pacers.of("held") is held
    assert pacers.of("limited") is limited
    assert pacers.of("gone") is not gone


class Paced:
    """A runner under limits, with the times at which the sink was asked for how many rows."""

    def __init__(self, limits: RateLimits, *, memory: int = 1 << 20) -> None:
        self.bench = Bench(memory=memory)
        self.pacer = Pacer()
        self.pacer.change(limits)
        self.writes: list[tuple[float, int]] = []
        self.lease_at_write: list[float] = []
        bench = self.bench
        bench.runner = CollectionRunner(
            bench.runner.assignment,
            connections=bench.connections,  # type: ignore[arg-type]
            gate=bench.gate,
            budget=bench.budget,
            limits=Limits(assignment_bytes=memory * 3 // 4),
            notify=lambda _: None,
            query_partition=lambda *_: None,
            on_room=bench.connections.wake_readers,
            pacer=self.pacer,
        )
        bench.sink.before_write = self._note

    async def _note(self, _target: CollectionTarget, batch: RowBatch | DeleteBatch) -> None:
        assert isinstance(batch, RowBatch)
        self.writes.append((time.monotonic(), batch.num_rows))
        self.lease_at_write.append(self.bench.lease.remaining(boottime()))

    @property
    def conditions(self) -> dict[str, str]:
        return dict(self.bench.runner.report().conditions)

    async def end(self) -> None:
        await self.bench.runner.stop()
        await self.bench.connections.close()
        assert (self.bench.budget.held, self.bench.budget.writable) == (0, 0)


async def test_a_collection_keeps_the_limits_and_says_that_it_waits() -> None:
    paced = Paced(RateLimits(rows_per_second=40))
    bench = paced.bench
    await bench.start()
    counted = metrics.RATE_LIMITED_SECONDS.labels("tasks/t")._value.get()
    for n in range(1, 13):
        bench.append(insert(START + n, list(range(n * 10, n * 10 + 10))))
    bench.append(tick(START + 12))
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    assert "40 rows/s" in paced.conditions["RATE_LIMITED"]
    assert bench.runner.report().state == "RUNNING"
    await until(lambda: bench.resolved_ts == START + 12)
    first, last = paced.writes[0][0], paced.writes[-1][0]
    assert sum(rows for _, rows in paced.writes) == 120
    assert max(rows for _, rows in paced.writes) == 40, "no larger than a second's allowance"
    assert last - first > 1.5, "a second's allowance at once, the others as they come"
    assert metrics.RATE_LIMITED_SECONDS.labels("tasks/t")._value.get() > counted
    await paced.end()


async def test_a_stop_does_not_wait_for_the_limits() -> None:
    paced = Paced(RateLimits(rows_per_second=1))
    bench = paced.bench
    await bench.start()
    bench.append(insert(START + 1, list(range(1000))), tick(START + 1))
    await until(lambda: bench.resolved_ts == START + 1)
    bench.append(insert(START + 2, [5000]), tick(START + 2))
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    async with asyncio.timeout(1):
        await paced.end()
    assert bench.resolved_ts == START + 1, "what waited is the next owner's"
    assert paced.conditions == {}, "nothing waits any more"


async def test_limits_that_are_lifted_let_go_at_once() -> None:
    paced = Paced(RateLimits(bytes_per_second=1))
    bench = paced.bench
    await bench.start()
    bench.append(insert(START + 1, [1, 2]), tick(START + 1))
    await until(lambda: bench.resolved_ts == START + 1)
    bench.append(insert(START + 2, [3]), tick(START + 2))
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    paced.pacer.change(NONE)
    await until(lambda: bench.resolved_ts == START + 2)
    assert paced.conditions == {}, "without limits nothing is said of them"
    await paced.end()


async def test_what_waits_stays_within_the_memory() -> None:
    paced = Paced(RateLimits(rows_per_second=1), memory=40_000)
    bench = paced.bench
    await bench.start()
    # Its debt lasts for longer than a slow machine takes for the rest.
    bench.append(insert(START + 1, list(range(1000, 1060))), tick(START + 1))
    await until(lambda: bench.resolved_ts == START + 1)
    last = 1
    while bench.runner._intake.has_memory:
        last += 1
        bench.append(insert(START + last, [last], "x" * 400), tick(START + last))
        await asyncio.sleep(0.005)
    full = bench.budget.held
    more = range(last + 1, last + 401)
    for n in more:
        bench.append(insert(START + n, [n], "x" * 400), tick(START + n))
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert bench.budget.held < full + 10_000, "reading has paused by itself"
    assert bench.runner.report().state == "RUNNING"
    paced.pacer.change(NONE)
    await until(lambda: bench.resolved_ts == START + more[-1])
    await paced.end()


async def test_no_more_requests_than_allowed_are_under_way() -> None:
    paced = Paced(RateLimits(requests_in_flight=2))
    bench, release, most = paced.bench, asyncio.Event(), 0
    under_way = 0

    async def write(_target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await release.wait()
        under_way -= 1

    bench.sink.before_write = write
    await bench.start()
    in_flight = bench.runner._core.sequencer._in_flight
    for n in range(1, 5):
        bench.append(insert(START + n, [n]), tick(START + n))
        await until(lambda n=n: len(in_flight) == n)  # type: ignore[misc]
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    assert "2 requests at once" in paced.conditions["RATE_LIMITED"]
    assert under_way == 2
    paced.pacer.change(RateLimits(requests_in_flight=3))
    await until(lambda: under_way == 3)
    release.set()
    await until(lambda: bench.resolved_ts == START + 4)
    assert most == 3
    await paced.end()
    assert all(paced.pacer.requests.free() for _ in range(3)), "all were given back"
    assert not paced.pacer.requests.free()


async def test_a_stop_does_not_wait_for_a_request_of_others() -> None:
    paced = Paced(RateLimits(requests_in_flight=1))
    bench = paced.bench
    assert paced.pacer.requests.free(), "another collection's"
    await bench.start()
    bench.append(insert(START + 1, [1]), tick(START + 1))
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    async with asyncio.timeout(1):
        await paced.end()
    assert not paced.writes


async def test_collections_are_opened_no_more_at_once_than_allowed() -> None:
    paced = Paced(RateLimits(requests_in_flight=1))
    assert paced.pacer.openings.free(), "another collection's"
    paced.bench.runner.start()
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    assert not paced.bench.runner._core.opened
    paced.pacer.openings.give_back()
    await until(lambda: paced.bench.runner._core.opened)
    await paced.end()


async def test_a_write_that_waited_still_needs_the_lease() -> None:
    """The lease is looked at after the waiting, never before."""
    paced = Paced(RateLimits(rows_per_second=20))
    bench = paced.bench
    await bench.start()
    bench.append(insert(START + 1, list(range(30))), tick(START + 1))
    await until(lambda: bench.resolved_ts == START + 1)
    bench.append(insert(START + 2, [5000]), tick(START + 2))
    await until(lambda: "RATE_LIMITED" in paced.conditions)
    bench.gate.core = ended = Lease()
    await asyncio.sleep(1.0)
    assert len(paced.writes) == 1, "allowed by the limits, not by the lease"
    ended.configure(1_000)
    ended.heartbeat_sent(1, boottime())
    ended.heartbeat_acked(1)
    bench.gate.renewed()
    await until(lambda: bench.resolved_ts == START + 2)
    assert min(paced.lease_at_write) > 1.0
    await paced.end()
