"""What the controller's Assign says, as nouns of this process, and back."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.model import (
    Collection,
    Index,
    Load,
    LoadKind,
    ObjectState,
    Partition,
    Vchannel,
)
from milvus_cdc.source import KafkaConfig, NatsConfig, QueueConfig
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import task_pb2


@dataclass(frozen=True, slots=True)
class LaneStart:
    """Where one vchannel resumes."""

    vchannel: str
    pchannel: str
    read_from: bytes
    resolved_ts: int
    horizon_ts: int
    closed: bool
    incarnation: bytes = b""
    """Of the topic in which `read_from` was taken; empty when not known yet."""


@dataclass(frozen=True, slots=True)
class CollectionAssignment:
    """Everything one collection assignment needs, at one version."""

    assignment_id: str
    epoch: int
    version: int
    task: str
    source: task_pb2.Source
    sink: task_pb2.Sink
    want: Collection
    lanes: tuple[LaneStart, ...]
    opened: bool
    sink_collection_id: int
    adopt_existing: bool
    recreate: bool
    drop_granted: bool


@dataclass(frozen=True, slots=True)
class MetadataAssignment:
    """A task's databases, as wanted."""

    assignment_id: str
    epoch: int
    version: int
    task: str
    sink: task_pb2.Sink
    databases: tuple[tuple[str, bool], ...]
    """(name, dropped)."""


Assignment = CollectionAssignment | MetadataAssignment


def queue_config(source: task_pb2.Source) -> QueueConfig:
    """Raises ValueError for a queue this version does not know."""
    match source.WhichOneof("queue"):
        case "nats":
            return NatsConfig(source.nats.url)
        case "kafka":
            return KafkaConfig(tuple(source.kafka.brokers))
        case other:
            raise ValueError(f"unknown queue {other!r}")


def from_assign(message: pb.Assign) -> Assignment:
    """Raises ValueError when it holds something this version cannot run: answer with Nack."""
    match message.WhichOneof("spec"):
        case "metadata":
            return MetadataAssignment(
                assignment_id=message.assignment_id,
                epoch=message.epoch,
                version=message.version,
                task=message.task,
                sink=message.sink,
                databases=tuple((d.name, d.dropped) for d in message.metadata.databases),
            )
        case "collection":
            pass
        case other:
            raise ValueError(f"unknown kind of assignment {other!r}")
    queue_config(message.source)
    spec = message.collection
    if not spec.vchannels:
        raise ValueError(f"assignment {message.assignment_id} names no vchannel")
    return CollectionAssignment(
        assignment_id=message.assignment_id,
        epoch=message.epoch,
        version=message.version,
        task=message.task,
        source=message.source,
        sink=message.sink,
        want=_collection(spec),
        lanes=tuple(
            LaneStart(
                v.vchannel,
                v.pchannel,
                v.read_from,
                v.resolved_ts,
                v.horizon_ts,
                v.closed,
                v.incarnation,
            )
            for v in spec.vchannels
        ),
        opened=spec.opened,
        sink_collection_id=spec.sink_collection_id,
        adopt_existing=spec.adopt_existing,
        recreate=spec.recreate,
        drop_granted=spec.drop_granted,
    )


_LOAD_KINDS = {
    pb.LoadSpec.KIND_UNSPECIFIED: LoadKind.NONE,
    pb.LoadSpec.KIND_COLLECTION: LoadKind.COLLECTION,
    pb.LoadSpec.KIND_PARTITIONS: LoadKind.PARTITIONS,
}


def _collection(spec: pb.CollectionSpec) -> Collection:
    dropped = spec.state == pb.CollectionSpec.STATE_DROPPING
    return Collection(
        collection_id=spec.collection_id,
        database_id=0,
        database=spec.database,
        name=spec.collection,
        schema=spec.schema,
        shards=spec.shards,
        consistency_level=spec.consistency_level,
        create_ts=spec.create_ts,
        properties=tuple(sorted(spec.properties.items())),
        state=ObjectState.DROPPED if dropped else ObjectState.CREATED,
        partitions=tuple(
            Partition(
                p.partition_id,
                p.name,
                p.create_ts,
                ObjectState.DROPPED
                if p.state == pb.PartitionSpec.STATE_DROPPED
                else ObjectState.CREATED,
                p.drop_ts,
            )
            for p in spec.partitions
        ),
        indexes=tuple(
            Index(
                i.index_id,
                i.name,
                i.field_id,
                i.field_name,
                tuple(sorted(i.params.items())),
                i.create_ts,
            )
            for i in spec.indexes
        ),
        load=Load(_LOAD_KINDS[spec.load.kind], tuple(spec.load.partition_ids), spec.load.replicas),
        vchannels=tuple(Vchannel(v.vchannel, v.pchannel, v.read_from) for v in spec.vchannels),
    )
