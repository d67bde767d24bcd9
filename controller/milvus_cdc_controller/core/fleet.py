"""What people ask of the fleet: marks, drains and moves; checked, stored, answered.

Laws: a refusal changes nothing and names its field; a drain that would stop something is refused
unless forced, and says what would stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from milvus_cdc.model import part_of_assignment, split_assignment_id

from milvus_cdc_controller.core import moves
from milvus_cdc_controller.core.effects import Refusal, Reply
from milvus_cdc_controller.core.events import (
    CancelDrain,
    CordonReplicator,
    DrainReplicator,
    MoveAssignment,
    Rebalance,
    UncordonReplicator,
)
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.moving import Cause, Move
from milvus_cdc_controller.core.placement import place
from milvus_cdc_controller.core.placing import TAKES_PARTS, held_by, labels_of, need_of
from milvus_cdc_controller.core.presence import end_drain, forget_drain, held_under, look
from milvus_cdc_controller.core.replicator import (
    Drain,
    DrainState,
    ReplicatorRecord,
    ReplicatorState,
)
from milvus_cdc_controller.core.spreading import spreads
from milvus_cdc_controller.core.world import World

NAMES_MAX = 5
"""So many of what would stop are named."""


def cordon(world: World, command: CordonReplicator) -> None:
    _mark(world, command, lambda mark: replace(mark, cordoned=True))


def uncordon(world: World, command: UncordonReplicator) -> None:
    """Ends a drain, too: what is left of it stays."""
    _mark(world, command, lambda mark: replace(mark, cordoned=False, drain=None))


def _mark(
    world: World,
    command: CordonReplicator | UncordonReplicator,
    change: Callable[[ReplicatorRecord], ReplicatorRecord],
) -> None:
    refusal = _unknown(world, command.name, "name")
    if refusal is None and not command.validate_only:
        mark = world.mark_of(command.name)
        if mark.draining and not change(mark).draining:
            forget_drain(world, command.name)
        world.put_replicator(change(mark))
    world.effects.append(Reply(command.call, refusal=refusal))


def drain(world: World, command: DrainReplicator) -> None:
    refusal = _check_drain(world, command)
    if refusal is None and not command.validate_only:
        mark = world.mark_of(command.name)
        before = mark.drain if mark.draining else None
        now = world.now.wall_ms
        world.put_replicator(
            replace(
                mark,
                cordoned=True,
                drain=Drain(
                    DrainState.RUNNING,
                    before.begin_ms if before else now,
                    now + command.timeout_ms if command.timeout_ms else 0,
                    before.total if before else held_under(world, command.name),
                    command.force,
                    before.cordoned_before if before else mark.cordoned,
                    tuple(s.instance for s in world.named(command.name)),
                ),
            )
        )
        look(world)
        moves.advance(world)
    world.effects.append(Reply(command.call, refusal=refusal))


def cancel_drain(world: World, command: CancelDrain) -> None:
    refusal = _unknown(world, command.name, "name")
    mark = world.mark_of(command.name)
    if refusal is None and not mark.draining:
        refusal = Refusal(
            "FAILED_PRECONDITION",
            "NOT_DRAINING",
            f"replicators/{command.name} is not being drained; there is nothing to cancel.",
            "name",
        )
    if refusal is None:
        end_drain(world, mark, DrainState.CANCELLED)
    world.effects.append(Reply(command.call, refusal=refusal))


def move(world: World, command: MoveAssignment) -> None:
    refusal, target = _check_move(world, command)
    if refusal is None and target is not None and not command.validate_only:
        grant = world.grants[command.assignment_id]
        # A person's wish replaces one that waits for its turn.
        world.moves.pop(command.assignment_id, None)
        if target.instance != grant.instance:
            world.moves[command.assignment_id] = Move(
                command.assignment_id, grant.instance, grant.epoch, Cause.MOVE, target.instance
            )
        moves.advance(world)
    world.effects.append(Reply(command.call, refusal=refusal))


def rebalance(world: World, command: Rebalance) -> None:
    planned = moves.plan_by_hand(world, command.max_moves)
    moves.take_up(world, planned)
    moves.advance(world)
    world.effects.append(Reply(command.call))


# Checks.


def _unknown(world: World, name: str, field: str) -> Refusal | None:
    known = (s.name for s in (*world.sessions.values(), *world.departed.values()))
    if name in world.replicators or name in known:
        return None
    return Refusal(
        "NOT_FOUND",
        "REPLICATOR_NOT_FOUND",
        f"There is no replicators/{name}; `milvus-cdc replicator list` shows what there is.",
        field,
    )


def _check_drain(world: World, command: DrainReplicator) -> Refusal | None:
    refusal = _unknown(world, command.name, "name")
    if refusal is not None or command.force:
        return refusal
    held = [grant for s in world.named(command.name) for grant in _held(world, s)]
    others = [s for s in world.takers() if s.name != command.name]
    placed = place(
        (need_of(world, grant.assignment_id) for grant in held),
        moves.with_moves(world, others),
        spreads(world, leaving={s.instance for s in world.named(command.name)}),
    )
    stays = [grant for grant in held if grant.assignment_id not in placed]
    if not stays:
        return None
    names = [describe(world, grant.assignment_id) for grant in stays[:NAMES_MAX]]
    more = f" and {len(stays) - NAMES_MAX} more" if len(stays) > NAMES_MAX else ""
    reason, why = "NO_OTHER_REPLICATOR", "no other replicator takes assignments"
    if others:
        reason, why = "NO_CAPACITY", "the others have no room for it, or not the labels it needs"
    return Refusal(
        "FAILED_PRECONDITION",
        reason,
        f"Draining replicators/{command.name} would stop {len(stays)} of the {len(held)} that it "
        f"holds, because {why}: {', '.join(names)}{more}. Start another replicator, or force it.",
        "name",
        (("would_stop", str(len(stays))), ("holds", str(len(held)))),
    )


def _check_move(world: World, command: MoveAssignment) -> tuple[Refusal | None, Session | None]:
    """The refusal, else the process that gets it; neither when it is on its way there."""
    key = command.assignment_id
    grant = world.grants.get(key)
    if grant is None:
        return _no(
            "ASSIGNMENT_NOT_FOUND",
            f"There is no assignments/{key}; `milvus-cdc assignment list` shows what there is.",
            "name",
            kind="NOT_FOUND",
        ), None
    refusal = _unknown(world, command.replicator, "replicator")
    if refusal is not None:
        return refusal, None
    found = world.named(command.replicator)
    under_way = world.moves.get(key)
    if under_way is not None and under_way.begun:
        if any(s.instance == under_way.target for s in found):
            return None, None
    elif any(s.instance == grant.instance for s in found):
        return None, world.owner(grant)
    refusal = _check_owner(world, grant)
    if refusal is not None:
        return refusal, None
    refusals = [_check_target(world, key, s) for s in reversed(found)]
    for session, fault in zip(reversed(found), refusals, strict=True):
        if fault is None:
            return _check_under_way(world, key), session
    gone = _no(
        "REPLICATOR_NOT_ALIVE",
        f"replicators/{command.replicator} is not connected.",
        "replicator",
    )
    return (refusals[0] if refusals else gone), None


def _check_owner(world: World, grant: Grant) -> Refusal | None:
    key = grant.assignment_id
    owner = world.owner(grant)
    if owner is None:
        return _no(
            "ASSIGNMENT_NOT_HELD",
            f"assignments/{key} is held by nobody now, so there is nothing to move; it is placed "
            "when it is to run and a replicator has room.",
            "name",
        )
    if owner.state(world.leases, world.now.mono_ms) is ReplicatorState.SUSPECT:
        return _no(
            "OWNER_SILENT",
            f"replicators/{owner.name}, which holds assignments/{key}, is silent; it goes "
            "elsewhere when its lease has ended.",
            "name",
        )
    return None


def _check_target(world: World, key: str, session: Session) -> Refusal | None:
    name = f"replicators/{session.name}"
    state = session.state(world.leases, world.now.mono_ms)
    if state in (ReplicatorState.DRAINING, ReplicatorState.STOPPED):
        return _no(
            "REPLICATOR_DRAINING", f"{name} is {state.lower()}; it gets nothing.", "replicator"
        )
    if state is not ReplicatorState.ALIVE:
        return _no("REPLICATOR_NOT_ALIVE", f"{name} is silent.", "replicator")
    if session.mark.cordoned:
        return _no(
            "REPLICATOR_CORDONED",
            f"{name} is cordoned: `milvus-cdc replicator uncordon {session.name}` first.",
            "replicator",
        )
    coming = sum(
        move.target == session.instance and not _is_there(world, move)
        for move in world.moves.values()
    )
    if session.capacity and held_by(world, session) + coming >= session.capacity:
        return _no(
            "REPLICATOR_FULL",
            f"{name} holds as many as its capacity of {session.capacity} allows, those included "
            "that are on their way to it.",
            "replicator",
        )
    if not session.takes_work(world.leases, world.now.mono_ms):
        return _no("REPLICATOR_FULL", f"{name} has just refused for want of room.", "replicator")
    missing = need_of(world, key).labels - labels_of(session)
    if missing >= TAKES_PARTS:
        return _no(
            "TAKES_NO_PARTS",
            f"{name} is of a version that takes no parts of collections; upgrade it first.",
            "replicator",
        )
    if missing:
        wanted = ", ".join(f"{label}={value}" for label, value in sorted(missing))
        return _no(
            "LABELS_MISSING", f"{name} lacks what its task asks for: {wanted}.", "replicator"
        )
    uid, _ = split_assignment_id(key)
    spread = spreads(world, apart_from=key).get(uid)
    if spread is not None and not spread.admits(session.instance):
        return _no(
            "TASK_LIMITS",
            f"{world.tasks[uid].spec.name} may be with no more than {spread.most} replicators by "
            "its limits (requestsInFlight, connections), and is with as many; move it to one of "
            "those, or raise the limits.",
            "replicator",
        )
    return None


def _is_there(world: World, move: Move) -> bool:
    grant = world.grants.get(move.assignment_id)
    return grant is None or grant.instance == move.target


def _check_under_way(world: World, key: str) -> Refusal | None:
    """One that waits for its turn may be sent elsewhere."""
    if not world.seen(key).revoking:
        return None
    return _no("ASSIGNMENT_MOVING", f"assignments/{key} is being taken back just now.", "name")


def _no(reason: str, message: str, field: str, kind: str = "FAILED_PRECONDITION") -> Refusal:
    return Refusal(kind, reason, message, field)


def _held(world: World, session: Session) -> list[Grant]:
    return [world.grants[key] for key in world.held.by(session.instance)]


def describe(world: World, assignment_id: str) -> str:
    uid, _ = split_assignment_id(assignment_id)
    record = world.record_of(assignment_id)
    what = record.source_name if record is not None else "the databases"
    if part := part_of_assignment(assignment_id):
        what = f"part {part[0]} of {part[1]} of {what}"
    return f"{what} of {world.tasks[uid].spec.name}"
