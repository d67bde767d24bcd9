"""Whether a task may be as it is asked for, beside all others.

Laws: two tasks never own one name at one sink; what a task writes never comes back to its source;
a selection that can never select anything is a mistake. The first objection is the answer, and it
names its field.
"""

from __future__ import annotations

from milvus_cdc.selection import overlap, selects_nothing

from milvus_cdc_controller.core.effects import Effect, Refusal, Reply
from milvus_cdc_controller.core.events import CreateTask
from milvus_cdc_controller.core.mapping import check_rules, meeting
from milvus_cdc_controller.core.task import TaskSpec, echo
from milvus_cdc_controller.core.world import World


def find_repeated(world: World, command: CreateTask) -> Effect | None:
    """The answer to a request id seen before."""
    if not command.request_id:
        return None
    for task in world.tasks.values():
        if task.request_id == command.request_id:
            if task.fingerprint == command.fingerprint:
                return Reply(command.call, task)
            return Reply(
                command.call,
                refusal=Refusal(
                    "ALREADY_EXISTS",
                    "REQUEST_ID_REUSED",
                    f"The request id was used for {task.spec.name} with other contents; "
                    "use a new one.",
                    "request_id",
                ),
            )
    return None


def check_create(world: World, command: CreateTask) -> Refusal | None:
    if len(world.tasks) >= world.tasks_max:
        return Refusal(
            "RESOURCE_EXHAUSTED",
            "TOO_MANY_TASKS",
            f"There are {len(world.tasks)} tasks; delete one, or raise limits.tasks in the "
            "controller's configuration.",
            "task",
        )
    refusal = _share(world, command.creator)
    if refusal is not None:
        return refusal
    if command.spec.name in world.uid_by_name:
        return Refusal(
            "ALREADY_EXISTS",
            "TASK_EXISTS",
            f"{command.spec.name} exists already; choose another name or update it.",
            "task.name",
        )
    return check_names(world, command.spec, own_uid="")


def _share(world: World, creator: str) -> Refusal | None:
    """Refuses who has as many tasks already as one may have."""
    most = world.tasks_of_one_max
    if not creator or sum(task.creator == creator for task in world.tasks.values()) < most:
        return None
    limit = "limits.tasksPerPrincipal"
    return Refusal(
        "RESOURCE_EXHAUSTED",
        "PRINCIPAL_LIMIT",
        f"{creator} has made {most} of the tasks that are there; delete one, or raise {limit} in "
        "the controller's configuration.",
        "task",
        (("limit", limit), ("principal", creator), ("most", str(most))),
    )


def check_names(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    return (
        _nothing(spec)
        or _collision(spec, updating=bool(own_uid))
        or _overlap(world, spec, own_uid)
        or _echo(world, spec, own_uid)
    )


def _nothing(spec: TaskSpec) -> Refusal | None:
    found = selects_nothing(spec.selection)
    if found is None:
        return None
    index, why = found
    return Refusal(
        "INVALID_ARGUMENT",
        "SELECTS_NOTHING",
        f"{spec.selection.include[index]!r} can never select a collection: {why}.",
        f"task.selection.include[{index}]",
    )


def _collision(spec: TaskSpec, *, updating: bool) -> Refusal | None:
    fault = check_rules(spec.rename, spec.selection)
    if fault is None:
        return None
    # The rules stand since creation: what is to be changed is at fault.
    field = "task.selection.include" if updating else f"task.rename[{fault.rule}]"
    rule = spec.rename[fault.rule]
    return Refusal(
        "INVALID_ARGUMENT",
        fault.reason,
        f"rename[{fault.rule}] ({rule.source} -> {rule.sink}): {fault.message}.",
        field,
        (("rule", str(fault.rule)), ("from", rule.source), ("to", rule.sink)),
    )


def _echo(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    """Refuses what would come back to its own source through other tasks."""
    others = [
        task.spec for task in world.tasks.values() if task.uid != own_uid and not task.deleting
    ]
    way = echo(spec, others)
    if way is None:
        return None
    names = ", ".join(other.name for other in way)
    return Refusal(
        "FAILED_PRECONDITION",
        "SELF_FEEDING",
        f"What this task writes would come back to its source by {names}, and round again for "
        "ever. Select different collections in each direction, or give them other names by "
        "rename.",
        "task.selection.include",
        tuple(("task", other.name) for other in way[:1]),
    )


def _overlap(world: World, spec: TaskSpec, own_uid: str) -> Refusal | None:
    for uid in world.reach.candidates(spec):
        task = world.tasks[uid]
        if uid == own_uid:
            continue
        if spec.rename or task.spec.rename:
            pair = meeting(spec.naming, task.spec.naming)
        else:
            pair = overlap(spec.selection, task.spec.selection)
        if pair is None:
            continue
        mine, theirs = pair
        return Refusal(
            "FAILED_PRECONDITION",
            "SINK_OVERLAP",
            f"{task.spec.name} writes to the same sink, and its {theirs!r} can reach a name there "
            f"that {mine!r} can reach: two tasks may not own one sink collection. Narrow one of "
            "them, for example by exclude.",
            "task.selection.include",
            (("task", task.spec.name), ("pattern", mine), ("other_pattern", theirs)),
        )
    return None
