"""With how many replicators a task is whose requests or connections are limited."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.model import RateLimits
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.moving import Policy
from milvus_cdc_controller.core.placement import Candidate, Need, Spread, even_out, place
from milvus_cdc_controller.core.replicator import DrainState
from milvus_cdc_controller.core.status import beyond_limits, collection_status

from tests.unit.controller.test_core_fleet import held, refused, serving
from tests.unit.controller.world import LEASES, Script, collection, spec

UID = "uid-copy"
STREAMS = {"a": 1, "b": 2, "c": 3, "d": 4}
TWO = RateLimits(connections=2)


def fleet(limits: RateLimits, names: str = "abcd", count: int = 8, **task: Any) -> Script:
    script = Script()
    script.core.world.policy = Policy(moves_at_once=2, settle_ms=1_000)
    for name in names:
        script.hello(STREAMS[name], name)
    script.create(spec(limits=limits, **task))
    see(script, count)
    return script


def see(script: Script, count: int) -> None:
    script.see(*(collection(number, f"c{number}") for number in range(11, 11 + count)))
    serve(script)


def serve(script: Script, seconds: int = 0) -> None:
    for stream in script.core.world.streams:
        serving(script, stream)
    for _ in range(seconds):
        script.pass_time(1_000, beating=tuple(script.core.world.streams))
        for stream in tuple(script.core.world.streams):
            serving(script, stream)


def having(script: Script) -> set[str]:
    return {g.owner for g in script.core.world.grants_of(UID) if g.instance}


def update(script: Script, limits: RateLimits) -> None:
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, None, limits=limits))
    serve(script)


def exceeds(script: Script) -> str:
    return beyond_limits(script.core.world, script.core.world.tasks[UID])


@pytest.mark.parametrize(
    ("limits", "number"),
    [
        (RateLimits(), 4),
        (RateLimits(rows_per_second=1), 4),
        (RateLimits(connections=3), 3),
        (RateLimits(requests_in_flight=2), 2),
        (RateLimits(requests_in_flight=9, connections=8, connections_each=4), 2),
        (RateLimits(requests_in_flight=1, connections=8), 1),
    ],
)
def test_no_more_replicators_than_the_limits_can_be_divided_among(
    limits: RateLimits, number: int
) -> None:
    script = fleet(limits)
    serve(script, 20)  # evening out would like to
    assert len(having(script)) == number
    assert all(len(held(script, name)) >= 8 // number for name in having(script)), "evenly"
    parts = [s.parts[UID] for s in script.core.world.sessions.values() if UID in s.parts]
    assert sum(part.requests_in_flight for part in parts) <= limits.requests_in_flight
    assert not any(part.connections for part in parts)
    assert not exceeds(script)


def test_fewer_while_it_runs_and_more_again() -> None:
    script = fleet(RateLimits())
    assert len(having(script)) == 4
    update(script, TWO)
    assert "(a, b, c, d)" in exceeds(script)
    script.pass_time(1_000, beating=tuple(script.core.world.streams))
    moving = script.core.world.moves.values()
    assert {move.cause.value for move in moving} == {"LIMITS"}
    assert sum(move.begun for move in moving) == 2, "a few at a time"
    serve(script, 20)
    assert len(having(script)) == 2
    assert not exceeds(script)
    before = {key: grant.epoch for key, grant in script.core.world.grants.items()}
    serve(script, 20)
    assert before == {key: g.epoch for key, g in script.core.world.grants.items()}, "at rest"
    update(script, RateLimits())
    serve(script, 60)
    assert len(having(script)) == 4, "evened out"


def test_what_has_no_room_among_the_few_waits_and_says_why() -> None:
    script = Script()
    for name in "abc":
        script.hello(STREAMS[name], name, capacity=2)
    script.create(spec(limits=TWO))
    see(script, 6)
    assert len(having(script)) == 2
    world = script.core.world
    waiting = [r for r in world.collections[UID].values() if r.assignment_id not in world.grants]
    assert len(waiting) >= 2
    _, reason, message = collection_status(world, waiting[0])
    assert reason == "NO_CAPACITY"
    assert "with 2 replicators at most" in message
    update(script, RateLimits(connections=3))
    assert len(having(script)) == 3


def test_a_drain_finds_somebody_else_though_all_are_counted() -> None:
    script = fleet(RateLimits(requests_in_flight=1), "ab")
    (before,) = having(script)
    (after,) = set("ab") - {before}
    assert script.ask(ev.DrainReplicator, name=before, timeout_ms=0, force=False).refusal is None
    serve(script, 20)
    assert having(script) == {after}
    drain = script.core.world.mark_of(before).drain
    assert drain is not None
    assert drain.state is DrainState.DONE


def test_who_is_silent_counts_until_its_lease_has_ended() -> None:
    script = fleet(RateLimits(connections=1), "ab", 2)
    (before,) = having(script)
    (after,) = set("ab") - {before}
    script.take(ev.StreamLost(script.now, STREAMS[before]))
    see(script, 4)
    assert having(script) == {before}
    assert not held(script, after)
    script.pass_time(LEASES.ttl_ms + LEASES.margin_ms + 1_000, beating=(STREAMS[after],))
    assert having(script) == {after}
    assert len(held(script, after)) >= 4


def test_a_person_cannot_move_it_to_one_too_many() -> None:
    script = fleet(TWO, "abc")
    (third,) = set("abc") - having(script)
    key = sorted(held(script, min(having(script))))[0]
    reply = script.ask(ev.MoveAssignment, assignment_id=key, replicator=third)
    assert refused(reply) == ("FAILED_PRECONDITION", "TASK_LIMITS", "replicator")
    other = max(having(script))
    assert script.ask(ev.MoveAssignment, assignment_id=key, replicator=other).refusal is None


def test_labels_that_the_holder_lacks_lead_elsewhere() -> None:
    script = Script()
    script.hello(1, "a")
    script.hello(2, "b", labels=(("zone", "x"),))
    script.take(ev.Heartbeat(script.now, 2, 1, False))
    script.create(spec(limits=RateLimits(connections=1), replicator_labels=()))
    see(script, 3)
    (before,) = having(script)
    wanted = (("zone", "x"),)
    script.take(
        ev.UpdateTask(script.now, 9, "tasks/copy", "", None, None, replicator_labels=wanted)
    )
    serve(script, 20)
    assert having(script) == {"b"}, f"was with {before}"


NEEDS = st.lists(st.tuples(st.sampled_from("xyz"), st.floats(1, 20)), max_size=20).map(
    lambda rows: [
        Need(f"{task}.{n}", frozenset({("s", "p")}), weight)
        for n, (task, weight) in enumerate(rows)
    ]
)
LOADS = st.lists(st.integers(0, 30), min_size=1, max_size=5)


@given(NEEDS, LOADS, st.integers(1, 3), st.integers(1, 3))
def test_placement_keeps_the_number_and_leaves_nobody_out(
    needs: list[Need], loads: list[int], x: int, y: int
) -> None:
    all_ = [Candidate(f"i{n}", 0, 0, load, frozenset()) for n, load in enumerate(loads)]
    spreads = {"x": Spread(x), "y": Spread(y, frozenset({"gone"}))}
    placed = place(needs, all_, spreads)
    for task, most in (("x", x), ("y", y - 1)):
        own = [need.assignment_id for need in needs if need.assignment_id[0] == task]
        at = {placed[key] for key in own if key in placed}
        assert len(at) <= most
        assert set(own) <= placed.keys() or not most
    assert all(need.assignment_id in placed for need in needs if need.assignment_id[0] == "z")
    sides: dict[str, list[Need]] = {c.instance: [] for c in all_}
    for need in needs:
        if need.assignment_id in placed:
            sides[placed[need.assignment_id]].append(need)
    now = [
        Candidate(i, 0, len(own), loads[int(i[1:])] + sum(n.weight for n in own), frozenset())
        for i, own in sides.items()
    ]
    have = {
        task: frozenset(placed[n.assignment_id] for n in needs if n.assignment_id[0] == task)
        for task in "x"
    }
    for move in even_out(sides, now, spreads={"x": Spread(x, have["x"])}):
        placed[move.assignment_id] = move.target
    assert len({at for key, at in placed.items() if key[0] == "x"}) <= x
