"""What a lane releases is the same however often it forgets; what it holds meanwhile is bounded."""

from __future__ import annotations

import random
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Rank

from tests.unit.replicator.test_assignment_crashes import Entry, make_log, position

SIZE = 10
Released = list[tuple[int, Rank, int, bool, list[int]]]


def message(entry: Entry, order: int) -> LogOp:
    return LogOp(
        Rank.INSERT if entry.kind == "insert" else Rank.DELETE,
        entry.ts,
        order,
        position(order),
        entry,
        size=SIZE,
        rows=len(entry.rows),
        load_keys=partial(frozenset, [key for key, _ in entry.rows]),
        msg_id=id(entry),
    )


def release(log: list[Entry], cap: int | None, portion: int) -> tuple[Released, Lane, int]:
    """Everything a lane releases of a log when no more than `cap` bytes may wait for a tick, and
    the most it held.
    """
    lane = Lane("v", "p", read_from=position(0), resolved_ts=0, horizon_ts=2**63, closed=False)
    released: Released = []
    at = most = 0
    while at < len(log):
        entry = log[at]
        before = (lane.resolved_ts, lane.released_ts)
        if entry.kind == "tick":
            lane.tick(entry.ts, position(at))
        else:
            lane.add(message(entry, at))
        at += 1
        most = max(most, lane.buffered_bytes + lane.staged_bytes)
        if cap is not None and lane.may_forget and lane.buffered_bytes > cap:
            lane.forget(portion)
        if (again := lane.take_reread()) is not None:
            assert not lane.wants_reread
            at = int.from_bytes(again, "little")
        while lane.staged:
            op = lane.take()
            released.append((op.ts, op.rank, op.order, op.replaces, [p.order for p in op.paired]))
            lane.durable(op)
        assert (lane.resolved_ts, lane.released_ts) >= before
        if (lane.resolved_ts, lane.released_ts) == before:
            continue
        # Whoever takes over now finds everything that is not durable from here on.
        left = [n for n, e in enumerate(log[:at]) if e.kind != "tick" and e.ts > lane.resolved_ts]
        assert all(n >= int.from_bytes(lane.read_from, "little") for n in left)
    return released, lane, most


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 60),
    cap=st.sampled_from([0, SIZE, 5 * SIZE, 20 * SIZE]),
    portion=st.sampled_from([0, SIZE, 7 * SIZE, 10**6]),
)
def test_a_tiny_cap_releases_what_an_unlimited_one_does(
    seed: int, steps: int, cap: int, portion: int
) -> None:
    rng = random.Random(seed)
    once, _ = make_log(rng, 0, 1, steps)
    # What a producer tries again stands twice in the log.
    log = [entry for entry in once for _ in range(1 if rng.random() < 0.8 else 2)]
    unlimited, reference, _ = release(log, None, 0)
    released, lane, _ = release(log, cap, portion)
    assert released == unlimited
    assert (lane.resolved_ts, lane.read_from) == (reference.resolved_ts, reference.read_from)


@given(st.integers(1, 150), st.integers(5, 40))
@settings(max_examples=30, deadline=None)
def test_what_is_held_of_a_long_interval_is_a_portion(messages: int, portion: int) -> None:
    order = list(range(messages))
    random.Random(messages).shuffle(order)
    log = [Entry("insert", 1_000 + n, ((n, "x"),)) for n in order] + [Entry("tick", 5_000)]
    cap = 20 * SIZE
    released, _, most = release(log, cap, portion * SIZE)
    assert [ts for ts, *_ in released] == [1_000 + n for n in range(messages)]
    places = 24 * messages + 200
    assert most <= max(cap + SIZE, portion * SIZE, places)
