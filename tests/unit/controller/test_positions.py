"""Positions set by hand, and the watch over those that nobody reads from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.collection import CollectionState
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.positions import retention_of
from milvus_cdc_controller.core.retention import Retention, least
from milvus_cdc_controller.core.status import collection_status
from milvus_cdc_controller.core.task import TaskState
from milvus_cdc_controller.core.world import World

from tests.unit.controller.test_core import BOOKS, opened, running
from tests.unit.controller.world import Script, collection

SHARD = "dml_3_11v0"
OLD = ev.VchannelReport(
    SHARD, b"p5", 50, wanted_horizon_ts=900, incarnation=b"topic", retention=Retention(90_000)
)


def paused() -> Script:
    """One collection at (p5, 50) with horizon 900; released."""
    script = running()
    opened(script)
    script.report(1, BOOKS, 1, vchannels=(OLD,))
    script.take(ev.PauseTask(script.now, 1, "tasks/copy", ""))
    return script


def let_go(script: Script) -> None:
    for key in (BOOKS, "uid-copy.metadata"):
        script.take(ev.Released(script.now, 1, key, 1))


def at_rest() -> Script:
    script = paused()
    let_go(script)
    assert script.core.world.tasks["uid-copy"].state is TaskState.PAUSED
    return script


def place(vchannel: str = SHARD, **other: object) -> jobs.Located:
    return replace(jobs.Located(vchannel, b"p2", 20, b"topic"), **other)  # type: ignore[arg-type]


def set_to(script: Script, *places: jobs.Located, etag: str = "") -> fx.Reply:
    script.take(ev.SetPositions(script.now, 5, "tasks/copy", etag, places))
    return script.reply()


def test_going_back_keeps_the_horizon_and_is_what_the_next_owner_gets() -> None:
    script = at_rest()
    before = script.core.world.tasks["uid-copy"].etag
    reply = set_to(script, place())
    assert reply.refusal is None
    assert reply.task is not None
    assert reply.task.etag != before
    assert "checkpoints/uid-copy/11" in {e.key for e in script.last if isinstance(e, fx.Save)}
    script.take(ev.ResumeTask(script.now, 6, "tasks/copy", ""))
    (assign,) = [a for a in script.sent(fx.Assign) if a.collection]
    assert assign.progress is not None
    (point,) = assign.progress.checkpoints
    assert (point.read_from, point.resolved_ts, point.horizon_ts) == (b"p2", 20, 900)
    assert (assign.epoch, point.incarnation) == (2, b"topic")
    # A late word of the owner before does not bring the old place back.
    script.report(1, BOOKS, 1, vchannels=(OLD,))
    assert script.core.world.progress[BOOKS].checkpoints == (point,)


def test_nothing_is_set_while_somebody_may_still_write_or_read() -> None:
    for script in (running(), paused()):
        before = script.core.world.progress[BOOKS]
        reply = set_to(script, place())
        assert reply.refusal is not None
        assert reply.refusal.reason == "TASK_NOT_PAUSED"
        assert script.core.world.progress[BOOKS] == before


def test_one_bad_place_keeps_all_from_being_set() -> None:
    script = at_rest()
    script.see(collection(11), collection(12, "films"))
    before = dict(script.core.world.progress)
    for places, reason in (
        ((place(), place("dml_0_99v0")), "UNKNOWN_VCHANNEL"),
        ((place(), place("dml_0_12v0", reason="")), ""),
    ):
        reply = set_to(script, *places)
        assert (reply.refusal.reason if reply.refusal else "") == reason
        if reason:
            assert script.core.world.progress == before
    assert set_to(script, place(), etag="old").refusal is not None


def test_what_is_filled_anew_or_dropped_takes_no_position() -> None:
    script = at_rest()
    script.take(ev.ResyncCollection(script.now, 3, "tasks/copy", "default.books"))
    refusal = set_to(script, place()).refusal
    assert refusal is not None
    assert refusal.reason == "COLLECTION_RESYNCING"


def test_another_position_leads_out_of_a_lost_one_only() -> None:
    for reason, left in (("LOG_TRUNCATED", None), ("SCHEMA_MISMATCH", "SCHEMA_MISMATCH")):
        script = running()
        opened(script)
        failed = ReportedState.FAILED
        script.report(1, BOOKS, 1, state=failed, reason=reason, message="m", vchannels=(OLD,))
        script.take(ev.PauseTask(script.now, 1, "tasks/copy", ""))
        let_go(script)
        assert set_to(script, place()).refusal is None
        failure = script.core.world.collections["uid-copy"][11].failure
        assert (failure.reason if failure else None) == left


def look(script: Script) -> jobs.LocateJob:
    """The job that looks after what rests."""
    for _ in range(70):
        script.pass_time(1_000, beating=(1,))
        for request in script.sent(fx.JobRequest):
            if isinstance(request.payload, jobs.LocateJob):
                script.job_id = request.job_id  # type: ignore[attr-defined]
                return request.payload
    pytest.fail("nobody looks")


def answer(script: Script, *located: jobs.Located) -> None:
    job_id = script.job_id  # type: ignore[attr-defined]
    script.take(ev.JobUpdated(script.now, 1, job_id, jobs.LocateDone(located)))


def status(world: World) -> tuple[CollectionState, str]:
    state, reason, _ = collection_status(world, world.collections["uid-copy"][11])
    return state, reason


def test_a_place_lost_while_paused_fails_the_collection_then_and_there() -> None:
    script = at_rest()
    world = script.core.world
    (target,) = look(script).targets
    assert (target.read_from, target.resolved_ts, target.incarnation) == (b"p5", 50, b"topic")
    assert target.stored
    answer(script, place(read_from=b"p5", retention=Retention(10_000, -1, 100_000)))
    assert status(world) == (CollectionState.PAUSED, "")
    assert retention_of(world, world.progress[BOOKS], BOOKS).low(0.2)
    look(script)
    answer(script, place(reason="LOG_TRUNCATED", message="the first one is 9"))
    assert status(world) == (CollectionState.FAILED, "LOG_TRUNCATED")
    record = world.collections["uid-copy"][11]
    assert record.failure is not None
    assert "the first one is 9. Resync" in record.failure.message
    assert world.tasks["uid-copy"].state is TaskState.PAUSED


def test_an_answer_about_another_place_or_a_collection_taken_meanwhile_counts_for_nothing() -> None:
    script = at_rest()
    look(script)
    set_to(script, place())
    answer(script, place(reason="LOG_TRUNCATED"))
    assert status(script.core.world) == (CollectionState.PAUSED, "")
    look(script)
    script.take(ev.ResumeTask(script.now, 6, "tasks/copy", ""))
    answer(script, place(reason="LOG_TRUNCATED"))
    assert script.core.world.collections["uid-copy"][11].failure is None


def test_the_look_goes_on_after_its_replicator_was_lost_and_nobody_is_asked_while_all_is_read() -> (
    None
):
    script = at_rest()
    look(script)
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(60_000)
    script.hello(1, "a")
    look(script)
    script = running()
    opened(script)
    for _ in range(130):
        script.pass_time(1_000, beating=(1,))
        assert not script.sent(fx.JobRequest)


def test_time_left_runs_out_whether_anybody_looks_or_not() -> None:
    script = at_rest()
    world = script.core.world
    progress = world.progress[BOOKS]
    assert retention_of(world, progress, BOOKS).left_ms == 90_000
    script.pass_time(30_000, beating=(1,))
    assert retention_of(world, progress, BOOKS).left_ms == 60_000
    script.pass_time(90_000, beating=(1,))
    assert retention_of(world, progress, BOOKS).left_ms == 0


def test_low_is_a_part_of_either_limit() -> None:
    assert not Retention(21, -1, 100).low(0.2)
    assert Retention(19, -1, 100).low(0.2)
    assert Retention(90, 19, 100, 100).low(0.2)
    assert not Retention().low(0.2)
    both = least((Retention(50, 10, 100, 100), Retention(30, 40, 100, 100), Retention()))
    assert (both.left_ms, both.left_bytes) == (30, 10)


def test_a_replicator_is_lost_that_looks_at_places_of_a_task_just_deleted() -> None:
    script = Script()
    script.hello(1, "a")
    script.create()
    script.see(collection(11))
    script.ask(ev.PauseTask, name="tasks/copy", etag="")
    for key in ("uid-copy.11", "uid-copy.metadata"):
        script.take(ev.Released(script.now, 1, key, 1))
    script.pass_time(1_000, beating=(1,))
    assert [job.task_uid for job in script.core.world.jobs.values()] == ["uid-copy"]
    script.ask(ev.DeleteTask, name="tasks/copy", etag="")
    assert not script.core.world.tasks
    script.take(ev.StreamLost(script.now, 1))
    assert not script.core.world.jobs
