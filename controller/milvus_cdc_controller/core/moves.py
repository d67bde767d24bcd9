"""Carries out moves: drains, people's wishes, and evening out; a few at a time.

Laws: nobody is asked to let go before somebody else is known to take it, unless it stops anyway or
somebody forced it; at most `Policy.moves_at_once` are under way, so that each pause is short;
evening out by itself waits until the fleet has settled and keeps to its budget.
"""

from __future__ import annotations

from milvus_cdc_controller.core.grant import Grant, ReportedState
from milvus_cdc_controller.core.granting import revoke
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.moving import Cause, Move
from milvus_cdc_controller.core.placement import (
    SLACK,
    Candidate,
    Need,
    PlannedMove,
    even_out,
    place,
)
from milvus_cdc_controller.core.placing import candidates, labels_of, need_of, weight_of
from milvus_cdc_controller.core.spreading import spreads
from milvus_cdc_controller.core.world import World

HOLDS_BACK_MS = 15_000
"""A hand-off that takes longer no longer keeps others from beginning."""
BALANCE_EVERY_MS = 5_000
_MINUTE_MS = 60_000
BY_ITSELF_SLACK = 2 * SLACK
"""What placement has just done, which prefers readers of a log, is not undone by itself."""
BY_HAND_HYSTERESIS = 0.1
"""When a person asks, less is worth a move."""


def advance(world: World) -> None:
    """Ends what is over, plans what drains need, begins what may begin."""
    _finish(world)
    leaving = [s for s in world.sessions.values() if s.leaving and s.stream]
    if leaving:
        _plan_leaving(world, leaving)
    now_ms = world.now.mono_ms
    under_way = sum(move.begun and now_ms < move.until_ms for move in world.moves.values())
    room = world.policy.moves_at_once - under_way
    for move in list(world.moves.values()):
        if not move.begun and (room > 0 or _unattended(world, move)):
            room -= _begin(world, move)


def _finish(world: World) -> None:
    now_ms = world.now.mono_ms
    for key, move in list(world.moves.items()):
        grant = world.grants.get(key)
        if grant is None:
            over = True
        elif not move.begun:
            over = grant.epoch != move.epoch or grant.instance != move.source
        elif grant.epoch == move.epoch:
            # Not yet let go, or let go and nobody there to take it.
            over = now_ms >= move.until_ms and not grant.instance
        else:
            reported = world.seen(key).state is not ReportedState.NONE
            over = reported or now_ms >= move.until_ms
        if over:
            del world.moves[key]
            world.room = True


def _unattended(world: World, move: Move) -> bool:
    """Nobody can take it: waiting for its turn would gain nothing."""
    return not move.target


def _begin(world: World, move: Move) -> int:
    """1 when it counts among those under way."""
    grant = world.grants[move.assignment_id]
    target = world.sessions.get(move.target)
    if move.target and (target is None or not target.takes_work(world.leases, world.now.mono_ms)):
        # Its owner keeps it; a drain will find somebody else.
        del world.moves[move.assignment_id]
        world.room = True
        return 0
    move.begun = True
    move.until_ms = world.now.mono_ms + HOLDS_BACK_MS
    revoke(world, grant, "MOVING" if move.target else "DRAINING")
    return 1


def _plan_leaving(world: World, leaving: list[Session]) -> None:
    """Moves for what leaving replicators hold and that is not on its way yet; as many as can begin
    soon, because the fleet may look different later.
    """
    waiting = sum(not move.begun for move in world.moves.values())
    if waiting >= world.policy.moves_at_once:
        return
    soon = 2 * world.policy.moves_at_once - waiting
    by_instance = {s.instance: s for s in leaving}
    needs: list[tuple[Grant, Need]] = []
    for session in leaving:
        for key in world.held.by(session.instance):
            if key not in world.moves and not world.seen(key).revoking:
                needs.append((world.grants[key], need_of(world, key)))
    if not needs:
        return
    # The busiest first: what is left when a grace period ends is the least.
    needs.sort(key=lambda pair: (-pair[1].weight, pair[0].assignment_id))
    takers = world.takers()
    some = (need for _, need in needs)
    targets = place(some, with_moves(world, takers), spreads(world)) if takers else {}
    for grant, need in needs:
        session = by_instance[grant.instance]
        cause = Cause.STOPPING if session.draining else Cause.DRAIN
        target = targets.get(need.assignment_id, "")
        drain = session.mark.drain
        forced = session.draining or (drain is not None and drain.force)
        if target and soon > 0:
            soon -= 1
        elif target or not forced:
            continue
        world.moves[grant.assignment_id] = Move(
            grant.assignment_id, grant.instance, grant.epoch, cause, target
        )


def misplaced(world: World) -> None:
    """Moves for what runs where its task does not want it any more, or may not be any more by its
    limits, once somebody can take it.
    """
    known = spreads(world)
    strict = [
        task for task in world.tasks.values() if task.spec.replicator_labels or task.uid in known
    ]
    needs: dict[str, tuple[Need, Cause]] = {}
    for task in strict:
        labels = frozenset(task.spec.replicator_labels)
        spread = known.get(task.uid)
        owners = (world.sessions.get(instance) for instance in world.holders(task.uid))
        if spread is None and all(owner is None or labels <= labels_of(owner) for owner in owners):
            continue
        for grant in world.grants_of(task.uid):
            owner = world.owner(grant)
            key = grant.assignment_id
            if owner is None or not owner.stream:
                continue
            cause = None if labels <= labels_of(owner) else Cause.LABELS
            if cause is None and spread is not None and not owner.leaving:
                cause = None if spread.admits(owner.instance) else Cause.LIMITS
            if cause is not None and key not in world.moves and not world.seen(key).revoking:
                needs[key] = need_of(world, key), cause
    if not needs:
        return
    takers = with_moves(world, world.takers())
    for key, target in place((need for need, _ in needs.values()), takers, known).items():
        grant = world.grants[key]
        world.moves[key] = Move(key, grant.instance, grant.epoch, needs[key][1], target)


def with_moves(world: World, takers: list[Session]) -> list[Candidate]:
    """The takers as they will be when what is on its way has come."""
    known = {c.instance: c for c in candidates(world, takers)}
    for key, move in world.moves.items():
        grant = world.grants.get(key)
        if move.target in known and grant is not None and grant.instance != move.target:
            known[move.target] = known[move.target].holding(need_of(world, key))
    return list(known.values())


def plan_by_hand(world: World, moves_max: int) -> list[PlannedMove]:
    """What a person gets who asks; changes nothing."""
    return _plan(world, moves_max, SLACK, BY_HAND_HYSTERESIS)


def _plan(world: World, moves_max: int, slack: float, hysteresis: float) -> list[PlannedMove]:
    takers = world.takers()
    instances = [s.instance for s in takers]
    movable = {
        instance: [
            need_of(world, key)
            for key in world.held.by(instance)
            if key not in world.moves and not world.seen(key).revoking
        ]
        for instance in instances
    }
    return even_out(
        movable,
        with_moves(world, takers),
        moves_max=moves_max,
        slack=slack,
        hysteresis=hysteresis,
        spreads=spreads(world),
    )


def _is_even(world: World, hysteresis: float) -> bool:
    """So even that nothing would be planned, which takes much longer to see."""
    loads = [
        sum([weight_of(world, key) for key in world.held.by(session.instance)])
        for session in world.takers()
    ]
    if len(loads) < 2:
        return True
    # Sums in another order differ a little.
    gap = max(loads) - min(loads) + 0.001
    return gap < BY_ITSELF_SLACK + hysteresis * sum(loads) / len(loads)


def take_up(world: World, planned: list[PlannedMove]) -> None:
    """They begin in their turn."""
    for each in planned:
        grant = world.grants[each.assignment_id]
        world.moves[each.assignment_id] = Move(
            each.assignment_id, each.source, grant.epoch, Cause.REBALANCE, each.target
        )


def balance(world: World) -> None:
    """Evens out by itself, when nothing else is going on."""
    now_ms, policy, balancing = world.now.mono_ms, world.policy, world.balancing
    takers = frozenset(session.instance for session in world.takers())
    if takers != balancing.takers:
        balancing.takers = takers
        balancing.settled_ms = now_ms + policy.settle_ms
    if not policy.rebalance or world.moves or now_ms < balancing.settled_ms:
        return
    if now_ms < balancing.next_ms or any(s.leaving for s in world.sessions.values()):
        return
    balancing.next_ms = now_ms + BALANCE_EVERY_MS
    while balancing.begun and now_ms - balancing.begun[0] >= _MINUTE_MS:
        balancing.begun.popleft()
    budget = policy.moves_per_minute - len(balancing.begun)
    if budget > 0 and not _is_even(world, policy.hysteresis):
        planned = _plan(world, budget, BY_ITSELF_SLACK, policy.hysteresis)
        take_up(world, planned)
        balancing.begun.extend([now_ms] * len(planned))
