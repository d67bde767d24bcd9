"""Memory held by rows in transit, over all assignments of the process.

Laws: reading pauses at 100 % and resumes at 80 %. Rows that wait for their tick do not pause
reading by themselves, because only reading on brings the tick; the hard limit bounds them.
"""

from __future__ import annotations

HARD_LIMIT_FACTOR = 2
RESUME_AT = 0.8
ASIDE_SHARE = 4
"""So small a part of the limit that reading always finds room beside it."""


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
