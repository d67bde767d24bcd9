"""Marks, drains and moves of the fleet, by scripts of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.collection import CollectionState
from milvus_cdc_controller.core.moving import Policy
from milvus_cdc_controller.core.presence import why
from milvus_cdc_controller.core.replicator import (
    TRANSITIONS,
    DrainState,
    ReplicatorRecord,
    ReplicatorState,
    way,
)
from milvus_cdc_controller.core.status import collection_status

from tests.unit.controller.world import Script, collection, spec

BOOKS = "uid-copy.11"


def serving(script: Script, stream: int = 1) -> None:
    """The replicator of a stream reports what it was given and releases what is asked back."""
    world = script.core.world
    instance = world.streams[stream]
    while True:
        releases = [
            g
            for g in world.grants.values()
            if g.instance == instance and world.seen(g.assignment_id).revoking
        ]
        begins = [
            g
            for g in world.grants.values()
            if g.instance == instance
            and world.seen(g.assignment_id).state.value == "NONE"
            and g not in releases
        ]
        for grant in releases:
            script.take(ev.Released(script.now, stream, grant.assignment_id, grant.epoch))
        for grant in begins:
            script.report(stream, grant.assignment_id, grant.epoch)
        if not releases and not begins:
            return


def fleet(
    count: int = 6, *, names: str = "ab", policy: Policy | None = None, **hello: Any
) -> Script:
    """The first has everything, the others came later."""
    script = Script()
    script.core.world.policy = policy or Policy(moves_at_once=2, rebalance=False)
    script.hello(1, names[0], **hello)
    script.create()
    script.see(*(collection(number, f"c{number}") for number in range(11, 11 + count)))
    serving(script, 1)
    for stream, name in enumerate(names[1:], 2):
        script.hello(stream, name, **hello)
    return script


def held(script: Script, name: str) -> set[str]:
    return {g.assignment_id for g in script.core.world.grants.values() if g.owner == name}


def under_way(script: Script) -> int:
    return sum(bool(script.core.world.seen(key).revoking) for key in script.core.world.grants)


def state_of(script: Script, name: str) -> ReplicatorState:
    (session,) = script.core.world.named(name)
    return session.state(script.core.world.leases, script.core.world.now.mono_ms)


def refused(reply: fx.Reply) -> tuple[str, str, str]:
    assert reply.refusal is not None
    return reply.refusal.kind, reply.refusal.reason, reply.refusal.field


# The table.


@given(st.lists(st.sampled_from(ReplicatorState), min_size=1, max_size=6))
def test_every_way_is_one_of_the_table(states: list[ReplicatorState]) -> None:
    now = ReplicatorState.SUSPECT
    for state in states:
        if now is ReplicatorState.LOST and state is not now:
            with pytest.raises(AssertionError):
                way(now, state)
            return
        for step in way(now, state):
            assert step in TRANSITIONS[now]
            now = step
        assert now is state


# The mark.


def test_a_cordoned_replicator_keeps_what_it_holds_and_gets_nothing_new() -> None:
    script = fleet(2)
    before = held(script, "a")
    assert script.ask(ev.CordonReplicator, name="b").refusal is None
    assert script.stored["replicators/b"] == ReplicatorRecord("b", cordoned=True)
    script.see(*(collection(number, f"c{number}") for number in range(11, 15)))
    assert held(script, "a") == before | {"uid-copy.13", "uid-copy.14"}
    assert not held(script, "b")
    assert script.ask(ev.UncordonReplicator, name="b").refusal is None
    assert "replicators/b" not in script.stored, "a mark that says nothing is not stored"


def test_the_mark_outlives_a_stream_the_process_and_the_controller() -> None:
    script = fleet(1)
    script.ask(ev.CordonReplicator, name="b")
    script.take(ev.StreamLost(script.now, 2))
    script.hello(3, "b")
    assert script.core.world.named("b")[-1].mark.cordoned
    again = Script(script.stored, at_ms=500_000)
    again.hello(1, "b", instance="another start")
    again.see(collection(11, "c11"), collection(12, "c12"))
    again.pass_time(20_000, beating=(1,))
    assert not held(again, "b")


def test_what_waits_says_that_everybody_is_cordoned() -> None:
    script = fleet(0, names="a")
    script.ask(ev.CordonReplicator, name="a")
    script.see(collection(11))
    record = script.core.world.collections["uid-copy"][11]
    assert collection_status(script.core.world, record)[:2] == (
        CollectionState.PENDING,
        "NO_CAPACITY",
    )


def test_validate_only_changes_nothing() -> None:
    script = fleet(3)
    script.ask(ev.CordonReplicator, name="b", validate_only=True)
    script.ask(ev.DrainReplicator, name="a", validate_only=True)
    script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="b", validate_only=True)
    assert not any(key.startswith("replicators/") for key in script.stored)
    assert not script.core.world.moves
    assert not under_way(script)


# Draining.


def test_a_drain_moves_everything_a_few_at_a_time() -> None:
    script = fleet(6)
    before = held(script, "a")
    assert script.ask(ev.DrainReplicator, name="a").refusal is None
    assert state_of(script, "a") is ReplicatorState.DRAINING
    while held(script, "a"):
        assert 0 < under_way(script) <= 2
        serving(script, 1)
        serving(script, 2)
        script.pass_time(1_000, beating=(1, 2))
    assert held(script, "b") == before
    assert {g.epoch for g in script.core.world.grants.values()} == {2}
    drain = script.core.world.replicators["a"].drain
    assert drain is not None
    assert (drain.state, drain.total) == (DrainState.DONE, len(before))
    assert state_of(script, "a") is ReplicatorState.STOPPED
    # It still runs, and ends in order.
    script.take(ev.StreamLost(script.now, 1))
    assert [s.shown for s in script.core.world.departed.values()] == [ReplicatorState.STOPPED]


def test_a_replicator_that_stops_is_drained_alike() -> None:
    script = fleet(6)
    script.take(ev.Heartbeat(script.now, 1, 2, True))
    assert under_way(script) == 2
    while held(script, "a"):
        serving(script, 1)
        serving(script, 2)
    script.take(ev.StreamLost(script.now, 1))
    (session,) = script.core.world.departed.values()
    assert session.shown is ReplicatorState.STOPPED
    assert why(script.core.world, session)[0] == "STOPPED"


def test_who_stops_and_has_nobody_to_give_to_lets_go_of_everything_at_once() -> None:
    script = fleet(5, names="a")
    script.take(ev.Heartbeat(script.now, 1, 2, True))
    assert under_way(script) == len(held(script, "a")) == 6


def test_a_drain_of_the_last_one_is_refused_and_says_what_would_stop() -> None:
    script = fleet(7, names="a")
    reply = script.ask(ev.DrainReplicator, name="a")
    assert refused(reply) == ("FAILED_PRECONDITION", "NO_OTHER_REPLICATOR", "name")
    assert reply.refusal is not None
    assert "default.c11 of tasks/copy" in reply.refusal.message
    assert dict(reply.refusal.metadata)["would_stop"] == "8"
    assert not script.core.world.replicators
    assert not under_way(script)
    assert script.ask(ev.DrainReplicator, name="a", force=True).refusal is None
    assert under_way(script) == 8


def test_a_drain_into_too_little_room_is_refused() -> None:
    script = fleet(4, capacity=3, names="a")
    script.hello(2, "b", capacity=2)
    reply = script.ask(ev.DrainReplicator, name="a")
    assert refused(reply) == ("FAILED_PRECONDITION", "NO_CAPACITY", "name")


def test_a_drain_ends_at_its_deadline_and_what_is_left_stays() -> None:
    script = fleet(6)
    script.ask(ev.DrainReplicator, name="a", timeout_ms=3_000)
    script.pass_time(4_000, beating=(1, 2))
    drain = script.core.world.replicators["a"].drain
    assert drain is not None
    assert drain.state is DrainState.EXPIRED
    asked = under_way(script)
    serving(script, 1)
    serving(script, 2)
    script.pass_time(2_000, beating=(1, 2))
    assert len(held(script, "b")) == asked == 2
    assert script.core.world.replicators["a"].cordoned


def test_a_cancelled_drain_leaves_the_mark_as_it_was() -> None:
    script = fleet(6)
    reply = script.ask(ev.CancelDrain, name="a")
    assert refused(reply) == ("FAILED_PRECONDITION", "NOT_DRAINING", "name")
    script.ask(ev.DrainReplicator, name="a")
    script.ask(ev.CancelDrain, name="a")
    serving(script, 1)
    assert state_of(script, "a") is ReplicatorState.ALIVE
    assert not script.core.world.replicators["a"].cordoned
    assert len(held(script, "a")) == 5


def test_a_controller_that_begins_anew_goes_on_with_a_drain() -> None:
    script = fleet(6)
    script.ask(ev.DrainReplicator, name="a")
    again = Script(script.stored, at_ms=500_000)
    grants = again.core.world.grants.values()
    again.hello(1, "a", tuple(ev.Held(g.assignment_id, g.epoch, 1) for g in grants if g.instance))
    again.hello(2, "b")
    again.see(*(collection(number, f"c{number}") for number in range(11, 17)))
    for _ in range(10):
        serving(again, 1)
        serving(again, 2)
        again.pass_time(1_000, beating=(1, 2))
    assert not held(again, "a")
    drain = again.core.world.replicators["a"].drain
    assert drain is not None
    assert drain.state is DrainState.DONE


def test_who_is_lost_is_shown_as_lost_and_comes_back_as_new() -> None:
    script = fleet(1)
    script.take(ev.StreamLost(script.now, 2))
    assert state_of(script, "b") is ReplicatorState.SUSPECT
    script.pass_time(20_000, beating=(1,))
    assert [s.shown for s in script.core.world.departed.values()] == [ReplicatorState.LOST]
    script.hello(3, "b", instance="another start")
    assert not script.core.world.departed
    assert state_of(script, "b") is ReplicatorState.ALIVE


# Moving.


def test_a_move_goes_where_it_was_sent_though_placement_would_say_otherwise() -> None:
    script = fleet(6, names="abc")
    assert script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="c").refusal is None
    (revoke,) = script.sent(fx.Revoke, 1)
    assert (revoke.assignment_id, revoke.reason) == (BOOKS, "MOVING")
    record = script.core.world.collections["uid-copy"][11]
    assert collection_status(script.core.world, record)[1] == "MOVING"
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    (assign,) = script.sent(fx.Assign, 3)
    assert (assign.assignment_id, assign.epoch) == (BOOKS, 2)
    # Its wish is fulfilled when it is there.
    assert script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="c").refusal is None
    assert not script.sent(fx.Revoke)


def test_the_last_wish_about_a_move_counts_until_it_has_begun() -> None:
    script = fleet(6, names="abc", policy=Policy(moves_at_once=1, rebalance=False))
    first, second = "uid-copy.12", "uid-copy.13"
    script.ask(ev.MoveAssignment, assignment_id=first, replicator="b")
    for target in ("b", "c", "a"):
        assert not script.ask(ev.MoveAssignment, assignment_id=second, replicator=target).refusal
    assert list(script.core.world.moves) == [first], "back where it is"
    reply = script.ask(ev.MoveAssignment, assignment_id=first, replicator="c")
    assert refused(reply) == ("FAILED_PRECONDITION", "ASSIGNMENT_MOVING", "name")
    reply = script.ask(ev.MoveAssignment, assignment_id=first, replicator="a")
    assert refused(reply) == ("FAILED_PRECONDITION", "ASSIGNMENT_MOVING", "name")
    assert not script.ask(ev.MoveAssignment, assignment_id=first, replicator="b").refusal


def test_a_move_whose_target_has_gone_goes_to_somebody_else() -> None:
    script = fleet(1, names="abc")
    script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="c")
    script.take(ev.StreamLost(script.now, 3))
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    assert script.core.world.grants[BOOKS].owner in ("a", "b")
    assert script.core.world.grants[BOOKS].epoch == 2


def test_moves_that_can_not_be_are_refused_and_change_nothing() -> None:
    script = fleet(2, names="a")
    script.hello(2, "b", capacity=1)
    script.hello(3, "c")
    script.hello(4, "d")
    script.hello(5, "e")
    script.ask(ev.MoveAssignment, assignment_id="uid-copy.12", replicator="b")
    serving(script, 1)
    script.ask(ev.CordonReplicator, name="c")
    script.take(ev.StreamLost(script.now, 4))
    script.take(ev.Heartbeat(script.now, 5, 2, True))
    stored = dict(script.stored)
    found = {
        name: refused(script.ask(ev.MoveAssignment, assignment_id=key, replicator=name))
        for key, name in (
            (BOOKS, "b"),
            (BOOKS, "c"),
            (BOOKS, "d"),
            (BOOKS, "e"),
            (BOOKS, "nobody"),
            ("uid-copy.99", "a"),
        )
    }
    assert found == {
        "b": ("FAILED_PRECONDITION", "REPLICATOR_FULL", "replicator"),
        "c": ("FAILED_PRECONDITION", "REPLICATOR_CORDONED", "replicator"),
        "d": ("FAILED_PRECONDITION", "REPLICATOR_NOT_ALIVE", "replicator"),
        "e": ("FAILED_PRECONDITION", "REPLICATOR_DRAINING", "replicator"),
        "nobody": ("NOT_FOUND", "REPLICATOR_NOT_FOUND", "replicator"),
        "a": ("NOT_FOUND", "ASSIGNMENT_NOT_FOUND", "name"),
    }
    assert script.stored == stored
    assert not under_way(script)


def test_what_nobody_holds_or_a_silent_one_holds_is_not_moved() -> None:
    script = fleet(1)
    script.take(ev.StreamLost(script.now, 1))
    reply = script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="b")
    assert refused(reply) == ("FAILED_PRECONDITION", "OWNER_SILENT", "name")
    script.hello(3, "a", (ev.Held(BOOKS, 1, 1),))
    script.take(ev.PauseTask(script.now, 90, "tasks/copy", ""))
    script.take(ev.Released(script.now, 3, BOOKS, 1))
    reply = script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="b")
    assert refused(reply) == ("FAILED_PRECONDITION", "ASSIGNMENT_NOT_HELD", "name")


def test_another_process_with_the_same_instance_id_is_refused() -> None:
    script = Script()
    script.hello(1, "a", connects=4)
    script.hello(2, "a", connects=4)
    (closed,) = [e for e in script.last if isinstance(e, fx.CloseStream)]
    assert (closed.stream, closed.reason) == (2, "INSTANCE_IN_USE")
    assert script.core.world.streams == {1: "instance-a"}
    # The same process, connected anew.
    script.hello(3, "a", connects=5)
    assert script.core.world.streams == {3: "instance-a"}


# Labels.


def test_a_task_waits_for_a_replicator_with_its_labels_and_follows_a_change_of_them() -> None:
    script = Script()
    script.core.world.policy = Policy(rebalance=False)
    script.hello(1, "a", labels=(("zone", "x"),))
    script.create(spec(replicator_labels=(("zone", "y"),)))
    script.see(collection(11))
    record = script.core.world.collections["uid-copy"][11]
    assert collection_status(script.core.world, record)[1] == "NO_MATCHING_REPLICATOR"
    script.hello(2, "b", labels=(("disk", "fast"), ("zone", "y")))
    script.pass_time(1_000, beating=(1, 2))
    assert BOOKS in held(script, "b")
    serving(script, 2)
    reply = script.ask(ev.MoveAssignment, assignment_id=BOOKS, replicator="a")
    assert refused(reply) == ("FAILED_PRECONDITION", "LABELS_MISSING", "replicator")
    update = ev.UpdateTask(
        script.now, 50, "tasks/copy", "", None, None, replicator_labels=(("zone", "x"),)
    )
    script.take(update)
    script.pass_time(1_000, beating=(1, 2))
    serving(script, 2)
    assert BOOKS in held(script, "a")


# Evening out.


def settled(script: Script, streams: tuple[int, ...], seconds: int = 1) -> None:
    for _ in range(seconds):
        for stream in streams:
            serving(script, stream)
        script.pass_time(1_000, beating=streams)


def test_after_a_join_the_load_evens_out_by_itself_within_its_budget() -> None:
    policy = Policy(moves_at_once=8, moves_per_minute=2, settle_ms=10_000)
    script = fleet(8, policy=policy)
    settled(script, (1, 2), 9)
    assert len(held(script, "b")) == 0, "it waits until the fleet has settled"
    settled(script, (1, 2), 10)
    assert len(held(script, "b")) == 2, "the budget of a minute"
    settled(script, (1, 2), 130)
    assert len(held(script, "b")) == 3
    epochs = {key: grant.epoch for key, grant in script.core.world.grants.items()}
    settled(script, (1, 2), 130)
    assert {key: g.epoch for key, g in script.core.world.grants.items()} == epochs, "it flaps"


def test_a_person_evens_out_at_once() -> None:
    script = fleet(8)
    assert script.ask(ev.Rebalance, max_moves=3).refusal is None
    settled(script, (1, 2), 5)
    assert len(held(script, "b")) == 3
    script.ask(ev.Rebalance)
    settled(script, (1, 2), 5)
    assert len(held(script, "b")) == 4
    script.ask(ev.Rebalance)
    assert not script.core.world.moves


def test_busy_collections_weigh_more() -> None:
    script = fleet(4)
    at = script.now
    for second in range(60):
        script.at_ms = at.mono_ms + second * 1_000
        counters = script.core.world.progress[BOOKS].current
        rows = replace(counters, rows_inserted=20_000 * second)
        script.report(1, BOOKS, 1, counters=rows)
        script.take(ev.Heartbeat(script.now, 1, 1, False))
        script.take(ev.Heartbeat(script.now, 2, 1, False))
    script.ask(ev.Rebalance)
    settled(script, (1, 2), 10)
    # The busy one is alone: all others together weigh less.
    assert held(script, "b") == {BOOKS}


def test_assignments_at_rest_report_the_more_seldom_the_more_there_are() -> None:
    few, many = Script(), Script()
    for script, number in ((few, 3), (many, 3_000)):
        script.hello(1, "a", capacity=10_000)
        script.create()
        script.see(*(collection(n, f"c{n}") for n in range(1, number + 1)))
        script.pass_time(6_000, beating=(1,))  # they are given in portions
        script.take(ev.Heartbeat(script.now, 1, 1, False))
    assert few.sent(fx.HeartbeatAck)[-1].resting_ms == 3_000
    assert many.sent(fx.HeartbeatAck)[-1].resting_ms > 15_000
