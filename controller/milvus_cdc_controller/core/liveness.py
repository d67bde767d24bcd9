"""Replicator sessions and their leases.

Law: a process may write for `lease_ttl` after it *sent* a heartbeat that was acknowledged. Seen
from here, it certainly has stopped at the receipt of its last acknowledged heartbeat + ttl +
clock margin; only then may its work go elsewhere without its word. A lost stream proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from milvus_cdc.model import RateLimits


@dataclass(frozen=True, slots=True)
class Leases:
    """All in milliseconds."""

    ttl_ms: int = 15_000
    heartbeat_ms: int = 3_000
    margin_ms: int = 2_000

    def end_ms(self, acknowledged_ms: int) -> int:
        return acknowledged_ms + self.ttl_ms + self.margin_ms


class SessionState(StrEnum):
    ALIVE = "ALIVE"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"


@dataclass(slots=True)
class Session:
    """One process of a replicator, from its first Hello (or from the store) to the end of its
    lease.
    """

    instance: str
    name: str
    lease_end_ms: int
    stream: int = 0
    """0 while it is not connected."""
    version: str = ""
    peer: str = ""
    capacity: int = 0
    draining: bool = False
    connect_time_ms: int = 0
    heartbeat_time_ms: int = 0
    heard_ms: int = 0
    """Monotonic time of the last Hello or heartbeat."""
    full_until_ms: int = 0
    """It refused for want of room: nothing new before."""
    stale: set[tuple[str, int]] = field(default_factory=set)
    """(assignment, epoch) it held wrongly at Hello and has not yet released."""

    parts: dict[str, RateLimits] = field(default_factory=dict)
    """By task uid: what it was told on this stream of a task's limits."""

    def heard(self, leases: Leases, mono_ms: int, wall_ms: int) -> None:
        self.heard_ms = mono_ms
        self.heartbeat_time_ms = wall_ms
        self.lease_end_ms = max(self.lease_end_ms, leases.end_ms(mono_ms))

    def expired(self, mono_ms: int) -> bool:
        return mono_ms >= self.lease_end_ms

    def state(self, leases: Leases, mono_ms: int) -> SessionState:
        if not self.stream or mono_ms - self.heard_ms > 2 * leases.heartbeat_ms + 1_000:
            return SessionState.SUSPECT
        return SessionState.DRAINING if self.draining else SessionState.ALIVE

    def takes_work(self, leases: Leases, mono_ms: int) -> bool:
        return self.state(leases, mono_ms) is SessionState.ALIVE and mono_ms >= self.full_until_ms
