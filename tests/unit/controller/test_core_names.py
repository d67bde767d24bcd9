"""Names at a sink, by scripts of events: renames, chains, rings, rules, and crashes in between."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.model import Carry, Collection, Database
from milvus_cdc.selection import Selection
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.collection import CollectionRecord, CollectionState
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.mapping import NameRule
from milvus_cdc_controller.core.names import Claim, Names, alias_owner, collection_owner
from milvus_cdc_controller.core.status import collection_status, rename_pending
from milvus_cdc_controller.core.task import StartAt, TaskSpec
from milvus_cdc_controller.store.records import decode, encode

from tests.unit.controller.world import Script, collection, dropped, spec

UID = "uid-copy"


def books(number: int, name: str, *, alter_ts: int = 0, **other: object) -> Collection:
    return collection(number, name, alter_ts=alter_ts, **other)


def record(script: Script, number: int) -> CollectionRecord:
    return script.core.world.collections[UID][number]


def epoch(script: Script, number: int) -> int:
    return script.core.world.grants[f"{UID}.{number}"].epoch


def say(script: Script, number: int, **other: object) -> None:
    script.report(1, f"{UID}.{number}", epoch(script, number), **other)


def following(*collections: Collection, task: TaskSpec | None = None) -> Script:
    """All of them running, opened as 900 + id."""
    script = Script()
    script.hello(1, "a")
    script.create(task)
    script.see(*collections)
    for each in collections:
        number = each.collection_id
        say(script, number, opened=ev.SinkOpened(900 + number))
    return script


def asked(script: Script, number: int) -> tuple[str, str]:
    """(name at the sink now, name to have) as the last step told the owner; empty if it did not."""
    for assign in script.sent(fx.Assign):
        if assign.collection is not None and assign.collection.collection_id == number:
            told = assign.collection
            return (told.at_sink if told.renaming else "", told.sink_name)
    return ("", "")


def renamed(script: Script, number: int) -> None:
    """The owner has done what it was granted."""
    say(script, number, renamed_to=record(script, number).sink_name)


def moves(script: Script, limit: int = 20) -> dict[int, str]:
    """Everything granted is done, until nothing is left; the names at the end."""
    for _ in range(limit):
        going = [r.collection_id for r in script.core.world.collections[UID].values() if r.renaming]
        if not going:
            break
        names = [r.at_sink for r in script.core.world.collections[UID].values()]
        held = names + [record(script, n).sink_name for n in going]
        assert len(set(held)) == len(held), f"two collections with one name: {held}"
        renamed(script, going[0])
    else:
        raise AssertionError("renaming does not end")
    return {r.collection_id: r.at_sink for r in script.core.world.collections[UID].values()}


def test_a_rename_is_granted_and_the_old_name_kept_until_it_is_done() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b", alter_ts=77))
    assert asked(script, 11) == ("default.a", "default.b")
    assert record(script, 11).rename_ts == 77
    # Its name at the source is free already; at the sink it is not.
    script.see(books(11, "b", alter_ts=77), books(12, "a"))
    waiting = record(script, 12)
    state, reason, message = collection_status(script.core.world, waiting)
    assert (state, reason) == (CollectionState.PENDING, "WAITING_FOR_NAME")
    assert "default.b" in message
    renamed(script, 11)
    assert (record(script, 11).at_sink, record(script, 11).renaming) == ("default.b", False)
    assert script.core.world.grants[f"{UID}.12"].instance


def test_a_word_about_another_name_changes_nothing() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b"))
    say(script, 11, renamed_to="default.x")
    assert record(script, 11).at_sink == "default.a"


def test_a_chain_moves_up_from_its_end() -> None:
    script = following(books(11, "a"), books(12, "b"), books(13, "c"))
    script.see(books(11, "b"), books(12, "c"), books(13, "d"))
    assert [record(script, n).renaming for n in (11, 12, 13)] == [False, False, True]
    assert "is still held by default.c" in rename_pending(script.core.world, record(script, 11))
    assert moves(script) == {11: "default.b", 12: "default.c", 13: "default.d"}


def test_a_ring_is_opened_by_a_name_in_between() -> None:
    script = following(books(11, "a"), books(12, "b"), books(13, "c"))
    script.see(books(11, "b"), books(12, "c"), books(13, "a"))
    assert record(script, 11).sink_name == "default.milvus_cdc_moving_11"
    assert moves(script) == {11: "default.b", 12: "default.c", 13: "default.a"}


def test_a_ring_waits_until_each_of_it_could_move_at_once() -> None:
    script = following(books(11, "a"), books(12, "b"))
    script.see(books(11, "b", alter_ts=50), books(12, "a", alter_ts=60))
    for number, ts in ((11, 50), (12, 59)):
        point = ev.VchannelReport(f"dml_{number % 4}_{number}v0", b"p", ts)
        say(script, number, vchannels=(point,))
        assert not record(script, 11).renaming, "without a name for as long as the other needs"
    say(script, 12, vchannels=(ev.VchannelReport("dml_0_12v0", b"p", 60),))
    assert moves(script) == {11: "default.b", 12: "default.a"}


def test_a_ring_with_a_failed_one_keeps_its_names_until_it_is_retried() -> None:
    script = following(books(11, "a"), books(12, "b"))
    say(script, 12, state=ReportedState.FAILED, reason="BAD", message="m")
    script.see(books(11, "b"), books(12, "a"))
    assert not record(script, 11).renaming
    assert "which has failed: BAD" in rename_pending(script.core.world, record(script, 11))
    script.take(ev.RetryTask(script.now, 9, "tasks/copy", "default.a"))
    assert moves(script) == {11: "default.b", 12: "default.a"}


def test_a_name_renamed_twice_goes_on_from_where_it_is() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b"))
    script.see(books(11, "c"))
    assert record(script, 11).sink_name == "default.b", "the owner may be at it"
    renamed(script, 11)
    assert asked(script, 11) == ("default.b", "default.c")
    renamed(script, 11)
    assert record(script, 11).at_sink == "default.c"


def test_a_crash_between_the_grant_and_its_confirmation_repeats_it() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b"))
    script = Script(script.stored, at_ms=100_000)
    script.hello(1, "a", (ev.Held(f"{UID}.11", 1, 2),))
    assert asked(script, 11) == ("default.a", "default.b")
    # It had been done: the owner says so anew.
    renamed(script, 11)
    script = Script(script.stored, at_ms=200_000)
    script.hello(1, "a", (ev.Held(f"{UID}.11", 1, 3),))
    assert asked(script, 11) == ("", "default.b")


def test_a_drop_on_the_way_is_a_drop_under_both_names() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b"))
    script.see(dropped(books(11, "b")), books(12, "a"), books(13, "b"))
    told = record(script, 11)
    assert (told.dropping, told.renaming) == (True, True)
    assert not record(script, 12).holds_name
    assert not record(script, 13).holds_name
    say(script, 11, vchannels=(ev.VchannelReport("dml_3_11v0", b"p", 90, True),))
    say(script, 11, dropped=True)
    assert record(script, 12).holds_name
    assert record(script, 13).holds_name


def test_the_name_of_one_that_is_dropped_is_taken_after_its_drop() -> None:
    script = following(books(11, "a"), books(12, "b"))
    script.see(dropped(books(11, "a")), books(12, "a"))
    assert not record(script, 12).renaming
    assert "dropped there" in rename_pending(script.core.world, record(script, 12))
    say(script, 11, vchannels=(ev.VchannelReport("dml_3_11v0", b"p", 90, True),))
    say(script, 11, dropped=True)
    assert asked(script, 12) == ("default.b", "default.a")


def test_what_was_never_opened_simply_takes_its_newest_name() -> None:
    script = Script()
    script.create()
    script.see(books(11, "a"), books(12, "b"))
    # Nobody runs them yet: even a ring is no matter.
    script.see(books(11, "b"), books(12, "a"))
    script.hello(1, "a")
    assert (asked(script, 11), asked(script, 12)) == (("", "default.b"), ("", "default.a"))


def test_what_somebody_is_opening_keeps_its_name_until_it_is_opened() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(books(11, "a"))
    script.see(books(11, "b"))
    assert record(script, 11).sink_name == "default.a"
    # Even when that owner dies: it may have made the collection.
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(20_000)
    script.hello(1, "b")
    assert asked(script, 11) == ("", "default.a")
    say(script, 11, opened=ev.SinkOpened(5))
    assert asked(script, 11) == ("default.a", "default.b")


def test_a_failed_beginning_is_tried_again_under_another_name() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(books(11, "a"))
    say(script, 11, state=ReportedState.FAILED, reason="COLLECTION_EXISTS", message="m")
    script.see(books(11, "b"))
    assert asked(script, 11) == ("", "default.b")


def test_a_resync_on_the_way_holds_both_names_until_it_is_opened_anew() -> None:
    script = following(books(11, "a"))
    script.see(books(11, "b"))
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "default.b"))
    script.take(ev.Released(script.now, 1, f"{UID}.11", 1))
    told = record(script, 11)
    assert (told.recreate, told.at_sink, told.sink_name) == (True, "default.a", "default.b")
    say(script, 11, opened=ev.SinkOpened(6))
    told = record(script, 11)
    assert (told.renaming, told.at_sink, told.sink_collection_id) == (False, "default.b", 6)


def test_commands_speak_of_names_at_the_source() -> None:
    script = following(
        books(11, "a"),
        books(12, "b"),
        task=spec(rename=(NameRule("default.*", "copy.x_*"),), selection=Selection(("default.*",))),
    )
    assert record(script, 11).at_sink == "copy.x_a"
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "copy.x_a"))
    assert script.reply().refusal is not None
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "default.a"))
    assert record(script, 11).resync


def test_renamed_out_of_the_selection_is_let_go_and_remembered() -> None:
    script = following(
        books(11, "in_a"), books(12, "in_b"), task=spec(selection=Selection(("default.in_*",)))
    )
    script.see(books(11, "out_a"), books(12, "in_b"))
    assert [r.assignment_id for r in script.sent(fx.Revoke)] == [f"{UID}.11"]
    script.take(ev.Released(script.now, 1, f"{UID}.11", 1))
    assert list(script.core.world.collections[UID]) == [12]
    [left] = script.core.world.tasks[UID].left
    assert (left.source_name, left.sink_name) == ("default.out_a", "default.in_a")
    assert Script(script.stored).core.world.tasks[UID].left == (left,)
    # Back again: followed, and no longer remembered.
    script.see(books(11, "in_c"), books(12, "in_b"))
    assert record(script, 11).sink_name == "default.in_c"
    assert script.core.world.tasks[UID].left == ()


def test_narrowing_the_selection_is_no_leaving() -> None:
    script = following(books(11, "a"))
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, Selection(("default.b",))))
    assert script.sent(fx.Revoke)
    assert script.core.world.tasks[UID].left == ()


def test_start_speaks_of_what_was_selected_and_not_of_what_a_rename_brings() -> None:
    script = Script()
    script.hello(1, "a")
    only = Selection(("default.in_*",))
    script.create(spec(start=StartAt.LATEST, selection=only))
    script.see(books(11, "in_a"), books(12, "out_b"), books(13, "more"))
    assert not record(script, 11).started
    script.see(books(11, "in_a"), books(12, "in_b"), books(13, "more"))
    assert record(script, 12).started, "from its beginning"
    wider = Selection(("default.in_*", "default.more"))
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, wider))
    assert not record(script, 13).started, "it was there when it was selected"


def test_widening_and_narrowing_with_rules() -> None:
    rules = (NameRule("default.a", "default.z"),)
    script = following(books(11, "a"), task=spec(rename=rules, selection=Selection(("default.a",))))
    collides = Selection(("default.*",))
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, collides))
    refusal = script.reply().refusal
    assert refusal is not None
    assert (refusal.kind, refusal.reason) == ("INVALID_ARGUMENT", "NAME_COLLISION")
    wider = Selection(("default.*",), ("default.z",))
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, wider))
    assert script.reply().refusal is None
    script.see(books(11, "a"), books(12, "b"))
    assert {record(script, n).sink_name for n in (11, 12)} == {"default.z", "default.b"}


def test_a_name_that_a_rule_makes_and_milvus_does_not_take_fails_that_collection_alone() -> None:
    script = Script()
    script.hello(1, "a")
    script.create(
        spec(rename=(NameRule("default.t*", "default.*"),), selection=Selection(("default.t*",)))
    )
    script.see(books(11, "t1"), books(12, "tb"))
    assert record(script, 12).holds_name
    failure = record(script, 11).failure
    assert failure is not None
    assert failure.reason == "SINK_NAME_INVALID"
    assert "'1'" in failure.message
    script.see(books(11, "tc"), books(12, "tb"))
    assert (record(script, 11).failure, record(script, 11).sink_name) == (None, "default.c")


def test_databases_follow_the_rules_and_go_when_nothing_of_the_task_is_in_them() -> None:
    rules = (NameRule("shop.orders", "archive.orders"), NameRule("shop.*", "mirror.*"))
    shop = Database(5, "shop")
    orders = books(11, "orders", database="shop", database_id=5)
    users = books(12, "users", database="shop", database_id=5)
    script = Script()
    script.hello(1, "a")
    selection = Selection(("*.*",), ("archive.*", "mirror.*"))
    script.create(spec(rename=rules, selection=selection))

    def wishes() -> dict[str, bool]:
        return {d.name: d.dropped for d in script.core.world.metadata[UID].databases}

    script.see(orders, users, databases=(Database(1, "default"), shop))
    assert wishes() == {"default": False, "archive": False, "mirror": False}
    for number in (11, 12):
        say(script, number, opened=ev.SinkOpened(number))
    # Renamed into another database, and its old one is dropped.
    moved = replace(users, database="blog", database_id=6)
    script.see(dropped(orders), moved, databases=(Database(1, "default"), Database(6, "blog")))
    assert wishes() == {"default": False, "blog": False, "archive": False, "mirror": False}
    renamed(script, 12)
    assert record(script, 12).at_sink == "blog.users"
    assert wishes()["mirror"] is True


def test_tasks_may_not_reach_one_name_by_rules() -> None:
    script = following(books(11, "a"), task=spec(selection=Selection(("default.a*",))))
    other = spec(
        "tasks/other",
        selection=Selection(("shop.*",)),
        rename=(NameRule("shop.*", "default.*"),),
    )
    refusal = script.create(other).refusal
    assert refusal is not None
    assert refusal.reason == "SINK_OVERLAP"
    beside = replace(other, rename=(NameRule("shop.*", "default.b_*"),))
    assert script.create(beside).refusal is None
    assert script.create(replace(other, name="tasks/third", sink_id="else")).refusal is None


def test_what_would_come_back_to_its_source_is_refused() -> None:
    there = spec(selection=Selection(("*.*",), ("back.*",)), source_endpoint="m1", sink_id="m2")
    script = Script()
    assert script.create(there).refusal is None
    back = spec("tasks/back", source_endpoint="m2", sink_id="m1", source_id="other")
    refusal = script.create(back).refusal
    assert refusal is not None
    assert (refusal.reason, refusal.metadata) == ("SELF_FEEDING", (("task", "tasks/copy"),))
    apart = replace(back, selection=Selection(("back.*",)))
    assert script.create(apart).refusal is None
    # A round of three.
    third = spec("tasks/third", selection=Selection(("x.*",)), source_endpoint="m2", sink_id="m3")
    assert script.create(third).refusal is None
    fourth = spec("tasks/fourth", selection=Selection(("x.a",)), source_endpoint="m3", sink_id="m1")
    refusal = script.create(fourth).refusal
    assert refusal is not None
    assert refusal.reason == "SELF_FEEDING"


def test_without_schema_names_at_the_sink_stay() -> None:
    script = following(books(11, "a"), task=spec(carry=Carry(schema=False)))
    script.see(books(11, "b"))
    assert not record(script, 11).renaming
    assert "does not carry `schema`" in rename_pending(script.core.world, record(script, 11))
    carry = ev.UpdateTask(script.now, 9, "tasks/copy", "", None, None, carry=Carry())
    script.take(carry)
    assert moves(script) == {11: "default.b"}


def test_a_record_of_the_format_before_is_where_its_wish_says() -> None:
    script = following(books(11, "a"))
    old = replace(record(script, 11), at_sink="", rename_ts=0)
    key = f"collections/{UID}/11"
    stored = {**script.stored, key: decode(key, encode(old))}
    script = Script(stored, at_ms=100_000)
    script.hello(1, "a")
    assert record(script, 11).at_sink == "default.a"
    script.see(books(11, "b"))
    assert moves(script) == {11: "default.b"}


# Any permutation, in any steps.


@settings(deadline=None, max_examples=40)
@given(st.permutations("abcdef"), st.permutations("abcdefgh"), st.integers(0, 6))
def test_any_reshuffling_of_names_arrives(
    first: list[str], second: list[str], interrupted: int
) -> None:
    numbers = range(11, 17)
    script = following(*(books(n, "abcdef"[n - 11]) for n in numbers))
    script.see(*(books(n, first[n - 11]) for n in numbers))
    for _ in range(interrupted):
        going = [n for n in numbers if record(script, n).renaming]
        if going:
            renamed(script, going[-1])
    script.see(*(books(n, second[n - 11]) for n in numbers))
    assert moves(script, 40) == {n: f"default.{second[n - 11]}" for n in numbers}


def test_aliases_and_collections_claim_names_alike() -> None:
    names = Names()
    one, alias = collection_owner("u", 1), alias_owner("u", "default.x")
    names.put(Claim(one, "s", frozenset({"default.x"})))
    names.put(Claim(alias, "s", waits="default.x", since_ts=5))
    assert (names.ready(), names.rings()) == ([], [])
    names.put(Claim(one, "s", frozenset({"default.x", "default.y"})))
    assert names.ready() == []
    names.put(Claim(one, "s", frozenset({"default.y"})))
    assert [claim.owner for claim in names.ready()] == [alias]
    names.put(Claim(alias, "s", frozenset({"default.x"})))
    names.put(Claim(one, "s", frozenset({"default.y"}), "default.x", 7))
    assert (names.ready(), names.rings()) == ([], [])
    names.drop(alias)
    assert [claim.owner for claim in names.ready()] == [one]
