"""Work beside assignments that any replicator can do: probe, resolve, verify,
locate, diff, hold.

Law: a job is given to one connected replicator; when its stream is lost, the core's own jobs
begin anew elsewhere and those of a caller fail, because the caller has seen part of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc_controller.core.placement import Labels
from milvus_cdc_controller.core.retention import Retention


@dataclass(frozen=True, slots=True)
class ProbeJob:
    source: bytes
    sink: bytes
    collections: tuple[bytes, ...] = ()
    """Serialized, opaque here: what the sink must be able to hold."""
    indexes: bool = False
    dead_letters: bytes = b""
    """Serialized; empty when the task has no place for them."""


@dataclass(frozen=True, slots=True)
class ResolveJob:
    source: bytes
    pchannels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyTarget:
    """Each as (database, collection)."""

    source: tuple[str, str]
    sink: tuple[str, str]


@dataclass(frozen=True, slots=True)
class VerifyJob:
    source: bytes
    sink: bytes
    targets: tuple[VerifyTarget, ...]
    max_differences: int


@dataclass(frozen=True, slots=True)
class LocateTarget:
    """`read_from` with its `resolved_ts`, or (where `read_from` is empty) the last tick at or
    before `ts`.
    """

    vchannel: str
    pchannel: str
    read_from: bytes = b""
    resolved_ts: int = 0
    ts: int = 0
    incarnation: bytes = b""
    stored: bool = False
    """A checkpoint of ours: only whether the log still holds it is of interest."""


@dataclass(frozen=True, slots=True)
class LocateJob:
    source: bytes
    targets: tuple[LocateTarget, ...]


@dataclass(frozen=True, slots=True)
class DiffJob:
    source: bytes
    body: bytes
    """The whole job, opaque."""


@dataclass(frozen=True, slots=True)
class HoldPlace:
    """What is to become of one hold: it is made where it is missing, and moved up to the oldest of
    `keep_from`, which stays in the log; without any it stays where it is.
    """

    pchannel: str
    name: str
    keep_from: tuple[bytes, ...] = ()
    release: bool = False
    """It is removed instead."""


@dataclass(frozen=True, slots=True)
class HoldJob:
    source: bytes
    places: tuple[HoldPlace, ...] = ()
    look: bool = False
    """Every hold at that queue is told, whoever made it."""


JobPayload = ProbeJob | ResolveJob | VerifyJob | LocateJob | DiffJob | HoldJob


@dataclass(frozen=True, slots=True)
class JobFailed:
    reason: str
    message: str
    field: str = ""
    transient: bool = False


@dataclass(frozen=True, slots=True)
class ProbeDone:
    source_version: str
    sink_version: str
    sink_holds_checkpoints: bool = False


@dataclass(frozen=True, slots=True)
class ResolveDone:
    log_ends: tuple[tuple[str, bytes, bytes], ...]
    """(pchannel, position, incarnation of its topic)."""
    source_ts: int


@dataclass(frozen=True, slots=True)
class VerifyEvent:
    """One event of a running verify, opaque; `last` ends the job."""

    body: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class Located:
    """A good place when `reason` is empty."""

    vchannel: str
    read_from: bytes = b""
    resolved_ts: int = 0
    incarnation: bytes = b""
    retention: Retention | None = None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class LocateDone:
    located: tuple[Located, ...]
    """In the order asked."""


@dataclass(frozen=True, slots=True)
class DiffEvent:
    """One event of a running diff, opaque; `last` ends the job."""

    body: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class HoldSeen:
    """A hold as it is at the queue; all is well when `reason` is empty."""

    pchannel: str
    name: str
    backlog_entries: int = -1
    """-1 = not known."""
    backlog_bytes: int = -1
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class HoldDone:
    places: tuple[HoldSeen, ...]
    """In the order asked."""
    found: tuple[HoldSeen, ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    """(reason, message): what at the queue endangers holds, or what they endanger there."""


JobResult = JobFailed | ProbeDone | ResolveDone | VerifyEvent | LocateDone | DiffEvent | HoldDone


@dataclass(slots=True)
class Job:
    """`task_uid` is set for the core's own jobs."""

    job_id: str
    payload: JobPayload
    task_uid: str = ""
    instance: str = ""
    deadline_ms: int = 0
    labels: Labels = frozenset()
    """Only a replicator with all of them does it."""
    log_id: str = ""
    """Set for a job of the core that looks after this log's holds."""
