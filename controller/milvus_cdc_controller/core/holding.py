"""The holds of every log kept where the tasks need them: made, moved up, given up.

Laws: nothing at or after the oldest `read_from` of any task is ever given up, be the task paused
or failed; a name is stored before it is made at the queue, and forgotten after it is gone there;
nothing is given for the first time, and no log's end is looked up, before its place is held.
While anything that may need older entries is not known, holds stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from milvus_cdc.model import metadata_assignment_id

from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.effects import JobCancel, Refusal, Reply
from milvus_cdc_controller.core.events import ForgetHold
from milvus_cdc_controller.core.hold import PREFIX, HoldRecord, Round, Shard
from milvus_cdc_controller.core.index import Touched
from milvus_cdc_controller.core.jobs import (
    HoldDone,
    HoldJob,
    HoldPlace,
    HoldSeen,
    Job,
    JobFailed,
    JobResult,
)
from milvus_cdc_controller.core.sources import send_job
from milvus_cdc_controller.core.standing import in_order
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World

ROUND_MS = 30_000
RETRY_MS = 5_000
JOB_TIMEOUT_MS = 60_000
LATE_MS = 120_000
"""A job that nobody waits for any more has certainly ended: replicators give it up much sooner."""
_NOTHING_TO_HOLD = "LOG_RESET"
"""The topic is not there: whoever reads it says so."""


@dataclass(slots=True)
class _Need:
    """What tasks need of one pchannel."""

    places: dict[Shard, tuple[bytes, ...]] = field(default_factory=dict)
    frozen: bool = False
    """It may be that somebody needs more than `places` says."""
    resolving: bool = False
    """That is so because the log's end is being looked up, which takes a moment only."""


def restored(world: World) -> None:
    """What the controller before this one asked for may still be under way."""
    for key in world.holds.records:
        world.holds.unsettled[key] = world.now.mono_ms + LATE_MS


def advance(world: World, looked_at: Touched) -> None:
    """Begins what is due, of what has just changed what is needed at once; gives up what takes too
    long.
    """
    holds = world.holds
    logs = {task.spec.held_log for task in world.tasks.values() if task.spec.held_log}
    logs |= {record.log_id for record in holds.records.values()}
    if not logs:
        return
    hurried: set[str] = set()
    for uid in looked_at:
        task = world.tasks.get(uid)
        if task is None:
            holds.lacking.discard(uid)
            for record in holds.records.values():
                if not record.releasing:
                    holds.rounds.setdefault(record.log_id, Round()).unused = True
        elif task.spec.held_log and _comes_to_lack(world, task, looked_at.of(uid)):
            hurried.add(task.spec.held_log)
    now_ms = world.now.mono_ms
    for log_id in sorted(logs):
        known = holds.rounds.setdefault(log_id, Round())
        if known.job_id:
            _give_up_late(world, known)
        elif now_ms >= known.due_ms or (
            (log_id in hurried or known.unused) and now_ms >= known.not_before_ms
        ):
            known.unused = False
            _begin(world, log_id, known)


def waits(world: World, record: CollectionRecord) -> bool:
    """Its places are not yet known to be held."""
    if not world.tasks[record.task_uid].spec.held_log:
        return False
    return not all(shard in world.holds.covered for shard in _shards(world, record))


def failing(world: World, task: TaskRecord) -> str:
    """Why the log of a task cannot be held; empty when it can, or need not be."""
    known = world.holds.rounds.get(task.spec.held_log) if task.spec.held_log else None
    if known is None:
        return ""
    if known.reason:
        return f"{known.reason}: {known.message}"
    for record in world.holds.of(task.spec.held_log).values():
        seen = world.holds.seen.get(record.key)
        if seen is not None and seen.reason not in ("", _NOTHING_TO_HOLD):
            return f"{record.pchannel}: {seen.reason}: {seen.message}"
    return ""


def trouble(world: World, task: TaskRecord) -> list[tuple[str, str]]:
    """(reason, message) of all that is wrong with the holds that a task relies on."""
    known = world.holds.rounds.get(task.spec.held_log) if task.spec.held_log else None
    found = [] if known is None else list(known.warnings)
    if wrong := failing(world, task):
        found.append(("HOLD_FAILING", wrong))
    return found


def users(world: World, record: HoldRecord) -> list[TaskRecord]:
    """The tasks for which a log is held."""
    if record.releasing:
        return []
    return [task for task in world.tasks.values() if task.spec.held_log == record.log_id]


def forget_hold(world: World, command: ForgetHold) -> None:
    """Gives up a removal that cannot be carried out: its queue is gone for good."""
    found = [r for r in world.holds.records.values() if r.key == command.key]
    if not found or not found[0].releasing:
        text = f"{command.key} is not being removed."
        refusal = Refusal("FAILED_PRECONDITION", "HOLD_IN_USE", text, "name")
        world.effects.append(Reply(command.call, refusal=refusal))
        return
    world.drop_hold(found[0])
    world.effects.append(Reply(command.call))


# What is needed.


def _shards(world: World, record: CollectionRecord) -> Iterator[Shard]:
    for point in world.progress[record.assignment_id].checkpoints:
        if not point.closed:
            yield record.assignment_id, point.vchannel


def _comes_to_lack(world: World, task: TaskRecord, collection_ids: set[int] | None) -> bool:
    """Something of it is not held yet. Where nothing was when last looked at, only what has changed
    since can be.
    """
    lacking = world.holds.lacking
    found = _is_lacking(world, task, None if task.uid in lacking else collection_ids)
    (lacking.add if found else lacking.discard)(task.uid)
    return found


def _is_lacking(world: World, task: TaskRecord, collection_ids: set[int] | None) -> bool:
    """Something of these is not held yet."""
    if not task.probed:
        return False
    live = world.holds.of(task.spec.held_log)
    for record in in_order(world.collections[task.uid], collection_ids):
        if not record.started:
            for vchannel in record.want.vchannels:
                hold = live.get(vchannel.pchannel)
                if hold is None or hold.key not in world.holds.made:
                    return True
        elif any(shard not in world.holds.covered for shard in _shards(world, record)):
            return True
    return False


def _needs(world: World, log_id: str) -> dict[str, _Need]:
    """By pchannel."""
    needs: dict[str, _Need] = {}
    blind = False
    for task in world.tasks.values():
        if task.spec.held_log != log_id or not task.probed:
            continue
        view = world.sources.get(task.spec.source_id)
        if not task.deleting:
            # A collection that nobody has seen yet may begin before what the others have read.
            blind |= view is None or view.catalogue is None or view.doubted or bool(view.reason)
        resolving = world.work[task.uid].resolving if world.work[task.uid].resolve_job else ()
        for record in world.collections[task.uid].values():
            if not record.started:
                for vchannel in record.want.vchannels:
                    need = needs.setdefault(vchannel.pchannel, _Need())
                    need.resolving |= record.collection_id in resolving
                continue
            progress = world.progress[record.assignment_id]
            recounts = progress.recount.starts if progress.recount is not None else ()
            for point in progress.checkpoints:
                if point.closed:
                    continue
                places = {point.read_from, *(at for v, at, _ in recounts if v == point.vchannel)}
                need = needs.setdefault(point.pchannel, _Need())
                need.places[record.assignment_id, point.vchannel] = tuple(sorted(places))
                need.frozen |= b"" in places
        metadata = world.metadata[task.uid]
        if metadata.operations_channel and metadata.operations_read_from:
            need = needs.setdefault(metadata.operations_channel, _Need())
            # Its first byte tells if the entry there has been seen to.
            place = metadata.operations_read_from[1:]
            need.places[metadata_assignment_id(task.uid), ""] = (place,)
    for need in needs.values():
        need.frozen |= blind or need.resolving
    return needs


# One round.


def _begin(world: World, log_id: str, known: Round) -> None:
    in_time = world.now.mono_ms >= known.due_ms
    known.due_ms = world.now.mono_ms + ROUND_MS
    needs = _needs(world, log_id)
    _bring_records(world, log_id, needs)
    places: list[HoldPlace] = []
    shards: dict[str, set[Shard]] = {}
    for pchannel, record in sorted(world.holds.of(log_id).items()):
        need = needs[pchannel]
        # Where it could not be set back, who needs that waits for the next round.
        shards[record.key] = set() if need.resolving else set(need.places)
        keep = () if need.frozen else _kept(world, need, in_time=in_time)
        places.append(HoldPlace(pchannel, record.name, keep))
    for key, record in sorted(world.holds.of(log_id, releasing=True).items()):
        if world.now.mono_ms >= world.holds.release_after.get(key, 0):
            places.append(HoldPlace(record.pchannel, record.name, release=True))
    if not places:
        return
    first = next(r for r in world.holds.records.values() if r.log_id == log_id)
    world.job_count += 1
    job = Job(f"hold/{log_id}/{world.job_count}", HoldJob(first.source, tuple(places)))
    job.labels, job.log_id = frozenset(first.labels), log_id
    job.deadline_ms = world.now.mono_ms + JOB_TIMEOUT_MS
    if send_job(world, job):
        known.job_id, known.shards = job.job_id, shards
    else:
        known.due_ms = world.now.mono_ms + RETRY_MS


def _kept(world: World, need: _Need, *, in_time: bool) -> tuple[bytes, ...]:
    before = world.holds.before
    kept: set[bytes] = set()
    for shard, places in need.places.items():
        kept.update(places, before.get(shard, ()))
        if in_time or shard not in before:
            before[shard] = places
    return tuple(sorted(kept))


def _bring_records(world: World, log_id: str, needs: dict[str, _Need]) -> None:
    """In line with what is needed, and with how the queue is reached now."""
    task = min(
        (t for t in world.tasks.values() if t.spec.held_log == log_id),
        key=lambda t: t.uid,
        default=None,
    )
    live = world.holds.of(log_id)
    for record in [r for r in world.holds.records.values() if r.log_id == log_id]:
        if task is not None:
            spec = task.spec
            record = replace(record, source=spec.source, labels=spec.replicator_labels)
        unused = record.pchannel not in needs
        world.put_hold(replace(record, releasing=record.releasing or unused))
    if task is None:
        return
    for pchannel in sorted(needs.keys() - live.keys()):
        name = _new_name(world, task)
        record = HoldRecord(
            name,
            log_id,
            pchannel,
            task.spec.source,
            task.spec.replicator_labels,
            create_time_ms=world.now.wall_ms,
        )
        world.put_hold(record)


def _new_name(world: World, task: TaskRecord) -> str:
    """Never used before, here or by any other controller: what is still under way for an older
    hold cannot touch the new one.
    """
    used = {r.name for r in world.holds.records.values() if r.create_time_ms != world.now.wall_ms}
    number = world.now.wall_ms
    while (name := f"{PREFIX}{task.uid[:8]}-{number:x}") in used:
        number += 1
    return name


def _give_up_late(world: World, known: Round) -> None:
    job = world.jobs.get(known.job_id)
    if job is None or world.now.mono_ms < job.deadline_ms:
        return
    session = world.sessions.get(job.instance)
    if session is not None:
        world.send(session.stream, JobCancel(job.job_id))
    late = JobFailed("JOB_TIMEOUT", "The replicator did not answer in time.", transient=True)
    hold_done(world, job, late)


def hold_done(world: World, job: Job, result: JobResult) -> None:
    """The end of a round."""
    world.jobs.pop(job.job_id, None)
    known = world.holds.rounds.get(job.log_id)
    if known is None or known.job_id != job.job_id or not isinstance(job.payload, HoldJob):
        return
    known.job_id = ""
    shards, known.shards = known.shards, {}
    if not isinstance(result, HoldDone):
        if isinstance(result, JobFailed):
            known.reason, known.message = result.reason, result.message
        for place in job.payload.places:
            world.holds.unsettled[f"{place.name}/{place.pchannel}"] = world.now.mono_ms + LATE_MS
        _again_soon(world, known)
    else:
        known.reason = known.message = ""
        known.warnings = result.warnings
        for place, seen in zip(job.payload.places, result.places, strict=False):
            _take(world, known, place, seen, shards)
    for task in world.tasks.values():
        if task.spec.held_log == job.log_id:
            world.touch(task.uid)


def _take(
    world: World, known: Round, place: HoldPlace, seen: HoldSeen, shards: dict[str, set[Shard]]
) -> None:
    holds = world.holds
    record = holds.records.get(f"{place.name}/{place.pchannel}")
    if record is None:
        return
    holds.seen[record.key] = seen
    if seen.reason not in ("", _NOTHING_TO_HOLD):
        holds.made.discard(record.key)
        holds.unsettled[record.key] = world.now.mono_ms + LATE_MS
        _again_soon(world, known)
    elif not place.release:
        holds.made.add(record.key)
        holds.covered |= shards.get(record.key, set())
    elif world.now.mono_ms < holds.unsettled.get(record.key, 0):
        # What is under way may make it once more: it is removed again when that has ended.
        holds.release_after[record.key] = holds.unsettled[record.key]
    else:
        world.drop_hold(record)


def _again_soon(world: World, known: Round) -> None:
    known.due_ms = known.not_before_ms = world.now.mono_ms + RETRY_MS
