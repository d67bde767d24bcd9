"""How fast a task may write: the arithmetic of its limits, on a clock that the shell provides.

Laws: over any time what was started is at most the limit for that time, one second's allowance and
what one write has beyond that. A write larger than a second's allowance starts when that is whole,
and what it has beyond it is owed by those after it: nothing waits for ever.
"""

from __future__ import annotations

from milvus_cdc.model import RateLimits

_ROUNDING = 1e-6
"""Of a row or byte: a clock read after the time that was waited for may show a little less."""


class Bucket:
    """One limit, with at most a second's allowance in it; below zero where something is owed."""

    def __init__(self, per_second: int, now: float) -> None:
        self.per_second = per_second
        self._level = float(per_second)
        self._at = now

    def change(self, per_second: int, now: float) -> None:
        """What is owed stays owed."""
        self._fill(now)
        self.per_second = per_second
        self._level = min(self._level, per_second)

    def delay(self, amount: int, now: float) -> float:
        """Seconds until so much may start; 0 = now."""
        self._fill(now)
        missing = min(amount, self.per_second) - self._level
        return missing / self.per_second if missing > _ROUNDING else 0.0

    def take(self, amount: int, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        gone = max(0.0, now - self._at)
        self._level = min(float(self.per_second), self._level + gone * self.per_second)
        self._at = max(self._at, now)


class Pace:
    """Both limits of one task; without any nothing waits."""

    def __init__(self) -> None:
        self.limits = RateLimits()
        self._rows: Bucket | None = None
        self._bytes: Bucket | None = None

    def change(self, limits: RateLimits, now: float) -> None:
        self.limits = limits
        self._rows = _changed(self._rows, limits.rows_per_second, now)
        self._bytes = _changed(self._bytes, limits.bytes_per_second, now)

    def delay(self, rows: int, size: int, now: float) -> float:
        """Seconds until a write of so many rows and bytes may start; 0 = now."""
        of_rows = self._rows.delay(rows, now) if self._rows is not None else 0.0
        of_bytes = self._bytes.delay(size, now) if self._bytes is not None else 0.0
        return max(of_rows, of_bytes)

    def take(self, rows: int, size: int, now: float) -> None:
        """One starts."""
        if self._rows is not None:
            self._rows.take(rows, now)
        if self._bytes is not None:
            self._bytes.take(size, now)


def _changed(bucket: Bucket | None, per_second: int, now: float) -> Bucket | None:
    if not per_second:
        return None
    if bucket is None:
        return Bucket(per_second, now)
    bucket.change(per_second, now)
    return bucket
