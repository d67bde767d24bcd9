"""Who holds an assignment, and what the holder last said.

Law: `epoch` grows by one with every new owner and is stored together with the owner; a report
counts only when both its epoch and its sender's instance are those of the grant.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Grant:
    assignment_id: str
    epoch: int = 0
    owner: str = ""
    """Name of the replicator; empty while nobody holds it."""
    instance: str = ""
    """The owner's process: another start of the same replicator is another owner."""
    assign_time_ms: int = 0


class ReportedState(StrEnum):
    NONE = "NONE"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    FAILED = "FAILED"


@dataclass(slots=True)
class Observed:
    """What is known of the present epoch beside the store; forgotten with it."""

    sent_version: int = 0
    accepted_version: int = 0
    revoking: str = ""
    """Reason of the revoke under way; empty when none is."""
    seq: int = 0
    state: ReportedState = ReportedState.NONE
    reason: str = ""
    message: str = ""
    lag_ms: int = -1
    stands_ts: int = 0
    """Of a part: it stands before what only who has all vchannels can do; 0 = it does not."""
    state_time_ms: int = 0
    """Wall time at which the state last changed."""


class GrantState(StrEnum):
    """As ListAssignments shows it."""

    WAITING = "WAITING"
    ASSIGNED = "ASSIGNED"
    ACCEPTED = "ACCEPTED"
    REVOKING = "REVOKING"
    FENCED = "FENCED"
