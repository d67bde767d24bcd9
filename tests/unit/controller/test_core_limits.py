"""A task's limits, divided among the replicators that hold its collections."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.model import Collection, RateLimits
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.sharing import part

from tests.unit.controller.world import LEASES, Script, collection, spec

UID = "uid-copy"
LIMITED = spec(limits=RateLimits(100, 1001))
NONE = RateLimits()


def told(script: Script, stream: int | None = None) -> list[RateLimits]:
    return [message.limits for message in script.sent(fx.TaskLimits, stream)]


def parts(script: Script) -> dict[str, RateLimits]:
    """What each replicator believes."""
    return {
        session.name: session.parts[UID]
        for session in script.core.world.sessions.values()
        if UID in session.parts
    }


def update(script: Script, limits: RateLimits) -> None:
    script.take(ev.UpdateTask(script.now, 9, "tasks/copy", "", None, None, limits=limits))


def many(number: int) -> list[Collection]:
    return [collection(n, f"c{n}") for n in range(1, number + 1)]


def holders(script: Script) -> set[str]:
    """Of collections; the metadata's owner writes no rows."""
    grants = script.core.world.grants.items()
    return {grant.owner for key, grant in grants if not key.endswith("metadata")}


@given(
    st.builds(RateLimits, st.integers(0, 1 << 40), st.integers(0, 1 << 40)), st.integers(1, 1000)
)
def test_parts_add_up_to_the_whole_and_nobody_stands_still(limits: RateLimits, n: int) -> None:
    one = part(limits, n)
    for whole, each in (
        (limits.rows_per_second, one.rows_per_second),
        (limits.bytes_per_second, one.bytes_per_second),
    ):
        assert (each == 0) == (whole == 0)
        assert n * each <= max(whole, n)
        assert n * (each + 1) > whole


def test_the_only_holder_has_all_and_hears_of_it_before_its_work() -> None:
    script = Script()
    script.hello(1, "a")
    script.create(LIMITED)
    assert told(script) == []
    script.see(collection(1))
    kinds = [type(e.message) for e in script.last if isinstance(e, fx.Send)]
    assert kinds.index(fx.TaskLimits) < kinds.index(fx.Assign)
    assert told(script) == [RateLimits(100, 1001)]
    script.report(1, f"{UID}.1", 1)
    assert told(script) == [], "once"


def test_without_limits_nothing_is_told() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(collection(1))
    assert told(script) == []


def test_parts_follow_the_placement() -> None:
    script = Script()
    for stream, name in ((1, "a"), (2, "b"), (3, "c")):
        script.hello(stream, name)
    script.create(LIMITED)
    script.see(*many(4))
    owners = holders(script)
    assert len(owners) > 1
    assert parts(script) == dict.fromkeys(owners, part(LIMITED.limits, len(owners)))
    # One of them stops in order, and another takes over.
    leaving = min(owners)
    stream = {"a": 1, "b": 2, "c": 3}[leaving]
    script.take(ev.Heartbeat(script.now, stream, 1, True))
    for key, grant in list(script.core.world.grants.items()):
        if grant.owner == leaving:
            script.take(ev.Released(script.now, stream, key, grant.epoch))
    assert leaving not in parts(script)
    owners = holders(script)
    assert parts(script) == dict.fromkeys(owners, part(LIMITED.limits, len(owners)))


def test_a_silent_owner_keeps_its_part_until_its_lease_has_ended() -> None:
    script = Script()
    script.hello(1, "a")
    script.hello(2, "b")
    script.create(LIMITED)
    script.see(*many(6))
    assert holders(script) == {"a", "b"}
    script.take(ev.StreamLost(script.now, 1))
    assert parts(script)["b"] == RateLimits(50, 500)
    script.pass_time(LEASES.ttl_ms - 1_000, beating=(2,))
    assert parts(script)["b"] == RateLimits(50, 500)
    script.pass_time(LEASES.ttl_ms, beating=(2,))
    assert parts(script) == {"b": RateLimits(100, 1001)}


def test_a_change_while_it_runs_reaches_the_holders_alone() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(collection(1))
    generation = script.core.world.tasks[UID].generation
    update(script, RateLimits(rows_per_second=7))
    assert told(script, 1) == [RateLimits(7, 0)]
    assert script.sent(fx.Assign) == [], "contents of assignments are as they were"
    assert script.core.world.tasks[UID].generation == generation + 1
    update(script, NONE)
    assert told(script, 1) == [NONE]
    script.hello(2, "b")
    assert told(script) == []


def test_a_new_stream_hears_it_again_before_the_world_is_told_in_full() -> None:
    script = Script()
    script.hello(1, "a")
    script.create(LIMITED)
    script.see(collection(1))
    held = tuple(ev.Held(key, grant.epoch, 1) for key, grant in script.core.world.grants.items())
    script.take(ev.StreamLost(script.now, 1))
    script.hello(2, "a", held)
    kinds = [type(e.message) for e in script.last if isinstance(e, fx.Send)]
    assert kinds.index(fx.Welcome) < kinds.index(fx.TaskLimits) < kinds.index(fx.Assign)
    assert kinds.index(fx.TaskLimits) < kinds.index(fx.Synced)
    again = Script(script.stored, at_ms=script.at_ms)
    again.hello(1, "a", held)
    assert told(again) == [RateLimits(100, 1001)], "a restarted controller, too"


def test_a_deleted_task_has_no_limits_any_more() -> None:
    script = Script()
    script.hello(1, "a")
    script.create(LIMITED)
    script.see(collection(1))
    script.take(ev.DeleteTask(script.now, 9, "tasks/copy", "", False))
    for key, grant in list(script.core.world.grants.items()):
        script.take(ev.Released(script.now, 1, key, grant.epoch))
    assert UID not in script.core.world.tasks
    assert parts(script) == {}
