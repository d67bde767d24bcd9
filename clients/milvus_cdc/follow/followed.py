"""One followed collection: what of it may be handed out next, and how far it has been.

Laws: what was handed out counts when the program comes back for more, not before. A batch ends
where a place in the log can be named between what it holds and all else. A drop is handed out when
every shard has come to it, and no shard goes past it before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from milvus_cdc.changes import changes_of
from milvus_cdc.follow.items import ChangeBatch, EventKind, Item, SchemaEvent
from milvus_cdc.follow.positions import CollectionPosition, VchannelPosition
from milvus_cdc.model import Collection
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Mark, Rank
from milvus_cdc.rows import Table, table_of
from milvus_cdc.sink.writer import Checkpoint


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """A batch is at least what one request of the source has at one timestamp."""

    rows: int
    size: int
    """Payload bytes in the log."""


class Followed:
    """Nothing is read before `begun`: until then its positions may be set."""

    def __init__(self, want: Collection, saved: CollectionPosition | None) -> None:
        self.collection_id = want.collection_id
        self.resumed = saved is not None
        self.begun = False
        self.vanished = False
        """Dropped according to the metadata: its log may end without a word."""
        self.table: Table = table_of(want)
        """As handed out last."""
        self._partition_key = any(field.partition_key for field in self.table.fields)
        self.incarnations: dict[str, bytes] = {}
        self.lanes: dict[str, Lane] = {}
        for place in want.vchannels:
            at = (saved.vchannels if saved else {}).get(place.vchannel)
            if at is None:
                at = VchannelPosition(place.pchannel, place.start_position, 0)
            self.incarnations[place.vchannel] = at.incarnation
            self.lanes[place.vchannel] = Lane(
                place.vchannel,
                place.pchannel,
                read_from=at.read_from,
                resolved_ts=at.resolved_ts,
                horizon_ts=0,
                closed=at.closed,
            )
        self._marks: dict[str, Mark] = {}
        self._dropped: set[int] = set()
        self._told = ("", "")
        """Database and name that the program knows."""
        self._in_hand: list[tuple[Lane, LogOp]] = []
        self._marks_in_hand: dict[str, Mark] = {}
        if saved is not None:
            # The names told last; what has changed since is told first.
            self.table = _named(self.table, saved.database, saved.name)
        self.settle()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Somebody else knows better how far this vchannel was handled."""
        lane = self.lanes.get(checkpoint.vchannel)
        if lane is not None:
            lane.resume(checkpoint.read_from, checkpoint.resolved_ts)

    def next_item(self, vchannel: str, limits: BatchLimits) -> Item | None:
        """The next of this vchannel, None when there is nothing, or it waits for another one."""
        lane = self.lanes[vchannel]
        while lane.staged and not self._in_hand:
            head = lane.staged[0]
            if head.rank is not Rank.MARKER:
                return self._batch(lane, limits)
            if head.drops_collection:
                return None  # `ended` tells
            if head.partition_id in self._dropped:
                self._take(lane)
                self.settle()
            elif all(_reached(other, head) for other in self.lanes.values()):
                return self._partition_dropped(head)
            else:
                return None
        return None

    def ended(self) -> SchemaEvent | None:
        """The collection's drop, once everything before it was handed out."""
        ts = 0
        for lane in self.lanes.values():
            if not lane.ended or (lane.staged and not lane.staged[0].drops_collection):
                return None
            if lane.staged:
                ts = lane.staged[0].ts
        if not self.begun or self._in_hand:
            return None
        return SchemaEvent(EventKind.COLLECTION_DROPPED, self.table, ts)

    def settle(self) -> None:
        """What is in hand was dealt with."""
        for lane, op in self._in_hand:
            lane.durable(op)
        self._in_hand.clear()
        self._marks.update(self._marks_in_hand)
        self._marks_in_hand.clear()
        self._told = (self.table.source_database, self.table.source_collection)

    def position(self) -> CollectionPosition:
        """Of everything settled."""
        return CollectionPosition(
            *self._told,
            {
                vchannel: self._position(lane, self.incarnations[vchannel])
                for vchannel, lane in self.lanes.items()
            },
        )

    def renamed(self, database: str, name: str) -> SchemaEvent | None:
        """The metadata says so; None when nothing is new."""
        before = (self.table.source_database, self.table.source_collection)
        if before == (database, name):
            return None
        self.table = _named(self.table, database, name)
        return SchemaEvent(EventKind.COLLECTION_RENAMED, self.table, renamed_from=before)

    def _position(self, lane: Lane, incarnation: bytes) -> VchannelPosition:
        read_from, resolved_ts = lane.read_from, lane.resolved_ts
        mark = self._marks.get(lane.vchannel)
        if mark is not None and mark.resolved_ts > resolved_ts:
            read_from, resolved_ts = mark.read_from, mark.resolved_ts
        return VchannelPosition(lane.pchannel, read_from, resolved_ts, incarnation, lane.closed)

    def _batch(self, lane: Lane, limits: BatchLimits) -> ChangeBatch:
        rows = size = 0
        mark: Mark | None = None
        ops: list[LogOp] = []
        while lane.staged and lane.staged[0].rank is not Rank.MARKER:
            head = lane.staged[0]
            full = rows + head.rows > limits.rows or size + head.size > limits.size
            if mark is not None and full:
                break
            op, mark = self._take(lane)
            if self._partition_key:
                op.partition = ""
            ops.append(op)
            rows += op.rows
            size += op.size
        checkpoint = Checkpoint(lane.vchannel, lane.read_from, lane.resolved_ts)
        if mark is not None:
            checkpoint = Checkpoint(mark.vchannel, mark.read_from, mark.resolved_ts)
        return ChangeBatch(self.table, lane.vchannel, tuple(map(changes_of, ops)), checkpoint)

    def _partition_dropped(self, head: LogOp) -> SchemaEvent:
        self._dropped.add(head.partition_id)
        for lane in self.lanes.values():
            if lane.staged and _drops(lane.staged[0], head.partition_id):
                self._take(lane)
        return SchemaEvent(EventKind.PARTITION_DROPPED, self.table, head.ts, head.partition)

    def _take(self, lane: Lane) -> tuple[LogOp, Mark | None]:
        op = lane.take()
        mark = lane.mark_after(op)
        self._in_hand.append((lane, op))
        if mark is not None:
            self._marks_in_hand[lane.vchannel] = mark
        return op, mark


def _named(table: Table, database: str, name: str) -> Table:
    return replace(
        table,
        source_database=database,
        source_collection=name,
        database=database,
        collection=name,
    )


def _drops(op: LogOp, partition_id: int) -> bool:
    return op.rank is Rank.MARKER and op.partition_id == partition_id


def _reached(lane: Lane, marker: LogOp) -> bool:
    """All before the marker was handed out in this lane, and is known to be all."""
    if lane.staged:
        head = lane.staged[0]
        return head.ts > marker.ts or _drops(head, marker.partition_id)
    return lane.ended or lane.released_ts >= marker.ts
