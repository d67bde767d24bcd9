"""What Prometheus can ask the controller. The health of the product is
`milvus_cdc_collection_lag_seconds`.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Iterator

from milvus_cdc.model import tso_to_ms
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from milvus_cdc_controller.core.collection import CollectionState
from milvus_cdc_controller.core.events import Instant
from milvus_cdc_controller.core.liveness import SessionState
from milvus_cdc_controller.core.positions import retention_of
from milvus_cdc_controller.core.status import lag_ms, outline
from milvus_cdc_controller.core.task import TaskState
from milvus_cdc_controller.core.world import World

OBSERVED_AT_ONCE = 200
_Place = tuple[Gauge, str, str]
"""Of a figure: which, of which task and collection."""


class Metrics:
    """One registry a process; gauges are set by `observe`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leader = Gauge(
            "milvus_cdc_controller_leader",
            "1 while this controller leads; the other metrics of a controller are its own then.",
            registry=self.registry,
        )
        self.tasks = Gauge("milvus_cdc_tasks", "Tasks by state.", ["state"], registry=self.registry)
        self.collections = Gauge(
            "milvus_cdc_collections", "Followed collections by state.", ["state"],
            registry=self.registry,
        )  # fmt: skip
        names = ["task", "collection"]
        self.lag_seconds = Gauge(
            "milvus_cdc_collection_lag_seconds",
            "Source time now minus the source time up to which every row is durable in the sink, "
            "as its replicator last said.",
            names,
            registry=self.registry,
        )
        self.checkpoint_age_seconds = Gauge(
            "milvus_cdc_collection_checkpoint_age_seconds",
            "Time now minus the source time up to which every row is durable in the sink.",
            names,
            registry=self.registry,
        )
        self.retention_left_seconds = Gauge(
            "milvus_cdc_collection_retention_left_seconds",
            "How long the queue still keeps the oldest message that is not durable in the sink.",
            names,
            registry=self.registry,
        )
        self.retention_left_bytes = Gauge(
            "milvus_cdc_collection_retention_left_bytes",
            "Bytes to be written until the queue forgets the oldest message that is not durable.",
            names,
            registry=self.registry,
        )
        self.replicators = Gauge(
            "milvus_cdc_replicators",
            "Replicators by state; LOST and STOPPED count those of the last hour.",
            ["state"],
            registry=self.registry,
        )
        self.assignments = Gauge(
            "milvus_cdc_assignments",
            "Assignments held, by replicator; an empty name counts those that wait.",
            ["replicator"],
            registry=self.registry,
        )
        hold = ["hold", "pchannel"]
        self.hold_backlog_entries = Gauge(
            "milvus_cdc_hold_backlog_entries",
            "Entries that the source's queue keeps because of a hold, as last looked at.",
            hold,
            registry=self.registry,
        )
        self.hold_backlog_bytes = Gauge(
            "milvus_cdc_hold_backlog_bytes",
            "Bytes that the source's queue keeps because of a hold, as last looked at.",
            hold,
            registry=self.registry,
        )
        self.store_write_seconds = Histogram(
            "milvus_cdc_store_write_seconds", "Duration of one commit.", registry=self.registry
        )
        self.errors = Counter(
            "milvus_cdc_errors", "Errors by class and reason.", ["error_class", "reason"],
            registry=self.registry,
        )  # fmt: skip

    def observe(self, world: World, now: Instant) -> None:
        """All at once."""
        for _ in self.observing(world, now):
            pass

    def observing(self, world: World, now: Instant) -> Iterator[None]:
        """Pauses now and then while it looks at collections: whoever has it may do something else,
        and the world may change. What is shown changes at the end.
        """
        tasks = [task.state for task in world.tasks.values()]
        for state in TaskState:
            self.tasks.labels(state=state.value).set(tasks.count(state))
        shown = (
            self.lag_seconds,
            self.checkpoint_age_seconds,
            self.retention_left_seconds,
            self.retention_left_bytes,
        )
        # Of two with one name, of which one is on its way out, the worse one is shown.
        worst: dict[_Place, float] = {}
        states: list[CollectionState] = []
        found = [record for records in world.collections.values() for record in records.values()]
        for number, record in enumerate(found, 1):
            if number % OBSERVED_AT_ONCE == 0:
                yield
            key = record.assignment_id
            progress = world.progress.get(key)
            if progress is None:
                continue  # it has gone meanwhile
            status = outline(world, record)
            states.append(status[0] if status is not None else CollectionState.PENDING)
            name = world.tasks[record.task_uid].spec.name, record.now_at_sink
            lag = lag_ms(world, record)
            if lag >= 0:
                _note(worst, (self.lag_seconds, *name), max, lag / 1000)
            resolved_ts = progress.resolved_ts
            if resolved_ts:
                age_ms = max(0, now.wall_ms - tso_to_ms(resolved_ts))
                _note(worst, (self.checkpoint_age_seconds, *name), max, age_ms / 1000)
            left = retention_of(world, progress, key)
            if left.left_ms >= 0:
                _note(worst, (self.retention_left_seconds, *name), min, left.left_ms / 1000)
            if left.left_bytes >= 0:
                _note(worst, (self.retention_left_bytes, *name), min, left.left_bytes)
        for gauge in shown:
            gauge.clear()
        for (gauge, task, collection), value in worst.items():
            gauge.labels(task=task, collection=collection).set(value)
        for collection_state in CollectionState:
            self.collections.labels(state=collection_state.value).set(
                states.count(collection_state)
            )
        known = (*world.sessions.values(), *world.departed.values())
        sessions = [session.state(world.leases, now.mono_ms) for session in known]
        for session_state in SessionState:
            self.replicators.labels(state=session_state.value).set(sessions.count(session_state))
        self.assignments.clear()
        owners = (grant.owner if grant.instance else "" for grant in world.grants.values())
        for owner, number in Counted(owners).items():
            self.assignments.labels(replicator=owner).set(number)

        self._observe_holds(world)

    def _observe_holds(self, world: World) -> None:
        self.hold_backlog_entries.clear()
        self.hold_backlog_bytes.clear()
        for key, record in world.holds.records.items():
            seen = world.holds.seen.get(key)
            if seen is None:
                continue
            place = {"hold": record.name, "pchannel": record.pchannel}
            if seen.backlog_entries >= 0:
                self.hold_backlog_entries.labels(**place).set(seen.backlog_entries)
            if seen.backlog_bytes >= 0:
                self.hold_backlog_bytes.labels(**place).set(seen.backlog_bytes)

    def forget(self) -> None:
        """What only a leader knows."""
        for gauge in (
            *(self.tasks, self.collections, self.lag_seconds, self.checkpoint_age_seconds),
            *(self.retention_left_seconds, self.retention_left_bytes),
            *(self.replicators, self.assignments),
            *(self.hold_backlog_entries, self.hold_backlog_bytes),
        ):
            gauge.clear()


def _note(
    worst: dict[_Place, float], place: _Place, worse: Callable[..., float], value: float
) -> None:
    worst[place] = worse(value, worst.get(place, value))
