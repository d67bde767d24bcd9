"""What is to be counted at the sink after an owner that ended without a word.

A Milvus write cannot be conditional: what such an owner had sent may take effect after its lease,
when the next one has written the same rows. Laws: what is to be counted is stored in the step that
takes the assignment away, and outlives this process and further owners, until one of them says how
it ended; it never moves a stored checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import tso_to_ms

from milvus_cdc_controller.core.collection import (
    CollectionProgress,
    CollectionRecord,
    Recount,
    Recounted,
)
from milvus_cdc_controller.core.world import World

KEPT_MS = 1_800_000
"""Source time from there to the checkpoint, which each owner reads again. Beyond it (owners that
never last) it is given up, and the collection says so.
"""
NOT_RECOUNTED = (
    "KEYS_NOT_RECOUNTED",
    "replicators were lost one after the other, and none lasted long enough, or the log not so "
    "far back, to see if the first had left keys doubled; `milvus-cdc verify` tells, "
    "`milvus-cdc task resync` mends it",
)
WRITING_AGAIN = (
    "WRITING_AGAIN",
    "after a replicator was lost, keys at the sink could not be proved right; the rows since are "
    "being written once more, meanwhile older values may be seen",
)


def owner_lost(world: World, assignment_id: str) -> None:
    """Its lease has ended, and it has not let go."""
    record = world.record_of(assignment_id)
    if record is None or not record.opened:
        return
    before = world.progress[record.assignment_id]
    progress = _bounded(record, before)
    still_open = [point for point in progress.checkpoints if not point.closed]
    if progress.recount is None and any(p.horizon_ts > p.resolved_ts for p in still_open):
        starts = tuple((p.vchannel, p.read_from, p.resolved_ts) for p in still_open)
        progress = replace(progress, recount=Recount(starts))
    elif progress.recount is not None and progress.recount.again:
        progress = replace(progress, recount=replace(progress.recount, lost_again=True))
    if progress is not before:
        world.put_progress(progress)


def owner_begins(world: World, assignment_id: str) -> None:
    """Before it is sent anything."""
    record = world.record_of(assignment_id)
    if record is None:
        return
    before = world.progress[record.assignment_id]
    if (progress := _bounded(record, before)) is not before:
        world.put_progress(progress)


def _bounded(record: CollectionRecord, progress: CollectionProgress) -> CollectionProgress:
    recount = progress.recount
    if recount is None or recount.again:
        return progress  # what is half written again must be finished
    first = record.want.create_ts
    began = {vchannel: max(ts, first) for vchannel, _, ts in recount.starts}
    behind_ms = (
        tso_to_ms(point.resolved_ts) - tso_to_ms(began[point.vchannel])
        for point in progress.checkpoints
        if point.vchannel in began and not point.closed
    )
    if max(behind_ms, default=0) <= KEPT_MS:
        return progress
    return _given_up(progress)


def _given_up(progress: CollectionProgress) -> CollectionProgress:
    conditions = tuple(sorted({*progress.conditions, NOT_RECOUNTED}))
    return replace(progress, recount=None, conditions=conditions)


def log_is_gone(world: World, assignment_id: str, reason: str) -> bool:
    """Its owner cannot go on for `reason`. True when that is only because the log no longer reaches
    back to where a recount begins: without one, what is in the log may do. Not where rows are
    being written again: the sink is behind its checkpoint then.
    """
    record = world.record_of(assignment_id)
    if reason != "LOG_TRUNCATED" or record is None:
        return False
    progress = world.progress[record.assignment_id]
    if progress.recount is None or progress.recount.again:
        return False
    world.put_progress(_given_up(progress))
    return True


def recounted(progress: CollectionProgress, verdict: Recounted) -> CollectionProgress:
    """After a report of the grant's own epoch."""
    if progress.recount is None or verdict is Recounted.NOT_YET:
        return progress
    if verdict is Recounted.DONE:
        return replace(progress, recount=None)
    return replace(progress, recount=replace(progress.recount, again=True, lost_again=False))
