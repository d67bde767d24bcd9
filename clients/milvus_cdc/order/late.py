"""Messages behind a tick that had promised that there would be none.

Fact (seen on a 2.3.5 that was restarted on a busy machine): a proxy that has just started serves
before the root coordinator counts it among those whose writes hold ticks back. For some seconds
rows come behind ticks with higher timestamps, and the two halves of one upsert on either side of
such a tick. Milvus itself does not mind, since its rows keep their timestamps; what is applied in
order does.

Law: of the keys of late messages the state at the newest tick that was released before is released
anew: one row that replaces, or one deletion, for each. So no value ever goes back to an older one,
not even until the next message, and an owner may end anywhere. A late deletion that reaches other
partitions than what is newer is released before it: nobody else would remove the row there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from milvus_cdc.order.ops import Key, LogOp, Rank

STEP = 1_000 << 18
"""TSO of one second."""
PLACES = 120
EVERYWHERE = -1
"""For a partition: all of them."""


class History:
    """Where to begin to read everything beyond an earlier tick: about one place for each second of
    source time, the newest two minutes.
    """

    def __init__(self, ts: int, read_from: bytes) -> None:
        self._places = deque([(ts, read_from)], maxlen=PLACES)

    def add(self, ts: int, read_from: bytes) -> None:
        if ts - self._places[-1][0] >= STEP:
            self._places.append((ts, read_from))

    def before(self, ts: int) -> bytes:
        """Of the newest place that lies before everything at or beyond `ts`; the oldest one if
        there is none.
        """
        for tick, read_from in reversed(self._places):
            if tick < ts:
                return read_from
        return self._places[0][1]


@dataclass(frozen=True, slots=True)
class Correction:
    """What is to be released anew, of a stretch of the log that is read again."""

    frontier_ts: int
    """The newest tick that was released before: anything up to it may be in the sink."""
    keys: frozenset[Key] | None
    """Of the late messages; None where they were forgotten, and then everything is."""
    orders: frozenset[int]
    """Of the late messages themselves."""

    def part_of(self, op: LogOp) -> LogOp | None:
        """As much of it as is released anew."""
        if op.ts > self.frontier_ts or op.order in self.orders:
            return op
        if op.rank is Rank.MARKER:
            return None
        if self.keys is None:
            return op
        touched = op.keys() & self.keys
        if len(touched) == len(op.keys()):
            return op
        if not touched:
            return None
        assert op.restrict is not None
        return op.restrict(touched)

    def states(self, ops: Sequence[LogOp]) -> list[LogOp]:
        """Of operations in the order in which they take effect: those up to the frontier as far as
        they are the last for a key; markers and everything beyond it as they are.
        """
        kept: list[LogOp] = []
        said: dict[Key, set[int]] = {}
        """By what is newer: of which partitions."""
        for op in reversed(ops):
            last: LogOp | None = op
            if op.ts <= self.frontier_ts and op.rank is not Rank.MARKER:
                keys = frozenset(k for k in op.keys() if self._counts(op, said.get(k)))
                for key in keys:
                    said.setdefault(key, set()).add(op.partition_id)
                if len(keys) < len(op.keys()):
                    assert op.restrict is not None
                    last = op.restrict(keys) if keys else None
                if last is not None:
                    last.replaces = last.rank is Rank.INSERT
            if last is not None:
                kept.append(last)
        kept.reverse()
        return kept

    def _counts(self, op: LogOp, newer: set[int] | None) -> bool:
        if newer is None:
            return True
        late_delete = op.rank is Rank.DELETE and op.order in self.orders
        return late_delete and newer.isdisjoint((op.partition_id, EVERYWHERE))
