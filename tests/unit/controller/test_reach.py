"""Tasks that could meet at a sink are found without looking at all; freed room is used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.selection import Selection, overlap
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.reach import Reach
from milvus_cdc_controller.core.task import TaskSpec

from tests.unit.controller.world import Script, spec

GLOBS = st.sampled_from(["*.*", "a.*", "a.b", "a.b?", "a.bc", "b.b", "?.b", "b.*", "b.bc"])
SPECS = st.builds(
    lambda include, sink: spec(selection=Selection(tuple(include)), sink_id=sink),
    st.lists(GLOBS, min_size=1, max_size=3),
    st.sampled_from(["one", "two"]),
)
CHANGES = st.lists(st.tuples(st.sampled_from("uvwxyz"), st.none() | SPECS), max_size=20)


@given(CHANGES, SPECS)
def test_nobody_who_meets_a_selection_is_missed(
    changes: list[tuple[str, TaskSpec | None]], new: TaskSpec
) -> None:
    reach, now = Reach(), dict[str, TaskSpec]()
    for uid, task in changes:
        if task is None:
            reach.drop(uid)
            now.pop(uid, None)
        else:
            reach.put(uid, task)
            now[uid] = task
    meeting = {
        uid
        for uid, task in now.items()
        if task.sink_id == new.sink_id and overlap(new.selection, task.selection)
    }
    found = reach.candidates(new)
    assert meeting <= set(found) <= now.keys()
    assert len(found) == len(set(found))


def test_a_task_that_found_no_room_gets_it_when_another_is_gone() -> None:
    script = Script()
    script.create(spec("tasks/a", selection=Selection(("default.a",))))
    script.create(spec("tasks/b", selection=Selection(("default.b",))))
    script.see()
    script.take(ev.Hello(script.now, 1, "r", "instance-r", "1", "peer", 1, 1, ()))
    owned = {g.assignment_id: g for g in script.core.world.grants.values() if g.instance}
    assert len(owned) == 1
    (held,) = owned.values()
    task = script.core.world.tasks[held.assignment_id.rpartition(".")[0]]
    script.take(ev.DeleteTask(script.now, 9, task.spec.name, "", False))
    script.take(ev.Released(script.now, 1, held.assignment_id, held.epoch))
    now = {g.assignment_id for g in script.core.world.grants.values() if g.instance}
    assert len(now) == 1
    assert now.isdisjoint(owned)
