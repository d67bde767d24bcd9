"""Holds: what keeps a queue from forgetting entries that some task still has to read.

A queue like Pulsar deletes what every subscription has acknowledged. So there is one durable
subscription of ours on each pchannel of such a log, under a name that is stored before it is made
and never used again once it is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from milvus_cdc_controller.core.jobs import HoldSeen

PREFIX = "milvus-cdc-"
"""Begins the name of every hold, as the queue's adapter knows it (HOLD_PREFIX)."""

Shard = tuple[str, str]
"""(assignment id, vchannel); the vchannel is empty for a metadata assignment."""


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """One hold: it may exist from the moment this is stored until it is forgotten."""

    name: str
    """Of the subscription."""
    log_id: str
    pchannel: str
    source: bytes
    """How to reach the queue, also when the last task that said so is gone."""
    labels: tuple[tuple[str, str], ...] = ()
    """Only a replicator with all of them reaches it."""
    releasing: bool = False
    """Nobody needs it any more; it is to be removed at the queue, then forgotten."""
    create_time_ms: int = 0

    @property
    def key(self) -> str:
        return f"{self.name}/{self.pchannel}"


@dataclass(slots=True)
class Round:
    """The work on one log's holds: one job at a time."""

    job_id: str = ""
    due_ms: int = 0
    not_before_ms: int = 0
    """After a failure."""
    shards: dict[str, set[Shard]] = field(default_factory=dict)
    """By hold's key: whose places the job under way keeps. A place set by hand leaves it."""
    unused: bool = False
    """A task has gone since the last one began."""
    reason: str = ""
    message: str = ""
    """Why the last one failed; empty when it did not."""
    warnings: tuple[tuple[str, str], ...] = ()
    """What at the queue endangers the holds, or what the holds endanger there."""


@dataclass(slots=True)
class Holds:
    records: dict[str, HoldRecord] = field(default_factory=dict)
    """By `HoldRecord.key`."""
    rounds: dict[str, Round] = field(default_factory=dict)
    """By log id; forgotten with the process, like all that follows."""
    covered: set[Shard] = field(default_factory=set)
    """A round that kept their places has ended well, and so does every round since."""
    lacking: set[str] = field(default_factory=set)
    """Uids of tasks something of which was not held when last looked at."""
    made: set[str] = field(default_factory=set)
    """Keys of those that are known to exist."""
    seen: dict[str, HoldSeen] = field(default_factory=dict)
    """By key: as last looked at."""
    before: dict[Shard, tuple[bytes, ...]] = field(default_factory=dict)
    """Places a round ago. They are kept, too: a collection that has just been made begins a little
    before what the others have read, and is in the log before it is seen in the metadata.
    """
    unsettled: dict[str, int] = field(default_factory=dict)
    """By key, monotonic ms: until then what failed or got lost may still be carried out."""
    release_after: dict[str, int] = field(default_factory=dict)

    def of(self, log_id: str, *, releasing: bool = False) -> dict[str, HoldRecord]:
        """By pchannel for those in use, else by key."""
        found = (r for r in self.records.values() if r.log_id == log_id)
        if releasing:
            return {r.key: r for r in found if r.releasing}
        return {r.pchannel: r for r in found if not r.releasing}

    def uncover(self, assignment_id: str) -> None:
        """Its places may have gone back: what was kept for it counts no more."""
        for kept in (self.covered, *(s for r in self.rounds.values() for s in r.shards.values())):
            for shard in [shard for shard in kept if shard[0] == assignment_id]:
                kept.discard(shard)
        for shard in [shard for shard in self.before if shard[0] == assignment_id]:
            del self.before[shard]

    def forget(self, key: str) -> None:
        for known in (self.records, self.seen, self.unsettled, self.release_after):
            known.pop(key, None)
        self.made.discard(key)
