"""Lease arithmetic, memory budget, and what a word of the controller does to what runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.changes import op_of
from milvus_cdc.codec.messages import Delete, Keys
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Rank
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.holdings import Holdings, Verdict
from milvus_cdc_replicator.core.lease import Lease


def test_the_lease_runs_from_the_sending_of_the_heartbeat() -> None:
    lease = Lease()
    lease.configure(10)
    assert lease.write_timeout(0, 8, 1) is None, "no lease before the first answer"
    lease.heartbeat_sent(1, now=100.0)
    lease.heartbeat_acked(1)
    assert lease.remaining(104.0) == 6.0, "however late the answer came"
    assert lease.write_timeout(101.0, 8, 1) == 8
    assert lease.write_timeout(105.0, 8, 1) == 5.0, "no deadline beyond the lease"
    assert lease.write_timeout(109.5, 8, 1) is None
    assert lease.write_timeout(500.0, 8, 1) is None, "a frozen process wakes without a lease"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), max_size=30))
def test_an_answer_that_comes_out_of_order_never_shortens_the_lease(
    acks: list[tuple[int, float]],
) -> None:
    lease = Lease()
    lease.configure(5)
    for seq in range(6):
        lease.heartbeat_sent(seq, now=float(seq))
    left = 0.0
    for seq, _ in acks:
        lease.heartbeat_acked(seq)
        assert lease.remaining(0) >= left
        left = lease.remaining(0)


def test_reading_pauses_when_writing_must_make_room_and_resumes_at_80_percent() -> None:
    budget = Budget(100)
    budget.update(100, 60)
    assert not budget.may_read
    budget.update(-15, -15)
    assert not budget.may_read
    budget.update(-5, -5)
    assert budget.may_read


def test_rows_that_wait_for_their_tick_do_not_stop_the_reading_that_brings_it() -> None:
    budget = Budget(100)
    budget.update(150, 0)
    assert budget.may_read


def test_a_pause_ends_when_only_rows_that_wait_for_their_tick_are_left() -> None:
    budget = Budget(100)
    budget.update(130, 45)
    assert not budget.may_read
    budget.update(-45, -45)
    assert budget.held > 80
    assert budget.may_read, "nothing that is written would ever make room"


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=400))
def test_sinks_that_stand_still_leave_memory_for_any_other(sinks: int, turns: list[int]) -> None:
    """Each reads whenever it may, and nothing is written."""
    budget = Budget(1000)
    shares = [budget.share(b"%d" % n) for n in range(sinks + 1)]
    held = [0] * sinks
    for turn in [*turns, *range(sinks)] * 2 + list(range(sinks)) * 400:
        if turn < sinks and shares[turn].may_read:
            shares[turn].update(10, 10)
            held[turn] += 10
    # One after the other at worst: each two thirds of what those before it have left.
    assert budget.held <= 1000 * (1 - 3.0**-sinks) + 10 * sinks
    free = 1000 - budget.held
    mine = 0
    assert shares[-1].may_read
    while shares[-1].may_read and mine < 1000:
        shares[-1].update(10, 10)
        mine += 10
    assert mine >= free * 2 / 3


def test_the_only_sink_has_all_of_the_memory_and_again_when_the_others_have_gone() -> None:
    budget = Budget(100)
    only = budget.share(b"a")
    only.update(99, 99)
    assert only.may_read
    again, other = budget.share(b"a"), budget.share(b"b")
    assert not only.may_read
    assert not again.may_read, "all collections of a sink together"
    assert other.may_read
    other.leave()
    assert only.may_read
    only.update(-99, -99)
    only.leave()
    again.leave()
    assert not budget.shared


def test_a_share_does_not_stop_the_reading_that_brings_a_tick() -> None:
    budget = Budget(100)
    share, _ = budget.share(b"a"), budget.share(b"b")
    share.update(90, 0)
    assert share.may_read
    share.update(0, 30)
    assert not share.may_read


def test_epochs_decide_what_a_word_does() -> None:
    holdings = Holdings()
    assert holdings.assign("a", 3, 7) is Verdict.START
    assert holdings.assign("a", 3, 8) is Verdict.UPDATE
    assert holdings.assign("a", 3, 7) is Verdict.STALE
    assert holdings.assign("a", 2, 9) is Verdict.STALE
    assert holdings.assign("a", 4, 9) is Verdict.REPLACE
    assert not holdings.revoke("a", 3), "an old word takes nothing away"
    assert holdings.revoke("a", 4)
    assert holdings.assign("a", 3, 9) is Verdict.SPENT, "an epoch that ended does not come back"
    assert holdings.assign("a", 4, 9) is Verdict.SPENT, "its release may be on its way"
    assert holdings.assign("a", 5, 10) is Verdict.START


def _row(ts: int, order: int, msg_id: int = 0, payload: object = "x") -> LogOp:
    return LogOp(
        Rank.INSERT, ts, order, order.to_bytes(8, "little"), payload, size=1, rows=1, msg_id=msg_id
    )


def _lane() -> Lane:
    return Lane("v", "p", read_from=b"", resolved_ts=0, horizon_ts=0, closed=False)


def test_a_producers_retry_is_one_message_but_two_messages_of_one_request_are_two() -> None:
    lane = _lane()
    assert lane.add(_row(5, 0, msg_id=9))
    assert not lane.add(_row(5, 1, msg_id=9))
    assert lane.add(_row(5, 2, msg_id=9, payload="other rows of the same request"))


@pytest.mark.parametrize("keys", [np.array([1, 2, 3]), ("a", "b", "c")])
def test_a_delete_that_its_producer_sent_again_is_one_too(keys: Keys) -> None:
    lane = _lane()
    copies = [
        op_of(Delete("v", 1, -1, "", 5, keys[:count], 9, 40), bytes([n]), n, "v", 100)
        for n, count in enumerate((3, 3, 2))
    ]
    assert [op is not None and lane.add(op) for op in copies] == [True, False, True]


def test_a_message_beyond_the_tick_but_before_it_in_the_log_holds_read_from_back() -> None:
    """The checkpoint of a real capture: (offset 20, timestamp of the tick at 23)."""
    lane = _lane()
    lane.add(_row(30, 20))
    lane.tick(25, (23).to_bytes(8, "little"))
    assert (lane.resolved_ts, lane.read_from) == (25, (20).to_bytes(8, "little"))
    lane.tick(31, (24).to_bytes(8, "little"))
    assert lane.resolved_ts == 25, "released is not durable"
    lane.durable(lane.take())
    assert (lane.resolved_ts, lane.read_from) == (31, (24).to_bytes(8, "little"))


def test_a_repeated_tick_is_no_news() -> None:
    lane = _lane()
    assert lane.tick(25, b"a")
    assert not lane.tick(25, b"b")
    assert lane.read_from == b"a"
