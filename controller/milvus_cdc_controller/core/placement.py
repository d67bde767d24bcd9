"""Which replicator gets a waiting assignment, and which ones move so that the load evens out.

Laws: capacity, the labels that a task asks for and the number of replicators that its limits allow
are never broken; spread first (nobody gets
something while he carries more than `SLACK` above the least loaded who could have it), then prefer
those that already read the same pchannels, because a pchannel is read once per replicator. Evening
out only ever moves from more to less, and never so much that it would be worth moving back: what is
even stays where it is, whoever asks how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from milvus_cdc.model import split_assignment_id

SLACK = 1.0
"""What one idle collection weighs."""

WORTH = 0.9
"""Of a difference: what weighs more than this part of it gains too little to be moved."""
Log = tuple[str, str]
"""(source id, pchannel)"""
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Need:
    """An assignment without an owner. `logs` are none for a metadata assignment, which weighs
    nothing.
    """

    assignment_id: str
    logs: frozenset[Log] = frozenset()
    weight: float = 1.0
    labels: Labels = frozenset()
    """Whoever gets it has all of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replicator that takes work. `load` weighs its collection assignments, `held` counts all."""

    instance: str
    capacity: int
    held: int
    load: float
    logs: frozenset[Log]
    labels: Labels = frozenset()

    def room(self) -> bool:
        return self.capacity == 0 or self.held < self.capacity

    def suits(self, need: Need) -> bool:
        return need.labels <= self.labels

    def holding(self, need: Need) -> Candidate:
        """As it is once it holds that, too."""
        load = self.load + need.weight
        return replace(self, held=self.held + 1, load=load, logs=self.logs | need.logs)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a task that may be with `most` replicators at once: who has something of it."""

    most: int
    instances: frozenset[str] = frozenset()

    def admits(self, instance: str) -> bool:
        return instance in self.instances or len(self.instances) < self.most

    def with_(self, instance: str) -> Spread:
        return replace(self, instances=self.instances | {instance})


Spreads = Mapping[str, Spread]
"""By task uid; a task that is not named may be with any number."""


@dataclass(frozen=True, slots=True)
class PlannedMove:
    assignment_id: str
    source: str
    target: str
    weight: float


def place(
    needs: Iterable[Need],
    candidates: Iterable[Candidate],
    spreads: Spreads = MappingProxyType({}),
    *,
    most: int = 0,
) -> dict[str, str]:
    """Assignment -> instance, at most so many when `most` is not 0. Needs that nobody can take are
    left out.
    """
    takers = [_Taker(c) for c in sorted(candidates, key=lambda c: c.instance)]
    having = dict(spreads)
    placed: dict[str, str] = {}
    for need in needs:
        able = [t for t in takers if t.room and need.labels <= t.candidate.labels]
        spread = having.get(task_of(need)) if having else None
        if spread is not None:
            able = [t for t in able if spread.admits(t.candidate.instance)]
        if not able:
            if not any(t.room for t in takers):
                break
            continue
        near_load = min([t.load for t in able]) + SLACK
        near = [t for t in able if t.load <= near_load]
        best = min(near, key=lambda t: (-len(need.logs & t.logs), t.load, t.held))
        placed[need.assignment_id] = best.candidate.instance
        if len(placed) == most:
            break
        best.take(need)
        if spread is not None:
            having[task_of(need)] = spread.with_(best.candidate.instance)
    return placed


def task_of(need: Need) -> str:
    """Its uid."""
    return split_assignment_id(need.assignment_id)[0]


class _Taker:
    """A candidate while needs are being placed."""

    __slots__ = ("candidate", "held", "load", "logs", "room")

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.held, self.load = candidate.held, candidate.load
        self.logs = set(candidate.logs)
        self.room = candidate.room()

    def take(self, need: Need) -> None:
        self.held += 1
        self.load += need.weight
        self.logs |= need.logs
        self.room = self.candidate.capacity == 0 or self.held < self.candidate.capacity


@dataclass(slots=True)
class _Side:
    """A replicator while moves are being planned."""

    candidate: Candidate
    load: float
    held: int
    needs: dict[str, Need] = field(default_factory=dict)

    def full(self) -> bool:
        return self.candidate.capacity != 0 and self.held >= self.candidate.capacity


def even_out(
    held: dict[str, list[Need]],
    candidates: Iterable[Candidate],
    *,
    moves_max: int = 0,
    slack: float = SLACK,
    hysteresis: float = 0.0,
    spreads: Spreads = MappingProxyType({}),
) -> list[PlannedMove]:
    """Moves between the candidates, most useful first; at most `moves_max` when it is not 0.

    `held` names by instance what may move. Nothing moves between two whose loads differ by no more
    than `slack` and the part `hysteresis` of what a candidate carries on average.
    """
    sides = {
        c.instance: _Side(
            c, c.load, c.held, {need.assignment_id: need for need in held.get(c.instance, [])}
        )
        for c in candidates
    }
    if len(sides) < 2:
        return []
    mean = sum(side.load for side in sides.values()) / len(sides)
    gap_min = slack + hysteresis * mean
    having = dict(spreads)
    moves: list[PlannedMove] = []
    while not moves_max or len(moves) < moves_max:
        move = _best_move(sides, gap_min, having)
        if move is None:
            break
        moves.append(move)
        source, target = sides[move.source], sides[move.target]
        need = source.needs.pop(move.assignment_id)
        if having and (spread := having.get(task_of(need))) is not None:
            having[task_of(need)] = spread.with_(move.target)
        # It stays where it comes to: one move at most for each.
        source.load -= move.weight
        source.held -= 1
        target.load += move.weight
        target.held += 1
        target.candidate = replace(target.candidate, logs=target.candidate.logs | need.logs)
    return moves


def _admits(having: Spreads, need: Need, instance: str) -> bool:
    spread = having.get(task_of(need)) if having else None
    return spread is None or spread.admits(instance)


def _best_move(sides: dict[str, _Side], gap_min: float, having: Spreads) -> PlannedMove | None:
    by_load = sorted(sides.items(), key=lambda item: (item[1].load, item[0]))
    for source_name, source in reversed(by_load):
        for target_name, target in by_load:
            gap = source.load - target.load
            if gap <= gap_min:
                break
            if target.full():
                continue
            # Not what would only turn the difference round.
            most = WORTH * gap
            fitting = [
                need
                for need in source.needs.values()
                if need.logs and need.weight <= most and target.candidate.suits(need)
                if _admits(having, need, target_name)
            ]
            if not fitting:
                continue
            logs = target.candidate.logs
            best = min(
                fitting,
                key=lambda n: (abs(gap / 2 - n.weight), -len(n.logs & logs), n.assignment_id),
            )
            return PlannedMove(best.assignment_id, source_name, target_name, best.weight)
    return None
