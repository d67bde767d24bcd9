"""The fleet as the API shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from milvus_cdc.model import split_assignment_id
from milvuscdc.v1 import fleet_service_pb2 as pb

from milvus_cdc_controller.core.events import Instant
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.placement import PlannedMove
from milvus_cdc_controller.core.placing import need_of
from milvus_cdc_controller.core.presence import held_under, why
from milvus_cdc_controller.core.rates import IDLE
from milvus_cdc_controller.core.replicator import DrainState, ReplicatorRecord, ReplicatorState
from milvus_cdc_controller.core.status import grant_state, shown_as
from milvus_cdc_controller.core.world import World
from milvus_cdc_controller.present import timestamp

_STATES = {
    ReplicatorState.ALIVE: pb.REPLICATOR_STATE_ALIVE,
    ReplicatorState.SUSPECT: pb.REPLICATOR_STATE_SUSPECT,
    ReplicatorState.DRAINING: pb.REPLICATOR_STATE_DRAINING,
    ReplicatorState.LOST: pb.REPLICATOR_STATE_LOST,
    ReplicatorState.STOPPED: pb.REPLICATOR_STATE_STOPPED,
}
_DRAINS = {
    DrainState.RUNNING: pb.Drain.STATE_RUNNING,
    DrainState.DONE: pb.Drain.STATE_DONE,
    DrainState.CANCELLED: pb.Drain.STATE_CANCELLED,
    DrainState.EXPIRED: pb.Drain.STATE_EXPIRED,
}


def replicator_messages(world: World, now: Instant) -> list[pb.Replicator]:
    """Processes that are there, those that ended lately, and marked names that are not there."""
    held: defaultdict[str, list[str]] = defaultdict(list)
    for grant in world.grants.values():
        if grant.instance:
            held[grant.instance].append(grant.assignment_id)
    found = []
    for session in (*world.sessions.values(), *world.departed.values()):
        message = _session_message(world, session, now)
        keys = held[session.instance]
        rates = [world.rates.get(key, IDLE) for key in keys]
        message.assignments = len(keys)
        message.rows_per_second = round(sum(rate.rows_per_second for rate in rates), 1)
        message.bytes_per_second = round(sum(rate.bytes_per_second for rate in rates), 1)
        message.load = round(sum(need_of(world, key).weight for key in keys), 2)
        found.append(message)
    seen = {session.name for session in world.sessions.values()}
    seen.update(session.name for session in world.departed.values())
    absent = (mark for name, mark in world.replicators.items() if name not in seen)
    return [*found, *(_mark_message(world, mark) for mark in absent)]


def _session_message(world: World, session: Session, now: Instant) -> pb.Replicator:
    reason, message = why(world, session)
    mark = world.mark_of(session.name)
    result = pb.Replicator(
        name=f"replicators/{session.name}",
        instance_id=session.instance,
        version=session.version,
        peer=session.peer,
        state=_STATES[session.state(world.leases, now.mono_ms)],
        capacity=session.capacity,
        connect_time=timestamp(session.connect_time_ms),
        heartbeat_time=timestamp(session.heartbeat_time_ms),
        lease_expire_time=timestamp(now.wall_ms + session.lease_end_ms - now.mono_ms),
        cordoned=mark.cordoned,
        reason=reason,
        message=message,
        labels=dict(session.labels),
    )
    _add_drain(world, result, mark)
    return result


def _mark_message(world: World, mark: ReplicatorRecord) -> pb.Replicator:
    result = pb.Replicator(
        name=f"replicators/{mark.name}",
        state=pb.REPLICATOR_STATE_STOPPED,
        cordoned=mark.cordoned,
        reason="NOT_CONNECTED",
        message="No process of this name is there; its mark waits for one.",
    )
    _add_drain(world, result, mark)
    return result


def _add_drain(world: World, result: pb.Replicator, mark: ReplicatorRecord) -> None:
    drain = mark.drain
    if drain is None:
        return
    result.drain.CopyFrom(
        pb.Drain(
            state=_DRAINS[drain.state],
            begin_time=timestamp(drain.begin_ms),
            deadline_time=timestamp(drain.deadline_ms),
            total=drain.total,
            left=held_under(world, mark.name),
            force=drain.force,
        )
    )


def listed_grants(world: World) -> Iterator[Grant]:
    """What is held or waits; of a collection that is, or was, given out in parts only the shape in
    which it is now.
    """
    for key, grant in world.grants.items():
        record = None if grant.instance or not world.parts else world.record_of(key)
        if record is not None and world.parts.get(record.assignment_id):
            if key not in shown_as(world, world.tasks[record.task_uid], record):
                continue
        yield grant


def assignment_message(world: World, grant: Grant) -> pb.AssignmentInfo:
    uid, _ = split_assignment_id(grant.assignment_id)
    record = world.record_of(grant.assignment_id)
    move = world.moves.get(grant.assignment_id)
    target = world.sessions.get(move.target) if move is not None else None
    moving = move is not None and grant.epoch == move.epoch
    return pb.AssignmentInfo(
        name=f"assignments/{grant.assignment_id}",
        task=world.tasks[uid].spec.name,
        collection=record.source_name if record is not None else "",
        epoch=grant.epoch,
        version=record.version if record is not None else world.metadata[uid].version,
        replicator=f"replicators/{grant.owner}" if grant.instance else "",
        state=grant_state(world, grant).value,
        assign_time=timestamp(grant.assign_time_ms),
        moving_to=f"replicators/{target.name}" if moving and target is not None else "",
        moving_reason=move.cause.value if moving and move is not None else "",
        rows_per_second=round(world.rates.get(grant.assignment_id, IDLE).rows_per_second, 1),
    )


def plan_message(world: World, planned: Iterable[PlannedMove]) -> pb.RebalancePlan:
    before = {session.instance: 0.0 for session in world.takers()}
    for grant in world.grants.values():
        if grant.instance in before:
            before[grant.instance] += need_of(world, grant.assignment_id).weight
    after = dict(before)
    plan = pb.RebalancePlan()
    for move in planned:
        after[move.source] -= move.weight
        after[move.target] += move.weight
        uid, _ = split_assignment_id(move.assignment_id)
        record = world.record_of(move.assignment_id)
        plan.moves.add(
            assignment=f"assignments/{move.assignment_id}",
            task=world.tasks[uid].spec.name,
            collection=record.source_name if record is not None else "",
            to=_name(world, move.target),
            load=round(move.weight, 2),
            **{"from": _name(world, move.source)},
        )
    for instance in before:
        plan.loads.add(
            replicator=_name(world, instance),
            before=round(before[instance], 2),
            after=round(after[instance], 2),
        )
    return plan


def _name(world: World, instance: str) -> str:
    return f"replicators/{world.sessions[instance].name}"
