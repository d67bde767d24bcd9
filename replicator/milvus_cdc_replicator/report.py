"""What an assignment tells the controller, and how it is put on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from milvus_cdc.codec.operations import FlushOperation
from milvus_cdc.model import tso_to_ms
from milvus_cdc.order.lane import Lane
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_pb2

from milvus_cdc_replicator.core.counters import Counters


class Recounted(StrEnum):
    """How a recount has ended."""

    NOT_YET = "NOT_YET"
    DONE = "DONE"
    WRITE_AGAIN = "WRITE_AGAIN"


@dataclass(frozen=True, slots=True)
class LaneReport:
    vchannel: str
    read_from: bytes
    resolved_ts: int
    closed: bool
    wanted_horizon_ts: int
    incarnation: bytes
    stored_ts: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One Progress, in this process' nouns."""

    assignment_id: str
    epoch: int
    state: str
    """RUNNING, RETRYING or FAILED."""
    reason: str
    message: str
    lanes: tuple[LaneReport, ...]
    counters: Counters
    lag_ms: int
    conditions: tuple[tuple[str, str], ...]
    opened: tuple[int, bool, int] | None
    """(sink collection id, adopted, horizon TSO)."""
    dropped: bool
    applied_version: int = 0
    renamed_to: tuple[str, str] | None = None
    """(database, name) that the sink's collection has since a rename."""
    flushed_ts: int = 0
    aliases_version: int = 0
    flushes: tuple[FlushOperation, ...] = ()
    operations_read_from: bytes = b""
    recounted: Recounted = Recounted.NOT_YET
    stands_ts: int = 0
    """Of a part: all before it is done, what is there only who has all vchannels can do."""
    whole_now: bool = False
    """Of a part: it cannot go on, whatever the others do."""


def lag_ms(lanes: Iterable[Lane], now_ms: int | None) -> int:
    """Source time now minus the source time up to which every row is durable, whether or not what
    lies between has been read; -1 before the first checkpoint, and while it is not known what time
    it is at the source.
    """
    resolved = [lane.resolved_ts for lane in lanes if not lane.closed]
    if not resolved:
        return 0
    oldest = min(resolved)
    return -1 if now_ms is None or oldest == 0 else max(now_ms - tso_to_ms(oldest), 0)


_STATES = {
    "RUNNING": pb.Progress.STATE_RUNNING,
    "RETRYING": pb.Progress.STATE_RETRYING,
    "FAILED": pb.Progress.STATE_FAILED,
}


_RECOUNTED = {
    Recounted.NOT_YET: pb.RECOUNTED_UNSPECIFIED,
    Recounted.DONE: pb.RECOUNTED_DONE,
    Recounted.WRITE_AGAIN: pb.RECOUNTED_WRITE_AGAIN,
}


def to_progress(report: Report, seq: int) -> pb.Progress:
    message = pb.Progress(
        assignment_id=report.assignment_id,
        epoch=report.epoch,
        seq=seq,
        state=_STATES[report.state],
        reason=report.reason,
        message=report.message,
        vchannels=[
            pb.VchannelReport(
                vchannel=lane.vchannel,
                read_from=lane.read_from,
                resolved_ts=lane.resolved_ts,
                closed=lane.closed,
                wanted_horizon_ts=lane.wanted_horizon_ts,
                incarnation=lane.incarnation,
                stored_ts=lane.stored_ts,
            )
            for lane in report.lanes
        ],
        rows_inserted=report.counters.rows_inserted,
        rows_upserted=report.counters.rows_upserted,
        rows_deleted=report.counters.rows_deleted,
        rows_skipped=report.counters.rows_skipped,
        rows_refused=report.counters.rows_refused,
        bytes_written=report.counters.bytes_written,
        lag_ms=report.lag_ms,
        conditions=[task_pb2.Condition(type=t, message=m) for t, m in report.conditions],
        dropped=report.dropped,
        applied_version=report.applied_version,
        flushed_ts=report.flushed_ts,
        aliases_version=report.aliases_version,
        flushes=[
            pb.FlushOperation(ts=f.ts, database=f.database, collections=f.collections)
            for f in report.flushes
        ],
        operations_read_from=report.operations_read_from,
        recounted=_RECOUNTED[report.recounted],
        stands_ts=report.stands_ts,
        whole_now=report.whole_now,
    )
    if report.renamed_to is not None:
        message.renamed_to.database, message.renamed_to.collection = report.renamed_to
    if report.opened is not None:
        sink_collection_id, adopted, horizon_ts = report.opened
        message.opened.sink_collection_id = sink_collection_id
        message.opened.adopted = adopted
        message.opened.horizon_ts = horizon_ts
    return message
