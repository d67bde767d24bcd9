"""Placement: nobody over capacity or without the labels, spread, near the logs already read; and
evening out that moves little and comes to rest.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc_controller.core.placement import (
    SLACK,
    Candidate,
    Need,
    PlannedMove,
    even_out,
    place,
)

LOGS = st.frozensets(st.tuples(st.just("s"), st.sampled_from("pqrs")), min_size=1, max_size=2)
LABELS = st.frozensets(
    st.sampled_from([("zone", "x"), ("zone", "y"), ("disk", "fast")]), max_size=2
)
CANDIDATES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 5), LABELS), min_size=0, max_size=4
).map(
    lambda rows: [
        Candidate(f"i{n}", capacity, held, held, frozenset(), labels)
        for n, (capacity, held, labels) in enumerate(rows)
    ]
)
NEEDS = st.lists(st.tuples(LOGS, st.floats(1, 20), LABELS), max_size=20).map(
    lambda rows: [
        Need(f"a{n}", logs, weight, labels) for n, (logs, weight, labels) in enumerate(rows)
    ]
)


@given(NEEDS, CANDIDATES)
def test_capacity_labels_and_spread(needs: list[Need], all_: list[Candidate]) -> None:
    placed = place(needs, all_)
    now = {c.instance: c for c in all_}
    for need in needs:
        able = [c for c in now.values() if c.room() and need.labels <= c.labels]
        if need.assignment_id not in placed:
            assert not able, "somebody could have had it"
            continue
        chosen = now[placed[need.assignment_id]]
        assert chosen in able
        assert chosen.load <= min(c.load for c in able) + SLACK
        now[chosen.instance] = chosen.holding(need)


def test_the_reader_of_the_log_is_preferred() -> None:
    log = frozenset({("s", "p")})
    reader = Candidate("a", 0, 1, 1, log)
    idle = Candidate("b", 0, 0, 0, frozenset())
    assert place([Need("x", log)], [reader, idle]) == {"x": "a"}
    assert place([Need("x", log)], []) == {}


Held = dict[str, list[Need]]


def world(weights: list[list[float]], labels: list[frozenset[tuple[str, str]]]) -> Held:
    held: Held = {}
    for n, row in enumerate(weights):
        own = labels[n % len(labels)] if labels else frozenset()
        held[f"i{n}"] = [
            Need(
                f"a{n}.{m}",
                frozenset({("s", f"p{m % 3}")}),
                weight,
                own if m % 4 == 0 else frozenset(),
            )
            for m, weight in enumerate(row)
        ]
    return held


def candidates_of(held: Held, labels: list[frozenset[tuple[str, str]]]) -> list[Candidate]:
    return [
        Candidate(
            instance,
            0,
            len(needs),
            sum(need.weight for need in needs),
            frozenset(log for need in needs for log in need.logs),
            labels[n % len(labels)] if labels else frozenset(),
        )
        for n, (instance, needs) in enumerate(held.items())
    ]


def carried_out(held: Held, moves: list[PlannedMove]) -> Held:
    held = {instance: list(needs) for instance, needs in held.items()}
    for move in moves:
        (need,) = [n for n in held[move.source] if n.assignment_id == move.assignment_id]
        held[move.source].remove(need)
        held[move.target].append(need)
    return held


WEIGHTS = st.lists(st.lists(st.floats(1, 10), max_size=12), min_size=2, max_size=5)
SOME_LABELS = st.lists(LABELS, max_size=3)


@given(WEIGHTS, SOME_LABELS, st.floats(0, 0.5))
def test_evening_out_comes_to_rest_and_never_makes_it_worse(
    weights: list[list[float]], labels: list[frozenset[tuple[str, str]]], hysteresis: float
) -> None:
    held = world(weights, labels)
    moves = even_out(held, candidates_of(held, labels), hysteresis=hysteresis)
    assert len({move.assignment_id for move in moves}) == len(moves), "one move each"
    after = carried_out(held, moves)
    for candidate in candidates_of(after, labels):
        for need in after[candidate.instance]:
            moved = need not in held[candidate.instance]
            assert not moved or need.labels <= candidate.labels
    loads, loads_after = ([c.load for c in candidates_of(h, labels)] for h in (held, after))
    assert max(loads_after) <= max(loads) + 1e-9
    assert min(loads_after) >= min(loads) - 1e-9


@given(st.integers(0, 60), st.integers(1, 8))
def test_a_join_moves_only_what_must_move(count: int, before: int) -> None:
    """Equal weights: the new one gets its part, nobody else gets anything, then nothing moves."""
    held = world([[1.0] * (count // before + (n < count % before)) for n in range(before)], [])
    held["new"] = []
    moves = even_out(held, candidates_of(held, []))
    assert {move.target for move in moves} <= {"new"}
    assert len(moves) <= count // (before + 1)
    after = carried_out(held, moves)
    sizes = [len(needs) for needs in after.values()]
    assert max(sizes) - min(sizes) <= SLACK + 1
    assert not even_out(after, candidates_of(after, []))


@given(st.integers(1, 40), st.integers(2, 8))
def test_a_leave_moves_only_what_was_held_there(count: int, before: int) -> None:
    held = world([[1.0] * (count // before + (n < count % before)) for n in range(before)], [])
    gone = held.pop("i0")
    placed = place(gone, candidates_of(held, []))
    assert placed.keys() == {need.assignment_id for need in gone}
    for need in gone:
        held[placed[need.assignment_id]].append(need)
    sizes = [len(needs) for needs in held.values()]
    assert max(sizes) - min(sizes) <= SLACK + 1
    # What was just placed is not moved by itself.
    assert not even_out(held, candidates_of(held, []), slack=2 * SLACK)


@given(WEIGHTS, st.integers(1, 3))
def test_a_budget_is_kept_and_the_rest_comes_later(weights: list[list[float]], budget: int) -> None:
    held = world(weights, [])
    rounds = 0
    while True:
        moves = even_out(held, candidates_of(held, []), moves_max=budget, hysteresis=0.2)
        if not moves:
            break
        assert len(moves) <= budget
        held = carried_out(held, moves)
        rounds += 1
        assert rounds <= 200, "it never comes to rest"


def test_nothing_goes_to_a_full_one() -> None:
    held = world([[1.0] * 8, []], [])
    full = [replace(c, capacity=2) for c in candidates_of(held, [])]
    moves = even_out(held, full)
    assert [move.target for move in moves] == ["i1", "i1"]
