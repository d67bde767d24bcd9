"""The controller's core keeps the log of every task, and no longer than any of them needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.hold import HoldRecord
from milvus_cdc_controller.core.holding import trouble
from milvus_cdc_controller.core.jobs import (
    HoldDone,
    HoldJob,
    HoldSeen,
    JobFailed,
    ResolveDone,
    ResolveJob,
)
from milvus_cdc_controller.core.status import collection_status
from milvus_cdc_controller.core.task import StartAt, TaskState

from tests.unit.controller.world import Script, collection, spec

LOG = "log-id"


def held(name: str = "tasks/copy", **other: Any) -> Any:
    return spec(name, **{"held_log": LOG, **other})


def jobs(script: Script, kind: type[Any] = HoldJob) -> list[fx.JobRequest]:
    return [job for job in script.sent(fx.JobRequest) if isinstance(job.payload, kind)]


def holds(script: Script) -> list[HoldRecord]:
    return [record for record in script.stored.values() if isinstance(record, HoldRecord)]


def done(script: Script, job: fx.JobRequest, stream: int = 1, **wrong: str) -> None:
    """The job ends; `wrong` names what went wrong on a pchannel."""
    assert isinstance(job.payload, HoldJob)
    seen = tuple(
        HoldSeen(p.pchannel, p.name, 1, 10, reason=wrong.get(p.pchannel, ""), message="why")
        for p in job.payload.places
    )
    script.take(ev.JobUpdated(script.now, stream, job.job_id, HoldDone(seen)))


def keeps(job: fx.JobRequest) -> dict[str, tuple[bytes, ...]]:
    assert isinstance(job.payload, HoldJob)
    return {p.pchannel: p.keep_from for p in job.payload.places if not p.release}


def releases(job: fx.JobRequest) -> list[tuple[str, str]]:
    assert isinstance(job.payload, HoldJob)
    return [(p.pchannel, p.name) for p in job.payload.places if p.release]


def assigned(script: Script) -> list[fx.Assign]:
    return [each for each in script.sent(fx.Assign) if each.collection is not None]


def next_round(script: Script, *beating: int) -> fx.JobRequest:
    """The next job for holds, however long it takes."""
    for _ in range(130):
        script.at_ms += 1_000
        for stream in beating or (1,):
            script.take(ev.Heartbeat(script.now, stream, 1, False))
            if found := jobs(script):
                return found[0]
        script.take(ev.Ticked(script.now))
        if found := jobs(script):
            return found[0]
    raise AssertionError("no round")


def begun(**other: Any) -> Script:
    """One collection from the beginning, held and assigned."""
    script = Script()
    script.hello(1, "r1")
    script.create(held(**other))
    script.see(collection(1))
    (job,) = jobs(script)
    done(script, job)
    assert assigned(script)
    return script


def report(script: Script, position: bytes, ts: int = 5, epoch: int = 1) -> None:
    shard = ev.VchannelReport("dml_1_1v0", position, ts)
    script.report(1, "uid-copy.1", epoch, vchannels=(shard,))


def test_nothing_is_assigned_before_its_log_is_held() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(held())
    script.see(collection(1))
    (job,) = jobs(script)
    assert keeps(job) == {"dml_1": (b"start",)}
    assert not assigned(script)
    record = script.core.world.collections["uid-copy"][1]
    assert collection_status(script.core.world, record)[1] == "WAITING_FOR_HOLD"
    (stored,) = holds(script)
    assert (stored.pchannel, stored.name) == ("dml_1", job.payload.places[0].name)  # type: ignore[union-attr]
    done(script, job)
    (assign,) = assigned(script)
    assert assign.assignment_id == "uid-copy.1"


def test_the_end_of_the_log_is_looked_up_once_it_is_held() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(held(start=StartAt.LATEST))
    script.see(collection(1))
    (job,) = jobs(script)
    assert keeps(job) == {"dml_1": ()}
    assert not jobs(script, ResolveJob)
    done(script, job)
    (resolve,) = jobs(script, ResolveJob)
    # While it is looked up, nothing moves up, whatever other tasks have read.
    assert keeps(next_round(script)) == {"dml_1": ()}
    (other,) = [job for job in script.core.world.jobs.values() if job.log_id]
    ends = ResolveDone((("dml_1", b"end", b""),), 0)
    script.take(ev.JobUpdated(script.now, 1, resolve.job_id, ends))
    # The round under way began before: it has not kept this place.
    script.take(ev.JobUpdated(script.now, 1, other.job_id, HoldDone((HoldSeen("dml_1", "x"),))))
    assert not assigned(script)
    (job,) = jobs(script)
    assert keeps(job) == {"dml_1": (b"end",)}
    done(script, job)
    assert assigned(script)


def test_a_task_without_a_replicator_waits_for_the_first_one_alone() -> None:
    script = Script()
    script.create(held())
    script.see(collection(1))
    script.pass_time(10_500)
    script.hello(1, "r1")
    assert jobs(script)


def test_a_task_without_holds_needs_none() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(spec())
    script.see(collection(1))
    assert not jobs(script)
    assert assigned(script)


def test_holds_follow_a_round_behind_and_stay_for_paused_and_failed() -> None:
    script = begun()
    report(script, b"pos-7")
    assert keeps(next_round(script)) == {"dml_1": (b"pos-7", b"start")}
    done(script, jobs(script)[0])
    assert keeps(next_round(script)) == {"dml_1": (b"pos-7",)}
    done(script, jobs(script)[0])
    script.ask(ev.PauseTask, name="tasks/copy", etag="")
    assert keeps(next_round(script)) == {"dml_1": (b"pos-7",)}
    done(script, jobs(script)[0])
    assert script.core.world.tasks["uid-copy"].paused


def test_the_lowest_of_all_tasks_counts() -> None:
    script = begun()
    report(script, b"pos-7")
    script.create(held("tasks/other", sink_id="another"))
    (job,) = jobs(script)
    assert keeps(job) == {"dml_1": (b"pos-7", b"start")}
    assert len(holds(script)) == 1


def test_nothing_moves_while_the_metadata_cannot_be_read() -> None:
    script = begun()
    script.take(ev.SourceUnavailable(script.now, "source-id", "ETCD_UNREACHABLE", "away"))
    assert keeps(next_round(script)) == {"dml_1": ()}


def test_the_last_deletion_removes_the_hold_without_its_replicator_and_after_a_restart() -> None:
    script = begun()
    script.ask(ev.DeleteTask, name="tasks/copy", etag="", allow_missing=False)
    script.take(ev.StreamLost(script.now, 1))
    assert not jobs(script)
    again = Script(script.stored, at_ms=script.at_ms)  # the controller starts anew
    again.pass_time(20_000)  # the replicator's lease has ended
    assert not again.core.world.tasks
    (left,) = holds(again)
    again.hello(2, "r2")
    job = next_round(again, 2)
    assert releases(job) == [("dml_1", left.name)]
    done(again, job, 2, dml_1="PULSAR_UNREACHABLE")
    assert holds(again), "not forgotten before it is gone"
    job = next_round(again, 2)
    done(again, job, 2)
    # What the first controller had asked for could still be carried out by somebody.
    assert holds(again)
    job = next_round(again, 2)
    assert again.at_ms >= 120_000
    done(again, job, 2)
    assert not holds(again)
    again.pass_time(60_000, beating=(2,))
    assert not again.core.world.jobs


def test_a_clean_deletion_is_forgotten_at_once_and_the_next_hold_has_another_name() -> None:
    script = begun()
    (first,) = holds(script)
    script.ask(ev.DeleteTask, name="tasks/copy", etag="", allow_missing=False)
    for grant in list(script.core.world.grants.values()):
        if grant.instance:
            script.take(ev.Released(script.now, 1, grant.assignment_id, grant.epoch))
    (job,) = jobs(script)
    assert releases(job) == [("dml_1", first.name)]
    script.create(held("tasks/next"))
    done(script, job)
    script.see(collection(1))
    (second,) = holds(script)
    assert second.name != first.name
    assert script.core.world.tasks["uid-next"].state is not TaskState.FAILED


def test_a_deletion_during_a_round_is_seen_to_right_after_it() -> None:
    script = begun()
    job = next_round(script)
    script.ask(ev.DeleteTask, name="tasks/copy", etag="", allow_missing=False)
    for grant in list(script.core.world.grants.values()):
        if grant.instance:
            script.take(ev.Released(script.now, 1, grant.assignment_id, grant.epoch))
    assert not script.core.world.tasks
    done(script, job)
    script.take(ev.Ticked(script.now))
    assert releases(jobs(script)[0])


def test_a_lost_replicator_s_round_is_done_by_another() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(held())
    script.see(collection(1))
    (job,) = jobs(script)
    script.hello(2, "r2")
    script.take(ev.StreamLost(script.now, 1))
    again = next_round(script, 2)
    assert again.job_id != job.job_id
    done(script, job, 1)  # nobody listens to the first one any more
    assert not script.core.world.holds.made
    done(script, again, 2)
    assert script.core.world.holds.made


def test_a_round_without_an_answer_is_given_up() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(held())
    script.see(collection(1))
    assert jobs(script)
    script.pass_time(59_000, beating=(1,))
    assert [j for j in script.core.world.jobs.values() if j.log_id]
    assert keeps(next_round(script))


def test_what_is_set_back_is_held_before_it_is_read_again() -> None:
    script = begun()
    report(script, b"pos-7")
    done(script, next_round(script))
    done(script, next_round(script))
    script.ask(ev.ResyncCollection, name="tasks/copy", collection="default.books")
    script.take(ev.Released(script.now, 1, "uid-copy.1", 1))
    (job,) = jobs(script)
    assert keeps(job) == {"dml_1": (b"start",)}
    assert not assigned(script)
    done(script, job)
    assert assigned(script)


def test_what_a_recount_may_read_again_stays() -> None:
    script = begun()
    record = script.core.world.collections["uid-copy"][1]
    script.report(
        1,
        "uid-copy.1",
        1,
        vchannels=(ev.VchannelReport("dml_1_1v0", b"pos-7", 5, wanted_horizon_ts=90),),
        opened=ev.SinkOpened(77),
    )
    done(script, next_round(script))
    done(script, next_round(script))
    script.hello(2, "r2")
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(18_000, beating=(2,))
    progress = script.core.world.progress[record.assignment_id]
    assert progress.recount is not None
    shard = ev.VchannelReport("dml_1_1v0", b"pos-9", 50)
    script.report(2, "uid-copy.1", 2, vchannels=(shard,))
    for _ in range(3):
        job = next_round(script, 2)
        assert b"pos-7" in keeps(job)["dml_1"]
        done(script, job, 2)


def test_a_hold_that_cannot_be_made_is_said_and_tried_again() -> None:
    script = Script()
    script.hello(1, "r1")
    script.create(held())
    script.see(collection(1))
    (job,) = jobs(script)
    wrong = JobFailed("PULSAR_TOKEN", "The broker refuses the token.")
    script.take(ev.JobUpdated(script.now, 1, job.job_id, wrong))
    task = script.core.world.tasks["uid-copy"]
    assert "refuses the token" in dict(trouble(script.core.world, task))["HOLD_FAILING"]
    done(script, next_round(script))
    assert not trouble(script.core.world, task)


def test_a_removal_can_be_given_up_by_hand_only() -> None:
    script = begun()
    (record,) = holds(script)
    assert script.ask(ev.ForgetHold, key=record.key).refusal is not None
    script.ask(ev.DeleteTask, name="tasks/copy", etag="", allow_missing=False)
    for grant in list(script.core.world.grants.values()):
        if grant.instance:
            script.take(ev.Released(script.now, 1, grant.assignment_id, grant.epoch))
    done(script, jobs(script)[0], dml_1="PULSAR_UNREACHABLE")
    assert script.ask(ev.ForgetHold, key=record.key).refusal is None
    assert not holds(script)


# The same, whatever happens.

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["report", "report", "tick", "tick", "done", "fail", "lose", "back", "pause", "create",
             "delete", "restart", "resync", "late"]
        ),
        st.integers(0, 9),
    ),
    max_size=60,
)  # fmt: skip


class _Queue:
    """What the queue still has: everything from the hold's place on, whoever moves it and when."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, str], int] = {}

    def carry_out(self, job: HoldJob) -> HoldDone:
        for place in job.places:
            key = (place.name, place.pchannel)
            if place.release:
                self.at.pop(key, None)
            else:
                self.at.setdefault(key, 0)
                if place.keep_from:
                    self.at[key] = min(map(_number, place.keep_from))
        return HoldDone(tuple(HoldSeen(p.pchannel, p.name) for p in job.places))


def _number(position: bytes) -> int:
    return 0 if position == b"start" else int(position.decode())


@settings(max_examples=60, deadline=None)
@given(_STEPS)
def test_no_hold_passes_what_a_running_collection_reads(steps: list[tuple[str, int]]) -> None:
    script, queue = Script(), _Queue()
    read: dict[str, int] = {}
    late: list[HoldJob] = []
    stream = 1
    script.hello(stream, "r1")
    script.create(held("tasks/a"))
    script.see(collection(1), collection(5))

    def collections() -> list[tuple[str, int]]:
        world = script.core.world
        return [(uid, cid) for uid in sorted(world.collections) for cid in world.collections[uid]]

    def check() -> None:
        """Where it is assigned, its place is in the queue."""
        world = script.core.world
        for uid, cid in collections():
            record = world.collections[uid][cid]
            grant = world.grants.get(record.assignment_id)
            if grant is None or not grant.instance or not record.started:
                continue
            hold = world.holds.of(LOG)["dml_1"]
            for point in world.progress[record.assignment_id].checkpoints:
                kept = queue.at[hold.name, "dml_1"]
                assert kept <= _number(point.read_from), (uid, cid, kept, point.read_from)

    for what, number in steps:
        under_way = [j for j in script.core.world.jobs.values() if isinstance(j.payload, HoldJob)]
        match what:
            case "tick":
                script.pass_time(1_000 * (1 + number), beating=(stream,))
            case "done" if under_way:
                assert isinstance(under_way[0].payload, HoldJob)
                result = queue.carry_out(under_way[0].payload)
                script.take(ev.JobUpdated(script.now, stream, under_way[0].job_id, result))
            case "fail" if under_way:
                wrong = JobFailed("X", "x", transient=True)
                script.take(ev.JobUpdated(script.now, stream, under_way[0].job_id, wrong))
            case "lose":
                late += [j.payload for j in under_way if isinstance(j.payload, HoldJob)]
                stream += 1
                script.take(ev.StreamLost(script.now, stream - 1))
                script.hello(stream, f"r{stream}")
            case "late" if late:
                # Without what goes forward: a place set back by hand is found out by its reader.
                job = late.pop()
                moved = tuple(
                    replace(p, keep_from=(str(queue.at.get((p.name, p.pchannel), 0)).encode(),))
                    for p in job.places
                    if not p.release
                )
                queue.carry_out(replace(job, places=moved))
            case "report":
                for uid, cid in collections():
                    key = f"{uid}.{cid}"
                    grant = script.core.world.grants.get(key)
                    if grant is None or grant.instance != f"instance-r{stream}":
                        continue
                    if (number + cid) % 2:
                        continue
                    read[key] = read.get(key, 0) + 1 + number
                    shard = ev.VchannelReport(f"dml_1_{cid}v0", str(read[key]).encode(), read[key])
                    script.report(stream, key, grant.epoch, vchannels=(shard,))
            case "pause" if "uid-a" in script.core.world.tasks:
                paused = script.core.world.tasks["uid-a"].paused
                script.calls += 1
                kind = ev.ResumeTask if paused else ev.PauseTask
                script.take(kind(script.now, script.calls, "tasks/a", ""))
            case "create" if "uid-b" not in script.core.world.tasks:
                script.create(held("tasks/b", sink_id="b"))
            case "delete" if "uid-b" in script.core.world.tasks:
                script.calls += 1
                script.take(ev.DeleteTask(script.now, script.calls, "tasks/b", "", False))
            case "resync" if "uid-a" in script.core.world.tasks:
                script.calls += 1
                script.take(
                    ev.ResyncCollection(script.now, script.calls, "tasks/a", "default.books")
                )
            case "restart":
                late += [j.payload for j in under_way if isinstance(j.payload, HoldJob)]
                script = Script(script.stored, at_ms=script.at_ms)
                stream += 1
                script.hello(stream, f"r{stream}")
                script.see(collection(1), collection(5))
            case _:
                pass
        check()

    # Whatever happened: with the last task the last hold goes.
    for uid in list(script.core.world.tasks):
        name = script.core.world.tasks[uid].spec.name
        script.calls += 1
        script.take(ev.DeleteTask(script.now, script.calls, name, "", False))
    for job in late:
        queue.carry_out(replace(job, places=tuple(p for p in job.places if not p.release)))
    for _ in range(300):
        script.pass_time(1_000, beating=(stream,))
        for job_ in list(script.core.world.jobs.values()):
            if isinstance(job_.payload, HoldJob):
                result = queue.carry_out(job_.payload)
                script.take(ev.JobUpdated(script.now, stream, job_.job_id, result))
        for grant in list(script.core.world.grants.values()):
            if grant.instance == f"instance-r{stream}":
                script.take(ev.Released(script.now, stream, grant.assignment_id, grant.epoch))
    assert not holds(script)
    assert not queue.at
