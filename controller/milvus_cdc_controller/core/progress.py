"""Merging what a replicator reports into what is stored.

Laws: monotone. `resolved_ts` and `read_from` never go back, a closed vchannel stays closed, a
horizon only grows, the topic a position was taken from stays what it was first seen to be; and a
horizon is granted only for a collection whose ownership of the sink object is stored.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc_controller.core.collection import (
    Checkpoint,
    CollectionProgress,
    CollectionRecord,
    Counters,
    PartReport,
    applied,
)
from milvus_cdc_controller.core.events import ProgressReported, VchannelReport

_UNTIL_RESYNC = frozenset({"KEYS_NOT_RECOUNTED", "PARTITION_EMPTIED", "ROWS_LEFT_OUT"})


def merge_checkpoint(point: Checkpoint, report: VchannelReport, *, grant: bool) -> Checkpoint:
    if report.resolved_ts >= point.resolved_ts:
        point = replace(
            point,
            resolved_ts=report.resolved_ts,
            read_from=report.read_from or point.read_from,
        )
    if grant and report.wanted_horizon_ts > point.horizon_ts:
        point = replace(point, horizon_ts=report.wanted_horizon_ts)
    if report.incarnation and not point.incarnation:
        point = replace(point, incarnation=report.incarnation)
    if report.stored_ts > point.stored_ts:
        point = replace(point, stored_ts=report.stored_ts)
    if report.closed and not point.closed:
        point = replace(point, closed=True)
    return point


def merge(
    progress: CollectionProgress, report: ProgressReported, *, opened: bool
) -> CollectionProgress:
    """The progress after a report of the grant's own epoch. `opened`: the sink object is (now)
    known as ours.
    """
    adopted = report.opened.horizon_ts if report.opened and report.opened.adopted else 0
    by_name = {v.vchannel: v for v in report.vchannels}
    points = []
    for point in progress.checkpoints:
        if adopted > point.horizon_ts:
            point = replace(point, horizon_ts=adopted)
        if point.vchannel in by_name:
            point = merge_checkpoint(point, by_name[point.vchannel], grant=opened)
        points.append(point)
    past, current = progress.past, progress.current
    if report.epoch > progress.epoch:
        past, current = past.plus(current), Counters()
    return replace(
        progress,
        checkpoints=tuple(points),
        epoch=report.epoch,
        past=past,
        current=report.counters,
        conditions=_standing(progress.conditions, report.conditions),
        parts=tuple(replace(part, conditions=()) for part in progress.parts),
    )


def merge_part(progress: CollectionProgress, report: ProgressReported) -> CollectionProgress:
    """As `merge`, after a report of a part."""
    by_name = {v.vchannel: v for v in report.vchannels}
    points = tuple(
        merge_checkpoint(point, by_name[point.vchannel], grant=True)
        if point.vchannel in by_name
        else point
        for point in progress.checkpoints
    )
    past = progress.past
    parts = {part.assignment_id: part for part in progress.parts}
    before = parts.get(report.assignment_id)
    if before is not None and before.epoch < report.epoch:
        past = past.plus(before.current)
    parts[report.assignment_id] = PartReport(
        report.assignment_id, report.epoch, report.counters, report.conditions
    )
    said = {pair for part in parts.values() for pair in part.conditions}
    return replace(
        progress,
        checkpoints=points,
        past=past,
        parts=tuple(parts[key] for key in sorted(parts)),
        conditions=_standing(progress.conditions, tuple(sorted(said))),
    )


def _standing(
    before: tuple[tuple[str, str], ...], now: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """What is wrong with the rows stays said until they are brought anew."""
    said = {kind for kind, _ in now}
    kept = tuple(pair for pair in before if pair[0] in _UNTIL_RESYNC and pair[0] not in said)
    return tuple(sorted((*now, *kept))) if kept else now


def apply_applied(record: CollectionRecord, report: ProgressReported) -> CollectionRecord:
    """Only of the newest wish: what an older one wanted is not known any more."""
    if report.applied_version != record.version or record.recreate:
        return record
    now = applied(record.want)
    return record if record.applied == now else replace(record, applied=now)


def apply_opened(record: CollectionRecord, report: ProgressReported) -> CollectionRecord:
    """The wish once the sink object is known as ours; the next version tells the holder that it
    is stored.
    """
    if report.opened is None or (record.opened and not record.recreate):
        return record
    return replace(
        record,
        version=record.version + 1,
        opened=True,
        recreate=False,
        sink_collection_id=report.opened.sink_collection_id,
        at_sink=record.want.full_name,
    )


def apply_renamed(record: CollectionRecord, report: ProgressReported) -> CollectionRecord:
    """The wish once the sink's collection is known to have the name it was granted."""
    if not record.renaming or report.renamed_to != record.want.full_name:
        return record
    return replace(record, version=record.version + 1, at_sink=record.want.full_name)
