"""Who holds a name at a sink.

Law: one (task, collection id) at a time. A holder keeps its name until it is gone from the sink;
among those that wait, the one created first at the source is next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """A record's wish for a name. `sink` identifies the sink, `name` is `database.collection`
    there.
    """

    key: tuple[str, int]
    sink: str
    name: str
    create_ts: int
    holds: bool


def winners(claims: Iterable[Claim]) -> frozenset[tuple[str, int]]:
    """The keys that hold, or may now take, their names."""
    best: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        other = best.get((claim.sink, claim.name))
        if other is None or _rank(claim) < _rank(other):
            best[claim.sink, claim.name] = claim
    return frozenset(claim.key for claim in best.values())


def _rank(claim: Claim) -> tuple[bool, int, int, str]:
    return (not claim.holds, claim.create_ts, claim.key[1], claim.key[0])
