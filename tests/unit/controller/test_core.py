"""The core by scripts of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from milvus_cdc.model import Database, ObjectState, Partition
from milvus_cdc.selection import Selection
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.collection import CollectionProgress, CollectionState, Counters
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.status import collection_status
from milvus_cdc_controller.core.task import StartAt, TaskState

from tests.unit.controller.world import SOURCE, Script, collection, dropped, spec

BOOKS = "uid-copy.11"


def running() -> Script:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(collection(11))
    return script


def opened(script: Script, epoch: int = 1, stream: int = 1) -> None:
    script.report(stream, BOOKS, epoch, opened=ev.SinkOpened(99))


def task_state(script: Script) -> tuple[TaskState, str]:
    task = script.core.world.tasks["uid-copy"]
    return task.state, task.reason


def test_owner_and_epoch_are_saved_in_the_step_that_sends_them() -> None:
    script = running()
    saved = {e.key for e in script.last if isinstance(e, fx.Save)}
    assert {f"assignments/{BOOKS}", "collections/uid-copy/11", "checkpoints/uid-copy/11"} <= saved
    (assign,) = [a for a in script.sent(fx.Assign) if a.collection]
    assert (assign.epoch, assign.assignment_id) == (1, BOOKS)


def test_horizons_are_granted_only_to_opened_collections() -> None:
    script = running()
    wish = ev.VchannelReport("dml_3_11v0", b"p", 5, wanted_horizon_ts=100)
    script.report(1, BOOKS, 1, vchannels=(wish,))
    (ack,) = script.sent(fx.ProgressAck)
    assert ack.horizons == (("dml_3_11v0", 0),)
    script.report(1, BOOKS, 1, vchannels=(wish,), opened=ev.SinkOpened(99))
    (ack,) = script.sent(fx.ProgressAck)
    assert ack.horizons == (("dml_3_11v0", 100),)
    (assign,) = script.sent(fx.Assign)
    assert assign.collection is not None
    assert (assign.collection.opened, assign.collection.sink_collection_id) == (True, 99)


def test_an_adopted_collection_begins_with_its_horizon_at_what_may_be_in_it() -> None:
    script = running()
    script.report(1, BOOKS, 1, opened=ev.SinkOpened(99, True, 700))
    (ack,) = script.sent(fx.ProgressAck)
    assert ack.horizons == (("dml_3_11v0", 700),)


def test_a_report_of_another_epoch_or_instance_changes_nothing() -> None:
    script = running()
    script.hello(2, "b")
    before = script.core.world.progress[BOOKS]
    point = ev.VchannelReport("dml_3_11v0", b"p", 50)
    for stream, epoch in ((2, 1), (1, 0), (1, 2)):
        script.report(stream, BOOKS, epoch, vchannels=(point,))
        assert script.core.world.progress[BOOKS] == before
        assert [r.epoch for r in script.sent(fx.Revoke)] == [epoch]
        assert not script.sent(fx.ProgressAck)


def test_progress_never_goes_back() -> None:
    script = running()
    opened(script)
    ahead = ev.VchannelReport("dml_3_11v0", b"p9", 90, wanted_horizon_ts=500)
    back = ev.VchannelReport("dml_3_11v0", b"p1", 10, wanted_horizon_ts=50)
    script.report(1, BOOKS, 1, vchannels=(ahead,))
    script.report(1, BOOKS, 1, vchannels=(back,))
    (point,) = script.core.world.progress[BOOKS].checkpoints
    assert (point.read_from, point.resolved_ts, point.horizon_ts) == (b"p9", 90, 500)


def test_counters_sum_over_epochs() -> None:
    script = running()
    script.report(1, BOOKS, 1, counters=Counters(5))
    script.report(1, BOOKS, 1, counters=Counters(7))
    script.take(ev.Heartbeat(script.now, 1, 1, True))
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    script.hello(2, "b")
    script.report(2, BOOKS, 2, counters=Counters(1, 1))
    totals = script.core.world.progress[BOOKS].totals
    assert (totals.rows_inserted, totals.rows_upserted) == (8, 1)


def test_a_lost_stream_is_no_reason_to_hand_over_and_the_end_of_the_lease_is() -> None:
    script = running()
    script.hello(2, "b")
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(16_900, beating=(2,))
    assert script.core.world.grants[BOOKS].instance == "instance-a"
    assert task_state(script) == (TaskState.RETRYING, "REPLICATOR_LOST")
    script.pass_time(200, beating=(2,))
    assert script.core.world.grants[BOOKS].instance == "instance-b"
    assert script.core.world.grants[BOOKS].epoch == 2


def test_a_controller_restart_moves_nothing() -> None:
    before = running()
    opened(before)
    script = Script(before.stored, at_ms=500_000)
    script.hello(1, "b")
    script.see(collection(11))
    assert not script.sent(fx.Assign)
    script.hello(2, "a", (ev.Held(BOOKS, 1, 2),))
    assigned = {a.assignment_id: a.epoch for a in script.sent(fx.Assign, 2)}
    assert assigned[BOOKS] == 1
    assert not script.sent(fx.Revoke)


def test_after_a_controller_restart_an_absent_owner_keeps_its_work_for_a_lease() -> None:
    script = Script(running().stored, at_ms=500_000)
    script.hello(1, "b")
    script.see(collection(11))
    script.pass_time(16_900, beating=(1,))
    assert script.core.world.grants[BOOKS].epoch == 1
    script.pass_time(200, beating=(1,))
    assert script.core.world.grants[BOOKS].instance == "instance-b"


def test_a_controller_elsewhere_may_have_given_longer_leases() -> None:
    script = Script(running().stored, at_ms=500_000, inherited_ttl_ms=25_000)
    script.hello(1, "b")
    script.see(collection(11))
    script.pass_time(26_900, beating=(1,))
    assert script.core.world.grants[BOOKS].epoch == 1
    script.pass_time(200, beating=(1,))
    assert script.core.world.grants[BOOKS].instance == "instance-b"


def test_a_stale_holder_is_asked_to_let_go_before_it_may_have_it_again() -> None:
    script = running()
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(18_000)
    script.hello(2, "a", (ev.Held(BOOKS, 1, 1), ev.Held("garbage", 4, 4)))
    assert {(r.assignment_id, r.epoch) for r in script.sent(fx.Revoke)} == {
        (BOOKS, 1),
        ("garbage", 4),
    }
    assert BOOKS not in {a.assignment_id for a in script.sent(fx.Assign)}
    script.take(ev.Released(script.now, 2, BOOKS, 1))
    assert [a.epoch for a in script.sent(fx.Assign)] == [2]


def test_drop_waits_until_the_closed_vchannels_are_stored() -> None:
    script = running()
    opened(script)
    script.see(dropped(collection(11)), collection(12))
    (assign,) = [a for a in script.sent(fx.Assign) if a.assignment_id == BOOKS]
    assert assign.collection is not None
    assert (assign.collection.dropping, assign.collection.drop_granted) == (True, False)
    # Not granted yet: its word for a drop counts nothing.
    script.report(1, BOOKS, 1, dropped=True)
    assert 11 in script.core.world.collections["uid-copy"]
    closed = ev.VchannelReport("dml_3_11v0", b"p", 80, True)
    script.report(1, BOOKS, 1, vchannels=(closed,))
    (assign,) = script.sent(fx.Assign)
    assert assign.collection is not None
    assert assign.collection.drop_granted
    waiting = script.core.world.collections["uid-copy"][12]
    assert collection_status(script.core.world, waiting)[:2] == (
        CollectionState.PENDING,
        "WAITING_FOR_NAME",
    )
    script.report(1, BOOKS, 1, dropped=True)
    assert [a.assignment_id for a in script.sent(fx.Assign)] == ["uid-copy.12"]
    assert list(script.core.world.collections["uid-copy"]) == [12]


def test_a_collection_dropped_at_first_sight_is_left_alone() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(dropped(collection(11)))
    assert not script.core.world.collections["uid-copy"]


def test_absence_in_a_trusted_reading_is_a_drop_and_in_a_doubted_one_nothing() -> None:
    script = running()
    opened(script)
    catalogue = script.core.world.sources[SOURCE].catalogue
    assert catalogue is not None
    empty = replace(catalogue, collections=(), revision=9)
    doubt = ev.CatalogueSeen(script.now, SOURCE, empty, False, "SOURCE_METADATA_MISSING", "why")
    script.take(doubt)
    assert task_state(script) == (TaskState.FAILED, "SOURCE_METADATA_MISSING")
    assert BOOKS in {r.assignment_id for r in script.sent(fx.Revoke)}
    assert not script.core.world.collections["uid-copy"][11].dropping
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    # A retry while the source is still in doubt changes nothing.
    script.take(ev.RetryTask(script.now, 9, "tasks/copy", ""))
    assert task_state(script)[0] is TaskState.FAILED
    script.see(collection(11))
    assert script.core.world.grants[BOOKS].epoch == 2
    script.see()
    assert script.core.world.collections["uid-copy"][11].dropping


def test_partitions_once_seen_stay_as_dropped() -> None:
    script = running()
    books = collection(11)
    more = Partition(7, "more", 300)
    script.see(replace(books, partitions=(*books.partitions, more)))
    script.see(books)
    kept = {p.partition_id: p.state for p in script.sent(fx.Assign)[0].collection.want.partitions}  # type: ignore[union-attr]
    assert kept == {1100: ObjectState.CREATED, 7: ObjectState.DROPPED}


def test_the_same_reading_twice_sends_nothing() -> None:
    script = running()
    script.see(collection(11))
    assert not [e for e in script.last if isinstance(e, fx.Send)]


def test_failed_is_taken_from_its_owner_and_retry_goes_on_from_the_checkpoint() -> None:
    script = running()
    opened(script)
    point = ev.VchannelReport("dml_3_11v0", b"p5", 50)
    script.report(
        1, BOOKS, 1, state=ReportedState.FAILED, reason="BAD", message="m", vchannels=(point,)
    )
    assert script.core.world.grants[BOOKS].instance == ""
    assert task_state(script) == (TaskState.RUNNING, "COLLECTIONS_FAILED")
    script.take(ev.RetryTask(script.now, 9, "tasks/copy", "default.books"))
    (assign,) = script.sent(fx.Assign)
    assert assign.epoch == 2
    assert assign.progress is not None
    assert assign.progress.checkpoints[0].read_from == b"p5"


def test_resync_begins_anew_only_when_nobody_writes_any_more() -> None:
    script = running()
    opened(script)
    point = ev.VchannelReport("dml_3_11v0", b"p5", 50, wanted_horizon_ts=900)
    script.report(1, BOOKS, 1, vchannels=(point,))
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "default.books"))
    assert script.sent(fx.Revoke)
    assert script.core.world.progress[BOOKS].checkpoints[0].resolved_ts == 50
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    (assign,) = script.sent(fx.Assign)
    assert assign.collection is not None
    assert assign.progress is not None
    assert (assign.collection.recreate, assign.collection.opened) == (True, False)
    begin = assign.progress.checkpoints[0]
    assert (begin.read_from, begin.resolved_ts, begin.horizon_ts) == (b"start", 0, 0)
    script.report(1, BOOKS, 2, opened=ev.SinkOpened(100))
    assert script.core.world.collections["uid-copy"][11].recreate is False


def test_the_topic_a_position_belongs_to_is_stored_and_stays() -> None:
    script = running()
    opened(script)
    for topic in (b"", b"first", b"second", b""):
        point = ev.VchannelReport("dml_3_11v0", b"p5", 50, incarnation=topic)
        script.report(1, BOOKS, 1, vchannels=(point,))
    stored = script.stored[f"checkpoints/{BOOKS.replace('.', '/')}"]
    assert isinstance(stored, CollectionProgress)
    assert stored.checkpoints[0].incarnation == b"first"
    script.take(ev.Heartbeat(script.now, 1, 1, True))
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    script.hello(2, "b")
    (assign,) = [a for a in script.sent(fx.Assign) if a.collection]
    assert assign.progress is not None
    assert assign.progress.checkpoints[0].incarnation == b"first"
    # The beginning of a collection lies in the topic it was read from, too.
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "default.books"))
    script.take(ev.Released(script.now, 2, BOOKS, 2))
    (assign,) = script.sent(fx.Assign)
    assert assign.progress is not None
    begin = assign.progress.checkpoints[0]
    assert (begin.read_from, begin.incarnation) == (b"start", b"first")


def test_latest_resolves_existing_collections_and_survives_a_restart_meanwhile() -> None:
    script = Script()
    script.create(spec(start=StartAt.LATEST))
    script.see(collection(11))
    assert task_state(script) == (TaskState.CREATING, "NO_REPLICATOR")
    script = Script(script.stored)
    script.see(collection(11), collection(12, "films"))
    script.hello(1, "a")
    (job,) = script.sent(fx.JobRequest)
    assert job.payload == jobs.ResolveJob(b"source", ("dml_3",))
    # Created later: from its beginning, at once.
    assert "uid-copy.12" in {a.assignment_id for a in script.sent(fx.Assign)}
    done = jobs.ResolveDone((("dml_3", b"end", b"topic"),), 0)
    script.take(ev.JobUpdated(script.now, 1, job.job_id, done))
    (assign,) = script.sent(fx.Assign)
    assert assign.progress is not None
    assert assign.progress.checkpoints[0].read_from == b"end"
    assert assign.progress.checkpoints[0].incarnation == b"topic"


def test_an_unprobed_task_is_probed_when_a_replicator_comes() -> None:
    script = Script()
    script.create(probed=False)
    script.see(collection(11))
    assert task_state(script) == (TaskState.CREATING, "NO_REPLICATOR")
    script.hello(1, "a")
    (job,) = script.sent(fx.JobRequest)
    down = jobs.JobFailed("SINK_UNAVAILABLE", "down", transient=True)
    script.take(ev.JobUpdated(script.now, 1, job.job_id, down))
    assert task_state(script) == (TaskState.CREATING, "SINK_UNAVAILABLE")
    again = None
    for _ in range(6):
        script.pass_time(1_000, beating=(1,))
        again = again or next(iter(script.sent(fx.JobRequest)), None)
    assert again is not None
    script.take(ev.JobUpdated(script.now, 1, again.job_id, jobs.ProbeDone("1", "1")))
    assert task_state(script)[0] is TaskState.RUNNING
    assert script.core.world.grants[BOOKS].epoch == 1


def test_databases_are_dropped_after_their_collections() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    db = Database(5, "shop")
    books = collection(11, database="shop", database_id=5)
    default = Database(1, "default")
    script.see(books, databases=(default, db))
    script.report(1, BOOKS, 1, opened=ev.SinkOpened(9))
    script.see(dropped(books), databases=(default,))
    wishes = {d.name: d.dropped for d in script.core.world.metadata["uid-copy"].databases}
    assert wishes == {"default": False, "shop": False}
    closed = ev.VchannelReport("dml_3_11v0", b"p", 80, True)
    script.report(1, BOOKS, 1, vchannels=(closed,))
    script.report(1, BOOKS, 1, dropped=True)
    (assign,) = script.sent(fx.Assign)
    assert assign.metadata is not None
    assert {d.name: d.dropped for d in assign.metadata.databases} == {
        "default": False,
        "shop": True,
    }
    script.report(1, "uid-copy.metadata", 1, applied_version=assign.version)
    wishes = {d.name: d.dropped for d in script.core.world.metadata["uid-copy"].databases}
    assert wishes == {"default": False}


def test_two_tasks_may_not_own_one_sink_object() -> None:
    script = running()
    refused = script.create(spec("tasks/other", selection=Selection(("default.b*",)))).refusal
    assert refused is not None
    assert refused.reason == "SINK_OVERLAP"
    assert ("task", "tasks/copy") in refused.metadata
    assert len(script.core.world.tasks) == 1
    elsewhere = spec("tasks/other", sink_id="another")
    assert script.create(elsewhere).refusal is None


def test_deselecting_lets_go_and_forgets() -> None:
    script = running()
    opened(script)
    script.take(
        ev.UpdateTask(script.now, 9, "tasks/copy", "", None, Selection(("*.*",), ("*.books",)))
    )
    assert script.sent(fx.Revoke)
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    assert not script.core.world.collections["uid-copy"]


def test_delete_ends_when_everybody_has_let_go() -> None:
    script = running()
    script.take(ev.DeleteTask(script.now, 9, "tasks/copy", ""))
    for revoke in script.sent(fx.Revoke):
        script.take(ev.Released(script.now, 1, revoke.assignment_id, revoke.epoch))
    assert script.stored == {}
    assert script.core.world.tasks == {}


def test_nack_for_want_of_room_goes_elsewhere_and_another_fails_the_collection() -> None:
    script = running()
    script.hello(2, "b")
    script.take(ev.Nacked(script.now, 1, BOOKS, 1, 1, "CAPACITY", "full"))
    assert script.core.world.grants[BOOKS].instance == "instance-b"
    script.take(ev.Nacked(script.now, 2, BOOKS, 2, 1, "SINK_UNKNOWN", "no"))
    failure = script.core.world.collections["uid-copy"][11].failure
    assert failure is not None
    assert failure.reason == "SINK_UNKNOWN"


def test_news_that_crosses_a_replicators_stop_fails_nothing_and_moves_only_when_released() -> None:
    """A new version of what it runs may reach a replicator that is stopping already."""
    script = running()
    script.take(ev.Acked(script.now, 1, BOOKS, 1, 1))
    script.hello(2, "b")
    script.take(ev.Nacked(script.now, 1, BOOKS, 1, 1, "DRAINING", "this replicator is stopping"))
    assert script.core.world.collections["uid-copy"][11].failure is None
    assert script.core.world.grants[BOOKS].instance == "instance-a", "it may still write"
    script.take(ev.Released(script.now, 1, BOOKS, 1))
    assert script.core.world.grants[BOOKS].instance == "instance-b"


def test_a_callers_job_fails_with_its_replicator() -> None:
    script = running()
    verify = jobs.VerifyJob(b"", b"", (), 1)
    script.take(ev.JobAsked(script.now, "call/1", verify))
    assert script.sent(fx.JobRequest)
    script.take(ev.StreamLost(script.now, 1))
    (output,) = [e for e in script.last if isinstance(e, fx.JobOutput)]
    assert isinstance(output.result, jobs.JobFailed)
    assert (output.result.reason, output.last) == ("REPLICATOR_LOST", True)
    script.take(ev.JobAsked(script.now, "call/2", verify))
    (output,) = [e for e in script.last if isinstance(e, fx.JobOutput)]
    assert isinstance(output.result, jobs.JobFailed)
    assert output.result.reason == "NO_REPLICATOR"


@pytest.mark.parametrize("kind", ["wrong", "right"])
def test_etag(kind: str) -> None:
    script = running()
    etag = script.core.world.tasks["uid-copy"].etag if kind == "right" else "x"
    script.take(ev.PauseTask(script.now, 9, "tasks/copy", etag))
    refusal = script.reply().refusal
    assert (refusal is None) == (kind == "right")
    if refusal is not None:
        assert (refusal.kind, refusal.reason) == ("ABORTED", "ETAG_MISMATCH")
