"""Placement: nobody over capacity, spread, near the logs already read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc_controller.core.placement import SLACK, Candidate, Need, place

LOGS = st.frozensets(st.tuples(st.just("s"), st.sampled_from("pqrs")), min_size=1, max_size=2)
CANDIDATES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=0, max_size=4).map(
    lambda rows: [
        Candidate(f"i{n}", capacity, held, held, frozenset())
        for n, (capacity, held) in enumerate(rows)
    ]
)


@given(st.lists(LOGS, max_size=20), CANDIDATES)
def test_capacity_and_spread(logs: list[frozenset[tuple[str, str]]], all_: list[Candidate]) -> None:
    needs = [Need(f"a{n}", log) for n, log in enumerate(logs)]
    placed = place(needs, all_)
    load = {c.instance: c.load for c in all_}
    for instance in placed.values():
        load[instance] += 1
    for candidate in all_:
        assert not candidate.capacity or load[candidate.instance] <= max(
            candidate.capacity, candidate.held
        )
    got = {c.instance for c in all_ if load[c.instance] > c.load}
    room = [c for c in all_ if not c.capacity or load[c.instance] < c.capacity]
    for instance in got:
        assert all(load[instance] <= load[c.instance] + SLACK + 1 for c in room)
    if len(placed) < len(needs):
        assert not room


def test_the_reader_of_the_log_is_preferred() -> None:
    log = frozenset({("s", "p")})
    reader = Candidate("a", 0, 1, 1, log)
    idle = Candidate("b", 0, 0, 0, frozenset())
    assert place([Need("x", log)], [reader, idle]) == {"x": "a"}
    assert place([Need("x", log)], []) == {}
