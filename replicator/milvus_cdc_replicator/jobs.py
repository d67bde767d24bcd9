"""Work beside assignments: probe a source and sink, find places in the log, compare both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from milvus_cdc.errors import BugError, CdcError, RetryableError, UserError
from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.sink import Sink
from milvus_cdc.sink.writer_sink import WriterSink
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_pb2

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.diffing import diff_all
from milvus_cdc_replicator.holding import keep_holds
from milvus_cdc_replicator.positions import locate_targets
from milvus_cdc_replicator.spec import collection_of
from milvus_cdc_replicator.verifying import reads, verify_targets

log = structlog.get_logger()

VIOLATIONS_NAMED = 10


class JobRunner:
    """Runs jobs side by side; each ends with a result, a failure or its cancellation."""

    def __init__(self, connections: Connections, send: Callable[[pb.ConnectRequest], None]) -> None:
        self._connections = connections
        self._send = send
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, request: pb.JobRequest) -> None:
        if request.job_id in self._tasks:
            return
        task = asyncio.create_task(self._run(request), name=f"job {request.job_id}")
        self._tasks[request.job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.job_id, None))

    def cancel(self, job_id: str) -> None:
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request: pb.JobRequest) -> None:
        job_id = request.job_id
        try:
            match request.WhichOneof("job"):
                case "probe":
                    with self._connections.using(request.probe.sink):
                        result = await self._probe(request.probe)
                    self._update(pb.JobUpdate(job_id=job_id, probe=result))
                case "resolve":
                    resolved = await self._resolve(request.resolve)
                    self._update(pb.JobUpdate(job_id=job_id, resolve=resolved))
                case "verify":
                    await self._verify(job_id, request.verify)
                case "diff":
                    with self._connections.using(request.diff.sink):
                        await diff_all(
                            self._connections,
                            request.diff,
                            lambda update: self._update(pb.JobUpdate(job_id=job_id, diff=update)),
                        )
                case "locate":
                    source = await self._connections.source(request.locate.source)
                    located = await locate_targets(source, request.locate)
                    self._update(pb.JobUpdate(job_id=job_id, locate=located))
                case "hold":
                    source = await self._connections.source(request.hold.source)
                    held = await keep_holds(source, request.hold)
                    self._update(pb.JobUpdate(job_id=job_id, hold=held))
                case other:
                    raise BugError(
                        "UNKNOWN_JOB", f"this replicator does not know the job {other!r}"
                    )
        except CdcError as error:
            self._failed(job_id, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("job failed unexpectedly", job_id=job_id)
            self._failed(job_id, BugError("REPLICATOR_BUG", f"{type(error).__name__}: {error}"))

    def _update(self, update: pb.JobUpdate) -> None:
        self._send(pb.ConnectRequest(job_update=update))

    def _failed(self, job_id: str, error: CdcError) -> None:
        failed = pb.JobFailed(
            reason=error.reason,
            message=error.message,
            field=error.field,
            transient=isinstance(error, RetryableError),
        )
        self._update(pb.JobUpdate(job_id=job_id, failed=failed))

    async def _probe(self, job: pb.ProbeJob) -> pb.ProbeResult:
        if job.HasField("dead_letters"):
            await self._connections.dead_letters(job.dead_letters).probe()
        if job.sink.WhichOneof("kind") is None:
            return pb.ProbeResult()
        sink = await self._connections.sink(job.sink)
        with _blame(f"sink.{job.sink.WhichOneof('kind')}"):
            sink_version = await sink.probe()
        await _check_planned(sink, job)
        source = await self._connections.source(job.source)
        with _blame(f"source.{job.source.WhichOneof('queue')}"):
            await source.probe()
        source_version = ""
        if job.source.HasField("milvus"):
            with _blame("source.milvus"):
                async with self._source_client(job.source) as client:
                    answer = await client.call("GetVersion", milvus_pb2.GetVersionRequest())
                    source_version = answer.version
                    await _check_token(client)
        return pb.ProbeResult(
            source_version=source_version,
            sink_version=sink_version,
            sink_holds_checkpoints=(
                isinstance(sink, WriterSink) and sink.writer.capabilities.own_checkpoint
            ),
        )

    async def _resolve(self, job: pb.ResolveJob) -> pb.ResolveResult:
        source = await self._connections.source(job.source)
        result = pb.ResolveResult()
        for pchannel in job.pchannels:
            ends = await source.log_range(pchannel)
            result.log_ends.append(
                pb.LogEnd(pchannel=pchannel, position=ends.end, incarnation=ends.incarnation)
            )
        if job.source.HasField("milvus"):
            async with self._source_client(job.source) as client:
                result.source_ts = await reads(client).timestamp()
        return result

    async def _verify(self, job_id: str, job: pb.VerifyJob) -> None:
        async with (
            self._source_client(job.source) as source,
            self._connections.milvus(job.sink.milvus, who="sink") as sink,
        ):
            await verify_targets(
                source,
                sink,
                job,
                lambda update: self._update(pb.JobUpdate(job_id=job_id, verify=update)),
            )

    def _source_client(self, source: task_pb2.Source) -> MilvusClient:
        return self._connections.milvus(source.milvus, who="source")


async def _check_token(source: MilvusClient) -> None:
    """Raises UserError SOURCE_UNAUTHENTICATED: a version is told to anybody. What the user may read
    shows when it is read.
    """
    try:
        await source.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())
    except UserError as error:
        if error.reason != "SOURCE_PERMISSION_DENIED":
            raise


async def _check_planned(sink: Sink, job: pb.ProbeJob) -> None:
    """Raises UserError UNSUPPORTED_BY_SINK naming what the sink cannot hold."""
    refused = []
    wants = list(map(collection_of, job.collections))
    if isinstance(sink, WriterSink):
        refused = await sink.violations_together(wants)
    else:
        for want in wants:
            found = await sink.violations(want, indexes=job.indexes)
            refused += [f"{want.full_name}: {why}" for why in found]
    if refused:
        more = (
            f"; and {len(refused) - VIOLATIONS_NAMED} more"
            if (len(refused) > VIOLATIONS_NAMED)
            else ""
        )
        raise UserError(
            "UNSUPPORTED_BY_SINK",
            "the sink cannot hold "
            + "; ".join(refused[:VIOLATIONS_NAMED])
            + more
            + ". Exclude these collections, or set carry.index to false where it is about indexes",
            field="selection.exclude",
        )


class _blame:
    """Names the task field whose connection failed."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, CdcError) and not error.field:
            error.field = self._field
