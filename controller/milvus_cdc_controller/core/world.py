"""What the controller knows, being changed, and the one list of effects that a step fills.

Law: a stored record is replaced only through `put_*` and `drop_*`, so that no change can miss its
Save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from milvus_cdc.model import (
    collection_assignment_id,
    metadata_assignment_id,
    part_of_assignment,
    split_assignment_id,
)

from milvus_cdc_controller.core.collection import (
    NO_ROWS,
    CollectionProgress,
    CollectionRecord,
    claim_of,
    touched,
)
from milvus_cdc_controller.core.effects import (
    CloseSource,
    Effect,
    Forget,
    OpenSource,
    Publish,
    Record,
    Save,
    Send,
    StreamMessage,
)
from milvus_cdc_controller.core.facts import Facts, SourceView, TaskWork
from milvus_cdc_controller.core.grant import Grant, Observed
from milvus_cdc_controller.core.hold import HoldRecord
from milvus_cdc_controller.core.index import Touched
from milvus_cdc_controller.core.liveness import Session
from milvus_cdc_controller.core.metadata import alias_names
from milvus_cdc_controller.core.names import Claim, alias_owner
from milvus_cdc_controller.core.replicator import ReplicatorRecord
from milvus_cdc_controller.core.store_keys import (
    collection_key,
    grant_key,
    hold_key,
    metadata_key,
    progress_key,
    replicator_key,
    source_key,
    task_key,
)
from milvus_cdc_controller.core.task import MetadataRecord, SourceRecord, TaskRecord


@dataclass(slots=True)
class World(Facts):
    dirty: Touched = field(default_factory=Touched)
    """Tasks whose assignments and state must be looked at in this step."""
    stirred: set[str] = field(default_factory=set)
    """Tasks whose progress changed since the last tick: published there."""
    effects: list[Effect] = field(default_factory=list)

    # Loading and saving.

    def restore(self, records: Iterable[Record]) -> None:
        """What the store held. Records without their task are left-overs of a half-done removal
        and are ignored.
        """
        held = list(records)
        for record in held:
            if isinstance(record, TaskRecord):
                self.tasks[record.uid] = record
                self.uid_by_name[record.spec.name] = record.uid
                self.collections[record.uid] = {}
                self.metadata[record.uid] = MetadataRecord(record.uid)
                self.work[record.uid] = TaskWork()
                self.unstarted[record.uid] = {}
                self.reach.put(record.uid, record.spec)
        for record in held:
            match record:
                case CollectionRecord() if record.task_uid in self.tasks:
                    self.collections[record.task_uid][record.collection_id] = record
                case MetadataRecord() if record.task_uid in self.tasks:
                    self.metadata[record.task_uid] = record
                case SourceRecord():
                    self.source_records[record.source_id] = record
                case ReplicatorRecord():
                    self.replicators[record.name] = record
                case HoldRecord():
                    self.holds.records[record.key] = record
                case _:
                    pass
        for record in held:
            match record:
                case CollectionProgress() if record.collection_id in self.collections.get(
                    record.task_uid, ()
                ):
                    key = collection_assignment_id(record.task_uid, record.collection_id)
                    self.progress[key] = record
                    self.rows.change(record.task_uid, NO_ROWS, record.totals)
                case Grant():
                    uid, collection_id = split_assignment_id(record.assignment_id)
                    if uid in self.tasks and (
                        collection_id is None or collection_id in self.collections[uid]
                    ):
                        self.grants[record.assignment_id] = record
                        self.held.put(None, record)
                        self._note_part(record.assignment_id)
                case _:
                    pass
        for uid, records_of_task in self.collections.items():
            for collection_id, wanted in list(records_of_task.items()):
                self.progress.setdefault(
                    wanted.assignment_id, CollectionProgress(uid, collection_id)
                )
                if wanted.opened and not wanted.at_sink:  # of the format before
                    records_of_task[collection_id] = replace(wanted, at_sink=wanted.sink_name)
                self._claim(records_of_task[collection_id])
                if not wanted.started:
                    self.unstarted[uid][collection_id] = None
        for metadata in self.metadata.values():
            self._claim_aliases(metadata, None)

    def put_task(self, task: TaskRecord) -> None:
        first = task.uid not in self.tasks
        self.tasks[task.uid] = task
        self.uid_by_name[task.spec.name] = task.uid
        if first:
            self.collections[task.uid] = {}
            self.metadata[task.uid] = MetadataRecord(task.uid)
            self.work[task.uid] = TaskWork()
            self.unstarted[task.uid] = {}
        self.reach.put(task.uid, task.spec)
        self.effects.append(Save(task_key(task.uid), task))
        self.effects.append(Publish(task.uid))
        self.touch(task.uid)

    def put_collection(self, record: CollectionRecord) -> None:
        before = self.collections[record.task_uid].get(record.collection_id)
        if before is not None:
            record = touched(before, record)
        self.collections[record.task_uid][record.collection_id] = record
        self.progress.setdefault(
            record.assignment_id, CollectionProgress(record.task_uid, record.collection_id)
        )
        self.effects.append(Save(collection_key(record.task_uid, record.collection_id), record))
        self._claim(record)
        if record.started:
            self.unstarted[record.task_uid].pop(record.collection_id, None)
        else:
            self.unstarted[record.task_uid][record.collection_id] = None
        self.dirty.one(record.task_uid, record.collection_id)

    def _claim_aliases(self, now: MetadataRecord, before: MetadataRecord | None) -> None:
        held = alias_names(now)
        for name in (alias_names(before) if before is not None else frozenset()) - held:
            self.names.drop(alias_owner(now.task_uid, name))
        sink_id = self.tasks[now.task_uid].spec.sink_id
        for name in held:
            self.names.put(Claim(alias_owner(now.task_uid, name), sink_id, frozenset({name})))

    def _claim(self, record: CollectionRecord) -> None:
        self.names.put(claim_of(self.tasks[record.task_uid], record))

    def put_progress(self, progress: CollectionProgress) -> None:
        key = collection_assignment_id(progress.task_uid, progress.collection_id)
        before = self.progress.get(key)
        if before is None:
            self.rows.change(progress.task_uid, NO_ROWS, progress.totals)
        elif (progress.current, progress.past, progress.parts) != (
            before.current,
            before.past,
            before.parts,
        ):
            self.rows.change(progress.task_uid, before.totals, progress.totals)
        self.progress[key] = progress
        self.effects.append(Save(progress_key(progress.task_uid, progress.collection_id), progress))

    def put_metadata(self, metadata: MetadataRecord) -> None:
        self._claim_aliases(metadata, self.metadata.get(metadata.task_uid))
        self.metadata[metadata.task_uid] = metadata
        self.effects.append(Save(metadata_key(metadata.task_uid), metadata))
        self.touch(metadata.task_uid)

    def put_grant(self, grant: Grant) -> None:
        previous = self.grants.get(grant.assignment_id)
        assert previous is None or grant.epoch >= previous.epoch, "an epoch never goes back"
        if previous is None or previous.epoch != grant.epoch or not grant.instance:
            self.observed[grant.assignment_id] = Observed(state_time_ms=self.now.wall_ms)
        self.grants[grant.assignment_id] = grant
        self.held.put(previous, grant)
        self.room |= not grant.instance
        self._note_part(grant.assignment_id)
        self.effects.append(Save(grant_key(grant.assignment_id), grant))
        self.touch_one(grant.assignment_id)

    def _note_part(self, assignment_id: str) -> None:
        if part_of_assignment(assignment_id) is not None:
            uid, collection_id = split_assignment_id(assignment_id)
            whole = collection_assignment_id(uid, collection_id or 0)
            self.parts.setdefault(whole, set()).add(assignment_id)

    def put_source(self, record: SourceRecord) -> None:
        if self.source_records.get(record.source_id) != record:
            self.source_records[record.source_id] = record
            self.effects.append(Save(source_key(record.source_id), record))

    def put_hold(self, record: HoldRecord) -> None:
        if self.holds.records.get(record.key) != record:
            self.holds.records[record.key] = record
            self.effects.append(Save(hold_key(record), record))

    def drop_hold(self, record: HoldRecord) -> None:
        self.holds.forget(record.key)
        self.effects.append(Forget(hold_key(record)))

    def put_replicator(self, record: ReplicatorRecord) -> None:
        """The mark of a name, from now on also that of its processes."""
        if record == self.mark_of(record.name):
            return
        if record.blank:
            del self.replicators[record.name]
            self.effects.append(Forget(replicator_key(record.name)))
        else:
            self.replicators[record.name] = record
            self.effects.append(Save(replicator_key(record.name), record))
        for session in self.sessions.values():
            if session.name == record.name:
                session.mark = record
        self.touch_fleet()

    def drop_collection(self, record: CollectionRecord) -> None:
        key = record.assignment_id
        self.collections[record.task_uid].pop(record.collection_id)
        self.unstarted[record.task_uid].pop(record.collection_id, None)
        progress = self.progress.pop(key, None)
        if progress is not None:
            self.rows.change(record.task_uid, progress.totals, NO_ROWS)
        self.retention.pop(key, None)
        self.divided.discard(key)
        self.lacking.pop(key, None)
        self.holds.uncover(key)
        self.effects.append(Forget(collection_key(record.task_uid, record.collection_id)))
        self.effects.append(Forget(progress_key(record.task_uid, record.collection_id)))
        for held in (key, *sorted(self.parts.pop(key, ()))):
            self.observed.pop(held, None)
            self.rates.pop(held, None)
            self._drop_grant(held)
        self.names.drop(record.owner)
        self.dirty.one(record.task_uid, record.collection_id)
        # Its name at the sink is free: another task's collection may wait for it.
        for task in self.tasks.values():
            if task.spec.sink_id == self.tasks[record.task_uid].spec.sink_id:
                self.dirty.state(task.uid)

    def _drop_grant(self, assignment_id: str) -> None:
        grant = self.grants.pop(assignment_id, None)
        if grant is not None:
            self.held.put(grant, None)
            self.room = True
            self.effects.append(Forget(grant_key(assignment_id)))

    def drop_task(self, task: TaskRecord) -> None:
        for record in list(self.collections[task.uid].values()):
            self.drop_collection(record)
        key = metadata_assignment_id(task.uid)
        self._drop_grant(key)
        self.observed.pop(key, None)
        self._claim_aliases(MetadataRecord(task.uid), self.metadata[task.uid])
        del self.tasks[task.uid], self.collections[task.uid], self.metadata[task.uid]
        del self.work[task.uid], self.unstarted[task.uid]
        self.rows.forget(task.uid)
        self.standing.pop(task.uid, None)
        if self.uid_by_name.get(task.spec.name) == task.uid:
            del self.uid_by_name[task.spec.name]
        self.dirty.discard(task.uid)
        self.unplaced.pop(task.uid, None)
        self.reach.drop(task.uid)
        self.effects.append(Forget(metadata_key(task.uid)))
        self.effects.append(Forget(task_key(task.uid)))
        self.effects.append(Publish(task.uid, deleted=task))
        self.watch_sources()

    # Sending.

    def send(self, stream: int, message: StreamMessage) -> None:
        if stream:
            self.effects.append(Send(stream, message))

    def touch(self, uid: str) -> None:
        """The task with everything of it."""
        if uid in self.tasks:
            self.dirty.whole(uid)

    def touch_one(self, assignment_id: str) -> None:
        """What one assignment is about; of a part, its collection."""
        uid, _, what = assignment_id.rpartition(".")
        if uid in self.tasks:
            number = what.partition("-")[0]
            if number.isdecimal():
                self.dirty.one(uid, int(number))
            else:
                self.dirty.state(uid)

    def touch_state(self, uid: str) -> None:
        """The task's own state and work."""
        if uid in self.tasks:
            self.dirty.state(uid)

    def touch_unplaced(self) -> None:
        """What waits for a replicator with room may find one."""
        self.room = True
        for uid in self.unplaced:
            self.touch_state(uid)

    def touch_fleet(self) -> None:
        """Who takes work is another now."""
        self.room = True
        for uid in self.tasks:
            self.dirty.state(uid)

    def touch_held(self, session: Session) -> None:
        """All that it holds, or held when it connected: how it stands is another now."""
        for key in self.held.by(session.instance):
            self.touch_one(key)
        for key, _ in session.stale:
            self.touch_one(key)

    def touch_all(self) -> None:
        for uid in self.tasks:
            self.dirty.whole(uid)

    def watch_sources(self) -> None:
        """Sources are open while some task wants them."""
        wanted: dict[str, bytes] = {}
        for task in self.tasks.values():
            if not task.deleting:
                wanted.setdefault(task.spec.source_id, task.spec.source)
        for source_id in wanted.keys() - self.sources.keys():
            self.sources[source_id] = SourceView()
            self.effects.append(OpenSource(source_id, wanted[source_id]))
        for source_id in self.sources.keys() - wanted.keys():
            del self.sources[source_id]
            self.effects.append(CloseSource(source_id))
            if self.source_records.pop(source_id, None) is not None:
                self.effects.append(Forget(source_key(source_id)))
