"""The API's messages made from the core's nouns, and the core's nouns from what users send."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf import json_format, timestamp_pb2
from milvus_cdc.model import (
    Batching,
    Carry,
    Drift,
    Import,
    RateLimits,
    tso_to_ms,
)
from milvus_cdc.selection import Selection
from milvus_cdc.sink_connections import connections_each
from milvus_cdc.source.registry import position_text
from milvuscdc.v1 import task_pb2

from milvus_cdc_controller.core.collection import Checkpoint, CollectionRecord, CollectionState
from milvus_cdc_controller.core.holding import trouble
from milvus_cdc_controller.core.mapping import NameRule, split
from milvus_cdc_controller.core.parts import points_of
from milvus_cdc_controller.core.positions import retention_of
from milvus_cdc_controller.core.recount import WRITING_AGAIN
from milvus_cdc_controller.core.status import (
    beyond_limits,
    collection_view,
    rename_pending,
    task_totals,
)
from milvus_cdc_controller.core.task import LeftCollection, StartAt, TaskRecord, TaskSpec, TaskState
from milvus_cdc_controller.core.world import World
from milvus_cdc_controller.retention_alarm import RETENTION_LOW, retention_text
from milvus_cdc_controller.sealing import shown
from milvus_cdc_controller.specs import (
    DRIFTS,
    batching_message,
    carry_message,
    dead_letters_message,
    duration,
    limits_message,
)

TASK_STATES = {
    TaskState.CREATING: task_pb2.TASK_STATE_CREATING,
    TaskState.RUNNING: task_pb2.TASK_STATE_RUNNING,
    TaskState.RETRYING: task_pb2.TASK_STATE_RETRYING,
    TaskState.PAUSED: task_pb2.TASK_STATE_PAUSED,
    TaskState.FAILED: task_pb2.TASK_STATE_FAILED,
    TaskState.DELETING: task_pb2.TASK_STATE_DELETING,
}
_COLLECTION_STATES = {
    CollectionState.PENDING: task_pb2.COLLECTION_STATE_PENDING,
    CollectionState.RUNNING: task_pb2.COLLECTION_STATE_RUNNING,
    CollectionState.RETRYING: task_pb2.COLLECTION_STATE_RETRYING,
    CollectionState.PAUSED: task_pb2.COLLECTION_STATE_PAUSED,
    CollectionState.FAILED: task_pb2.COLLECTION_STATE_FAILED,
    CollectionState.DROPPING: task_pb2.COLLECTION_STATE_DROPPING,
}


def timestamp(unix_ms: int) -> timestamp_pb2.Timestamp | None:
    """None, so unset, for 0."""
    if not unix_ms:
        return None
    result = timestamp_pb2.Timestamp()
    result.FromMilliseconds(unix_ms)
    return result


def source_id(source: task_pb2.Source) -> str:
    """The same for two tasks that read the same metadata."""
    etcd = source.etcd
    parts = [
        *sorted(endpoint.lower() for endpoint in etcd.endpoints),
        etcd.root_path or "by-dev",
        etcd.meta_sub_path or "meta",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def held_log(source: task_pb2.Source) -> str:
    """The same for two tasks that read the same log, where that is to be held; else empty."""
    if source.WhichOneof("queue") != "pulsar" or source.pulsar.hold == task_pb2.PULSAR_HOLD_NONE:
        return ""
    queue = source.pulsar
    scheme, _, hosts = queue.service_url.lower().partition("://")
    parts = [
        source_id(source),
        scheme,
        *sorted(hosts.split(",")),
        queue.tenant or "public",
        queue.namespace or "default",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def sink_id(sink: task_pb2.Sink) -> str:
    """The same for two tasks that write to the same place; for sinks other than a Milvus, in the
    same manner: what decides about names there belongs to the place.
    """
    match sink.WhichOneof("kind"):
        case "milvus":
            return f"milvus {endpoint_id(sink.milvus.uri)}"
        case "kafka":
            brokers = ",".join(sorted(broker.lower() for broker in sink.kafka.brokers))
            return f"kafka {brokers} {sink.kafka.topic}"
        case "files":
            return f"files {sink.files.uri.rstrip('/')} {sink.files.s3.endpoint}"
        case "postgres":
            to = sink.postgres
            place = f"{to.host.lower()}:{to.port or 5432}/{to.database}"
            return f"postgres {place} {to.schema} {to.table}"
        case _:
            config = json_format.MessageToJson(sink.plugin.config, indent=None, sort_keys=True)
            return f"plugin {sink.plugin.name} {config}"


def endpoint_id(uri: str) -> str:
    """Scheme and case do not make another server; localhost is 127.0.0.1; a missing port is
    Milvus' own.
    """
    host = uri.partition("://")[2].rstrip("/").lower()
    name, colon, port = host.rpartition(":")
    if not colon:
        name, port = host, "19530"
    return f"{'127.0.0.1' if name == 'localhost' else name}:{port}"


def selection(message: task_pb2.Selection) -> Selection:
    return Selection(tuple(message.include), tuple(message.exclude))


def task_spec(task: task_pb2.Task) -> TaskSpec:
    return TaskSpec(
        name=task.name,
        labels=tuple(sorted(task.labels.items())),
        selection=selection(task.selection),
        source=task.source.SerializeToString(deterministic=True),
        source_id=source_id(task.source),
        sink=task.sink.SerializeToString(deterministic=True),
        sink_id=sink_id(task.sink),
        start=(StartAt.LATEST if task.start.WhichOneof("at") == "latest" else StartAt.EARLIEST),
        adopt_existing=task.adopt_existing,
        rename=tuple(NameRule(getattr(rule, "from"), rule.to) for rule in task.rename),
        source_endpoint=(
            f"milvus {endpoint_id(task.source.milvus.uri)}" if task.source.milvus.uri else ""
        ),
        carry=carry(task.carry),
        drift=drift(task.drift),
        batching=batching(task.batching),
        limits=limits(task),
        dead_letters=dead_letters(task),
        replicator_labels=tuple(sorted(task.replicator_labels.items())),
        max_parts=task.split.max_parts,
        held_log=held_log(task.source),
    )


def carry(message: task_pb2.Carry) -> Carry:
    """What is unset has its default."""
    return Carry(**{field.name: value for field, value in message.ListFields()})


def drift(value: task_pb2.Drift.ValueType) -> Drift:
    return Drift.REPORT if value == task_pb2.DRIFT_REPORT else Drift.REPAIR


def batching(message: task_pb2.Batching) -> Batching:
    linger = None
    if message.HasField("linger"):
        linger = message.linger.ToMilliseconds()
    return Batching(message.max_rows, message.max_bytes, linger)


def limits(task: task_pb2.Task) -> RateLimits:
    """Of a whole task: what a replicator's connections are depends on its sink."""
    message = task.limits
    each = connections_each(task.sink) if message.connections else 1
    return RateLimits(
        message.rows_per_second,
        message.bytes_per_second,
        message.requests_in_flight,
        message.connections,
        each,
    )


def dead_letters(task: task_pb2.Task) -> bytes:
    """Empty where there are none."""
    if not task.HasField("dead_letters"):
        return b""
    return task.dead_letters.SerializeToString(deterministic=True)


def fingerprint(task: task_pb2.Task) -> str:
    """Of everything in a task that a user decides."""
    wish = task_pb2.Task()
    wish.CopyFrom(task)
    for name in (
        "uid", "etag", "generation", "observed_generation", "state", "reason", "message",
        "state_time", "create_time", "update_time", "progress", "conditions",
    ):  # fmt: skip
        wish.ClearField(name)
    return hashlib.sha256(wish.SerializeToString(deterministic=True)).hexdigest()


def task_message(world: World, task: TaskRecord, store_error: str = "") -> task_pb2.Task:
    """`store_error`: what keeps the controller from storing; every task waits for it."""
    spec = task.spec
    state, reason, message = task.state, task.reason, task.message
    if store_error and state in (TaskState.CREATING, TaskState.RUNNING, TaskState.RETRYING):
        state, reason = TaskState.RETRYING, "STORE_UNAVAILABLE"
        message = f"The controller cannot store progress: {store_error}"
    result = task_pb2.Task(
        name=spec.name,
        uid=task.uid,
        etag=task.etag,
        generation=task.generation,
        observed_generation=task.observed_generation,
        labels=dict(spec.labels),
        source=task_pb2.Source.FromString(spec.source),
        sink=task_pb2.Sink.FromString(spec.sink),
        selection=task_pb2.Selection(
            include=spec.selection.include, exclude=spec.selection.exclude
        ),
        adopt_existing=spec.adopt_existing,
        rename=[task_pb2.NameRule(**{"from": r.source, "to": r.sink}) for r in spec.rename],
        carry=carry_message(spec.carry),
        drift=DRIFTS[spec.drift],
        batching=batching_message(spec.batching),
        limits=limits_message(spec.limits),
        dead_letters=dead_letters_message(spec.dead_letters),
        replicator_labels=dict(spec.replicator_labels),
        split=task_pb2.Split(max_parts=spec.max_parts) if spec.max_parts else None,
        state=TASK_STATES[state],
        reason=reason,
        message=message,
        state_time=timestamp(task.state_time_ms),
        create_time=timestamp(task.create_time_ms),
        update_time=timestamp(task.update_time_ms),
        conditions=[_left_condition(each) for each in task.left],
    )
    shown(result)
    if spec.start is StartAt.LATEST:
        result.start.latest.SetInParent()
    else:
        result.start.earliest.SetInParent()
    if task.uid in world.tasks:
        totals = task_totals(world, task.uid)
        result.conditions.extend(
            task_pb2.Condition(type=kind, message=text)
            for kind, text in (*world.metadata[task.uid].conditions, *trouble(world, task))
        )
        if beyond := beyond_limits(world, task):
            result.conditions.add(type="LIMITS_EXCEEDED", message=beyond)
        result.progress.collections = totals.collections
        result.progress.collections_running = totals.running
        result.progress.collections_failed = totals.failed
        result.progress.rows_inserted = totals.counters.rows_inserted
        result.progress.rows_upserted = totals.counters.rows_upserted
        result.progress.rows_deleted = totals.counters.rows_deleted
        if totals.lag_ms >= 0:
            result.progress.lag.CopyFrom(duration(totals.lag_ms))
    return result


def _left_condition(left: LeftCollection) -> task_pb2.Condition:
    return task_pb2.Condition(
        type="COLLECTION_LEFT_SELECTION",
        message=f"{left.source_name} (id {left.collection_id} at the source) was renamed out of "
        f"the selection and is no longer followed; at the sink it stays as {left.sink_name}, to be "
        "dropped there if it is not needed. An update of the selection ends this remark.",
    )


def import_text(imports: Sequence[Import]) -> str:
    """What bulk imports brought to the source and not to the sink."""
    last = max(imports, key=lambda each: each.time_ms)
    rows = sum(each.rows for each in imports)
    many = f"{len(imports)} bulk imports" if len(imports) > 1 else "A bulk import"
    counted = f"{rows:,} rows" if rows else "rows (how many the metadata does not say)"
    when = (
        datetime.fromtimestamp(last.time_ms / 1000, UTC).isoformat(timespec="seconds")
        if last.time_ms
        else "an unknown time"
    )
    return (
        f"{many} brought {counted} to the source, the last one at {when}: such rows are in no log "
        "and are not at the sink. Import the same files there, or insert the rows at the source."
    )


def _letters_text(rows: int) -> str:
    return (
        f"{rows:,} rows that the sink refused are in the task's dead letters with the reasons, "
        "and not at the sink. Change or delete them at the source; `milvus-cdc task resync` brings "
        "the collection anew."
    )


def collection_message(world: World, record: CollectionRecord) -> task_pb2.TaskCollection:
    view = collection_view(world, record)
    state, reason, message = view.status
    totals = view.progress.totals
    resolved_ts = view.progress.resolved_ts
    conditions = list(view.progress.conditions)
    recount = view.progress.recount
    if recount is not None and recount.again and WRITING_AGAIN[0] not in dict(conditions):
        conditions.append(WRITING_AGAIN)  # replicators said it themselves once
    left = retention_of(world, view.progress, record.assignment_id)
    if left.low(world.warn_fraction):
        conditions.append((RETENTION_LOW, retention_text(left)))
    if record.want.imports:
        conditions.append(("UNREPLICATED_IMPORT", import_text(record.want.imports)))
    if totals.rows_refused:
        conditions.append(("DEAD_LETTERS", _letters_text(totals.rows_refused)))
    pending = rename_pending(world, record)
    if pending:
        conditions.append(("RENAME_PENDING", pending))
    database, name = split(record.source_name)
    sink_database, sink_collection = split(record.now_at_sink)
    result = task_pb2.TaskCollection(
        name=f"{world.tasks[record.task_uid].spec.name}/collections/{record.collection_id}",
        database=database,
        collection=name,
        sink_database=sink_database,
        sink_collection=sink_collection,
        collection_id=record.collection_id,
        state=_COLLECTION_STATES[state],
        reason=reason,
        message=message,
        state_time=timestamp(view.observed.state_time_ms),
        checkpoint_time=timestamp(tso_to_ms(resolved_ts)) if resolved_ts else None,
        rows_inserted=totals.rows_inserted,
        rows_upserted=totals.rows_upserted,
        rows_deleted=totals.rows_deleted,
        rows_skipped=totals.rows_skipped,
        rows_refused=totals.rows_refused,
        replicator=f"replicators/{view.grant.owner}" if view.grant.instance else "",
        epoch=0 if view.parts else view.grant.epoch,
        vchannels=[
            _vchannel_message(world, record.assignment_id, point)
            for point in view.progress.checkpoints
        ],
        conditions=[task_pb2.Condition(type=kind, message=text) for kind, text in conditions],
        parts=[
            task_pb2.CollectionPart(
                assignment=f"assignments/{part.assignment_id}",
                replicator=f"replicators/{part.owner}" if part.instance else "",
                epoch=part.epoch,
                vchannels=[p.vchannel for p in points_of(part.assignment_id, view.progress)],
            )
            for part in view.parts
        ],
    )
    if view.lag_ms >= 0:
        result.lag.CopyFrom(duration(view.lag_ms))
    return result


def _vchannel_message(
    world: World, assignment_id: str, point: Checkpoint
) -> task_pb2.VchannelProgress:
    result = task_pb2.VchannelProgress(
        vchannel=point.vchannel,
        read_from=point.read_from,
        read_from_text=position_text(point.read_from),
        resolved_ts=point.resolved_ts,
        horizon_ts=point.horizon_ts,
        closed=point.closed,
        retention_left_bytes=-1,
    )
    seen = world.retention.get(assignment_id, {}).get(point.vchannel)
    if seen is not None and not point.closed:
        left = seen.now(world.now.wall_ms)
        if left.left_ms >= 0:
            result.retention_left.CopyFrom(duration(left.left_ms))
        result.retention_left_bytes = left.left_bytes
    return result
