"""The decisions of one collection assignment: what may be written when, and how far it is durable.

Laws: a row beyond the granted horizon waits; a row at or below the horizon with which this owner
began is upserted, because an earlier owner may have written it; a row whose partition the metadata
does not know yet waits for it, a row of a dropped partition is left out and counted, nothing else
is ever left out. A partition's drop is exact: every row before it is durable first, no lane passes
it before it is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from milvus_cdc.model import Collection, ObjectState, Partition, ms_to_tso
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import LogOp, Rank

from milvus_cdc_replicator.core.counters import Counters
from milvus_cdc_replicator.core.effects import (
    CreatePartition,
    DropPartition,
    Effect,
    QueryPartition,
    StartWrite,
)
from milvus_cdc_replicator.core.horizons import Horizons
from milvus_cdc_replicator.core.ops import Write, WriteKind
from milvus_cdc_replicator.core.sequencer import Sequencer, WriteLimits
from milvus_cdc_replicator.core.tally import Tally

DROP_MARGIN_MS = 60_000
"""The log's message of a partition's drop is a little later than the drop in the metadata: Milvus
stamps it when it sends it.
"""


@dataclass(slots=True)
class _Partitions:
    """Which partition id holds a name at the sink."""

    holders: dict[str, int] = field(default_factory=dict)
    creating: set[int] = field(default_factory=set)
    dropping: int | None = None
    queried: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)


class AssignmentCore:
    """One collection of one task, as this owner sees it. Owned by a single task; `step()` after
    every event.
    """

    def __init__(
        self, want: Collection, lanes: Iterable[Lane], limits: WriteLimits, *, partition_key: bool
    ) -> None:
        self.want = want
        self.lanes = {lane.vchannel: lane for lane in lanes}
        self.counters = Counters()
        self.horizons = Horizons()
        self.opened = False
        self.carries_rows = True
        """Without: rows are read and counted as done, drops stay exact."""
        self.left_out = False
        """Rows were, for that reason."""
        self.held_back = False
        """Nothing new is begun: what is under way comes to its end."""
        self.part = False
        """Others write other vchannels of it at the same time: what needs all of them is not
        done, but stood before.
        """
        self.stands_ts = 0
        """Of a part: the newest TSO that it has stood before; all before that is durable."""
        self.still = False
        """Nothing more is taken: what was goes out and comes to its end."""
        self.tally: Tally | None = None
        """Hears what is taken, while keys are to be recounted."""
        self.sequencer = Sequencer(limits)
        self._partition_key = partition_key
        self._partitions = _Partitions()
        self._known = {p.partition_id: p for p in want.partitions}
        self._lane_of: dict[int, Lane] = {}
        self._backlog_max = limits.in_flight

    # ---- events

    def mark_opened(self, existing_rows_until_ts: int) -> None:
        """The sink collection is there with the partitions of the metadata;
        `existing_rows_until_ts` is a TSO at or after every row an adopted one can hold, 0 for an
        empty one.
        """
        self.opened = True
        for partition in self.want.partitions:
            if partition.state is ObjectState.CREATED:
                self._partitions.holders[partition.name] = partition.partition_id
        # Whose drop is still to come has its name at the sink, and its rows; the oldest is first.
        for partition in self._drops_ahead(self.want.partitions):
            self._partitions.holders[partition.name] = partition.partition_id
        for lane in self.lanes.values():
            lane.upsert_until_ts = max(lane.upsert_until_ts, existing_rows_until_ts)

    def update(self, want: Collection) -> None:
        """The metadata changed. Partitions once known stay known."""
        self.want = want
        news = [p for p in want.partitions if p.partition_id not in self._known]
        if self.part and self.opened:
            # Another part may have heard of it in time, and made it; the oldest is first.
            for partition in reversed(self._drops_ahead(news)):
                self._partitions.holders.setdefault(partition.name, partition.partition_id)
        for partition in want.partitions:
            self._known[partition.partition_id] = partition
            self._partitions.queried.discard(partition.partition_id)

    def grant(self, vchannel: str, horizon_ts: int) -> None:
        lane = self.lanes.get(vchannel)
        if lane is not None:
            self.horizons.grant(lane, horizon_ts)

    def took_before(self, op: LogOp) -> None:
        """An owner before has written `op`, at or below the checkpoint with which this one began,
        and beyond the start of a recount.
        """
        if self.tally is None or not self.carries_rows or not self._is_there(op):
            return
        if op.rank is Rank.MARKER:
            self.tally.dropped_before(op.partition)
        else:
            kind = WriteKind.DELETE if op.rank is Rank.DELETE else WriteKind.UPSERT
            self.tally.took_before(kind, self._partition_name(op), op)

    def write_done(self, write_id: int) -> Write:
        write = self.sequencer.done(write_id)
        for op in write.ops:
            self._settle(op)
        for mark in write.marks.values():
            lane = self.lanes[mark.vchannel]
            lane.stored_ts = max(lane.stored_ts, mark.resolved_ts)
        self.counters.add(write)
        return write

    def refused(self, rows: int) -> None:
        """So many are dead letters now; the write that they were taken out of may go on."""
        self.counters.rows_refused += rows

    def partition_created(self, partition_id: int) -> None:
        self._partitions.creating.discard(partition_id)
        self._partitions.holders[self._known[partition_id].name] = partition_id

    def partition_dropped(self, partition_id: int) -> None:
        state = self._partitions
        state.dropping = None
        state.dropped.add(partition_id)
        if self.tally is not None and partition_id in self._known:
            self.tally.forget_partition(self._known[partition_id].name)
        for name, holder in list(state.holders.items()):
            if holder == partition_id:
                del state.holders[name]

    # ---- decisions

    def step(self) -> list[Effect]:
        """Everything that may be done now."""
        effects: list[Effect] = []
        if not self.opened or self.held_back:
            return effects
        effects.extend(self._new_partitions())
        if self._partitions.dropping is None and not self.still:
            for lane in self.lanes.values():
                effects.extend(self._pump(lane))
                if self._partitions.dropping is not None:
                    break
        if self.sequencer.lingering and (self.still or self._awaited()):
            self.sequencer.hurry()
        effects.extend(StartWrite(write) for write in self.sequencer.start())
        idle = self.sequencer.backlog == 0 and self._partitions.dropping is None
        if idle and not self.still:
            effects.extend(self._ready_drop())
        return effects

    @property
    def resting(self) -> bool:
        """Nothing that was read waits for anything; source time alone goes on."""
        return self.sequencer.idle and all(
            lane.idle and not lane.buffered_bytes for lane in self.lanes.values()
        )

    @property
    def at_rest(self) -> bool:
        """Nothing of it is under way at the sink."""
        state = self._partitions
        return not self.sequencer.in_flight and not state.creating and state.dropping is None

    @property
    def held_bytes(self) -> int:
        """Memory held for this assignment."""
        return self.buffered_bytes + self.writable_bytes

    @property
    def buffered_bytes(self) -> int:
        """Of rows that wait for their tick."""
        return sum([lane.buffered_bytes for lane in self.lanes.values()])

    @property
    def writable_bytes(self) -> int:
        """Of rows whose tick has come: writing makes room for them."""
        staged = sum([lane.staged_bytes for lane in self.lanes.values()])
        return staged + self.sequencer.held_bytes

    @property
    def closed(self) -> bool:
        return all(lane.closed for lane in self.lanes.values())

    @property
    def dropped_partitions(self) -> frozenset[int]:
        """Partitions that this owner has dropped, or found to be."""
        return frozenset(self._partitions.dropped)

    @property
    def waiting_partitions(self) -> frozenset[int]:
        """Partitions whose rows wait for the metadata."""
        return frozenset(self._partitions.queried)

    def wanted_horizon(self, lane: Lane) -> int:
        """A TSO to ask for, or 0."""
        return self.horizons.wanted(lane, resting=self.resting) if self.opened else 0

    def horizon_blocks(self) -> bool:
        """Some lane cannot go on without a grant."""
        return any(
            lane.staged and lane.staged[0].ts > lane.horizon_ts for lane in self.lanes.values()
        )

    # ---- inside

    def _pump(self, lane: Lane) -> list[Effect]:
        while lane.staged and self.sequencer.backlog < self._backlog_max:
            op = lane.staged[0]
            if op.rank is Rank.MARKER:
                if op.drops_collection:
                    self._leave_out(lane)
                    continue
                holder = self._partitions.holders.get(op.partition)
                if holder != op.partition_id and not self.part:
                    # Never at the sink, or dropped already to make room for its successor. A part
                    # cannot know: another may have made it.
                    self._partitions.dropped.add(op.partition_id)
                    self._leave_out(lane)
                    continue
                return []
            if not self.carries_rows:
                self._leave_out(lane)
                self.left_out = True
                continue
            if op.ts > lane.horizon_ts:
                return []
            if not self._partition_key and op.partition_id != -1:
                verdict = self._admit(lane, op)
                if verdict is not None:
                    if verdict:
                        return verdict
                    if op.partition_id not in self._partitions.dropped and not self._is_dropped(
                        op.partition_id
                    ):
                        return []
                    self._leave_out(lane)
                    self.counters.rows_skipped += op.rows
                    continue
            lane.take()
            self._lane_of[id(op)] = lane
            op.partition = self._partition_name(op)
            if self.tally is not None:
                self._remember(lane, op)
            self.sequencer.add(self._kind(lane, op), op.partition, op, lane.vchannel)
            self._mark(lane, op)
        return []

    def _remember(self, lane: Lane, op: LogOp) -> None:
        assert self.tally is not None
        window = op.ts <= lane.upsert_until_ts
        self.tally.took(self._kind(lane, op), op.partition, op, window=window)

    def _is_there(self, op: LogOp) -> bool:
        """The sink has its partition."""
        if self._partition_key or op.partition_id == -1:
            return True
        known = self._known.get(op.partition_id)
        return known is not None and self._partitions.holders.get(known.name) == op.partition_id

    def _awaited(self) -> bool:
        """A drop waits for what is unfinished."""
        return any(
            lane.ended or (lane.staged and lane.staged[0].rank is Rank.MARKER)
            for lane in self.lanes.values()
        )

    def _leave_out(self, lane: Lane) -> None:
        op = lane.take()
        self._mark(lane, op)
        lane.durable(op)

    def _mark(self, lane: Lane, op: LogOp) -> None:
        if (mark := lane.mark_after(op)) is not None:
            self.sequencer.mark(mark)

    def _admit(self, lane: Lane, op: LogOp) -> list[Effect] | None:
        """None = write it; an empty list = wait or leave out; effects = do these first."""
        state = self._partitions
        partition_id = op.partition_id
        if partition_id in state.dropped or self._is_dropped(partition_id):
            return []
        known = self._known.get(partition_id)
        if known is None:
            if partition_id in state.queried:
                return []
            state.queried.add(partition_id)
            return [QueryPartition(partition_id)]
        holder = state.holders.get(known.name)
        if holder == partition_id:
            return None
        if holder is not None and self._is_dropped(holder):
            # The name was given anew before the old partition's drop message: make room first.
            if self.sequencer.idle and self.part:
                self._stand(lane, op)
            elif self.sequencer.idle:
                state.dropping = holder
                return [DropPartition(holder, known.name, self._known[holder].drop_ts)]
            return []
        return []

    def _new_partitions(self) -> list[Effect]:
        if self._partition_key:
            return []
        state = self._partitions
        effects: list[Effect] = []
        for partition in self._known.values():
            if (
                partition.state is ObjectState.CREATED
                and partition.partition_id not in state.dropped
                and partition.partition_id not in state.creating
                and partition.name not in state.holders
            ):
                state.creating.add(partition.partition_id)
                effects.append(
                    CreatePartition(partition.partition_id, partition.name, partition.create_ts)
                )
        return effects

    def _ready_drop(self) -> list[Effect]:
        """The drop of a partition that every lane has reached, with everything before it
        durable.
        """
        for lane in self.lanes.values():
            if not lane.staged or lane.staged[0].rank is not Rank.MARKER:
                continue
            marker = lane.staged[0]
            if self.sequencer.idle and all(
                self._reached(other, marker) for other in self.lanes.values()
            ):
                if self.part:
                    self._stand(lane, marker)
                    return []
                self._partitions.dropping = marker.partition_id
                return [DropPartition(marker.partition_id, marker.partition, marker.ts)]
        return []

    def _stand(self, lane: Lane, op: LogOp) -> None:
        # What came behind its tick is older than the checkpoint, and done when that goes on.
        self.stands_ts = max(self.stands_ts, op.ts, lane.resolved_ts + 1)

    def _reached(self, lane: Lane, marker: LogOp) -> bool:
        if lane.ended and not lane.staged:
            return True
        if lane.staged:
            head = lane.staged[0]
            return head.ts > marker.ts or (
                head.rank is Rank.MARKER and head.partition_id == marker.partition_id
            )
        return lane.released_ts >= marker.ts

    def _drops_ahead(self, partitions: Iterable[Partition]) -> list[Partition]:
        """Those of them whose drop no checkpoint has passed, the newest first; as far as that can
        be told: one between what the metadata says and the message has not. An owner before may
        have carried it out all the same: then everything written since is replayed, so rows of the
        next partition of that name must not be below a checkpoint.
        """
        passed = [lane.resolved_ts for lane in self.lanes.values()]
        if min(passed, default=0) == 0:
            return []
        named: dict[str, list[Partition]] = {}
        for each in self.want.partitions:
            named.setdefault(each.name, []).append(each)

        def is_ahead(partition: Partition) -> bool:
            if partition.state is not ObjectState.DROPPED or not partition.name:
                return False
            # Without one it was gone when the metadata was read.
            latest = partition.drop_ts and partition.drop_ts + ms_to_tso(DROP_MARGIN_MS)
            if 0 < latest <= max(passed):
                return False
            until = [
                other.create_ts
                for other in named.get(partition.name, ())
                if other.partition_id != partition.partition_id
                if other.state is ObjectState.CREATED or other.create_ts > partition.create_ts
            ]
            return not until or max(passed) < max(partition.drop_ts, min(until))

        return sorted(filter(is_ahead, partitions), key=lambda p: p.create_ts, reverse=True)

    def _is_dropped(self, partition_id: int) -> bool:
        known = self._known.get(partition_id)
        return known is not None and known.state is ObjectState.DROPPED

    def _kind(self, lane: Lane, op: LogOp) -> WriteKind:
        if op.rank is Rank.DELETE:
            return WriteKind.DELETE
        if op.replaces or op.ts <= lane.upsert_until_ts:
            return WriteKind.UPSERT
        return WriteKind.INSERT

    def _partition_name(self, op: LogOp) -> str:
        return (
            ""
            if self._partition_key or op.partition_id == -1
            else self._known[op.partition_id].name
        )

    def _settle(self, op: LogOp) -> None:
        self._lane_of.pop(id(op)).durable(op)
