"""With which replicators a task may be whose limits cannot be divided among more.

Laws: who leaves no longer counts, nor who lacks the task's labels, so that a hand-over is possible;
who is silent does. Where more have something than may, those stay who take work and have most of
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from milvus_cdc_controller.core.placement import Spread
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.core.world import World


def spreads(
    world: World, *, leaving: Container[str] = (), apart_from: str = ""
) -> dict[str, Spread]:
    """By task uid, of tasks with such limits. `leaving`: instances that count as if they left;
    `apart_from`: an assignment that counts as if nobody had it.
    """
    return {
        uid: spread_of(world, task, leaving=leaving, apart_from=apart_from)
        for uid, task in world.tasks.items()
        if task.spec.limits.replicators
    }


def spread_of(
    world: World, task: TaskRecord, *, leaving: Container[str] = (), apart_from: str = ""
) -> Spread:
    """Of one task that has such limits."""
    having = Counter[str]()
    labels = set(task.spec.replicator_labels)
    for grant in world.grants_of(task.uid):
        move = world.moves.get(grant.assignment_id)
        # The target of a move has it already, as far as others are concerned.
        instance = move.target if move is not None and move.target else grant.instance
        if not instance or grant.assignment_id == apart_from or instance in leaving:
            continue
        session = world.sessions.get(instance)
        if session is None or (not session.leaving and labels <= set(session.labels)):
            having[instance] += 1
    most = task.spec.limits.replicators
    if len(having) > most:
        takers = {session.instance for session in world.takers()}
        ranked = sorted(having, key=lambda each: (each not in takers, -having[each], each))
        return Spread(most, frozenset(ranked[:most]))
    return Spread(most, frozenset(having))
