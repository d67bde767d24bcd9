"""How far a checkpoint is from falling out of the queue; known, never stored.

Law: what was seen is worth less with every second that passes, whether anybody looks again or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """-1 where the queue sets no such limit."""

    left_ms: int = -1
    left_bytes: int = -1
    limit_ms: int = 0
    limit_bytes: int = 0

    def aged(self, milliseconds: int) -> Retention:
        if self.left_ms < 0:
            return self
        left_ms = max(self.left_ms - max(milliseconds, 0), 0)
        return Retention(left_ms, self.left_bytes, self.limit_ms, self.limit_bytes)

    def low(self, fraction: float) -> bool:
        """Less than this part of a limit is left."""
        return (0 <= self.left_ms < fraction * self.limit_ms) or (
            0 <= self.left_bytes < fraction * self.limit_bytes
        )


NO_LIMIT = Retention()


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one shard, at a wall time in milliseconds."""

    retention: Retention
    at_ms: int

    def now(self, wall_ms: int) -> Retention:
        return self.retention.aged(wall_ms - self.at_ms)


def least(retentions: Iterable[Retention]) -> Retention:
    """The shortest of each kind."""
    held = list(retentions)
    in_time = min((r for r in held if r.left_ms >= 0), key=lambda r: r.left_ms, default=NO_LIMIT)
    in_bytes = min(
        (r for r in held if r.left_bytes >= 0), key=lambda r: r.left_bytes, default=NO_LIMIT
    )
    return Retention(in_time.left_ms, in_bytes.left_bytes, in_time.limit_ms, in_bytes.limit_bytes)
