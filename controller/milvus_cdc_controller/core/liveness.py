"""Replicator sessions and their leases.

Law: a process may write for `lease_ttl` after it *sent* a heartbeat that was acknowledged. Seen
from here, it certainly has stopped at the receipt of its last acknowledged heartbeat + ttl +
clock margin; only then may its work go elsewhere without its word. A lost stream proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from milvus_cdc.model import RateLimits

from milvus_cdc_controller.core.replicator import DrainState, ReplicatorRecord, ReplicatorState, way

SessionState = ReplicatorState


@dataclass(frozen=True, slots=True)
class Leases:
    """All in milliseconds."""

    ttl_ms: int = 15_000
    heartbeat_ms: int = 3_000
    margin_ms: int = 2_000

    def end_ms(self, acknowledged_ms: int) -> int:
        return acknowledged_ms + self.ttl_ms + self.margin_ms


@dataclass(slots=True)
class Session:
    """One process of a replicator, from its first Hello (or from the store) to the end of its
    lease, or until it has stopped in order.
    """

    instance: str
    name: str
    lease_end_ms: int
    stream: int = 0
    """0 while it is not connected."""
    version: str = ""
    peer: str = ""
    capacity: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    takes_parts: bool = False
    connects: int = 0
    """Streams that the process says to have begun; 0 while it has not said so."""
    draining: bool = False
    """It stops, by its own word."""
    mark: ReplicatorRecord = field(default_factory=lambda: ReplicatorRecord(""))
    """Its name's; kept true by `World.put_replicator`."""
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
    shown: ReplicatorState = ReplicatorState.SUSPECT
    """As last looked at; moves along the table."""
    ended_ms: int = 0
    """Unix time of its end; 0 while it is in the world."""

    def heard(self, leases: Leases, mono_ms: int, wall_ms: int) -> None:
        self.heard_ms = mono_ms
        self.heartbeat_time_ms = wall_ms
        self.lease_end_ms = max(self.lease_end_ms, leases.end_ms(mono_ms))

    def expired(self, mono_ms: int) -> bool:
        return mono_ms >= self.lease_end_ms

    def late(self, leases: Leases, mono_ms: int) -> bool:
        """Heartbeats stay away though it is connected."""
        return mono_ms - self.heard_ms > 2 * leases.heartbeat_ms + 1_000

    @property
    def leaving(self) -> bool:
        """All that it holds is to go elsewhere."""
        return self.draining or self.mark.draining

    @property
    def drained(self) -> bool:
        drain = self.mark.drain
        return (
            drain is not None
            and drain.state is DrainState.DONE
            and self.instance in drain.instances
        )

    def state(self, leases: Leases, mono_ms: int) -> ReplicatorState:
        if self.ended_ms:
            return self.shown
        if not self.stream or self.late(leases, mono_ms):
            return ReplicatorState.SUSPECT
        if self.leaving:
            return ReplicatorState.DRAINING
        return ReplicatorState.STOPPED if self.drained else ReplicatorState.ALIVE

    def look(self, leases: Leases, mono_ms: int) -> bool:
        """Moves `shown` to the state of now, along the table; True when it changed."""
        return self.show(self.state(leases, mono_ms))

    def show(self, state: ReplicatorState) -> bool:
        steps = way(self.shown, state)
        self.shown = state
        return bool(steps)

    def present(self, leases: Leases, mono_ms: int) -> bool:
        """It answers and stays: it may be given jobs, though perhaps no assignments."""
        silent = self.state(leases, mono_ms) is ReplicatorState.SUSPECT
        return not (silent or self.draining or self.ended_ms)

    def takes_work(self, leases: Leases, mono_ms: int) -> bool:
        return (
            self.state(leases, mono_ms) is ReplicatorState.ALIVE
            and not self.mark.cordoned
            and mono_ms >= self.full_until_ms
        )
