"""What the owner of one collection says of it: how far it is, and whether more than source time
has gone on since it last said so.
"""

from __future__ import annotations

from dataclasses import replace

from milvus_cdc.model import tso_to_ms

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.gate import boottime
from milvus_cdc_replicator.intake import Intake
from milvus_cdc_replicator.recount import Recounting
from milvus_cdc_replicator.report import LaneReport, Report, lag_ms
from milvus_cdc_replicator.sink_object import SinkObject
from milvus_cdc_replicator.spec import CollectionAssignment


class Reporting:
    """Puts together what the parts of one owner know."""

    def __init__(
        self,
        core: AssignmentCore,
        *,
        intake: Intake,
        sink_object: SinkObject,
        recounting: Recounting,
        connections: Connections,
    ) -> None:
        self._core = core
        self._intake = intake
        self._object = sink_object
        self._recounting = recounting
        self._connections = connections
        self._said: object = None

    @property
    def has_news(self) -> bool:
        """More has happened since the last report than that source time went on."""
        return not self._core.resting or self._said != self._gist()

    def _gist(self) -> object:
        lanes = self._core.lanes.values()
        return self._core.resting, replace(self._core.counters), [lane.closed for lane in lanes]

    def report(
        self, assignment: CollectionAssignment, standing: tuple[str, str, str], *, failed: bool
    ) -> Report:
        """`standing`: state, reason and message."""
        self._said = self._gist()
        state, reason, message = standing
        lanes = tuple(
            LaneReport(
                lane.vchannel,
                lane.read_from,
                lane.resolved_ts,
                lane.closed,
                0 if failed else self._core.wanted_horizon(lane),
                self._intake.incarnation(lane.vchannel),
                lane.stored_ts,
            )
            for lane in self._core.lanes.values()
        )
        labels = (assignment.task, self._object.placed.full_name)
        resolved = min((lane.resolved_ts for lane in lanes if not lane.closed), default=0)
        clock = self._connections.clock(assignment.source)
        lag = lag_ms(self._core.lanes.values(), clock.now_ms(boottime()))
        if lag >= 0:
            metrics.LAG_SECONDS.labels(*labels).set(lag / 1000)
        if resolved:
            metrics.CHECKPOINT_AGE.labels(*labels).set(tso_to_ms(resolved) / 1000)
        return Report(
            assignment_id=assignment.assignment_id,
            epoch=assignment.epoch,
            state=state,
            reason=reason,
            message=message,
            lanes=lanes,
            counters=replace(self._core.counters),
            lag_ms=lag,
            conditions=tuple(sorted(self._object.remarks.items())),
            opened=self._object.opened,
            dropped=self._object.dropped,
            renamed_to=self._object.renamed_to,
            flushed_ts=self._object.flushed_ts,
            applied_version=self._object.applied_version,
            recounted=self._recounting.ended,
            stands_ts=self._core.stands_ts,
            whole_now=self._object.needs_whole,
        )
