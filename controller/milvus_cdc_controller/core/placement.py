"""Which replicator gets a waiting assignment.

Laws: spread first (nobody gets more than `SLACK` above the least loaded), then prefer those that
already read the same pchannels, because a pchannel is read once per replicator; capacity is never
exceeded; what is placed is never moved.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 1


@dataclass(frozen=True, slots=True)
class Need:
    """An assignment without an owner. `logs` are (source id, pchannel); none for a metadata
    assignment.
    """

    assignment_id: str
    logs: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replicator that takes work. `load` counts its collection assignments, `held` all."""

    instance: str
    capacity: int
    held: int
    load: int
    logs: frozenset[tuple[str, str]]


def place(needs: list[Need], candidates: list[Candidate]) -> dict[str, str]:
    """Assignment -> instance. Needs that nobody can take are left out."""
    held = {c.instance: c.held for c in candidates}
    load = {c.instance: c.load for c in candidates}
    logs = {c.instance: set(c.logs) for c in candidates}
    capacity = {c.instance: c.capacity for c in candidates}
    placed: dict[str, str] = {}
    for need in needs:
        able = [
            instance
            for instance in sorted(held)
            if capacity[instance] == 0 or held[instance] < capacity[instance]
        ]
        if not able:
            continue
        least = min(load[instance] for instance in able)
        near = [instance for instance in able if load[instance] <= least + SLACK]
        best = min(
            near,
            key=lambda instance: (
                -len(need.logs & logs[instance]),
                load[instance],
                held[instance],
                instance,
            ),
        )
        placed[need.assignment_id] = best
        held[best] += 1
        if need.logs:
            load[best] += 1
            logs[best] |= need.logs
    return placed
