"""Who holds a name at a sink, and who may take it next.

Laws: a name is for one owner at a time: a collection or an alias of some task. An owner keeps a
name until nothing of it is at the sink under that name any more; among those that wait, the one
that came first at the source is next. A collection on its way from one name to another holds both.

An alias takes part like a collection: put a claim of `alias_owner(...)` that waits for the alias'
name while it is wanted and not yet granted (`since_ts` = its `alter_ts`), holds it from the step
that grants it to the sink until its removal there is confirmed, then drop the claim. What `ready`
returns may be granted in the same step; whoever grants says so by the owner's next claim. An alias
that is not wanted any more needs no name, so no ring runs through it: its holder's removal comes
without waiting, and whoever waits for the name follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COLLECTION = "COLLECTION"
    ALIAS = "ALIAS"


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """`what` is the collection's id at the source, or the alias' `database.name` there."""

    task_uid: str
    kind: Kind
    what: str


def collection_owner(task_uid: str, collection_id: int) -> Owner:
    return Owner(task_uid, Kind.COLLECTION, str(collection_id))


def alias_owner(task_uid: str, full_name: str) -> Owner:
    return Owner(task_uid, Kind.ALIAS, full_name)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one owner has and wants at one sink; names are `database.collection` there."""

    owner: Owner
    sink: str
    holds: frozenset[str] = frozenset()
    waits: str = ""
    """The name it would take now; empty when it wants none beside those it holds."""
    since_ts: int = 0
    """TSO at which the source gave it the name it waits for; 0 when unknown."""


_Places = dict[tuple[str, str], set[Owner]]


class Names:
    """Every claim, by owner and by name. Looking costs what waits, not what is held."""

    def __init__(self) -> None:
        self._claims: dict[Owner, Claim] = {}
        self._holders: _Places = {}
        self._waiting: _Places = {}

    def put(self, claim: Claim) -> None:
        """Replaces the owner's claim."""
        assert claim.waits not in claim.holds, "nobody waits for what he has"
        if self._claims.get(claim.owner) == claim:
            return
        self.drop(claim.owner)
        self._claims[claim.owner] = claim
        for name in claim.holds:
            self._holders.setdefault((claim.sink, name), set()).add(claim.owner)
        if claim.waits:
            self._waiting.setdefault((claim.sink, claim.waits), set()).add(claim.owner)

    def drop(self, owner: Owner) -> None:
        """It holds nothing and waits for nothing any more."""
        claim = self._claims.pop(owner, None)
        if claim is None:
            return
        for name in claim.holds:
            _remove(self._holders, (claim.sink, name), owner)
        if claim.waits:
            _remove(self._waiting, (claim.sink, claim.waits), owner)

    def claim(self, owner: Owner) -> Claim | None:
        return self._claims.get(owner)

    def holders(self, sink: str, name: str) -> frozenset[Owner]:
        """More than one only where records of an earlier version said so."""
        return frozenset(self._holders.get((sink, name), ()))

    def waits(self, owner: Owner) -> bool:
        claim = self._claims.get(owner)
        return claim is not None and bool(claim.waits)

    def ready(self) -> list[Claim]:
        """Claims whose name is free, one for each name."""
        return [
            min((self._claims[owner] for owner in waiting), key=_rank)
            for place, waiting in sorted(self._waiting.items())
            if place not in self._holders
        ]

    def rings(self) -> list[tuple[Owner, ...]]:
        """Owners that wait for each other's names in a circle: nobody moves unless one of them
        takes another name first.
        """
        rings: list[tuple[Owner, ...]] = []
        done: set[Owner] = set()
        for waiting in self._waiting.values():
            for first in waiting:
                path: list[Owner] = []
                owner: Owner | None = first
                while owner is not None and owner not in done and owner not in path:
                    path.append(owner)
                    owner = self._blocker(owner)
                if owner is not None and owner in path:
                    rings.append(tuple(sorted(path[path.index(owner) :])))
                done.update(path)
        return sorted(rings)

    def _blocker(self, owner: Owner) -> Owner | None:
        """Who holds what it waits for."""
        claim = self._claims[owner]
        if not claim.waits:
            return None
        return min(self._holders.get((claim.sink, claim.waits), ()), default=None)


def _rank(claim: Claim) -> tuple[int, Owner]:
    return (claim.since_ts, claim.owner)


def _remove(places: _Places, place: tuple[str, str], owner: Owner) -> None:
    owners = places.get(place)
    if owners is not None:
        owners.discard(owner)
        if not owners:
            del places[place]
