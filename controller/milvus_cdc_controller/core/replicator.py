"""A replicator as the fleet sees it: which state may follow which, and the mark left for its name.

Laws: a state is derived from facts (`Session.state`) and moves only along `TRANSITIONS`; the mark
(cordon, drain) belongs to the configured name, so that it outlives a stream, the process and a
controller.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class ReplicatorState(StrEnum):
    ALIVE = "ALIVE"
    SUSPECT = "SUSPECT"
    LOST = "LOST"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


_ALIVE, _SUSPECT = ReplicatorState.ALIVE, ReplicatorState.SUSPECT
_LOST, _DRAINING = ReplicatorState.LOST, ReplicatorState.DRAINING
_STOPPED = ReplicatorState.STOPPED

TRANSITIONS: dict[ReplicatorState, frozenset[ReplicatorState]] = {
    _ALIVE: frozenset({_SUSPECT, _DRAINING}),
    # It may come back in any state, and is given up only from here.
    _SUSPECT: frozenset({_ALIVE, _DRAINING, _STOPPED, _LOST}),
    # Back to ALIVE when a drain is cancelled.
    _DRAINING: frozenset({_ALIVE, _SUSPECT, _STOPPED}),
    # Drained, and its process still there: uncordoned, silent, or asked to stop.
    _STOPPED: frozenset({_ALIVE, _SUSPECT, _DRAINING}),
    # The process comes back as a new session.
    _LOST: frozenset(),
}


def way(before: ReplicatorState, after: ReplicatorState) -> tuple[ReplicatorState, ...]:
    """The states passed from one to the other, the last included: facts may have moved by several
    since they were looked at. AssertionError when the table knows no way.
    """
    ways: dict[ReplicatorState, tuple[ReplicatorState, ...]] = {before: ()}
    todo = deque([before])
    while todo:
        state = todo.popleft()
        if state is after:
            return ways[state]
        for following in sorted(TRANSITIONS[state]):
            if following not in ways:
                ways[following] = (*ways[state], following)
                todo.append(following)
    raise AssertionError(f"{before} -> {after}")


class DrainState(StrEnum):
    RUNNING = "RUNNING"
    DONE = "DONE"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


@dataclass(frozen=True, slots=True)
class Drain:
    """What somebody asked for. Times are Unix time, because it outlives the controller."""

    state: DrainState
    begin_ms: int
    deadline_ms: int = 0
    """0 = none."""
    total: int = 0
    force: bool = False
    cordoned_before: bool = False
    instances: tuple[str, ...] = ()
    """The processes of that name when it began."""


@dataclass(frozen=True, slots=True)
class ReplicatorRecord:
    """The mark. One that says nothing is not stored."""

    name: str
    cordoned: bool = False
    drain: Drain | None = None

    @property
    def draining(self) -> bool:
        return self.drain is not None and self.drain.state is DrainState.RUNNING

    @property
    def blank(self) -> bool:
        return not self.cordoned and self.drain is None
