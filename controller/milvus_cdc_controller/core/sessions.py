"""Replicators coming, going, and reporting.

Law: a report counts only from the instance that the grant names and with the grant's epoch;
anything else is answered with a revoke, so that a stale holder learns of it.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import split_assignment_id

from milvus_cdc_controller.core import parts
from milvus_cdc_controller.core.collection import Recounted
from milvus_cdc_controller.core.effects import (
    CloseStream,
    HeartbeatAck,
    JobCancel,
    JobOutput,
    ProgressAck,
    Revoke,
    Synced,
    Welcome,
)
from milvus_cdc_controller.core.events import (
    Acked,
    Heartbeat,
    Hello,
    JobAsked,
    JobCancelled,
    JobUpdated,
    Nacked,
    ProgressReported,
    Released,
    StreamLost,
)
from milvus_cdc_controller.core.grant import Grant, ReportedState
from milvus_cdc_controller.core.granting import let_go, revoke, send_assign
from milvus_cdc_controller.core.holding import hold_done
from milvus_cdc_controller.core.jobs import DiffEvent, Job, JobFailed, VerifyEvent
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.metadata_work import awaits, flushed, metadata_reported
from milvus_cdc_controller.core.moves import advance
from milvus_cdc_controller.core.placing import held_by
from milvus_cdc_controller.core.positions import note
from milvus_cdc_controller.core.presence import arrive, depart, look
from milvus_cdc_controller.core.progress import (
    apply_applied,
    apply_opened,
    apply_renamed,
    merge,
    merge_part,
)
from milvus_cdc_controller.core.rates import Rate, resting_ms
from milvus_cdc_controller.core.recount import log_is_gone, owner_lost, recounted
from milvus_cdc_controller.core.replicator import ReplicatorState
from milvus_cdc_controller.core.sources import adopt_again, job_done, send_job
from milvus_cdc_controller.core.task import Failure
from milvus_cdc_controller.core.world import World

REFUSED_FOR_NOW = frozenset({"CAPACITY", "DRAINING"})
"""Reasons of a Nack that speak of the replicator and not of the assignment."""
FULL_FOR_MS = 10_000
_IN_USE = (
    "Another process with this instance_id is connected: a machine was cloned while it ran. "
    "Start this replicator anew."
)


def started(world: World) -> None:
    """Every stored grant counts as live: its owner may have had its last heartbeat acknowledged
    just now, under a lease as long as that controller's.
    """
    longer_ms = max(0, world.inherited_ttl_ms - world.leases.ttl_ms)
    end_ms = world.leases.end_ms(world.now.mono_ms) + longer_ms
    for grant in world.grants.values():
        if grant.instance and grant.instance not in world.sessions:
            session = Session(grant.instance, grant.owner, end_ms)
            session.mark = world.mark_of(grant.owner)
            world.sessions[grant.instance] = session
    world.watch_sources()
    world.touch_all()


def hello(world: World, event: Hello) -> None:
    session = world.sessions.get(event.instance)
    if session is not None and 0 < event.connects <= session.connects:
        # The newest stream of a process says more than all before it.
        world.effects.append(CloseStream(event.stream, "INSTANCE_IN_USE", _IN_USE))
        return
    if session is None:
        session = Session(event.instance, event.name, 0)
        world.sessions[event.instance] = session
    elif session.stream:
        old = session.stream
        _detach(world, session)
        world.effects.append(CloseStream(old, "REPLACED", "The same process has connected anew."))
    session.name = event.name
    arrive(world, session)
    session.stream = event.stream
    session.version, session.peer, session.capacity = event.version, event.peer, event.capacity
    session.labels, session.connects = event.labels, event.connects
    session.takes_parts = event.takes_parts
    session.draining = False
    session.connect_time_ms = world.now.wall_ms
    session.full_until_ms = 0
    session.heard(world.leases, world.now.mono_ms, world.now.wall_ms)
    session.look(world.leases, world.now.mono_ms)
    world.streams[event.stream] = event.instance
    world.send(event.stream, Welcome(event.protocol))
    world.touch_held(session)
    session.stale.clear()
    session.parts.clear()
    for held in event.held:
        grant = world.grants.get(held.assignment_id)
        if grant is None or grant.instance != event.instance or grant.epoch != held.epoch:
            session.stale.add((held.assignment_id, held.epoch))
            world.send(event.stream, Revoke(held.assignment_id, held.epoch, "STALE_EPOCH"))
    for key in sorted(world.held.by(event.instance)):
        grant = world.grants[key]
        reason = world.seen(key).revoking
        if reason:
            world.send(event.stream, Revoke(key, grant.epoch, reason))
        else:
            send_assign(world, grant)
    world.send(event.stream, Synced())
    world.touch_fleet()


def _detach(world: World, session: Session) -> None:
    world.streams.pop(session.stream, None)
    session.stream = 0
    for job in [j for j in world.jobs.values() if j.instance == session.instance]:
        lost = JobFailed("REPLICATOR_LOST", "The replicator doing it was lost.", transient=True)
        if job.log_id:
            hold_done(world, job, lost)
        elif job.task_uid:
            job_done(world, job, lost)
            if job.task_uid in world.work:  # else its task was deleted meanwhile
                world.work[job.task_uid].not_before_ms = 0
        else:
            del world.jobs[job.job_id]
            world.effects.append(JobOutput(job.job_id, lost, last=True))


def stream_lost(world: World, event: StreamLost) -> None:
    session = world.session_of(event.stream)
    if session is None:
        return
    _detach(world, session)
    if (session.leaving or session.drained) and not session.stale and not held_by(world, session):
        depart(world, session, ReplicatorState.STOPPED)
    else:
        session.look(world.leases, world.now.mono_ms)
    world.touch_held(session)
    world.touch_fleet()


def heartbeat(world: World, event: Heartbeat) -> None:
    session = world.session_of(event.stream)
    if session is None:
        return
    was = session.state(world.leases, world.now.mono_ms)
    session.heard(world.leases, world.now.mono_ms, world.now.wall_ms)
    session.draining = session.draining or event.draining
    world.send(event.stream, HeartbeatAck(event.seq, resting_ms(len(world.grants))))
    session.look(world.leases, world.now.mono_ms)
    if session.shown is not was:
        world.touch_held(session)
        world.touch_fleet()
        advance(world)


def expire(world: World) -> None:
    """Takes from whoever's lease has certainly ended."""
    for session in list(world.sessions.values()):
        if not session.expired(world.now.mono_ms):
            continue
        if session.stream:
            stream = session.stream
            _detach(world, session)
            world.effects.append(
                CloseStream(stream, "LEASE_EXPIRED", "No heartbeat for a whole lease.")
            )
        depart(world, session, ReplicatorState.LOST)
        world.touch_held(session)
        for key in list(world.held.by(session.instance)):
            owner_lost(world, key)
            let_go(world, world.grants[key])
        world.touch_fleet()


def _own(world: World, stream: int, assignment_id: str, epoch: int) -> Grant | None:
    """The grant that a message of this stream may speak for."""
    session = world.session_of(stream)
    grant = world.grants.get(assignment_id)
    if session is None or grant is None:
        return None
    if grant.instance != session.instance or grant.epoch != epoch:
        return None
    return grant


def _why_not(world: World, stream: int, assignment_id: str) -> str:
    """What is wrong with somebody who speaks for an assignment that he does not hold."""
    grant, session = world.grants.get(assignment_id), world.session_of(stream)
    if grant is None:
        return "UNKNOWN_ASSIGNMENT"
    if session is not None and grant.instance not in ("", session.instance):
        return "HELD_BY_ANOTHER"
    return "STALE_EPOCH"


def acked(world: World, event: Acked) -> None:
    if _own(world, event.stream, event.assignment_id, event.epoch) is not None:
        world.seen(event.assignment_id).accepted_version = event.version


def nacked(world: World, event: Nacked) -> None:
    grant = _own(world, event.stream, event.assignment_id, event.epoch)
    session = world.session_of(event.stream)
    if grant is None or session is None:
        return
    observed = world.seen(event.assignment_id)
    if event.reason in REFUSED_FOR_NOW:
        session.full_until_ms = world.now.mono_ms + FULL_FOR_MS
        if observed.accepted_version:
            revoke(world, grant, event.reason)  # it has it, and says when it has let go
        else:
            let_go(world, grant)
        return
    if event.version == observed.sent_version:
        _fail(world, event.assignment_id, Failure(event.reason, event.message))
        revoke(world, grant, event.reason)


def _fail(world: World, assignment_id: str, failure: Failure) -> None:
    uid, collection_id = split_assignment_id(assignment_id)
    if collection_id is None:
        world.put_metadata(replace(world.metadata[uid], failure=failure))
    else:
        world.put_collection(replace(world.collections[uid][collection_id], failure=failure))


def released(world: World, event: Released) -> None:
    session = world.session_of(event.stream)
    if session is None:
        return
    if (event.assignment_id, event.epoch) in session.stale:
        session.stale.discard((event.assignment_id, event.epoch))
        world.touch_one(event.assignment_id)
    grant = _own(world, event.stream, event.assignment_id, event.epoch)
    if grant is not None:
        let_go(world, grant)
        look(world)
        advance(world)


def progress_reported(world: World, event: ProgressReported) -> None:
    grant = _own(world, event.stream, event.assignment_id, event.epoch)
    if grant is None:
        if world.session_of(event.stream) is not None:
            reason = _why_not(world, event.stream, event.assignment_id)
            world.send(event.stream, Revoke(event.assignment_id, event.epoch, reason))
        return
    observed = world.seen(event.assignment_id)
    if event.seq <= observed.seq:
        return
    uid, collection_id = split_assignment_id(event.assignment_id)
    face = (observed.state, observed.reason, observed.message)
    observed.seq = event.seq
    if observed.state is not event.state:
        observed.state_time_ms = world.now.wall_ms
    observed.state, observed.reason, observed.message = event.state, event.reason, event.message
    observed.lag_ms = event.lag_ms
    world.stirred.add(uid)
    if event.assignment_id in world.moves:
        advance(world)
    horizons: tuple[tuple[str, int], ...] = ()
    if collection_id is None:
        _metadata_progress(world, event, uid)
    else:
        horizons = _collection_progress(world, event, uid, collection_id)
    if event.state is ReportedState.FAILED and event.assignment_id in world.grants:
        # It has stopped by itself: nothing is in flight, so it is free at once.
        if not log_is_gone(world, event.assignment_id, event.reason):
            _fail(world, event.assignment_id, Failure(event.reason, event.message))
        let_go(world, grant)
        world.send(event.stream, Revoke(event.assignment_id, event.epoch, "FAILED"))
    world.send(event.stream, ProgressAck(event.assignment_id, event.epoch, event.seq, horizons))
    if face != (event.state, event.reason, event.message):
        world.touch_one(event.assignment_id)


def _metadata_progress(world: World, event: ProgressReported, uid: str) -> None:
    if metadata_reported(world, uid, event):
        adopt_again(world, uid)


def _collection_progress(
    world: World, event: ProgressReported, uid: str, collection_id: int
) -> tuple[tuple[str, int], ...]:
    record = world.collections[uid][collection_id]
    old_progress = world.progress[record.assignment_id]
    is_part = event.assignment_id != record.assignment_id
    if is_part:
        new = apply_applied(record, event)
        progress = parts.reported(world, event, merge_part(old_progress, event))
        counters = event.counters
    else:
        new = apply_applied(apply_renamed(apply_opened(record, event), event), event)
        progress = recounted(merge(old_progress, event, opened=new.opened), event.recounted)
        counters = progress.totals
    if progress != old_progress:
        world.put_progress(progress)
    rate = world.rates.setdefault(event.assignment_id, Rate())
    rate.count(world.now.mono_ms, counters.rows_written, counters.bytes_written)
    for shard in event.vchannels:
        if shard.retention is not None:
            note(world, record.assignment_id, shard.vchannel, shard.retention)
    moves = world.names.waits(record.owner) or awaits(world, event.assignment_id)
    if moves or progress.closed != old_progress.closed:
        world.touch_one(event.assignment_id)
    if new is not record:
        world.put_collection(new)
    if is_part:
        if parts.turns(world, world.tasks[uid], new):
            world.touch_one(record.assignment_id)
        points = parts.points_of(event.assignment_id, progress)
        return tuple((point.vchannel, point.horizon_ts) for point in points)
    if record.renaming and not new.renaming:
        adopt_again(world, uid)  # the database that it has left may go
    flushed(world, uid, collection_id, event.flushed_ts)
    if event.recounted is Recounted.WRITE_AGAIN:
        revoke(world, world.grants[event.assignment_id], "WRITE_AGAIN")
    if event.dropped and new.drop_granted:
        session = world.session_of(event.stream)
        assert session is not None
        session.stale.add((event.assignment_id, event.epoch))
        world.drop_collection(new)
        adopt_again(world, uid)
        world.send(event.stream, Revoke(event.assignment_id, event.epoch, "DROPPED"))
    return tuple((point.vchannel, point.horizon_ts) for point in progress.checkpoints)


# Jobs of callers.


def job_asked(world: World, event: JobAsked) -> None:
    job = Job(event.job_id, event.payload, labels=frozenset(event.labels))
    if not send_job(world, job):
        text = "No replicator is connected; start one."
        if event.labels and world.alive():
            text = "No connected replicator has the labels that the task asks for; start one."
        none = JobFailed("NO_REPLICATOR", text, transient=True)
        world.effects.append(JobOutput(event.job_id, none, last=True))


def job_cancelled(world: World, event: JobCancelled) -> None:
    job = world.jobs.pop(event.job_id, None)
    if job is not None and job.instance in world.sessions:
        world.send(world.sessions[job.instance].stream, JobCancel(job.job_id))


def job_updated(world: World, event: JobUpdated) -> None:
    job = world.jobs.get(event.job_id)
    session = world.session_of(event.stream)
    if job is None or session is None or job.instance != session.instance:
        return
    if job.log_id:
        hold_done(world, job, event.result)
        return
    if job.task_uid:
        job_done(world, job, event.result)
        return
    last = not isinstance(event.result, VerifyEvent | DiffEvent) or event.result.last
    if last:
        del world.jobs[job.job_id]
    world.effects.append(JobOutput(job.job_id, event.result, last))
