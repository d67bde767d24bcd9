"""Memory held by rows in transit, over all assignments of the process.

Laws: reading pauses at 100 % and resumes at 80 %. Rows that wait for their tick do not pause
reading by themselves, because only reading on brings the tick; the hard limit bounds them. However
many sinks stand still, the collections of any other one find memory: of several, each takes more
only while it has at most twice of what is free. So one that stands still ends with two thirds; two
with two fifths each, or the later with two thirds of what the earlier has left.
"""

from __future__ import annotations

HARD_LIMIT_FACTOR = 2
RESUME_AT = 0.8
ASIDE_SHARE = 4
"""So small a part of the limit that reading always finds room beside it."""


FREE_TIMES = 2
"""A sink's rows may be so many times as large as what is free, where there are other sinks."""


class Budget:
    """Invariant: `held` is the sum of what was taken and not given back; never negative."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hard_limit_bytes = limit_bytes * HARD_LIMIT_FACTOR
        self.held = 0
        """Everything read and not durable."""
        self.writable = 0
        """The part that no longer waits for a tick: it shrinks by writing alone."""
        self._aside = 0
        self._paused = False
        self._shares: dict[bytes, Share] = {}

    def share(self, sink: bytes) -> Share:
        """For one more collection of that sink, until `leave`."""
        share = self._shares.setdefault(sink, Share(self, sink))
        share.collections += 1
        return share

    def end(self, sink: bytes) -> None:
        """It has no collections any more."""
        del self._shares[sink]

    @property
    def shared(self) -> bool:
        """There are collections of several sinks."""
        return len(self._shares) > 1

    def set_aside(self, delta_bytes: int) -> bool:
        """For what is remembered beside rows; False, and nothing taken, beyond a quarter of the
        limit.
        """
        if delta_bytes > 0 and (self._aside + delta_bytes) * ASIDE_SHARE > self.limit_bytes:
            return False
        self._aside += delta_bytes
        self.update(delta_bytes, 0)
        return True

    def update(self, held_delta: int, writable_delta: int) -> None:
        self.held += held_delta
        self.writable += writable_delta
        assert self.held >= 0
        assert self.writable >= 0

    @property
    def may_read(self) -> bool:
        if not self.writable:
            # All of it waits for ticks, which only reading brings: nothing else would end a pause.
            self._paused = False
        elif self.held >= self.hard_limit_bytes:
            self._paused = True
        elif self.held >= self.limit_bytes:
            # Pause only if writing will make room; else the tick is still to be read.
            self._paused = self.writable >= self.limit_bytes // 4
        elif self.held <= self.limit_bytes * RESUME_AT:
            self._paused = False
        return not self._paused


class Share:
    """What the collections of one sink hold of it."""

    def __init__(self, budget: Budget, sink: bytes) -> None:
        self._budget = budget
        self._sink = sink
        self._writable = 0
        self.collections = 0

    def leave(self) -> None:
        """A collection that holds nothing any more."""
        self.collections -= 1
        if not self.collections:
            self._budget.end(self._sink)

    def update(self, held_delta: int, writable_delta: int) -> None:
        self._writable += writable_delta
        self._budget.update(held_delta, writable_delta)

    @property
    def may_read(self) -> bool:
        budget = self._budget
        if self._writable and budget.shared:
            # Only what writing makes room for: a tick that is waited for is still to be read.
            if self._writable > FREE_TIMES * max(0, budget.limit_bytes - budget.held):
                return False
        return budget.may_read
