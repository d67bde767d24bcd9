"""What the controller's Assign says, as nouns of this process, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from milvus_cdc.model import (
    Batching,
    Carry,
    Collection,
    Drift,
    Index,
    Load,
    LoadKind,
    ObjectState,
    Partition,
    RoleGrant,
    Vchannel,
)
from milvus_cdc.sink.metadata import AliasWish, MetadataWish, RbacWish
from milvus_cdc.source import KafkaConfig, NatsConfig, PulsarConfig, QueueConfig
from milvuscdc.v1 import dead_letters_pb2, task_pb2
from milvuscdc.v1 import replication_service_pb2 as pb


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
    stored_ts: int = 0
    """Newest `resolved_ts` that a sink which keeps checkpoints is known to hold."""
    recount_from: bytes = b""
    """Where the keys to be recounted begin, before `read_from`; empty when there."""
    recount_ts: int = 0
    """As `resolved_ts`."""


class Recount(StrEnum):
    """What is to be done about requests of a lost owner that may take effect late."""

    NONE = "NONE"
    WANTED = "WANTED"
    WRITE_AGAIN = "WRITE_AGAIN"
    """Keys were found wrong: everything since is written once more, then they are recounted."""


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
    renamed_from: tuple[str, str] | None = None
    """(database, name) that the sink's collection still may have."""
    rename_ts: int = 0
    """Rows at or below it come before the rename."""
    source_database: str = ""
    """Its database at the source."""
    source_collection: str = ""
    """Its name there."""
    carry: Carry = field(default_factory=Carry)
    drift: Drift = Drift.REPAIR
    batching: Batching = field(default_factory=Batching)
    dead_letters: dead_letters_pb2.DeadLetters | None = None
    """None: a row that the sink refuses stops the collection."""
    applied: Applied | None = None
    """What an owner before has carried out."""
    flush_ts: int = 0
    """A user's flush: done once rows at or below it are in the sink; 0 = none."""
    awaited_ts: int = 0
    """To be told as soon as everything at or below it is in the sink; 0 = none."""
    recount: Recount = Recount.NONE
    part: bool = False
    """Others write other vchannels of it at the same time: rows only."""
    compares: bool = True
    """The sink is compared, rows aside."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What an owner has carried out, rows aside; tells the source's changes from others'."""

    indexes: tuple[Index, ...]
    load: Load
    partition_ids: frozenset[int]
    alter_ts: int
    touched_indexes: frozenset[str] = frozenset()
    """Names of those that the source has changed since, however often."""
    touched_load: bool = False

    @classmethod
    def of(cls, want: Collection) -> Applied:
        alive = (p.partition_id for p in want.partitions if p.state is ObjectState.CREATED)
        return cls(want.indexes, want.load, frozenset(alive), want.alter_ts)


@dataclass(frozen=True, slots=True)
class Operations:
    """What is wanted from the source's operations channel."""

    channel: str
    read_from: bytes
    flush: bool
    credentials: bool


@dataclass(frozen=True, slots=True)
class MetadataAssignment:
    """What belongs to a task and not to a collection, as wanted."""

    assignment_id: str
    epoch: int
    version: int
    task: str
    sink: task_pb2.Sink
    source: task_pb2.Source
    wish: MetadataWish
    drift: Drift = Drift.REPAIR
    applied_version: int = 0
    """The newest that was reported as applied, by whichever owner."""
    operations: Operations | None = None


Assignment = CollectionAssignment | MetadataAssignment


def queue_config(source: task_pb2.Source) -> QueueConfig:
    """Raises ValueError for a queue this version does not know."""
    match source.WhichOneof("queue"):
        case "nats":
            nats = source.nats
            return NatsConfig(
                nats.url,
                tls=nats.tls if nats.HasField("tls") else None,
                token=nats.token if nats.HasField("token") else None,
                username=nats.username,
                password=nats.password if nats.HasField("password") else None,
                credentials_file=nats.credentials_file,
                nkey_seed=nats.nkey_seed if nats.HasField("nkey_seed") else None,
                tls_handshake_first=nats.tls_handshake_first,
            )
        case "kafka":
            kafka = source.kafka
            return KafkaConfig(
                tuple(kafka.brokers), kafka.security if kafka.HasField("security") else None
            )
        case "pulsar":
            return _pulsar_config(source.pulsar)
        case other:
            raise ValueError(f"unknown queue {other!r}")


def _pulsar_config(queue: task_pb2.PulsarQueue) -> PulsarConfig:
    """Without its token, which only who connects can resolve."""
    return PulsarConfig(
        queue.service_url,
        queue.admin_url,
        queue.tenant or "public",
        queue.namespace or "default",
        tls=queue.tls if queue.HasField("tls") else None,
        oauth=queue.oauth if queue.HasField("oauth") else None,
        token_from=queue.token.SerializeToString(deterministic=True).hex()
        if queue.HasField("token")
        else "",
        held=queue.hold != task_pb2.PULSAR_HOLD_NONE,
    )


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
                source=message.source,
                wish=metadata_wish(message.metadata),
                drift=_drift(message.drift),
                applied_version=message.metadata.applied_version,
                operations=_operations(message.metadata),
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
        want=collection_of(spec),
        lanes=tuple(
            LaneStart(
                v.vchannel,
                v.pchannel,
                v.read_from,
                v.resolved_ts,
                v.horizon_ts,
                v.closed,
                v.incarnation,
                v.stored_ts,
                v.recount_from,
                v.recount_ts,
            )
            for v in spec.vchannels
        ),
        opened=spec.opened,
        sink_collection_id=spec.sink_collection_id,
        adopt_existing=spec.adopt_existing,
        recreate=spec.recreate,
        drop_granted=spec.drop_granted,
        renamed_from=(
            (spec.renamed_from.database, spec.renamed_from.collection)
            if spec.HasField("renamed_from")
            else None
        ),
        rename_ts=spec.rename_ts,
        source_database=spec.source_database,
        source_collection=spec.source_collection,
        carry=carry_of(message.carry),
        drift=_drift(message.drift),
        batching=_batching(message.batching),
        dead_letters=message.dead_letters if message.HasField("dead_letters") else None,
        applied=_applied(spec.applied) if spec.HasField("applied") else None,
        flush_ts=spec.flush_ts,
        awaited_ts=spec.awaited_ts,
        recount=_RECOUNTS[spec.recount],
        part=message.HasField("part"),
        compares=message.part.compares or not message.HasField("part"),
    )


def carry_of(message: task_pb2.Carry) -> Carry:
    """What is unset has its default."""
    return Carry(**{each.name: value for each, value in message.ListFields()})


_RECOUNTS = {
    pb.RECOUNT_UNSPECIFIED: Recount.NONE,
    pb.RECOUNT_WANTED: Recount.WANTED,
    pb.RECOUNT_WRITE_AGAIN: Recount.WRITE_AGAIN,
}


def _drift(value: task_pb2.Drift.ValueType) -> Drift:
    return Drift.REPORT if value == task_pb2.DRIFT_REPORT else Drift.REPAIR


def _batching(message: task_pb2.Batching) -> Batching:
    linger = message.linger.ToMilliseconds() if message.HasField("linger") else None
    return Batching(message.max_rows, message.max_bytes, linger)


def _operations(spec: pb.MetadataSpec) -> Operations | None:
    if not spec.HasField("operations"):
        return None
    wanted = spec.operations
    return Operations(wanted.channel, wanted.read_from, wanted.flush, wanted.credentials)


def metadata_wish(spec: pb.MetadataSpec) -> MetadataWish:
    return MetadataWish(
        databases=tuple((d.name, d.dropped) for d in spec.databases),
        database_properties=tuple(
            (d.name, tuple(sorted(d.properties.items()))) for d in spec.databases if d.properties
        ),
        aliases=tuple(AliasWish(a.database, a.alias, a.collection) for a in spec.aliases),
        dropped_aliases=tuple((a.database, a.collection) for a in spec.dropped_aliases),
        rbac=_rbac_wish(spec.rbac) if spec.HasField("rbac") else None,
    )


def _rbac_wish(spec: pb.RbacSpec) -> RbacWish:
    return RbacWish(
        users=tuple(spec.users),
        roles=tuple(spec.roles),
        members=tuple((m.user, m.role) for m in spec.members),
        grants=tuple(map(_grant, spec.grants)),
        privilege_groups=tuple((g.name, tuple(g.privileges)) for g in spec.privilege_groups),
        dropped_roles=tuple(spec.dropped_roles),
        dropped_members=tuple((m.user, m.role) for m in spec.dropped_members),
        dropped_grants=tuple(map(_grant, spec.dropped_grants)),
        dropped_privilege_groups=tuple(spec.dropped_privilege_groups),
    )


def _grant(spec: pb.GrantSpec) -> RoleGrant:
    return RoleGrant(spec.role, spec.object_type, spec.object_name, spec.database, spec.privilege)


_LOAD_KINDS = {
    pb.LoadSpec.KIND_UNSPECIFIED: LoadKind.NONE,
    pb.LoadSpec.KIND_COLLECTION: LoadKind.COLLECTION,
    pb.LoadSpec.KIND_PARTITIONS: LoadKind.PARTITIONS,
}


def _applied(applied: pb.AppliedObjects) -> Applied:
    return Applied(
        tuple(map(_index, applied.indexes)),
        _load(applied.load),
        frozenset(applied.partition_ids),
        applied.alter_ts,
        frozenset(applied.touched_indexes),
        applied.touched_load,
    )


def _index(spec: pb.IndexSpec) -> Index:
    return Index(
        spec.index_id,
        spec.name,
        spec.field_id,
        spec.field_name,
        tuple(sorted(spec.params.items())),
        spec.create_ts,
    )


def _load(spec: pb.LoadSpec) -> Load:
    return Load(_LOAD_KINDS[spec.kind], tuple(spec.partition_ids), spec.replicas)


def collection_of(spec: pb.CollectionSpec) -> Collection:
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
        indexes=tuple(map(_index, spec.indexes)),
        load=_load(spec.load),
        alter_ts=spec.alter_ts,
        vchannels=tuple(Vchannel(v.vchannel, v.pchannel, v.read_from) for v in spec.vchannels),
    )
