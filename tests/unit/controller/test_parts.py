"""A collection given out in parts: split, taken back for what is no row, and never both at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.model import (
    Index,
    RateLimits,
    Vchannel,
    part_of_assignment,
    split_assignment_id,
)
from milvus_cdc_controller import wire
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import splitting
from milvus_cdc_controller.core.collection import CollectionState, Counters
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.parts import parts_of, points_of
from milvus_cdc_controller.core.status import collection_status, collection_view, task_totals
from milvus_cdc_controller.store.records import decode, encode

from tests.unit.controller.world import Script, collection, spec

WHOLE = "uid-copy.11"
ONE, TWO = f"{WHOLE}-1of2", f"{WHOLE}-2of2"
SHARDS = (Vchannel("dml_0_11v0", "dml_0", b"a"), Vchannel("dml_1_11v1", "dml_1", b"b"))
HOT = replace(collection(11), vchannels=SHARDS)
BOTH = (1, 2)


def whole(**task: Any) -> Script:
    """One of two replicators has it, with everything carried out at the sink."""
    script = Script()
    for stream, name in ((1, "a"), (2, "b")):
        script.hello(stream, name, takes_parts=True)
    script.create(spec(max_parts=2, source=b"", sink=b"", **task))
    script.see(HOT)
    said(script, WHOLE, (50, 50), opened=ev.SinkOpened(99))
    version = script.core.world.collections["uid-copy"][11].version
    said(script, WHOLE, (50, 50), applied_version=version)
    return script


def stream_of(script: Script, key: str) -> int:
    return {"instance-a": 1, "instance-b": 2}[script.core.world.grants[key].instance]


def said(script: Script, key: str, resolved: tuple[int, ...], **other: object) -> None:
    """By its owner, of its own shards."""
    part = part_of_assignment(key)
    own = SHARDS if part is None else SHARDS[part[0] - 1 :: part[1]]
    points = tuple(
        ev.VchannelReport(v.vchannel, b"p%d" % ts, ts, wanted_horizon_ts=ts + 50)
        for v, ts in zip(own, resolved, strict=True)
    )
    grant = script.core.world.grants[key]
    stream = stream_of(script, key)
    script.report(stream, key, grant.epoch, vchannels=points, **other)


def let_go(script: Script, key: str) -> None:
    grant = script.core.world.grants[key]
    script.take(ev.Released(script.now, stream_of(script, key), key, grant.epoch))


def held(script: Script) -> set[str]:
    return {g.assignment_id for g in script.core.world.grants.values() if g.instance} - {
        "uid-copy.metadata"
    }


def divided(**task: Any) -> Script:
    script = whole(**task)
    script.pass_time(4_000, beating=BOTH)
    let_go(script, WHOLE)
    assert held(script) == {ONE, TWO}
    return script


def asked_back(script: Script) -> set[str]:
    return {key for key in held(script) if script.core.world.seen(key).revoking}


def test_ids_say_which_part() -> None:
    assert split_assignment_id(TWO) == ("uid-copy", 11)
    assert (part_of_assignment(TWO), part_of_assignment(WHOLE)) == ((2, 2), None)
    assert part_of_assignment("4f-uid.metadata") is None


def test_two_replicators_get_a_shard_each_when_the_first_has_let_go() -> None:
    script = whole()
    script.pass_time(4_000, beating=BOTH)
    assert (held(script), asked_back(script)) == ({WHOLE}, {WHOLE})
    let_go(script, WHOLE)
    told = script.sent(fx.Assign)
    assert {a.assignment_id for a in told} == {ONE, TWO}
    assert stream_of(script, ONE) != stream_of(script, TWO)
    sent = [wire.response(a, "c", script.core.world.leases, 1000).assign for a in told]
    assert [[v.vchannel for v in a.collection.vchannels] for a in sent] == [
        [v.vchannel] for v in SHARDS
    ]
    assert [a.part.compares for a in sent] == [True, False]
    view = collection_view(script.core.world, script.core.world.collections["uid-copy"][11])
    assert [grant.assignment_id for grant in view.parts] == [ONE, TWO]


@pytest.mark.parametrize("how", ["not asked for", "old replicators", "one shard", "one replicator"])
def test_it_stays_whole_where_it_cannot_be_split(how: str) -> None:
    script = Script()
    for stream, name in ((1, "a"), (2, "b"))[: 1 if how == "one replicator" else 2]:
        script.hello(stream, name, takes_parts=how != "old replicators")
    script.create(spec(max_parts=0 if how == "not asked for" else 2))
    of = replace(HOT, vchannels=SHARDS[:1]) if how == "one shard" else HOT
    script.see(of)
    own = SHARDS[: len(of.vchannels)]
    points = tuple(ev.VchannelReport(v.vchannel, b"p", 50) for v in own)
    stream = stream_of(script, WHOLE)
    version = script.core.world.collections["uid-copy"][11].version + 1
    script.report(stream, WHOLE, 1, opened=ev.SinkOpened(99), vchannels=points)
    script.report(stream, WHOLE, 1, applied_version=version, vchannels=points)
    script.pass_time(10_000, beating=(1, 2) if how != "one replicator" else (1,))
    assert (held(script), asked_back(script)) == ({WHOLE}, set())


def test_shards_that_share_a_topic_stay_together() -> None:
    """A delete of Milvus 2.2 names no shard: a part that has one of two could take that of the
    other for its own.
    """
    script = divided()
    progress = script.core.world.progress[WHOLE]
    task = script.core.world.tasks["uid-copy"]
    one, two = progress.checkpoints
    third = replace(one, vchannel="dml_0_11v2")
    more = replace(progress, checkpoints=(one, two, third))
    assert parts_of(task, more) == (ONE, TWO)
    assert [points_of(key, more) for key in (ONE, TWO)] == [(one, third), (two,)]
    assert parts_of(task, replace(progress, checkpoints=(one, third))) == ()


def test_it_stays_whole_until_each_shard_has_a_checkpoint() -> None:
    """Before the first one the next owner cannot tell which drops of partitions are ahead."""
    script = Script()
    for stream, name in ((1, "a"), (2, "b")):
        script.hello(stream, name, takes_parts=True)
    script.create(spec(max_parts=2, source=b"", sink=b""))
    index = Index(5, "v", 101, "v", (), create_ts=100)
    script.see(replace(HOT, indexes=(index,)))
    said(script, WHOLE, (50, 0), opened=ev.SinkOpened(99))
    said(script, WHOLE, (60, 0))
    script.pass_time(10_000, beating=BOTH)
    assert (held(script), asked_back(script)) == ({WHOLE}, set())
    said(script, WHOLE, (60, 10))
    script.pass_time(2_000, beating=BOTH)
    assert asked_back(script) == {WHOLE}


def test_one_that_cannot_go_on_beyond_its_horizon_is_made_whole_all_the_same() -> None:
    """Ticks pass a horizon, and what comes behind them is older."""
    script = divided()
    for key, shard in ((ONE, SHARDS[0]), (TWO, SHARDS[1])):
        epoch = script.core.world.grants[key].epoch
        point = ev.VchannelReport(shard.vchannel, b"p", 2000)
        now = key == TWO
        script.report(stream_of(script, key), key, epoch, vchannels=(point,), whole_now=now)
    assert asked_back(script) == {ONE, TWO}


def test_parts_are_taken_back_when_all_stand_and_split_again_behind_it() -> None:
    script = divided()
    said(script, ONE, (90,), stands_ts=100)
    assert not asked_back(script)
    said(script, TWO, (80,))
    assert not asked_back(script)
    said(script, TWO, (95,), stands_ts=100)
    assert asked_back(script) == {ONE, TWO}
    let_go(script, ONE)
    assert held(script) == {TWO}
    let_go(script, TWO)
    assert held(script) == {WHOLE}
    said(script, WHOLE, (120, 99))
    script.pass_time(10_000, beating=BOTH)
    assert (held(script), asked_back(script)) == ({WHOLE}, set())
    said(script, WHOLE, (120, 120))
    script.pass_time(2_000, beating=BOTH)
    assert asked_back(script) == {WHOLE}


def test_one_that_has_nothing_to_stand_before_only_has_to_come_as_far() -> None:
    script = divided()
    said(script, ONE, (90,), stands_ts=100)
    said(script, TWO, (100,))
    assert asked_back(script) == {ONE, TWO}


def test_a_controller_that_restarts_in_between_takes_them_back_all_the_same() -> None:
    before = divided()
    said(before, ONE, (90,), stands_ts=100)
    script = Script(before.stored)
    assert held(script) == {ONE, TWO}
    for stream, name in ((1, "a"), (2, "b")):
        key = next(k for k in (ONE, TWO) if script.core.world.grants[k].owner == name)
        epoch = script.core.world.grants[key].epoch
        script.hello(stream, name, (ev.Held(key, epoch, 1),), takes_parts=True)
    said(script, TWO, (95,), stands_ts=100)
    assert not asked_back(script)
    said(script, ONE, (90,), stands_ts=100)
    assert asked_back(script) == {ONE, TWO}
    again = Script(script.stored)
    again.pass_time(1_000)
    assert asked_back(again) == {ONE, TWO}


def test_a_lost_part_is_followed_by_the_whole_and_recounted_before_it_is_split_again() -> None:
    script = divided()
    said(script, ONE, (90,))
    said(script, TWO, (90,))
    lost, other = (ONE, TWO) if stream_of(script, ONE) == 1 else (TWO, ONE)
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(17_500, beating=(2,))
    assert (held(script), asked_back(script)) == ({other}, {other})
    assert lost not in held(script)
    let_go(script, other)
    assert held(script) == {WHOLE}
    recount = script.core.world.progress[WHOLE].recount
    assert recount is not None
    assert {vchannel for vchannel, _, _ in recount.starts} == {v.vchannel for v in SHARDS}
    script.pass_time(10_000, beating=(2,))
    assert (held(script), asked_back(script)) == ({WHOLE}, set())


def test_a_process_that_comes_back_with_a_part_keeps_the_whole_waiting() -> None:
    script = divided()
    first = stream_of(script, ONE)
    epoch = script.core.world.grants[ONE].epoch
    script.take(ev.StreamLost(script.now, first))
    script.pass_time(17_500, beating=(3 - first,))
    name = "a" if first == 1 else "b"
    script.hello(first + 2, name, (ev.Held(ONE, epoch, 1),), takes_parts=True)
    let_go(script, TWO)
    assert held(script) == set()
    script.take(ev.Released(script.now, first + 2, ONE, epoch))
    assert held(script) == {WHOLE}


def test_one_that_cannot_go_on_needs_no_others_to_stand() -> None:
    script = divided()
    said(script, ONE, (90,))
    said(script, TWO, (70,), whole_now=True)
    assert asked_back(script) == {ONE, TWO}
    assert script.core.world.progress[WHOLE].whole_until_ts == 140


def test_pausing_dropping_and_leaving_the_split_take_parts_back() -> None:
    pausing = divided()
    pausing.ask(ev.PauseTask, name="tasks/copy", etag="")
    assert asked_back(pausing) == {ONE, TWO}
    dropping = divided()
    dropping.see()
    assert asked_back(dropping) == {ONE, TWO}
    leaving = divided()
    leaving.ask(ev.UpdateTask, name="tasks/copy", etag="", labels=None, selection=None, max_parts=0)
    assert asked_back(leaving) == {ONE, TWO}
    let_go(leaving, ONE)
    let_go(leaving, TWO)
    assert held(leaving) == {WHOLE}


def test_a_part_without_an_owner_makes_it_whole_again() -> None:
    script = divided()
    said(script, ONE, (90,))
    said(script, TWO, (90,))
    gone = stream_of(script, TWO)
    script.ask(ev.CordonReplicator, name="a")
    script.ask(ev.CordonReplicator, name="b")
    let_go(script, TWO)
    record = script.core.world.collections["uid-copy"][11]
    assert collection_status(script.core.world, record)[:2] == (
        CollectionState.PENDING,
        "NO_CAPACITY",
    )
    assert script.core.world.unplaced == {"uid-copy": {11: [TWO]}}
    script.pass_time(17_000, beating=BOTH)
    assert asked_back(script) == {ONE}
    script.ask(ev.UncordonReplicator, name="a" if gone == 2 else "b")
    let_go(script, ONE)
    assert held(script) == {WHOLE}
    assert not script.core.world.unplaced


def share_of(script: Script, key: str) -> int:
    session = script.core.world.sessions[script.core.world.grants[key].instance]
    return session.parts["uid-copy"].requests_in_flight


def test_limits_are_divided_among_those_that_have_parts() -> None:
    script = whole(limits=RateLimits(requests_in_flight=4))
    assert share_of(script, WHOLE) == 4
    script.pass_time(4_000, beating=BOTH)
    let_go(script, WHOLE)
    assert (held(script), share_of(script, ONE), share_of(script, TWO)) == ({ONE, TWO}, 2, 2)
    said(script, ONE, (70,), whole_now=True)
    let_go(script, ONE)
    let_go(script, TWO)
    assert (held(script), share_of(script, WHOLE)) == ({WHOLE}, 4)


def test_what_may_be_with_one_replicator_is_not_split() -> None:
    one = whole(limits=RateLimits(connections=1))
    one.pass_time(10_000, beating=BOTH)
    assert (held(one), asked_back(one)) == ({WHOLE}, set())
    script = whole(limits=RateLimits(connections=2))
    script.hello(3, "c", takes_parts=True)
    script.pass_time(4_000, beating=(1, 2, 3))
    let_go(script, WHOLE)
    assert held(script) == {ONE, TWO}
    assert len(script.core.world.holders("uid-copy")) == 2


def test_parts_that_may_be_with_one_replicator_only_come_together() -> None:
    script = divided(limits=RateLimits(connections=2))
    said(script, ONE, (60,))
    said(script, TWO, (60,))
    script.ask(
        ev.UpdateTask,
        name="tasks/copy",
        etag="",
        labels=None,
        selection=None,
        limits=RateLimits(connections=1),
    )
    script.pass_time(2_000, beating=BOTH)
    [moving] = asked_back(script)
    let_go(script, moving)
    assert held(script) == {ONE, TWO}
    assert stream_of(script, ONE) == stream_of(script, TWO)


def test_a_task_counts_a_collection_once_and_is_as_far_behind_as_the_last_part() -> None:
    script = divided()
    said(script, ONE, (60,), lag_ms=5)
    assert task_totals(script.core.world, "uid-copy").running == 0
    said(script, TWO, (60,), lag_ms=7)
    totals = task_totals(script.core.world, "uid-copy")
    assert (totals.collections, totals.running, totals.lag_ms) == (1, 1, 7)
    said(script, TWO, (61,), lag_ms=3)
    assert task_totals(script.core.world, "uid-copy").lag_ms == 5
    said(script, TWO, (61,), state=ReportedState.RETRYING)
    standing = script.core.world.standing["uid-copy"]
    assert (set(standing.running), standing.retrying) == (set(), {11})


def test_a_look_is_at_so_many_and_all_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def look(_world: Any, _task: Any, record: Any) -> bool:
        looked_at.append(record.collection_id)
        return False

    monkeypatch.setattr(splitting, "LOOKED_AT_ONCE", 2)
    monkeypatch.setattr(splitting, "_may_be_split", look)
    script = Script()
    script.hello(1, "a", takes_parts=True)
    script.hello(2, "b", takes_parts=True)
    script.create(spec(max_parts=2))
    script.see(*(collection(number, f"c{number}") for number in (11, 12, 13)))
    for number in (11, 12, 13):
        key = f"uid-copy.{number}"
        script.report(stream_of(script, key), key, 1, opened=ev.SinkOpened(99))
    script.pass_time(3_000, beating=BOTH)
    assert [looked_at.count(number) for number in (11, 12, 13)] == [2, 2, 2]


def test_a_part_is_not_moved_to_an_older_replicator() -> None:
    script = divided()
    script.hello(3, "c")
    reply = script.ask(ev.MoveAssignment, assignment_id=ONE, replicator="c")
    assert reply.refusal is not None
    assert reply.refusal.reason == "TAKES_NO_PARTS"


def test_what_found_no_other_replicator_is_split_when_one_comes() -> None:
    script = whole()
    script.ask(ev.CordonReplicator, name="b" if stream_of(script, WHOLE) == 1 else "a")
    script.pass_time(20_000, beating=BOTH)
    assert asked_back(script) == set()
    script.hello(3, "c")
    script.pass_time(10_000, beating=(1, 2, 3))
    assert asked_back(script) == set()
    script.hello(4, "d", takes_parts=True)
    script.pass_time(6_000, beating=(1, 2, 3, 4))
    assert asked_back(script) == {WHOLE}


def test_counters_of_parts_and_wholes_add_up() -> None:
    script = whole()
    said(script, WHOLE, (50, 50), counters=Counters(10))
    script.pass_time(4_000, beating=BOTH)
    let_go(script, WHOLE)
    said(script, ONE, (60,), counters=Counters(1))
    said(script, TWO, (60,), counters=Counters(2), conditions=(("RATE_LIMITED", "slow"),))
    said(script, ONE, (70,), counters=Counters(3))
    progress = script.core.world.progress[WHOLE]
    assert (progress.totals.rows_inserted, progress.conditions) == (15, (("RATE_LIMITED", "slow"),))
    assert task_totals(script.core.world, "uid-copy").counters == progress.totals
    assert decode("checkpoints/uid-copy/11", encode(progress)) == progress
    assert b'"format_version":9' in encode(progress)
    said(script, ONE, (90,), stands_ts=100, counters=Counters(3))
    said(script, TWO, (90,), stands_ts=100, counters=Counters(2))
    let_go(script, ONE)
    let_go(script, TWO)
    said(script, WHOLE, (110, 110), counters=Counters(5))
    progress = script.core.world.progress[WHOLE]
    assert (progress.totals.rows_inserted, progress.conditions) == (20, ())


def test_what_is_stored_of_a_task_without_parts_is_read_by_the_version_before() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(HOT)
    for record in script.stored.values():
        assert b'"format_version":8' in encode(record)
        assert b"parts" not in encode(record)
        assert b"whole_until" not in encode(record)
