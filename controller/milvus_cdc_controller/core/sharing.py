"""What each replicator may do of what a task's limits allow.

Laws: a task's limits are divided by the number of replicators that hold collections of it, those
included that are silent and may still write; a part is told before the first assignment it bounds,
and again whenever it changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from milvus_cdc.model import RateLimits

from milvus_cdc_controller.core.effects import Assign, Effect, Send, Synced, TaskLimits
from milvus_cdc_controller.core.world import World

NONE = RateLimits()


def part(limits: RateLimits, sharers: int) -> RateLimits:
    """Of one among so many. At least one of each: nobody stands still."""

    def divided(whole: int) -> int:
        return max(1, whole // max(1, sharers)) if whole else 0

    return RateLimits(
        divided(limits.rows_per_second),
        divided(limits.bytes_per_second),
        divided(limits.requests_in_flight),
    )


def tell_parts(world: World, uids: Iterable[str]) -> None:
    """To every connected replicator that has heard of no such part, or of another one."""
    for uid in sorted(uids):
        task = world.tasks.get(uid)
        limits = NONE if task is None else task.spec.limits
        holders: set[str] = set()
        if task is not None and limits != NONE:
            holders = set(world.held.holders(uid))
        share = part(limits, len(holders))
        for session in world.sessions.values():
            now = share if session.instance in holders else NONE
            if not session.stream or session.parts.get(uid, NONE) == now:
                continue
            if now == NONE:
                del session.parts[uid]
            else:
                session.parts[uid] = now
            send = Send(session.stream, TaskLimits(uid, now))
            world.effects.insert(_before_work(world.effects, session.stream), send)


def _before_work(effects: list[Effect], stream: int) -> int:
    for index, effect in enumerate(effects):
        if isinstance(effect, Send) and effect.stream == stream:
            if isinstance(effect.message, Assign | Synced):
                return index
    return len(effects)
