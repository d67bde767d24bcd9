"""The task: what a user wants, what became of it, and which state may follow which.

Law: a task's state changes only along `TRANSITIONS`; anything else is a bug of ours and fails
loudly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from milvus_cdc.model import Batching, Carry, Drift, RateLimits, Rbac
from milvus_cdc.selection import Selection

from milvus_cdc_controller.core.mapping import Flow, Naming, Rules


class TaskState(StrEnum):
    CREATING = "CREATING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    PAUSED = "PAUSED"
    FAILED = "FAILED"
    DELETING = "DELETING"


LEFT_MAX = 100

TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.CREATING: frozenset(
        {
            TaskState.RUNNING,
            TaskState.RETRYING,
            TaskState.PAUSED,
            TaskState.FAILED,
            TaskState.DELETING,
        }
    ),
    TaskState.RUNNING: frozenset(
        {TaskState.RETRYING, TaskState.PAUSED, TaskState.FAILED, TaskState.DELETING}
    ),
    TaskState.RETRYING: frozenset(
        {TaskState.RUNNING, TaskState.PAUSED, TaskState.FAILED, TaskState.DELETING}
    ),
    TaskState.PAUSED: frozenset(
        {
            TaskState.CREATING,
            TaskState.RUNNING,
            TaskState.RETRYING,
            TaskState.FAILED,
            TaskState.DELETING,
        }
    ),
    TaskState.FAILED: frozenset(
        {
            TaskState.CREATING,
            TaskState.RUNNING,
            TaskState.RETRYING,
            TaskState.PAUSED,
            TaskState.DELETING,
        }
    ),
    TaskState.DELETING: frozenset(),
}


class StartAt(StrEnum):
    EARLIEST = "EARLIEST"
    LATEST = "LATEST"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something stopped: `reason` for programs, `message` for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What the user wants. `source` and `sink` are opaque here; their ids say which are one."""

    name: str
    labels: tuple[tuple[str, str], ...]
    selection: Selection
    source: bytes
    source_id: str
    sink: bytes
    sink_id: str
    start: StartAt
    adopt_existing: bool = False
    carry: Carry = field(default_factory=Carry)
    drift: Drift = Drift.REPAIR
    batching: Batching = field(default_factory=Batching)
    limits: RateLimits = field(default_factory=RateLimits)
    dead_letters: bytes = b""
    """Opaque here; empty when refused rows stop their collection."""
    rename: Rules = ()
    replicator_labels: tuple[tuple[str, str], ...] = ()
    """Only replicators with all of them get something of it."""
    source_endpoint: str = ""
    """The source's public API, written as a `sink_id`; empty when the task does not name it."""
    max_parts: int = 0
    """Parts that one collection is given out in at most; in one piece when 0 or 1."""
    held_log: str = ""
    """Says which log of which queue is to be held; empty where none is."""

    @property
    def naming(self) -> Naming:
        return Naming(self.rename, self.selection)


def echo(spec: TaskSpec, others: Sequence[TaskSpec]) -> tuple[TaskSpec, ...] | None:
    """The tasks by which rows that `spec` writes could come back to its source and be written
    again; None when there are none. A task that does not name its source's API is not looked
    through.
    """
    if not spec.source_endpoint:
        return None
    own = spec.naming.flows()
    todo: list[tuple[TaskSpec, Flow, tuple[TaskSpec, ...]]] = [(spec, flow, ()) for flow in own]
    seen: set[tuple[str, Flow]] = set()
    while todo:
        task, flow, way = todo.pop()
        if task.sink_id == spec.source_endpoint and way:
            if any(task.naming.feeds(flow, spec.naming, first) for first in own):
                return way
        for other in others:
            if other.source_endpoint != task.sink_id:
                continue
            for after in other.naming.flows():
                if (other.name, after) in seen:
                    continue
                if task.naming.feeds(flow, other.naming, after):
                    seen.add((other.name, after))
                    todo.append((other, after, (*way, other)))
    return None


@dataclass(frozen=True, slots=True)
class LeftCollection:
    """A collection that a rename at the source took out of the selection; its rows stay at the
    sink.
    """

    collection_id: int
    source_name: str
    sink_name: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A stored task: the wish, its generation, and the state last shown."""

    uid: str
    spec: TaskSpec
    generation: int = 1
    observed_generation: int = 0
    request_id: str = ""
    fingerprint: str = ""
    """Of the task as it was first asked for; tells a repeated request from another one with the
    same id.
    """
    paused: bool = False
    deleting: bool = False
    failure: Failure | None = None
    probed: bool = False
    """A replicator has reached queue and sink once."""
    created: bool = False
    """Catalogue read and every start position known once: never CREATING again."""
    baseline: tuple[int, ...] | None = None
    """Collections that existed when they were selected; `start` speaks of these only, not of one
    that a rename brought in. None until the first catalogue.
    """
    baseline_of: Selection | None = None
    """The selection that `baseline` speaks of."""
    left: tuple[LeftCollection, ...] = ()
    """Newest last, at most `LEFT_MAX`."""
    state: TaskState = TaskState.CREATING
    reason: str = ""
    message: str = ""
    state_time_ms: int = 0
    create_time_ms: int = 0
    update_time_ms: int = 0
    creator: str = ""
    """The principal that made it; empty where nobody was asked who he is, and in older records."""

    @property
    def etag(self) -> str:
        return f"{self.uid[:8]}-{self.generation}"

    @property
    def active(self) -> bool:
        """It wants to replicate."""
        return not (self.paused or self.deleting or self.failure is not None)


def move(task: TaskRecord, state: TaskState, reason: str, message: str, wall_ms: int) -> TaskRecord:
    """The task in another state (or with another reason); its time changes only with the state."""
    if state is task.state:
        if (reason, message) == (task.reason, task.message):
            return task
        return replace(task, reason=reason, message=message)
    assert state in TRANSITIONS[task.state], f"{task.state} -> {state}"
    return replace(task, state=state, reason=reason, message=message, state_time_ms=wall_ms)


@dataclass(frozen=True, slots=True)
class DatabaseWish:
    """A database to have at the sink, by its name there."""

    database_id: int
    """Of the source's database that it stands for; 0 for one that is only there for collections
    mapped into it.
    """
    name: str
    dropped: bool = False


Properties = tuple[str, tuple[tuple[str, str], ...]]
"""A database at the sink and its properties."""


@dataclass(frozen=True, slots=True)
class AliasWish:
    """By its names at the sink; `source` is its `database.alias` at the source."""

    source: str
    database: str
    alias: str
    collection: str
    collection_id: int
    sink_collection_id: int = 0
    """Another one when the sink's collection was made anew: the alias must be looked at again."""

    @property
    def place(self) -> str:
        return f"{self.database}.{self.alias}"


@dataclass(frozen=True, slots=True)
class MetadataRecord:
    """The content of a task's metadata assignment."""

    task_uid: str
    version: int = 0
    databases: tuple[DatabaseWish, ...] = ()
    applied_version: int = 0
    failure: Failure | None = None
    aliases: tuple[AliasWish, ...] = ()
    """To be at the sink: everything they wait for has happened, or they are as they were."""
    dropped_aliases: tuple[tuple[str, str, int], ...] = ()
    """(database, alias, id of the collection it stood for) at the sink, once wanted."""
    leaving: tuple[int, ...] = ()
    """Collections for which an alias may still stand until `aliases_version` has caught up."""
    aliases_version: int = 0
    """The newest version of which a replicator said that its aliases are as wanted."""
    database_properties: tuple[Properties, ...] = ()
    rbac: Rbac | None = None
    """With the names of the sink; None unless the task carries `rbac`."""
    dropped_rbac: Rbac = field(default_factory=Rbac)
    """Given by us and gone at the source."""
    operations_channel: str = ""
    operations_read_from: bytes = b""
    """Everything before it has been seen to; empty before the first reading."""
    conditions: tuple[tuple[str, str], ...] = ()

    @property
    def aliases_done(self) -> bool:
        return self.aliases_version >= self.version


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """What the last trusted reading said of a source: the next one is judged by it."""

    source_id: str
    cluster_id: int
    revision: int
    tso: int
    databases_keyed: bool
    incarnation: int
    alive: tuple[int, ...]
    """Followed collections last seen in state CREATED."""
