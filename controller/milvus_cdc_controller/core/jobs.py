"""Work beside assignments that any replicator can do: probe, resolve, verify.

Law: a job is given to one connected replicator; when its stream is lost, the core's own jobs
begin anew elsewhere and those of a caller fail, because the caller has seen part of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProbeJob:
    source: bytes
    sink: bytes


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


JobPayload = ProbeJob | ResolveJob | VerifyJob


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


JobResult = JobFailed | ProbeDone | ResolveDone | VerifyEvent


@dataclass(slots=True)
class Job:
    """`task_uid` is set for the core's own jobs."""

    job_id: str
    payload: JobPayload
    task_uid: str = ""
    instance: str = ""
    deadline_ms: int = 0
