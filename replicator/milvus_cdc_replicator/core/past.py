"""What owners before this one took since the start of a recount, up to the checkpoint: read for its
keys alone, beside the rows that go on from there.

Laws: nothing of it is written, and no checkpoint or partition moves by it. It ends with what the
checkpoint covers; whatever stands behind that in the log is the rows' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Rank


class Past:
    """Owned by the task that owns the assignment's core."""

    def __init__(
        self,
        lanes: Iterable[Lane],
        until_ts: Mapping[str, int],
        took: Callable[[LogOp], None],
    ) -> None:
        """`lanes` begin where the recount does, `until_ts` is where each one's checkpoint stood
        when this owner began; `took` hears every operation between, per vchannel in order.
        """
        self.lanes = {lane.vchannel: lane for lane in lanes}
        self._until_ts = until_ts
        self._took = took
        self._over: set[str] = set()
        self._dropped: set[int] = set()
        """Partitions, before the checkpoint: of some lane their rows may still be to come."""

    def step(self) -> None:
        """After something was read."""
        for lane in self.lanes.values():
            while lane.staged:
                op = lane.take()
                if self._counts(op) and self._is_covered(lane, op):
                    self._took(op)
                    if op.rank is Rank.MARKER:
                        self._dropped.add(op.partition_id)
                lane.durable(op)
            if lane.ended or lane.released_ts >= self._until_ts[lane.vchannel]:
                self._over.add(lane.vchannel)
                lane.end_of_log()

    @property
    def over(self) -> bool:
        """All of it was read."""
        return len(self._over) == len(self.lanes)

    @property
    def resting(self) -> bool:
        """Every tick counts, until the last one."""
        return False

    @property
    def buffered_bytes(self) -> int:
        """Of rows that wait for their tick."""
        return sum(lane.buffered_bytes for lane in self.lanes.values())

    @property
    def writable_bytes(self) -> int:
        """None: what a tick releases is taken at once."""
        return 0

    def _counts(self, op: LogOp) -> bool:
        return not op.drops_collection and op.partition_id not in self._dropped

    def _is_covered(self, lane: Lane, op: LogOp) -> bool:
        """By the checkpoint. What came behind a tick is covered by the next one, so by checkpoints
        beyond the one that it came behind.
        """
        assert op.batch is not None
        behind_ts, until_ts = op.batch.corrects_ts, self._until_ts[lane.vchannel]
        return op.ts <= until_ts and (behind_ts is None or behind_ts < until_ts)
