"""What time it is at a source, as far as its queue tells.

Laws: a tick is never read before its time, so each one read says what time it is there at least;
between them, and while nothing is read, time goes on at the pace of our own clock. The estimate
falls behind ticks only as slowly as two clocks drift apart: old ticks, read late, say nothing.
"""

from __future__ import annotations

DRIFT = 0.0002
"""Two clocks left alone differ by no more than this part of the time."""


class SourceClock:
    """`at` is our own clock in seconds; it must not stop while the process is frozen."""

    def __init__(self) -> None:
        self.known = False
        self._ahead_ms = 0.0
        """Of our own clock, when last told."""
        self._told_at = 0.0

    def tick_read(self, unix_ms: int, at: float) -> None:
        """A tick of this time has been read now."""
        ahead_ms = unix_ms - at * 1000
        if not self.known or ahead_ms >= self._estimate(at):
            self.known = True
            self._ahead_ms, self._told_at = ahead_ms, at

    def now_ms(self, at: float) -> int | None:
        """Unix milliseconds; None before the first tick."""
        return round(at * 1000 + self._estimate(at)) if self.known else None

    def _estimate(self, at: float) -> float:
        return self._ahead_ms - DRIFT * (at - self._told_at) * 1000
