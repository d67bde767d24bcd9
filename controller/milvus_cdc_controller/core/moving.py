"""What is known of an assignment on its way to another replicator, and how many may be on it.

Law: a move is only a wish about who is next. Who holds what is said by grants alone, so a move that
is forgotten (a controller that ends) loses nothing: placement finds the next owner.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum


class Cause(StrEnum):
    MOVE = "MOVE"
    DRAIN = "DRAIN"
    STOPPING = "STOPPING"
    REBALANCE = "REBALANCE"
    LABELS = "LABELS"
    LIMITS = "LIMITS"


@dataclass(slots=True)
class Move:
    assignment_id: str
    source: str
    """The instance that holds it."""
    epoch: int
    """Of the owner that lets go."""
    cause: Cause
    target: str = ""
    """The instance that gets it; empty when nobody can take it now and it is let go all the
    same.
    """
    begun: bool = False
    """The owner has been asked to let go."""
    until_ms: int = 0
    """Once begun it holds back others so long at most."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How eagerly work is moved."""

    moves_at_once: int = 4
    """Hand-offs under way, those of drains and of people's wishes included."""
    rebalance: bool = True
    """Even out by itself."""
    moves_per_minute: int = 10
    """Of evening out by itself."""
    hysteresis: float = 0.25
    """Loads that differ by less than this part of the average count as even."""
    settle_ms: int = 60_000
    """No replicator may have come or gone for so long before it evens out by itself."""


@dataclass(slots=True)
class Balancing:
    """What evening out by itself remembers."""

    takers: frozenset[str] = frozenset()
    settled_ms: int = 0
    next_ms: int = 0
    begun: deque[int] = field(default_factory=deque)
    """When its moves of the last minute were decided."""
