"""Between the stream's protobuf messages and the core's nouns."""

from __future__ import annotations

from collections.abc import Callable

from milvus_cdc.model import part_of_assignment
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_pb2

from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core import jobs
from milvus_cdc_controller.core.collection import Counters, Recounted
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.core.parts import compares, points_of
from milvus_cdc_controller.core.retention import Retention
from milvus_cdc_controller.specs import (
    DRIFTS,
    batching_message,
    carry_message,
    collection_spec,
    dead_letters_message,
    duration,
    limits_message,
    metadata_spec,
)

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1

_REPORTED = {
    pb.Progress.STATE_RUNNING: ReportedState.RUNNING,
    pb.Progress.STATE_RETRYING: ReportedState.RETRYING,
    pb.Progress.STATE_FAILED: ReportedState.FAILED,
}

_RECOUNTED = {
    pb.RECOUNTED_DONE: Recounted.DONE,
    pb.RECOUNTED_WRITE_AGAIN: Recounted.WRITE_AGAIN,
}

MakeEvent = Callable[[ev.Instant], ev.Event]


def hello(stream: int, peer: str, message: pb.Hello) -> MakeEvent | None:
    """None when no protocol version is common."""
    protocol = min(PROTOCOL_MAX, message.protocol_max)
    if protocol < max(PROTOCOL_MIN, message.protocol_min):
        return None
    held = tuple(ev.Held(h.assignment_id, h.epoch, h.version) for h in message.held)
    return lambda at: ev.Hello(
        at,
        stream,
        message.name,
        message.instance_id,
        message.version,
        peer,
        protocol,
        message.capacity,
        held,
        message.connects,
        tuple(sorted(message.labels.items())),
        message.takes_parts,
    )


def event(stream: int, request: pb.ConnectRequest) -> MakeEvent | None:
    """None for a message of a newer protocol: it is left out."""
    match request.WhichOneof("message"):
        case "ack":
            ack = request.ack
            return lambda at: ev.Acked(at, stream, ack.assignment_id, ack.epoch, ack.version)
        case "nack":
            nack = request.nack
            return lambda at: ev.Nacked(
                at,
                stream,
                nack.assignment_id,
                nack.epoch,
                nack.version,
                nack.reason or "REFUSED",
                nack.message,
            )
        case "released":
            done = request.released
            return lambda at: ev.Released(at, stream, done.assignment_id, done.epoch)
        case "heartbeat":
            beat = request.heartbeat
            return lambda at: ev.Heartbeat(at, stream, beat.seq, beat.draining)
        case "progress":
            return _progress(stream, request.progress)
        case "job_update":
            update = request.job_update
            result = _job_result(update)
            if result is None:
                return None
            return lambda at: ev.JobUpdated(at, stream, update.job_id, result)
        case "partition_query":
            query = request.partition_query
            return lambda at: ev.PartitionAsked(
                at, stream, query.assignment_id, query.epoch, query.partition_id
            )
    return None


def _progress(stream: int, progress: pb.Progress) -> MakeEvent:
    reports = tuple(
        ev.VchannelReport(
            v.vchannel,
            v.read_from,
            v.resolved_ts,
            v.closed,
            v.wanted_horizon_ts,
            v.incarnation,
            _retention(v.retention) if v.HasField("retention") else None,
            v.stored_ts,
        )
        for v in progress.vchannels
    )
    counters = Counters(
        progress.rows_inserted,
        progress.rows_upserted,
        progress.rows_deleted,
        progress.rows_skipped,
        progress.rows_refused,
        progress.bytes_written,
    )
    opened = None
    if progress.HasField("opened"):
        opened = ev.SinkOpened(
            progress.opened.sink_collection_id,
            progress.opened.adopted,
            progress.opened.horizon_ts,
        )
    renamed_to = ""
    if progress.HasField("renamed_to"):
        renamed_to = f"{progress.renamed_to.database}.{progress.renamed_to.collection}"
    return lambda at: ev.ProgressReported(
        at,
        stream,
        progress.assignment_id,
        progress.epoch,
        progress.seq,
        _REPORTED.get(progress.state, ReportedState.NONE),
        progress.reason,
        progress.message,
        reports,
        counters,
        progress.lag_ms,
        tuple((c.type, c.message) for c in progress.conditions),
        opened,
        progress.dropped,
        progress.applied_version,
        renamed_to,
        aliases_version=progress.aliases_version,
        flushed_ts=progress.flushed_ts,
        flushes=tuple(
            ev.FlushSeen(each.ts, each.database, tuple(each.collections))
            for each in progress.flushes
        ),
        operations_read_from=progress.operations_read_from,
        recounted=_RECOUNTED.get(progress.recounted, Recounted.NOT_YET),
        stands_ts=progress.stands_ts,
        whole_now=progress.whole_now,
    )


def _job_result(update: pb.JobUpdate) -> jobs.JobResult | None:
    match update.WhichOneof("update"):
        case "failed":
            failed = update.failed
            return jobs.JobFailed(failed.reason, failed.message, failed.field, failed.transient)
        case "probe":
            done = update.probe
            return jobs.ProbeDone(
                done.source_version, done.sink_version, done.sink_holds_checkpoints
            )
        case "resolve":
            ends = tuple((e.pchannel, e.position, e.incarnation) for e in update.resolve.log_ends)
            return jobs.ResolveDone(ends, update.resolve.source_ts)
        case "verify":
            last = update.verify.WhichOneof("event") == "done"
            return jobs.VerifyEvent(update.verify.SerializeToString(), last)
        case "diff":
            last = update.diff.WhichOneof("event") == "done"
            return jobs.DiffEvent(update.diff.SerializeToString(), last)
        case "locate":
            return jobs.LocateDone(tuple(map(_located, update.locate.located)))
        case "hold":
            return jobs.HoldDone(
                tuple(map(_hold_seen, update.hold.places)),
                tuple(map(_hold_seen, update.hold.found)),
                tuple((w.reason, w.message) for w in update.hold.warnings),
            )
    return None


def _hold_seen(held: pb.HeldLog) -> jobs.HoldSeen:
    return jobs.HoldSeen(
        held.pchannel,
        held.name,
        held.backlog_entries,
        held.backlog_bytes,
        held.reason,
        held.message,
    )


def _located(place: pb.LocatedVchannel) -> jobs.Located:
    return jobs.Located(
        place.vchannel,
        place.read_from,
        place.resolved_ts,
        place.incarnation,
        _retention(place.retention) if place.HasField("retention") else None,
        place.reason,
        place.message,
    )


def _retention(told: pb.Retention) -> Retention:
    return Retention(
        told.left.ToMilliseconds() if told.HasField("left") else -1,
        told.left_bytes,
        told.limit.ToMilliseconds(),
        told.limit_bytes,
    )


# To the replicator.


def response(
    message: fx.StreamMessage,
    controller_id: str,
    leases: Leases,
    progress_ms: int,
    silence_ms: int = 0,
) -> pb.ConnectResponse:
    match message:
        case fx.Welcome(protocol=protocol):
            return pb.ConnectResponse(
                welcome=pb.Welcome(
                    protocol=protocol,
                    controller_id=controller_id,
                    lease_ttl=duration(leases.ttl_ms),
                    heartbeat_interval=duration(leases.heartbeat_ms),
                    progress_interval=duration(progress_ms),
                    silence=duration(silence_ms),
                )
            )
        case fx.Assign():
            return pb.ConnectResponse(assign=_assign(message))
        case fx.Revoke(assignment_id=assignment_id, epoch=epoch, reason=reason):
            return pb.ConnectResponse(
                revoke=pb.Revoke(assignment_id=assignment_id, epoch=epoch, reason=reason)
            )
        case fx.Synced():
            return pb.ConnectResponse(synced=pb.Synced())
        case fx.HeartbeatAck(seq=seq, resting_ms=resting_ms):
            ack = pb.HeartbeatAck(seq=seq, resting_interval=duration(resting_ms))
            return pb.ConnectResponse(heartbeat_ack=ack)
        case fx.ProgressAck():
            return pb.ConnectResponse(
                progress_ack=pb.ProgressAck(
                    assignment_id=message.assignment_id,
                    epoch=message.epoch,
                    seq=message.seq,
                    horizons=[
                        pb.HorizonGrant(vchannel=vchannel, horizon_ts=ts)
                        for vchannel, ts in message.horizons
                    ],
                )
            )
        case fx.JobRequest(job_id=job_id, payload=payload):
            return pb.ConnectResponse(job_request=_job_request(job_id, payload))
        case fx.JobCancel(job_id=job_id):
            return pb.ConnectResponse(job_cancel=pb.JobCancel(job_id=job_id))
        case fx.TaskLimits(task_uid=uid, limits=limits):
            told = pb.TaskLimits(task_uid=uid, limits=limits_message(limits))
            return pb.ConnectResponse(task_limits=told)


def _assign(message: fx.Assign) -> pb.Assign:
    assign = pb.Assign(
        assignment_id=message.assignment_id,
        epoch=message.epoch,
        version=message.version,
        task=message.task.spec.name,
        source=task_pb2.Source.FromString(message.task.spec.source),
        sink=task_pb2.Sink.FromString(message.task.spec.sink),
        carry=carry_message(message.task.spec.carry),
        drift=DRIFTS[message.task.spec.drift],
        batching=batching_message(message.task.spec.batching),
        dead_letters=dead_letters_message(message.task.spec.dead_letters),
    )
    if message.collection is not None:
        assert message.progress is not None
        spec = collection_spec(message.collection, message.progress)
        spec.adopt_existing = message.task.spec.adopt_existing
        if part_of_assignment(message.assignment_id) is not None:
            names = {p.vchannel for p in points_of(message.assignment_id, message.progress)}
            others = [v for v in spec.vchannels if v.vchannel not in names]
            for other in others:
                spec.vchannels.remove(other)
            assign.part.compares = compares(message.assignment_id, message.collection)
        assign.collection.CopyFrom(spec)
    else:
        assert message.metadata is not None
        assign.metadata.CopyFrom(metadata_spec(message.metadata, message.task.spec.carry))
    return assign


def _job_request(job_id: str, payload: jobs.JobPayload) -> pb.JobRequest:
    source = task_pb2.Source.FromString(payload.source)
    match payload:
        case jobs.ProbeJob():
            sink = task_pb2.Sink.FromString(payload.sink)
            probe = pb.ProbeJob(
                source=source,
                sink=sink,
                collections=map(pb.CollectionSpec.FromString, payload.collections),
                indexes=payload.indexes,
                dead_letters=dead_letters_message(payload.dead_letters),
            )
            return pb.JobRequest(job_id=job_id, probe=probe)
        case jobs.ResolveJob():
            return pb.JobRequest(
                job_id=job_id, resolve=pb.ResolveJob(source=source, pchannels=payload.pchannels)
            )
        case jobs.DiffJob():
            return pb.JobRequest(job_id=job_id, diff=pb.DiffJob.FromString(payload.body))
        case jobs.HoldJob():
            held = pb.HoldJob(
                source=source,
                places=[
                    pb.HoldPlace(
                        pchannel=place.pchannel,
                        name=place.name,
                        keep_from=place.keep_from,
                        release=place.release,
                    )
                    for place in payload.places
                ],
                look=payload.look,
            )
            return pb.JobRequest(job_id=job_id, hold=held)
        case jobs.VerifyJob():
            targets = [
                pb.VerifyTarget(
                    source_database=target.source[0],
                    source_collection=target.source[1],
                    sink_database=target.sink[0],
                    sink_collection=target.sink[1],
                )
                for target in payload.targets
            ]
            return pb.JobRequest(
                job_id=job_id,
                verify=pb.VerifyJob(
                    source=source,
                    sink=task_pb2.Sink.FromString(payload.sink),
                    targets=targets,
                    max_differences=payload.max_differences,
                ),
            )
        case jobs.LocateJob():
            places = [
                pb.LocateTarget(
                    vchannel=target.vchannel,
                    pchannel=target.pchannel,
                    resolved_ts=target.resolved_ts,
                    incarnation=target.incarnation,
                    stored=target.stored,
                )
                for target in payload.targets
            ]
            for place, target in zip(places, payload.targets, strict=True):
                if target.read_from:
                    place.read_from = target.read_from
                else:
                    place.ts = target.ts
            return pb.JobRequest(job_id=job_id, locate=pb.LocateJob(source=source, targets=places))
