"""What the source's metadata says, and the work that must precede a first assignment: probe and
start positions.

Law: an untrusted reading changes nothing but the task's state: nothing is dropped, everything is
taken back.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import Catalogue, ObjectState, Partition

from milvus_cdc_controller.core.collection import CollectionRecord, changed, start_checkpoints
from milvus_cdc_controller.core.effects import JobCancel, JobRequest, ReadPartition
from milvus_cdc_controller.core.events import (
    CatalogueSeen,
    PartitionAsked,
    PartitionRead,
    SourceUnavailable,
)
from milvus_cdc_controller.core.granting import send_assign
from milvus_cdc_controller.core.jobs import (
    Job,
    JobFailed,
    JobPayload,
    JobResult,
    ProbeDone,
    ProbeJob,
    ResolveDone,
    ResolveJob,
)
from milvus_cdc_controller.core.positions import looked_after
from milvus_cdc_controller.core.reconcile import reconcile
from milvus_cdc_controller.core.task import Failure, SourceRecord, TaskRecord
from milvus_cdc_controller.core.world import World

JOB_TIMEOUT_MS = 60_000
RETRY_AFTER_MS = 5_000


def catalogue_seen(world: World, event: CatalogueSeen) -> None:
    view = world.sources.get(event.source_id)
    if view is None:
        return
    view.reason, view.message = "", ""
    view.doubted = not event.trusted
    before = view.catalogue
    if event.trusted:
        view.catalogue = event.catalogue
    for task in _tasks_of(world, event.source_id):
        if not event.trusted:
            if task.failure is None and not task.deleting:
                world.put_task(replace(task, failure=Failure(event.reason, event.message)))
        else:
            if world.work[task.uid].recheck:
                world.work[task.uid].recheck = False
                world.put_task(replace(task, failure=None))
            _adopt(world, task.uid, before)
        world.touch_state(task.uid)
    if event.trusted:
        _remember(world, event.source_id, event.catalogue)


def source_unavailable(world: World, event: SourceUnavailable) -> None:
    view = world.sources.get(event.source_id)
    if view is None:
        return
    view.reason, view.message = event.reason, event.message
    for task in _tasks_of(world, event.source_id):
        world.touch_state(task.uid)


def followed(world: World, source_id: str) -> frozenset[int]:
    """Collections that some task follows on this source."""
    return frozenset(
        collection_id
        for task in _tasks_of(world, source_id)
        for collection_id in world.collections[task.uid]
    )


def _remember(world: World, source_id: str, catalogue: Catalogue) -> None:
    wanted = followed(world, source_id)
    world.put_source(
        SourceRecord(
            source_id,
            catalogue.cluster_id,
            catalogue.revision,
            catalogue.tso,
            catalogue.databases_keyed,
            catalogue.incarnation,
            tuple(
                sorted(
                    c.collection_id
                    for c in catalogue.collections
                    if c.state is ObjectState.CREATED and c.collection_id in wanted
                )
            ),
        )
    )


def _tasks_of(world: World, source_id: str) -> list[TaskRecord]:
    return [task for task in world.tasks.values() if task.spec.source_id == source_id]


def adopt_catalogue(world: World, uid: str) -> None:
    """Brings one task's records in line with the last trusted reading of its source."""
    source_id = world.tasks[uid].spec.source_id
    view = world.sources.get(source_id)
    if view is not None and view.catalogue is not None:
        _adopt(world, uid)
        _remember(world, source_id, view.catalogue)


def adopt_again(world: World, uid: str) -> None:
    """The same after a record has gone or a name at the sink has come free: the others are in line
    with that reading.
    """
    source_id = world.tasks[uid].spec.source_id
    view = world.sources.get(source_id)
    if view is not None and view.catalogue is not None:
        _adopt(world, uid, view.catalogue)
        _remember(world, source_id, view.catalogue)


def _adopt(world: World, uid: str, before: Catalogue | None = None) -> None:
    task = world.tasks[uid]
    view = world.sources.get(task.spec.source_id)
    if view is None or view.catalogue is None or task.deleting:
        return
    catalogue = view.catalogue
    task = _baseline(world, task, catalogue)
    changes = reconcile(
        task, world.collections[uid], world.metadata[uid], catalogue, world.now.wall_ms, before
    )
    if changes.left is not None:
        world.put_task(replace(task, left=changes.left))
    for record in changes.saved:
        world.put_collection(record)
    if changes.metadata is not None:
        world.put_metadata(changes.metadata)
    world.touch_state(uid)


def _baseline(world: World, task: TaskRecord, catalogue: Catalogue) -> TaskRecord:
    """The task with its baseline told for its selection as it is now."""
    selection = task.spec.selection
    if task.baseline_of == selection:
        return task
    baseline = set(task.baseline or ())
    if task.baseline is None or task.baseline_of is not None:  # else of the format before
        baseline.update(
            c.collection_id
            for c in catalogue.collections
            if c.state is ObjectState.CREATED
            and selection.selects(c.full_name)
            and c.collection_id not in world.collections[task.uid]
        )
    task = replace(task, baseline=tuple(sorted(baseline)), baseline_of=selection)
    world.put_task(task)
    return task


# Partitions that a row names and the assignment does not list.


def partition_asked(world: World, event: PartitionAsked) -> None:
    session = world.session_of(event.stream)
    grant = world.grants.get(event.assignment_id)
    if session is None or grant is None:
        return
    record = world.record_of(event.assignment_id)
    if record is None or grant.instance != session.instance or grant.epoch != event.epoch:
        return
    if any(p.partition_id == event.partition_id for p in record.want.partitions):
        send_assign(world, grant)
        return
    source_id = world.tasks[record.task_uid].spec.source_id
    world.effects.append(ReadPartition(source_id, event.assignment_id, event.partition_id))


def partition_read(world: World, event: PartitionRead) -> None:
    """After the fresh reading: a partition that is still not there has been dropped."""
    if event.assignment_id not in world.grants:
        return
    record = world.record_of(event.assignment_id)
    if record is None or world.tasks[record.task_uid].failure is not None:
        return
    if any(p.partition_id == event.partition_id for p in record.want.partitions):
        return
    gone = Partition(event.partition_id, "", 0, ObjectState.DROPPED)
    want = replace(record.want, partitions=(*record.want.partitions, gone))
    world.put_collection(changed(record, want=want))


# Probe and resolve.


def advance_work(world: World) -> None:
    """Starts what a task still lacks, when a replicator is there to do it; gives up what takes
    too long.
    """
    for job in [j for j in world.jobs.values() if j.task_uid]:
        if world.now.mono_ms >= job.deadline_ms:
            session = world.sessions.get(job.instance)
            if session is not None:
                world.send(session.stream, JobCancel(job.job_id))
            late = JobFailed(
                "JOB_TIMEOUT", "The replicator did not answer in time.", transient=True
            )
            job_done(world, job, late)
    for task in world.tasks.values():
        work = world.work[task.uid]
        if not task.active or world.now.mono_ms < work.not_before_ms:
            continue
        if not task.probed:
            if not work.probe_job:
                work.probe_job = start_job(
                    world,
                    task,
                    ProbeJob(task.spec.source, task.spec.sink, dead_letters=task.spec.dead_letters),
                )
            continue
        if work.resolve_job:
            continue
        records = world.collections[task.uid]
        lacking = [
            record
            for record in (records[number] for number in world.unstarted[task.uid])
            if record.want.vchannels and not record.deselected
            if is_made(world, task, record)
        ]
        if lacking and task.baseline is not None:
            logs = sorted({v.pchannel for record in lacking for v in record.want.vchannels})
            work.resolving = tuple(record.collection_id for record in lacking)
            work.resolve_job = start_job(world, task, ResolveJob(task.spec.source, tuple(logs)))


def is_made(world: World, task: TaskRecord, record: CollectionRecord) -> bool:
    """Its log is held: what is found to be its end stays there."""
    if not task.spec.held_log:
        return True
    live = world.holds.of(task.spec.held_log)
    return all(
        v.pchannel in live and live[v.pchannel].key in world.holds.made
        for v in record.want.vchannels
    )


def start_job(world: World, task: TaskRecord, payload: JobPayload) -> str:
    """One of the core's own jobs; empty when no replicator is there."""
    world.job_count += 1
    labels = frozenset(task.spec.replicator_labels)
    job = Job(f"{task.uid}/{world.job_count}", payload, task.uid, labels=labels)
    job.deadline_ms = world.now.mono_ms + JOB_TIMEOUT_MS
    return job.job_id if send_job(world, job) else ""


def send_job(world: World, job: Job) -> bool:
    """To the replicator with the fewest jobs; False when none is there."""
    sessions = [s for s in world.alive() if job.labels <= frozenset(s.labels)]
    if not sessions:
        return False
    busy = [other.instance for other in world.jobs.values()]
    session = min(sessions, key=lambda s: busy.count(s.instance))
    job.instance = session.instance
    world.jobs[job.job_id] = job
    world.send(session.stream, JobRequest(job.job_id, job.payload))
    return True


def job_done(world: World, job: Job, result: JobResult) -> None:
    """The end of one of the core's own jobs."""
    world.jobs.pop(job.job_id, None)
    task = world.tasks.get(job.task_uid)
    if task is None:
        return
    work = world.work[task.uid]
    if job.job_id == work.check_job:
        looked_after(world, task, job, result)
        return
    if job.job_id not in (work.probe_job, work.resolve_job):
        return
    world.touch_state(task.uid)
    work.reason = work.message = ""
    work.not_before_ms = 0
    if job.job_id == work.probe_job:
        work.probe_job = ""
    else:
        work.resolve_job = ""
    match result:
        case JobFailed(transient=True) as failed:
            work.reason, work.message = failed.reason, failed.message
            work.not_before_ms = world.now.mono_ms + RETRY_AFTER_MS
            return
        case JobFailed() as failed:
            world.put_task(replace(task, failure=Failure(failed.reason, failed.message)))
        case ProbeDone():
            world.put_task(replace(task, probed=True))
        case ResolveDone() as done:
            ends = {pchannel: (at, topic) for pchannel, at, topic in done.log_ends}
            _begin(world, task, work.resolving, ends)
        case _:
            pass


def _begin(
    world: World,
    task: TaskRecord,
    collection_ids: tuple[int, ...],
    ends: dict[str, tuple[bytes, bytes]],
) -> None:
    for collection_id in collection_ids:
        record = world.collections[task.uid].get(collection_id)
        if record is None or record.started:
            continue
        if any(v.pchannel not in ends for v in record.want.vchannels):
            continue
        points = tuple(
            replace(point, read_from=ends[point.pchannel][0], incarnation=ends[point.pchannel][1])
            for point in start_checkpoints(record.want)
        )
        progress = world.progress[record.assignment_id]
        world.put_progress(replace(progress, checkpoints=points))
        world.put_collection(replace(record, started=True))
