"""What an operator reads in the log: tasks changing state, assignments changing hands,
collections failing.
"""

from __future__ import annotations

from typing import Any

import structlog
from milvus_cdc.model import part_of_assignment, split_assignment_id

from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core.collection import CollectionRecord
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.replicator import ReplicatorRecord
from milvus_cdc_controller.core.task import Failure, LeftCollection, TaskRecord, TaskState
from milvus_cdc_controller.core.world import World
from milvus_cdc_controller.metrics import Metrics

log = structlog.get_logger(__name__)


class Journal:
    """Compares what is saved with what was last said of it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._states: dict[str, tuple[TaskState, str]] = {}
        self._failures: dict[str, Failure | None] = {}
        self._names: dict[str, tuple[str, str]] = {}
        self._left: dict[str, tuple[LeftCollection, ...]] = {}

    def note(self, decided: list[fx.Effect], world: World) -> None:
        for effect in decided:
            match effect:
                case fx.Save(record=TaskRecord() as task):
                    self._task(task)
                case fx.Save(record=Grant() as grant):
                    self._grant(grant, world)
                case fx.Save(record=ReplicatorRecord() as mark):
                    drain = mark.drain.state.value if mark.drain is not None else ""
                    log.info(
                        "replicator marked",
                        replicator=mark.name,
                        cordoned=mark.cordoned,
                        drain=drain,
                    )
                case fx.Forget(key=key) if key.startswith("replicators/"):
                    log.info("replicator unmarked", replicator=key.partition("/")[2])
                case fx.Save(record=CollectionRecord() as record):
                    self._collection(record, world)
                case fx.Forget(key=key) if key.startswith("collections/"):
                    self._failures.pop(key.partition("/")[2].replace("/", "."), None)
                    self._names.pop(key.partition("/")[2].replace("/", "."), None)
                case fx.Publish(uid=uid, deleted=TaskRecord() as task):
                    self._states.pop(uid, None)
                    self._left.pop(uid, None)
                    log.info("task gone", task=task.spec.name)
                case fx.CloseStream(stream=stream, reason=reason):
                    log.warning("stream ended", stream=stream, reason=reason)
                case _:
                    pass

    def _task(self, task: TaskRecord) -> None:
        known = self._left.get(task.uid, ())
        self._left[task.uid] = task.left
        for left in task.left:
            if left not in known:
                log.warning(
                    "renamed out of the selection, no longer followed",
                    task=task.spec.name,
                    collection=left.source_name,
                    stays_at_sink=left.sink_name,
                )
        now = (task.state, task.reason)
        if self._states.get(task.uid) == now:
            return
        self._states[task.uid] = now
        say = log.error if task.state is TaskState.FAILED else log.info
        details: dict[str, Any] = {"reason": task.reason, "message": task.message}
        if not task.reason:
            details = {}
        say("task state", task=task.spec.name, state=task.state.value, **details)

    def _grant(self, grant: Grant, world: World) -> None:
        bound = _bound(grant.assignment_id, world)
        if grant.instance:
            log.info("assigned", **bound, epoch=grant.epoch, replicator=grant.owner)
        else:
            log.info("let go", **bound, epoch=grant.epoch)

    def _collection(self, record: CollectionRecord, world: World) -> None:
        key = record.assignment_id
        names = (record.source_name, record.now_at_sink)
        before = self._names.get(key, names)
        self._names[key] = names
        if names[0] != before[0]:
            log.info("renamed at the source", **_bound(key, world), before=before[0])
        if names[1] != before[1] and record.at_sink:
            log.info("renamed at the sink", **_bound(key, world), sink=names[1], before=before[1])
        if self._failures.get(key) == record.failure:
            return
        self._failures[key] = record.failure
        if record.failure is not None:
            self._metrics.errors.labels(error_class="failed", reason=record.failure.reason).inc()
            log.error(
                "collection failed",
                **_bound(key, world),
                reason=record.failure.reason,
                message=record.failure.message,
            )


def _bound(assignment_id: str, world: World) -> dict[str, str]:
    uid, collection_id = split_assignment_id(assignment_id)
    task = world.tasks.get(uid)
    record = world.collections.get(uid, {}).get(collection_id or 0)
    bound = {
        "task": task.spec.name if task is not None else uid,
        "collection": record.source_name if record is not None else "(metadata)",
    }
    if part := part_of_assignment(assignment_id):
        bound["part"] = f"{part[0]} of {part[1]}"
    return bound
