"""Very many collections: an event costs what it changes, and bulk is done in portions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from milvus_cdc_controller.core import assigning, placing, reconcile, status
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.grant import Grant, ReportedState
from milvus_cdc_controller.core.placing import PLACED_AT_ONCE
from milvus_cdc_controller.core.task import TaskState

from tests.unit.controller import world
from tests.unit.controller.world import Script, collection

UID = "uid-copy"
FEW, MANY = 30, 300


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often single assignments are looked at, by what does it."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counting(*args: Any) -> Any:
            counted[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, counting)

    count(assigning, "_settle_collection")
    count(placing, "need_of")
    count(placing, "wanted")
    count(status, "outline")
    count(reconcile, "merge_collection")
    monkeypatch.setattr(world, "agree", lambda *_: None)  # it looks at all
    return counted


def running(number: int) -> Script:
    script = Script()
    for stream, name in enumerate("abc", 1):
        script.hello(stream, name)
    script.create()
    script.see(*(collection(n, f"c{n}") for n in range(1, number + 1)))
    for n in range(1, number + 1):
        report(script, n)
    script.pass_time(1_000, beating=(1, 2, 3))
    assert script.core.world.tasks[UID].state is TaskState.RUNNING
    return script


def report(script: Script, number: int, **other: Any) -> None:
    grant = script.core.world.grants[f"{UID}.{number}"]
    stream = script.core.world.sessions[grant.instance].stream
    script.report(stream, grant.assignment_id, grant.epoch, **other)


@pytest.mark.parametrize("reports", [1, 2])
def test_a_report_costs_the_same_among_few_and_among_many(
    looks: Counter[str], reports: int
) -> None:
    costs = []
    for number in (FEW, MANY):
        script = running(number)
        looks.clear()
        for n in range(1, reports + 1):
            report(script, n, state=ReportedState.RETRYING, reason="SINK_DOWN", message="down")
        assert script.core.world.tasks[UID].reason == "SINK_DOWN"
        costs.append(dict(looks))
    assert costs[0] == costs[1]
    assert sum(costs[1].values()) < 10 * reports


def test_a_new_collection_costs_the_same_among_few_and_among_many(looks: Counter[str]) -> None:
    costs = []
    for number in (FEW, MANY):
        script = running(number)
        collections = [collection(n, f"c{n}") for n in range(1, number + 2)]
        looks.clear()
        script.see(*collections)
        assert f"{UID}.{number + 1}" in script.core.world.grants
        costs.append(looks["_settle_collection"] + looks["outline"])
    assert costs[0] == costs[1]


def test_who_comes_costs_what_he_holds(looks: Counter[str]) -> None:
    script = running(MANY)
    held = sum(g.owner == "a" for g in script.core.world.grants.values())
    script.take(ev.StreamLost(script.now, 1))
    looks.clear()
    script.hello(4, "a", connects=2)
    assert len(script.sent(fx.Assign, 4)) == held
    assert looks["_settle_collection"] <= held


def test_a_tick_at_rest_looks_at_nothing(looks: Counter[str]) -> None:
    script = running(MANY)
    looks.clear()
    script.pass_time(10_000, beating=(1, 2, 3))
    assert not +looks


def test_very_many_are_given_in_portions_that_end() -> None:
    script = running(3)
    number = 2 * PLACED_AT_ONCE  # a whole number of portions: the last one must not ask for more
    script.see(*(collection(n, f"c{n}") for n in range(1, number + 4)))
    given, steps = _given(script), 1
    assert given == PLACED_AT_ONCE
    while script.core.unfinished:
        script.take(ev.Ticked(script.now))
        assert _given(script) <= PLACED_AT_ONCE
        given, steps = given + _given(script), steps + 1
        assert steps <= 4
    assert given == number
    assert not script.core.world.unplaced


def _given(script: Script) -> int:
    return sum(
        isinstance(effect, fx.Save) and isinstance(effect.record, Grant) for effect in script.last
    )


def test_what_finds_no_room_is_given_once_there_is_some() -> None:
    script = Script()
    script.hello(1, "a", capacity=4)  # the databases, too
    script.create()
    script.see(*(collection(n, f"c{n}") for n in range(1, 6)))
    assert len(script.core.world.unplaced[UID]) == 2
    report(script, 1)
    assert len(script.core.world.unplaced[UID]) == 2
    script.hello(2, "b", capacity=1)
    assert len(script.core.world.unplaced[UID]) == 1
    script.hello(3, "c", capacity=9)
    assert not script.core.world.unplaced


def test_a_lost_stream_shows_at_once_on_what_it_held() -> None:
    script = running(FEW)
    script.take(ev.StreamLost(script.now, 1))
    task = script.core.world.tasks[UID]
    assert (task.state, task.reason) == (TaskState.RETRYING, "REPLICATOR_LOST")
    script.hello(4, "a", connects=2)
    assert script.core.world.tasks[UID].state is TaskState.RUNNING


def test_a_collection_that_is_gone_costs_the_same_among_few_and_among_many(
    looks: Counter[str],
) -> None:
    costs = []
    for number in (FEW, MANY):
        script = running(number)
        last = f"{UID}.{number}"
        report(script, number, opened=ev.SinkOpened(99, False, 0))
        script.see(*(collection(n, f"c{n}") for n in range(1, number)))
        point = script.core.world.progress[last].checkpoints[0]
        closed = ev.VchannelReport(point.vchannel, b"end", 10**6, True, 0)
        report(script, number, vchannels=(closed,))
        assert script.core.world.collections[UID][number].drop_granted
        looks.clear()
        report(script, number, dropped=True)
        assert last not in script.core.world.grants
        costs.append(dict(looks))
    assert costs[0] == costs[1]
