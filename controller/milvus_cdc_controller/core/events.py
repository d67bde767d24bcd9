"""Everything that can happen to the controller. Time arrives inside: `at` of every event."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.model import Batching, Carry, Catalogue, Drift, RateLimits
from milvus_cdc.selection import Selection

from milvus_cdc_controller.core.collection import NO_ROWS, Counters, Recounted
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.jobs import JobPayload, JobResult, Located
from milvus_cdc_controller.core.retention import Retention
from milvus_cdc_controller.core.task import TaskSpec


@dataclass(frozen=True, slots=True)
class Instant:
    """`mono_ms` never goes back and counts suspend: leases. `wall_ms` is Unix time: for people."""

    mono_ms: int
    wall_ms: int


@dataclass(frozen=True, slots=True)
class Event:
    at: Instant


@dataclass(frozen=True, slots=True)
class Started(Event):
    """The store has been loaded."""


@dataclass(frozen=True, slots=True)
class Ticked(Event):
    """Time has passed."""


# Commands of the API. `call` comes back in effects.Reply.


@dataclass(frozen=True, slots=True)
class Command(Event):
    call: int


@dataclass(frozen=True, slots=True)
class CreateTask(Command):
    uid: str
    spec: TaskSpec
    request_id: str
    fingerprint: str
    probed: bool
    validate_only: bool = False
    creator: str = ""
    """Empty where nobody is asked who he is."""


@dataclass(frozen=True, slots=True)
class UpdateTask(Command):
    name: str
    etag: str
    labels: tuple[tuple[str, str], ...] | None
    selection: Selection | None
    validate_only: bool = False
    carry: Carry | None = None
    drift: Drift | None = None
    batching: Batching | None = None
    limits: RateLimits | None = None
    dead_letters: bytes | None = None
    replicator_labels: tuple[tuple[str, str], ...] | None = None
    max_parts: int | None = None


@dataclass(frozen=True, slots=True)
class PauseTask(Command):
    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class ResumeTask(Command):
    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class DeleteTask(Command):
    name: str
    etag: str
    allow_missing: bool = False


@dataclass(frozen=True, slots=True)
class RetryTask(Command):
    name: str
    collection: str
    """`database.collection`; every failed one when empty."""


@dataclass(frozen=True, slots=True)
class ResyncCollection(Command):
    name: str
    collection: str


@dataclass(frozen=True, slots=True)
class SetPositions(Command):
    """All or nothing; each was found good in the log just before."""

    name: str
    etag: str
    positions: tuple[Located, ...]


# Of the fleet. `name` and `replicator` are names of replicators, without what stands before.


@dataclass(frozen=True, slots=True)
class CordonReplicator(Command):
    name: str
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class UncordonReplicator(Command):
    name: str
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class DrainReplicator(Command):
    name: str
    timeout_ms: int = 0
    """0 = no end."""
    force: bool = False
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class CancelDrain(Command):
    name: str


@dataclass(frozen=True, slots=True)
class MoveAssignment(Command):
    assignment_id: str
    replicator: str
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Rebalance(Command):
    max_moves: int = 0
    """0 = as many as it needs."""


@dataclass(frozen=True, slots=True)
class ForgetHold(Command):
    """Its removal is given up; what is at the queue stays there."""

    key: str
    """`HoldRecord.key`."""


# The source's metadata.


@dataclass(frozen=True, slots=True)
class CatalogueSeen(Event):
    """A whole reading. Not `trusted`: it must not be taken as evidence of anything."""

    source_id: str
    catalogue: Catalogue
    trusted: bool = True
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class SourceUnavailable(Event):
    source_id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PartitionRead(Event):
    """The reading asked for by effects.ReadPartition has been delivered as CatalogueSeen."""

    assignment_id: str
    partition_id: int


# Replicators. `stream` numbers one connection.


@dataclass(frozen=True, slots=True)
class Held:
    assignment_id: str
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class StreamEvent(Event):
    stream: int


@dataclass(frozen=True, slots=True)
class Hello(StreamEvent):
    name: str
    instance: str
    version: str
    peer: str
    protocol: int
    capacity: int
    held: tuple[Held, ...]
    connects: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    takes_parts: bool = False


@dataclass(frozen=True, slots=True)
class StreamLost(StreamEvent):
    pass


@dataclass(frozen=True, slots=True)
class Heartbeat(StreamEvent):
    seq: int
    draining: bool


@dataclass(frozen=True, slots=True)
class Acked(StreamEvent):
    assignment_id: str
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Nacked(StreamEvent):
    assignment_id: str
    epoch: int
    version: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Released(StreamEvent):
    assignment_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class VchannelReport:
    vchannel: str
    read_from: bytes
    resolved_ts: int
    closed: bool = False
    wanted_horizon_ts: int = 0
    incarnation: bytes = b""
    retention: Retention | None = None
    stored_ts: int = 0


@dataclass(frozen=True, slots=True)
class SinkOpened:
    sink_collection_id: int
    adopted: bool = False
    horizon_ts: int = 0


@dataclass(frozen=True, slots=True)
class FlushSeen:
    """A user's flush at the source, names as there."""

    ts: int
    database: str
    collections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProgressReported(StreamEvent):
    assignment_id: str
    epoch: int
    seq: int
    state: ReportedState
    reason: str = ""
    message: str = ""
    vchannels: tuple[VchannelReport, ...] = ()
    counters: Counters = NO_ROWS
    lag_ms: int = -1
    conditions: tuple[tuple[str, str], ...] = ()
    opened: SinkOpened | None = None
    dropped: bool = False
    applied_version: int = 0
    renamed_to: str = ""
    """`database.collection` that the sink's collection has now."""
    aliases_version: int = 0
    flushed_ts: int = 0
    stands_ts: int = 0
    """Of a part: all before it is done, what is there only who has all vchannels can do."""
    whole_now: bool = False
    """Of a part: it cannot go on, whatever the others do."""
    flushes: tuple[FlushSeen, ...] = ()
    operations_read_from: bytes = b""
    recounted: Recounted = Recounted.NOT_YET


@dataclass(frozen=True, slots=True)
class PartitionAsked(StreamEvent):
    assignment_id: str
    epoch: int
    partition_id: int


# Jobs asked for by the API; those of the core itself begin inside.


@dataclass(frozen=True, slots=True)
class JobAsked(Event):
    job_id: str
    payload: JobPayload
    labels: tuple[tuple[str, str], ...] = ()
    """Only a replicator with all of them does it."""


@dataclass(frozen=True, slots=True)
class JobCancelled(Event):
    job_id: str


@dataclass(frozen=True, slots=True)
class JobUpdated(StreamEvent):
    job_id: str
    result: JobResult
