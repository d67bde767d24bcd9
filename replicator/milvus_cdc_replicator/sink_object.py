"""What one collection assignment does with its object at the sink: open, partitions, rename,
indexes and load state, drop.

Laws: it lives under the name it has at the sink (`placed`), which follows the wanted one by a
rename. What is not in the log happens once everything older is in the sink. One change at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import structlog
from milvus_cdc.dead_letters import Place
from milvus_cdc.model import Collection, Drift, ObjectState, ms_to_tso, split_assignment_id
from milvus_cdc.rows import Table, table_of
from milvus_cdc.sink import Sink

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.arrangement import Arrangement
from milvus_cdc_replicator.convert import Converter
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.ops import Write
from milvus_cdc_replicator.drift import Reconciler, note_emptied, without_dropped
from milvus_cdc_replicator.flushing import Flushing
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.opening import name_of, named, open_collection
from milvus_cdc_replicator.pacing import Pacer
from milvus_cdc_replicator.renaming import Renaming
from milvus_cdc_replicator.sink_work import SinkWork, Troubles, look_again
from milvus_cdc_replicator.source_properties import SourceProperties
from milvus_cdc_replicator.spec import CollectionAssignment

log = structlog.get_logger()

ADOPTION_MARGIN_MS = 60_000
"""Rows of an adopted collection are no newer than now by the source's clock, which may be ahead."""
AFTER_BREAK_SECONDS = 5.0
ROWS_LEFT_OUT = (
    "rows of the source were read and not written, because the task does not carry `rows`; with it "
    "on again, `milvus-cdc task resync` brings them"
)


class SinkObject:
    """`post` hands an event to the owner of the core, `spawn` runs work beside it, `changed` makes
    the assignment report; `check_log` raises when the log is not there to fill it anew from.
    """

    def __init__(
        self,
        assignment: CollectionAssignment,
        core: AssignmentCore,
        *,
        converter: Converter,
        gate: WriteGate,
        pacer: Pacer,
        halt: asyncio.Event,
        troubles: Troubles,
        check_log: Callable[[], Awaitable[None]],
        post: Callable[[Callable[[], None]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
        letters: Callable[[], Place | None] = lambda: None,
        properties: SourceProperties | None = None,
        reconcile_seconds: float = 300,
    ) -> None:
        """`letters`: where refused rows go now, None where they stop the collection. Without
        `properties` those of the metadata count.
        """
        self._assignment = assignment
        self._core = core
        self._converter = converter
        self._gate = gate
        self._pacer = pacer
        self._letters = letters
        self._halt = halt
        self._troubles = troubles
        self._check_log = check_log
        self._post = post
        self._spawn = spawn
        self._changed = changed
        self.placed = assignment.want
        """`assignment.want` with the name that it has at the sink."""
        self.opened: tuple[int, bool, int] | None = None
        """(sink collection id, adopted, horizon TSO)."""
        self.conditions: dict[str, str] = {}
        self.arrangement = Arrangement(core, pacer, assignment.batching)
        self.late_writes = False
        """As the sink says when it is opened."""
        self.renamed_to: tuple[str, str] | None = None
        self.needs_whole = False
        """Of a part: what it needs to go on is for who has all vchannels to do."""
        self.dropped = False
        self._sink: Sink | None = None
        self._work: SinkWork | None = None
        self._properties = properties
        self._reconcile_seconds = reconcile_seconds
        self._reconciler: Reconciler | None = None
        self._reconciling = False
        self._renaming: Renaming | None = None
        self._flushing: Flushing | None = None
        self._partitions = asyncio.Lock()
        """Held by whoever makes or drops one at the sink."""
        self._dropping = False
        self._log = log.bind(
            task=assignment.task, collection=self.placed.full_name, epoch=assignment.epoch
        )

    def update(self, assignment: CollectionAssignment) -> None:
        self._assignment = assignment
        self.placed = named(assignment.want, name_of(self.placed))
        self.arrangement.update(assignment.batching)

    @property
    def remarks(self) -> dict[str, str]:
        """The conditions, and what holds for the moment."""
        if self._work is None or not self._work.rate_limited or self._halt.is_set():
            return self.conditions
        limits = self.arrangement.limits_text
        text = f"writes wait for the task's limits: {limits} on this replicator"
        return {**self.conditions, "RATE_LIMITED": text} if limits else self.conditions

    @property
    def applied_version(self) -> int:
        return self._reconciler.applied_version if self._reconciler is not None else 0

    @property
    def flushed_ts(self) -> int:
        """Of the newest flush carried out."""
        return self._flushing.flushed_ts if self._flushing is not None else 0

    def compare_soon(self, seconds: float) -> None:
        """The sink is looked at again at the latest in so many seconds."""
        if self._reconciler is not None:
            self._reconciler.soon(seconds)

    @property
    def waits(self) -> bool:
        """Something is still to be done, when its time has come or the source's."""
        assignment = self._assignment
        reconciler = self._reconciler if assignment.compares else None
        return (
            assignment.drop_granted
            or assignment.flush_ts > self.flushed_ts
            or name_of(assignment.want) != name_of(self.placed)
            or (reconciler is not None and reconciler.due(assignment.version))
        )

    def act(self) -> None:
        """Begins what is due."""
        self.arrangement.keep_up()
        if self._core.left_out:
            self.conditions["ROWS_LEFT_OUT"] = ROWS_LEFT_OUT
        whole = not self._assignment.part
        if whole and self._renaming is not None:
            flushing = self._flushing is not None and self._flushing.under_way
            self._renaming.act(busy=self._reconciling or flushing)
        self._maybe_reconcile()
        if whole:
            if self._flushing is not None and not self._dropping:
                self._flushing.act(self._assignment.flush_ts)
            self._maybe_drop()

    async def write(self, write: Write) -> bool:
        """As SinkWork.write."""
        assert self._work is not None
        return await self._work.write(write)

    async def open(self, sink: Sink) -> None:
        """Only with `core.opened` afterwards it is there; else it was told to stop."""
        self._sink = sink
        want = self._assignment.want
        self._work = SinkWork(
            sink,
            sink.target(want),
            self._assignment.sink,
            self._assignment.task,
            converter=self._converter,
            gate=self._gate,
            pacer=self._pacer,
            letters=self._letters,
            table=self._table,
            divisible=lambda: self.arrangement.divisible,
            refused=self._note_refused,
            halt=self._halt,
            troubles=self._troubles,
            restore=self._restore,
            reconnected=lambda: self.compare_soon(random.uniform(0, AFTER_BREAK_SECONDS)),
        )
        self._reconciler = Reconciler(
            sink,
            gate=self._gate,
            halt=self._halt,
            troubles=self._troubles,
            conditions=self.conditions,
            properties=self._properties,
            partitions=self._partitions,
            current=self._wanted,
            every_seconds=self._reconcile_seconds,
            log=self._log,
        )
        self._renaming = Renaming(
            self._core,
            sink,
            self._work,
            assignment=lambda: self._assignment,
            placed=lambda: self.placed,
            halt=self._halt,
            post=self._post,
            spawn=self._spawn,
            renamed=self._renamed,
        )
        self._flushing = Flushing(
            self._core,
            sink,
            self._work,
            placed=lambda: self.placed,
            halt=self._halt,
            conditions=self.conditions,
            post=self._post,
            spawn=self._spawn,
            changed=self._changed,
            log=self._log,
        )
        if self._assignment.drop_granted or self._core.closed:
            # Only the drop is left; the collection may be gone from the sink already.
            self._core.mark_opened(0)
            return
        found = await open_collection(sink, self._work, self._assignment, self._check_log)
        if found is None:
            return
        self.placed, opened = found
        if self._assignment.renamed_from is not None and self.placed is want:
            self.renamed_to = name_of(want)
        self._work.retarget(sink.target(self.placed))
        self._bind()
        existing_until = 0
        if opened.adopted:
            existing_until = ms_to_tso(int(time.time() * 1000) + ADOPTION_MARGIN_MS)
        self.opened = (opened.sink_collection_id, opened.adopted, existing_until)
        self.conditions.update(opened.conditions)
        self.late_writes = opened.late_writes
        applied = self._assignment.applied
        if applied is not None:
            known = {p.name for p in want.partitions if p.partition_id in applied.partition_ids}
            note_emptied(self.conditions, sorted(known.intersection(opened.created_partitions)))
        self.arrangement.begin(opened.writes_in_flight, opened.writer, opened.checkpoints)
        self._core.mark_opened(existing_until)
        self._log.info("collection opened", adopted=opened.adopted)
        self._changed()

    async def heartbeat(self) -> None:
        """Tells the sink how far it is."""
        resolved = min((lane.resolved_ts for lane in self._core.lanes.values()), default=0)
        if resolved and self._sink and self._work and not self._halt.is_set():
            await self._sink.heartbeat(self._work.target, resolved)

    async def release(self) -> None:
        """Nothing is written any more by this owner."""
        if self._sink and self._work and self._core.opened:
            await self._sink.release(self._work.target)

    def _note_refused(self, rows: int) -> None:
        """Told before a checkpoint passes them, as far as it can be."""
        self._core.refused(rows)
        self._changed()

    def _table(self) -> Table:
        assignment = self._assignment
        return table_of(
            self.placed,
            task=assignment.task,
            task_uid=split_assignment_id(assignment.assignment_id)[0],
            source_name=(
                assignment.source_database or self.placed.database,
                assignment.source_collection or self.placed.name,
            ),
        )

    def _bind(self) -> None:
        self._log = self._log.bind(collection=self.placed.full_name)
        self._troubles.bind(self._log)
        if self._reconciler is not None:
            self._reconciler.log = self._log
        if self._flushing is not None:
            self._flushing.log = self._log

    async def create_partition(self, partition_id: int, name: str, ts: int) -> None:
        assert self._sink is not None
        assert self._work is not None
        sink = self._sink

        async def create() -> None:
            async with self._partitions:
                await sink.create_partition(self.placed, name, ts=ts)

        carried = self._assignment.carry.schema
        if not carried or await self._work.ddl(f"create partition {name}", create):
            self._post(lambda: self._core.partition_created(partition_id))

    async def drop_partition(self, partition_id: int, name: str, ts: int) -> None:
        assert self._sink is not None
        assert self._work is not None
        sink = self._sink

        async def drop() -> None:
            async with self._partitions:
                await sink.drop_partition(self.placed, name, ts=ts)

        if not self._assignment.carry.schema:
            self._post(lambda: self._core.partition_dropped(partition_id))
        elif await self._work.ddl(f"drop partition {name}", drop):
            self._log.info("partition dropped", partition=name)
            self._post(lambda: self._core.partition_dropped(partition_id))

    def _maybe_reconcile(self) -> None:
        """What is no row follows once everything older than it is in the sink."""
        if self._reconciling or self._halt.is_set() or not self._core.opened or self._dropping:
            return
        reconciler, want = self._reconciler, self.placed
        if not self._assignment.compares:
            return
        if reconciler is None or self._core.held_back or want.state is ObjectState.DROPPED:
            return
        if not reconciler.due(self._assignment.version):
            return
        resolved = min(lane.resolved_ts for lane in self._core.lanes.values())
        newest = max((index.create_ts for index in want.indexes), default=0)
        if resolved == 0 or max(newest, want.alter_ts) > resolved:
            return  # as a whole, once everything older than the newest of them is in the sink
        self._reconciling = True
        self._spawn(self._reconcile(reconciler))

    async def _reconcile(self, reconciler: Reconciler) -> None:
        said = reconciler.applied_version, dict(self.conditions)
        try:
            await reconciler.run(self._assignment, self._wanted())
        finally:
            self._reconciling = False
            self._post(look_again)
            if said != (reconciler.applied_version, self.conditions):
                self._changed()

    async def _restore(self) -> bool:
        assert self._reconciler is not None
        assignment = self._assignment
        if assignment.part and assignment.carry.schema and assignment.drift is Drift.REPAIR:
            # Whoever has all vchannels next meets it, too, and brings it back.
            self.needs_whole = True
            self._changed()
            await self._halt.wait()
            return True
        return await self._reconciler.restore(self._assignment, self._wanted())

    def _wanted(self) -> Collection:
        """What the sink should have now, under the name that it has there."""
        resolved = min((lane.resolved_ts for lane in self._core.lanes.values()), default=0)
        return without_dropped(self.placed, resolved, self._core.dropped_partitions)

    def _renamed(self, name: tuple[str, str]) -> None:
        """Rows go on, under the name that it has now."""
        assert self._sink is not None
        assert self._work is not None
        before = self.placed.full_name
        self.placed = named(self._assignment.want, name)
        self.renamed_to = name
        self._work.retarget(self._sink.target(self.placed))
        metrics.forget(self._assignment.task, before)
        self._bind()
        self._log.info("renamed at the sink", before=before)
        self._changed()
        self._post(look_again)

    def _maybe_drop(self) -> None:
        if (
            self._dropping
            or (self._renaming is not None and self._renaming.under_way)
            or self._reconciling
            or self._halt.is_set()
            or not self._assignment.drop_granted
            or not self._core.sequencer.idle
        ):
            return
        self._dropping = True
        self._spawn(self._drop())

    async def _drop(self) -> None:
        assert self._sink is not None
        assert self._work is not None
        assignment = self._assignment
        names = {name_of(self.placed), name_of(assignment.want), assignment.renamed_from}
        dropped_ts = max((lane.dropped_ts for lane in self._core.lanes.values()), default=0)
        if not assignment.carry.schema:
            names.clear()  # it stays, and nobody's
        for name in sorted(filter(None, names)):
            drop = partial(
                self._sink.drop_collection,
                named(assignment.want, name),
                sink_collection_id=assignment.sink_collection_id,
                ts=dropped_ts,
            )
            if not await self._work.ddl("drop collection", drop):
                break
        else:
            self.dropped = True
            self._log.info("collection dropped")
            self._changed()
