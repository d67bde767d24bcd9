"""What owners have carried out, and what a task carries, by scripts of events."""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import Carry, Drift, Index, Load, LoadKind
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.collection import Applied, CollectionRecord
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.store.records import decode, encode

from tests.unit.controller.world import Script, collection

UID = "uid-copy"
A, B = (Index(n, name, 101, "v", (), 1) for n, name in ((1, "a"), (2, "b")))


def record(script: Script) -> CollectionRecord:
    return script.core.world.collections[UID][1]


def said(script: Script, **other: object) -> None:
    script.report(1, f"{UID}.1", script.core.world.grants[f"{UID}.1"].epoch, **other)


def running() -> Script:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(collection(1, indexes=(A,)))
    said(script, opened=ev.SinkOpened(901))
    return script


def test_only_the_newest_wish_is_remembered_as_carried_out() -> None:
    script = running()
    assert record(script).applied is None
    said(script, applied_version=record(script).version - 1)
    assert record(script).applied is None
    said(script, applied_version=record(script).version)
    done = record(script).applied
    assert done is not None
    assert done.indexes == (A,)


def test_changes_before_anybody_could_say_so_add_up_until_somebody_does() -> None:
    script = running()
    said(script, applied_version=record(script).version)
    loaded = Load(LoadKind.COLLECTION, (), 1)
    script.see(collection(1, indexes=(A, B), load=loaded))
    script.see(collection(1, indexes=(A,)))
    done = record(script).applied
    assert done is not None
    assert (done.indexes, done.load) == ((A,), Load())
    assert (done.touched_indexes, done.touched_load) == (("b",), True)
    [assign] = script.sent(fx.Assign)[-1:]
    assert assign.collection is not None
    assert assign.collection.applied == done
    stored = decode("collections/x/1", encode(record(script)))
    assert isinstance(stored, CollectionRecord)
    assert stored == record(script)
    said(script, applied_version=record(script).version)
    assert record(script).applied == Applied((A,), Load(), done.partition_ids, 0)


def test_a_change_of_what_is_carried_reaches_every_owner() -> None:
    script = running()
    version = record(script).version
    carry = replace(Carry(), rows=False)
    script.take(
        ev.UpdateTask(script.now, 9, "tasks/copy", "", None, None, carry=carry, drift=Drift.REPORT)
    )
    assert record(script).version == version + 1
    assign = script.sent(fx.Assign)[-1]
    assert assign.task.spec.carry == carry
    assert assign.task.spec.drift is Drift.REPORT


def test_a_retry_tells_owners_in_trouble_to_try_again() -> None:
    script = running()
    version = record(script).version
    said(script, state=ReportedState.RETRYING, reason="SINK_REFUSED", message="an index")
    script.take(ev.RetryTask(script.now, 9, "tasks/copy", ""))
    assert record(script).version == version + 1
    assert script.core.world.grants[f"{UID}.1"].instance, "and goes on meanwhile"


def test_what_is_wrong_with_the_rows_stays_said_until_they_are_brought_anew() -> None:
    script = running()
    said(script, conditions=(("PARTITION_EMPTIED", "p1"), ("DRIFT", "x")))
    said(script, conditions=())
    progress = script.core.world.progress[f"{UID}.1"]
    assert progress.conditions == (("PARTITION_EMPTIED", "p1"),)
