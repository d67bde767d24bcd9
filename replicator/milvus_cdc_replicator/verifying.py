"""Runs a verify job: the comparison engine's events as messages of the stream."""

from __future__ import annotations

from collections.abc import Callable

from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.verify import (
    Difference,
    DifferenceKind,
    MilvusReads,
    Progress,
    Target,
    verify_collection,
)
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import verify_pb2

_KINDS = {
    DifferenceKind.MISSING: verify_pb2.VerifyDifference.KIND_MISSING,
    DifferenceKind.EXTRA: verify_pb2.VerifyDifference.KIND_EXTRA,
    DifferenceKind.DIFFERENT: verify_pb2.VerifyDifference.KIND_DIFFERENT,
    DifferenceKind.DOUBLED: verify_pb2.VerifyDifference.KIND_DOUBLED,
}


def reads(client: MilvusClient) -> MilvusReads:
    return MilvusReads(client)


async def verify_targets(
    source: MilvusClient,
    sink: MilvusClient,
    job: pb.VerifyJob,
    send: Callable[[pb.VerifyUpdate], None],
) -> None:
    """Collection by collection; ends with `done`. Raises CdcError when a side cannot be read."""

    async def on_event(event: Progress | Difference) -> None:
        if isinstance(event, Progress):
            progress = verify_pb2.VerifyProgress(
                collection=event.collection,
                phase=event.phase,
                rows_compared=event.rows_compared,
                rows_total=event.rows_total,
            )
            send(pb.VerifyUpdate(progress=progress))
        else:
            difference = verify_pb2.VerifyDifference(
                collection=event.collection,
                partition=event.partition,
                kind=_KINDS[event.kind],
                key=event.key,
                fields=event.fields,
            )
            send(pb.VerifyUpdate(difference=difference))

    source_reads, sink_reads = reads(source), reads(sink)
    for target in job.targets:
        result = await verify_collection(
            source_reads,
            sink_reads,
            Target(
                target.source_database,
                target.source_collection,
                target.sink_database,
                target.sink_collection,
            ),
            max_differences=job.max_differences or 10,
            on_event=on_event,
        )
        send(
            pb.VerifyUpdate(
                collection=verify_pb2.VerifyCollectionResult(
                    collection=result.collection,
                    equal=result.equal,
                    reason=result.reason,
                    message=result.message,
                    rows_source=result.rows_source,
                    rows_sink=result.rows_sink,
                    missing=result.missing,
                    extra=result.extra,
                    different=result.different,
                    doubled=result.doubled,
                    source_doubled=result.source_doubled,
                )
            )
        )
    send(pb.VerifyUpdate(done=pb.VerifyDone()))
