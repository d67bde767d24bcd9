"""Everything the controller knows, and how it is looked up.

Law: nothing here changes a stored record; `World` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from milvus_cdc.model import Catalogue, metadata_assignment_id, split_assignment_id

from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.events import Instant
from milvus_cdc_controller.core.grant import Grant, Observed
from milvus_cdc_controller.core.hold import Holds
from milvus_cdc_controller.core.index import Held
from milvus_cdc_controller.core.jobs import Job
from milvus_cdc_controller.core.liveness import Leases, Session
from milvus_cdc_controller.core.moving import Balancing, Move, Policy
from milvus_cdc_controller.core.names import Names
from milvus_cdc_controller.core.rates import Rate
from milvus_cdc_controller.core.reach import Reach
from milvus_cdc_controller.core.replicator import ReplicatorRecord
from milvus_cdc_controller.core.retention import Seen
from milvus_cdc_controller.core.standing import Rows, Standing
from milvus_cdc_controller.core.task import MetadataRecord, SourceRecord, TaskRecord


@dataclass(slots=True)
class SourceView:
    """What is known of a source's metadata in this process."""

    catalogue: Catalogue | None = None
    """The last trusted reading."""
    doubted: bool = False
    """The last reading was not to be trusted."""
    reason: str = ""
    message: str = ""


@dataclass(slots=True)
class TaskWork:
    """A task's unfinished internal work; forgotten with the process."""

    probe_job: str = ""
    resolve_job: str = ""
    resolving: tuple[int, ...] = ()
    check_job: str = ""
    """Looks whether the queue still holds the places that nobody reads from."""
    check_after_ms: int = 0
    not_before_ms: int = 0
    recheck: bool = False
    """A retry waits for a trusted reading of the source."""
    reason: str = ""
    message: str = ""
    awaited: frozenset[int] = frozenset()
    """Collections whose progress may let an alias come."""


@dataclass(slots=True)
class Facts:
    """`put_*` and `drop_*`, which keep some of them true, are methods of `World`."""

    leases: Leases
    now: Instant = field(default_factory=lambda: Instant(0, 0))
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    uid_by_name: dict[str, str] = field(default_factory=dict)
    collections: dict[str, dict[int, CollectionRecord]] = field(default_factory=dict)
    progress: dict[str, CollectionProgress] = field(default_factory=dict)
    """By assignment id."""
    metadata: dict[str, MetadataRecord] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    observed: dict[str, Observed] = field(default_factory=dict)
    names: Names = field(default_factory=Names)
    """Kept true by `put_collection` and `drop_collection`."""
    reach: Reach = field(default_factory=Reach)
    """Kept true by `put_task` and `drop_task`."""
    held: Held = field(default_factory=Held)
    """Kept true by `put_grant`, `drop_collection` and `drop_task`, like all that follows here."""
    standing: dict[str, Standing] = field(default_factory=dict)
    """By task uid, as at the end of the last step."""
    rows: Rows = field(default_factory=Rows)
    unstarted: dict[str, dict[int, None]] = field(default_factory=dict)
    """By task uid: collections whose start is not known."""
    unplaced: dict[str, dict[int | None, list[str]]] = field(default_factory=dict)
    """By task uid and collection (None: the task's metadata): assignments that wait for a
    replicator with room.
    """
    room: bool = False
    """There may be room for them since they were last looked at."""
    more: bool = False
    """There is, and only the number that is placed at once held them back."""
    sessions: dict[str, Session] = field(default_factory=dict)
    """By instance."""
    streams: dict[int, str] = field(default_factory=dict)
    """Stream -> instance."""
    replicators: dict[str, ReplicatorRecord] = field(default_factory=dict)
    """Marks by name; none that says nothing."""
    departed: dict[str, Session] = field(default_factory=dict)
    """By instance: those that ended lately, for people to see."""
    moves: dict[str, Move] = field(default_factory=dict)
    """By assignment id, in the order in which they were asked for."""
    policy: Policy = field(default_factory=Policy)
    balancing: Balancing = field(default_factory=Balancing)
    rates: dict[str, Rate] = field(default_factory=dict)
    """By assignment id."""
    parts: dict[str, set[str]] = field(default_factory=dict)
    """By a collection's assignment id: the parts of it that have a grant."""
    divided: set[str] = field(default_factory=set)
    """Assignment ids of collections that are to be held in parts; grants say it after a restart."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Since when parts of a collection have no owner."""
    look_at_parts_ms: int = 0
    split_after_ms: int = 0
    parts_turn: int = 0
    """How many that are in one piece the looks have come past."""
    jobs: dict[str, Job] = field(default_factory=dict)
    job_count: int = 0
    sources: dict[str, SourceView] = field(default_factory=dict)
    source_records: dict[str, SourceRecord] = field(default_factory=dict)
    work: dict[str, TaskWork] = field(default_factory=dict)
    holds: Holds = field(default_factory=Holds)
    retention: dict[str, dict[str, Seen]] = field(default_factory=dict)
    """By assignment id and vchannel."""
    inherited_ttl_ms: int = 0
    """The longest lease that controllers before this one may have given."""
    check_every_ms: int = 60_000
    warn_fraction: float = 0.2
    """Less than this part of a limit of the queue is a reason to warn."""
    tasks_max: int = 1_000_000
    tasks_of_one_max: int = 1_000_000
    """Made by one principal."""

    def session_of(self, stream: int) -> Session | None:
        instance = self.streams.get(stream)
        return self.sessions.get(instance) if instance is not None else None

    def owner(self, grant: Grant) -> Session | None:
        return self.sessions.get(grant.instance) if grant.instance else None

    def record_of(self, assignment_id: str) -> CollectionRecord | None:
        uid, collection_id = split_assignment_id(assignment_id)
        if collection_id is None:
            return None
        return self.collections.get(uid, {}).get(collection_id)

    def grants_of(self, uid: str) -> Iterator[Grant]:
        for record in self.collections[uid].values():
            for key in (record.assignment_id, *sorted(self.parts.get(record.assignment_id, ()))):
                grant = self.grants.get(key)
                if grant is not None:
                    yield grant
        grant = self.grants.get(metadata_assignment_id(uid))
        if grant is not None:
            yield grant

    def holders(self, uid: str) -> set[str]:
        """Instances that hold something of the task."""
        metadata = self.grants.get(metadata_assignment_id(uid))
        own = {metadata.instance} if metadata is not None and metadata.instance else set()
        return own.union(self.held.holders(uid))

    def is_held(self, uid: str) -> bool:
        """Somebody holds something of the task."""
        return bool(self.holders(uid))

    def seen(self, assignment_id: str) -> Observed:
        return self.observed.setdefault(assignment_id, Observed())

    def mark_of(self, name: str) -> ReplicatorRecord:
        return self.replicators.get(name) or ReplicatorRecord(name)

    def named(self, name: str) -> list[Session]:
        """The processes of a name, the newest last."""
        found = [s for s in self.sessions.values() if s.name == name]
        return sorted(found, key=lambda s: (s.connect_time_ms, s.instance))

    def alive(self) -> list[Session]:
        """Replicators that answer, in a stable order: they may be given jobs."""
        return self._sorted(s for s in self.sessions.values() if self.present(s))

    def takers(self) -> list[Session]:
        """Replicators that take assignments, in a stable order."""
        now_ms = self.now.mono_ms
        return self._sorted(s for s in self.sessions.values() if s.takes_work(self.leases, now_ms))

    def present(self, session: Session) -> bool:
        return session.present(self.leases, self.now.mono_ms)

    @staticmethod
    def _sorted(sessions: Iterable[Session]) -> list[Session]:
        return sorted(sessions, key=lambda s: (s.name, s.instance))
