"""One vchannel: log order to timestamp order, and the checkpoint that follows durability.

Laws: messages between two ticks are not sorted, so they wait for the tick and leave sorted by
timestamp, deletes before inserts at an equal timestamp, log order for the rest (milvus
`pkg/mq/msgstream/mq_msgstream.go`). The checkpoint (`read_from`, `resolved_ts`) is never derived
from what was merely read: `resolved_ts` is a tick all of whose messages are durable, `read_from`
the oldest message beyond it, which may lie before the tick in the log. What waits for its tick
can be forgotten; once the tick is known it is read again in portions, each released as if its end
were a tick. What comes behind a tick that covers it (`late`) is read again with what it belongs
before. So the log says what is done, not timestamps alone: up to the first tick at or beyond the
checkpoint, what is no newer than the checkpoint.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from milvus_cdc.order.late import Correction, History
from milvus_cdc.order.ops import Key, LogOp, Mark, Rank, TickBatch
from milvus_cdc.order.survey import Portion, Survey


class Lane:
    """Invariants: resolved_ts <= released_ts; staged operations are in timestamp order; nothing
    regresses.
    """

    def __init__(
        self,
        vchannel: str,
        pchannel: str,
        *,
        read_from: bytes,
        resolved_ts: int,
        horizon_ts: int,
        closed: bool,
        stored_ts: int = 0,
    ) -> None:
        self.vchannel = vchannel
        self.pchannel = pchannel
        self.read_from = read_from
        self.resolved_ts = resolved_ts
        self.horizon_ts = horizon_ts
        self.upsert_until_ts = horizon_ts
        """Rows at or below it may have been written by an earlier owner."""
        self.stored_ts = stored_ts
        """Of a sink that keeps checkpoints itself: newest `resolved_ts` that it holds."""
        self.closed = closed
        """The log of this vchannel has ended and everything before is durable."""
        self.released_ts = resolved_ts
        """Newest tick seen."""
        self.staged: deque[LogOp] = deque()
        """Released by a tick, not yet taken by the sequencer."""
        self.ended = closed
        """The collection's drop was read: nothing after it matters."""
        self.dropped_ts = 0
        """TSO of the drop; 0 while it was not read, or where the log ended without one."""
        self.buffered_bytes = 0
        self.staged_bytes = 0
        self.taken_from = read_from
        """At or before the first message that is still staged or not yet released."""
        self.duplicates = 0
        self.late = 0
        """Messages that came behind a tick that covers them."""
        self._began_ts = resolved_ts
        self._passed_order = -1
        """What stands up to there and is no newer than the checkpoint of the beginning was left
        out.
        """
        self._start_ts = resolved_ts
        self._started = False
        """The tick of the start was passed: what comes now was not seen before."""
        self._buffer: list[LogOp] = []
        self._batches: deque[TickBatch] = deque()
        self._seen: dict[tuple[int, int, int], LogOp] = {}
        self._survey: Survey | None = None
        self._portion_bytes = 0
        self._portions: deque[Portion] = deque()
        """Still to be read again."""
        self._reread_from: bytes | None = None
        self._history = History(resolved_ts, read_from)
        self._released_from = read_from
        """At or before everything that is not released."""
        self._late: list[LogOp] = []
        """Among the buffered."""
        self._late_orders: set[int] = set()
        """Where late ones are in the log, since the last tick."""
        self._late_from = 0
        """The lowest timestamp of late ones since the last tick; 0 = none."""
        self._correction: Correction | None = None

    def add(self, op: LogOp) -> bool:
        """Buffers one message; False when it is not news (before the checkpoint, or a producer's
        retry).
        """
        if self.ended or self._reread_from is not None:
            return False
        if self._portions:
            return self._add_again(op)
        if not self._started and op.ts <= self._start_ts:
            if self.released_ts == self._began_ts:
                self._passed_order = op.order
            return False
        late = self._started and op.ts <= self.released_ts
        if self._survey is not None:
            self._survey.add(op.ts, op.order, op.size, op.position)
            self.buffered_bytes = self._survey.held_bytes
        elif not self._keep(op):
            return False
        elif late:
            self._late.append(op)
        if late:
            self.late += 1
            self._late_orders.add(op.order)
            self._late_from = min(self._late_from or op.ts, op.ts)
        return True

    def _add_again(self, op: LogOp) -> bool:
        portion = self._portions[0]
        kept = False
        if self._start_ts < op.ts <= portion.until_ts:
            wanted = op if self._correction is None else self._correction.part_of(op)
            kept = wanted is not None and self._keep(wanted)
        if op.order >= portion.last_order:
            self._release_portion()
        return kept

    def _keep(self, op: LogOp) -> bool:
        if op.msg_id:
            twin_key = (op.msg_id, op.ts, op.rank)
            twin = self._seen.get(twin_key)
            if twin is not None and twin.payload == op.payload:
                self.duplicates += 1
                return False
            self._seen[twin_key] = op
        self._buffer.append(op)
        self.buffered_bytes += op.size
        return True

    def tick(self, ts: int, position: bytes) -> bool:
        """Releases everything at or below `ts`; True when something was released or the frontier
        moved.
        """
        if self.ended or self.rereading:
            return False
        self._started = self._started or ts >= self._start_ts
        if ts <= self.released_ts:
            return False  # ticks may repeat; they never announce something new then
        if self._survey is None and not self._late:
            self._release(ts, position)
            return True
        portions = self._places(ts, position)
        if not portions:
            assert self._survey is not None
            self.released_ts = ts
            self._push(TickBatch(ts, self._survey.start, 0))
            return True
        self._start_ts = self.released_ts
        self._started = False
        if self._late_from:
            self._correct(portions)
        self._survey = None
        self._buffer = []
        self._seen = {}
        self.buffered_bytes = 0
        self._portions.extend(portions)
        self._reread_from = portions[0].start
        return True

    def _places(self, ts: int, position: bytes) -> list[Portion]:
        """Of what this tick covers."""
        if self._survey is not None:
            until = self.released_ts if self._late_from else 0
            return self._survey.portions(ts, position, self._portion_bytes, until)
        due = max((op for op in self._buffer if op.ts <= ts), key=_log_order)
        beyond = min((op for op in self._buffer if op.ts > ts), key=_log_order, default=None)
        read_from = position if beyond is None else beyond.position
        return [Portion(ts, self._released_from, due.order, read_from)]

    def _correct(self, portions: list[Portion]) -> None:
        """Reading begins where the oldest of the late messages belongs."""
        forgotten = self._survey is not None
        keys = [op.keys() for op in self._late if op.rank is not Rank.MARKER]
        self._correction = Correction(
            self.released_ts,
            None if forgotten else frozenset[Key]().union(*keys),
            frozenset(self._late_orders),
        )
        start = self._history.before(self._late_from)
        portions[0] = replace(portions[0], start=start)
        self._start_ts = self._late_from - 1
        self._late, self._late_orders, self._late_from = [], set(), 0

    def forget(self, portion_bytes: int) -> None:
        """Gives up the payloads of what waits for its tick; see `take_reread`. Between ticks only
        places and timestamps are kept from now on, afterwards `portion_bytes` at a time.
        """
        assert self.may_forget
        self._survey = Survey()
        for op in self._buffer:
            self._survey.add(op.ts, op.order, op.size, op.position)
        self._buffer = []
        self._late = []
        self._seen = {}
        self._portion_bytes = portion_bytes
        self.buffered_bytes = self._survey.held_bytes

    @property
    def may_forget(self) -> bool:
        """It holds something that waits for a tick not yet known."""
        return bool(self._buffer) and not self.rereading

    @property
    def forgetful(self) -> bool:
        """It keeps no payloads until the next tick."""
        return self._survey is not None

    @property
    def rereading(self) -> bool:
        """What was forgotten, or belongs before what was released, is being read again."""
        return bool(self._portions) or self._reread_from is not None

    @property
    def wants_reread(self) -> bool:
        """Nothing read further on is taken."""
        return self._reread_from is not None

    def take_reread(self) -> bytes | None:
        """Where reading has to begin anew, or None. What is read from there is taken again."""
        position, self._reread_from = self._reread_from, None
        return position

    def _release_portion(self) -> None:
        portion = self._portions.popleft()
        self._release(portion.until_ts, portion.read_from)
        self._start_ts = portion.until_ts
        if self.ended:
            self._portions.clear()
        else:
            self._reread_from = self._portions[0].start if self._portions else portion.read_from

    def _release(self, ts: int, position: bytes) -> None:
        correction, self._correction = self._correction, None
        due = [op for op in self._buffer if op.ts <= ts]
        if len(due) == len(self._buffer):
            self._buffer = []
        else:
            self._buffer = [op for op in self._buffer if op.ts > ts]
        self._seen = {(op.msg_id, op.ts, op.rank): op for op in self._buffer if op.msg_id}
        oldest = min(self._buffer, key=_log_order) if self._buffer else None
        self.released_ts = ts
        self._released_from = position if oldest is None else oldest.position
        self._history.add(ts, self._released_from)
        corrects_ts = None if correction is None else correction.frontier_ts
        batch = TickBatch(ts, self._released_from, 0, corrects_ts)
        due.sort(key=_apply_order)
        ops = _pair_upserts(due)
        if correction is not None:
            ops = correction.states(ops)
            if correction.keys is None:
                ops = [op for op in ops if not self._was_passed(op)]
        for op in ops:
            op.batch = batch
            batch.outstanding += 1
            self.staged.append(op)
            self.staged_bytes += op.size
            if op.drops_collection:
                self.ended = True
                self.dropped_ts = op.ts
                break
        if self.ended:
            self._buffer = []
        self.buffered_bytes = sum(op.size for op in self._buffer)
        self._push(batch)

    def _was_passed(self, op: LogOp) -> bool:
        """A deletion that was left out when this owner began. Where everything is said anew it may
        be the half of an upsert whose other half lies before; else it is done.
        """
        passed = op.order <= self._passed_order and op.ts <= self._began_ts
        return passed and op.rank is Rank.DELETE

    def resume(self, read_from: bytes, resolved_ts: int) -> None:
        """Before anything is read: the sink itself says that it is further than was known here."""
        assert not self._batches
        assert not self._buffer
        if resolved_ts > self.resolved_ts:
            self.read_from = self.taken_from = read_from
            self.resolved_ts = self.released_ts = resolved_ts
            self._start_ts = self._began_ts = resolved_ts
            self._released_from = read_from
            self._history = History(resolved_ts, read_from)

    def take(self) -> LogOp:
        """The next staged operation leaves."""
        op = self.staged.popleft()
        self.staged_bytes -= op.size
        batch = op.batch
        assert batch is not None
        if not self.staged or self.staged[0].batch is not batch:
            self.taken_from = batch.read_from
        return op

    def mark_after(self, op: LogOp) -> Mark | None:
        """The place between `op`, just taken, and everything else; None inside of a timestamp."""
        batch = op.batch
        assert batch is not None
        following = self.staged[0] if self.staged else None
        if following is None or following.batch is not batch:
            return Mark(self.vchannel, batch.read_from, batch.ts)
        if batch.corrects_ts is not None:
            return None
        if following.ts > op.ts:
            return Mark(self.vchannel, self.taken_from, op.ts)
        # A drop waits for everything before it, and must be read again should this owner end.
        return Mark(self.vchannel, self.taken_from, op.ts - 1) if _is_marker(following) else None

    def end_of_log(self) -> None:
        """The collection is dropped and its log holds no more: what no tick released yet went
        with it.
        """
        if not self.ended and not self.rereading:
            self.ended = True
            self._buffer = []
            self._survey = None
            self.buffered_bytes = 0
            self._advance()

    def durable(self, op: LogOp) -> None:
        """`op` is in the sink, or was rightly left out."""
        batch = op.batch
        assert batch is not None
        batch.outstanding -= 1
        assert batch.outstanding >= 0
        self._advance()

    @property
    def idle(self) -> bool:
        """Everything that a tick covers is durable."""
        return not self._batches and not self.rereading

    def _push(self, batch: TickBatch) -> None:
        if self._batches and not batch.outstanding and not self._batches[-1].outstanding:
            self._batches.pop()  # ticks that wait behind something unfinished are one
        self._batches.append(batch)
        self._advance()

    def _advance(self) -> None:
        while self._batches and self._batches[0].outstanding == 0:
            batch = self._batches.popleft()
            assert batch.ts >= self.resolved_ts
            self.resolved_ts = batch.ts
            self.read_from = batch.read_from
        if self.ended and not self._batches:
            self.closed = True


def _is_marker(op: LogOp) -> bool:
    return op.rank is Rank.MARKER


def _log_order(op: LogOp) -> int:
    return op.order


def _apply_order(op: LogOp) -> tuple[int, int, int]:
    return (op.ts, op.rank, op.order)


def _pair_upserts(due: list[LogOp]) -> list[LogOp]:
    """Joins the delete and insert halves of a source upsert, which share a timestamp, so that no
    reader of the sink sees the row gone in between. Only where the inserts bring back every
    deleted key; else both stay as they are.
    """
    result: list[LogOp] = []
    at = 0
    while at < len(due):
        end = at + 1
        while end < len(due) and due[end].ts == due[at].ts:
            end += 1
        group = due[at:end]
        deletes = [op for op in group if op.rank is Rank.DELETE]
        inserts = [op for op in group if op.rank is Rank.INSERT]
        if deletes and inserts and _replaces(deletes, inserts):
            for op in inserts:
                op.replaces = True
            inserts[-1].paired.extend(deletes)
            # A paired delete holds the memory of its message and nothing else.
            result.extend(op for op in group if op.rank is not Rank.DELETE)
        else:
            result.extend(group)
        at = end
    return result


def _replaces(deletes: list[LogOp], inserts: list[LogOp]) -> bool:
    partitions = {op.partition_id for op in inserts}
    for delete in deletes:
        if delete.partition_id != -1 and delete.partition_id not in partitions:
            return False
    # Messages of one request: its keys may be split differently on the two sides, by partition key.
    returned: set[Key] = set()
    for insert in inserts:
        returned |= insert.keys()
    return all(delete.keys() <= returned for delete in deletes)
