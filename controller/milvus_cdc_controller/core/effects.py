"""Everything the controller wants done, in order.

Law: the shell carries out every Save and Forget of a step, in one transaction, before anything
else of it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.model import RateLimits

from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.hold import HoldRecord
from milvus_cdc_controller.core.jobs import JobPayload, JobResult
from milvus_cdc_controller.core.replicator import ReplicatorRecord
from milvus_cdc_controller.core.task import MetadataRecord, SourceRecord, TaskRecord

Record = (
    TaskRecord
    | CollectionRecord
    | CollectionProgress
    | MetadataRecord
    | Grant
    | SourceRecord
    | ReplicatorRecord
    | HoldRecord
)


@dataclass(frozen=True, slots=True)
class Save:
    key: str
    record: Record


@dataclass(frozen=True, slots=True)
class Forget:
    key: str


# Messages to a replicator.


@dataclass(frozen=True, slots=True)
class Welcome:
    protocol: int


@dataclass(frozen=True, slots=True)
class Assign:
    assignment_id: str
    epoch: int
    version: int
    task: TaskRecord
    collection: CollectionRecord | None = None
    progress: CollectionProgress | None = None
    metadata: MetadataRecord | None = None


@dataclass(frozen=True, slots=True)
class Revoke:
    assignment_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Synced:
    pass


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    seq: int
    resting_ms: int
    """How often an assignment in which nothing happens is to report."""


@dataclass(frozen=True, slots=True)
class ProgressAck:
    """Carries every horizon of the assignment, so that the last ack alone tells all."""

    assignment_id: str
    epoch: int
    seq: int
    horizons: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class JobRequest:
    job_id: str
    payload: JobPayload


@dataclass(frozen=True, slots=True)
class JobCancel:
    job_id: str


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """This replicator's part."""

    task_uid: str
    limits: RateLimits


StreamMessage = (
    Welcome
    | Assign
    | Revoke
    | Synced
    | HeartbeatAck
    | ProgressAck
    | JobRequest
    | JobCancel
    | TaskLimits
)


@dataclass(frozen=True, slots=True)
class Send:
    stream: int
    message: StreamMessage


@dataclass(frozen=True, slots=True)
class CloseStream:
    stream: int
    reason: str
    message: str


# Answers and news for the API.


@dataclass(frozen=True, slots=True)
class Refusal:
    """`kind` is the canonical status: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS,
    FAILED_PRECONDITION, ABORTED.
    """

    kind: str
    reason: str
    message: str
    field: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """`task` is None where nothing is left to show (an allowed missing one)."""

    call: int
    task: TaskRecord | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Publish:
    """The task's public face may have changed; `deleted` carries its last one."""

    uid: str
    deleted: TaskRecord | None = None


@dataclass(frozen=True, slots=True)
class JobOutput:
    job_id: str
    result: JobResult
    last: bool


# The source's metadata.


@dataclass(frozen=True, slots=True)
class OpenSource:
    source_id: str
    source: bytes


@dataclass(frozen=True, slots=True)
class CloseSource:
    source_id: str


@dataclass(frozen=True, slots=True)
class RefreshSource:
    """Read it anew; a person has asked for it, so drops that waited for confirmation are
    confirmed.
    """

    source_id: str


@dataclass(frozen=True, slots=True)
class ReadPartition:
    """Read the source anew, linearizable, then say events.PartitionRead."""

    source_id: str
    assignment_id: str
    partition_id: int


Effect = (
    Save
    | Forget
    | Send
    | CloseStream
    | Reply
    | Publish
    | JobOutput
    | OpenSource
    | CloseSource
    | RefreshSource
    | ReadPartition
)
