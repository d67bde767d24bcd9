"""What time it is at a source, from ticks read early and late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc_replicator.core.source_clock import DRIFT, SourceClock


def test_nothing_is_known_before_the_first_tick() -> None:
    assert SourceClock().now_ms(10.0) is None


def test_time_goes_on_while_nothing_is_read() -> None:
    clock = SourceClock()
    clock.tick_read(1_000_000, 50.0)
    assert clock.now_ms(50.0) == 1_000_000
    assert abs((clock.now_ms(110.0) or 0) - 1_060_000) <= 60_000 * DRIFT + 1


def test_old_ticks_read_late_do_not_turn_it_back() -> None:
    clock = SourceClock()
    clock.tick_read(9_000_000, 50.0)
    clock.tick_read(1_000_000, 50.1)
    assert (clock.now_ms(50.1) or 0) >= 9_000_000


@given(
    st.floats(-DRIFT / 2, DRIFT / 2),
    st.lists(st.tuples(st.floats(0.1, 60), st.floats(0, 0.5)), min_size=1, max_size=100),
)
def test_it_follows_a_live_source_whose_clock_runs_faster_or_slower(
    drift: float, reads: list[tuple[float, float]]
) -> None:
    clock, at, worst = SourceClock(), 1_000.0, 0.0
    for pause, delay in reads:
        at += pause
        worst = max(worst, delay)
        true_ms = 5_000_000 + at * 1000 * (1 + drift)
        clock.tick_read(round(true_ms - delay * 1000), at)
        now = clock.now_ms(at)
        assert now is not None
        # Never ahead by more than what drifts between two ticks, never behind by more than a delay.
        assert -worst * 1000 - 2 <= now - true_ms <= sum(p for p, _ in reads) * DRIFT * 1500 + 2
