"""Runs one collection assignment: feeds its core from the log, carries out what the core decides,
tells how far it is.

Laws: one task owns the core, everything reaches it through the inbox. Nothing is written without
the lease. A write whose outcome is unknown is repeated as an upsert. A failure that only a person
can mend stops this collection and no other, after everything in flight has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from milvus_cdc.errors import BugError, CdcError, UserError
from milvus_cdc.model import Collection, ObjectState, ms_to_tso, tso_to_ms
from milvus_cdc.sink import Opened, Sink, reconcile

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.convert import Converter
from milvus_cdc_replicator.core import assignment as core
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.lane import Lane
from milvus_cdc_replicator.core.ops import Write
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.intake import Intake
from milvus_cdc_replicator.report import LaneReport, Report
from milvus_cdc_replicator.schema import key_field
from milvus_cdc_replicator.settings import Limits
from milvus_cdc_replicator.sink_work import SinkWork, Troubles
from milvus_cdc_replicator.spec import CollectionAssignment

log = structlog.get_logger()

HOUSEKEEPING_SECONDS = 1.0
REST_SECONDS = 0.5
PARTITION_UNKNOWN_SECONDS = 30.0
ADOPTION_MARGIN_MS = 60_000
"""Rows of an adopted collection are no newer than now by the source's clock, which may be ahead."""


RENAME_AGAIN_SECONDS = 2.0
_NOT_THERE = frozenset(
    {"SINK_COLLECTION_MISSING", "SINK_COLLECTION_REPLACED", "SINK_NAME_IS_ALIAS"}
)


def _name(want: Collection) -> tuple[str, str]:
    return want.database, want.name


def _named(want: Collection, name: tuple[str, str]) -> Collection:
    return want if _name(want) == name else replace(want, database=name[0], name=name[1])


class CollectionRunner:
    """Start with `start()`, end with `stop()`; in between `update`, `grant`, and `report` when
    asked.
    """

    def __init__(
        self,
        assignment: CollectionAssignment,
        *,
        connections: Connections,
        gate: WriteGate,
        budget: Budget,
        limits: Limits,
        notify: Callable[[str], None],
        query_partition: Callable[[str, int, int], None],
        on_room: Callable[[], None],
    ) -> None:
        self.assignment = assignment
        self._connections = connections
        self._gate = gate
        self._notify = notify
        self._query_partition = query_partition
        want = assignment.want
        key = key_field(want.schema)
        self._converter = Converter(key.field_id)
        self._core = core.AssignmentCore(
            want,
            [
                Lane(
                    lane.vchannel,
                    lane.pchannel,
                    read_from=lane.read_from,
                    resolved_ts=lane.resolved_ts,
                    horizon_ts=lane.horizon_ts,
                    closed=lane.closed,
                )
                for lane in assignment.lanes
            ],
            limits.writes,
            partition_key=key.partition_key,
        )
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner: asyncio.Task[None] | None = None
        self._sink: Sink | None = None
        self._work: SinkWork | None = None
        self._stopping = False
        self._halt = asyncio.Event()
        self._ended = False
        self._failure: CdcError | None = None
        self._opened: tuple[int, bool, int] | None = None
        self._conditions: dict[str, str] = {}
        self._dropped = False
        self._asked_horizons: tuple[int, ...] = ()
        self._said: object = None
        self._waiting_since: float | None = None
        self._placed = want
        """`assignment.want` with the name that it has at the sink."""
        self._renamed_to: tuple[str, str] | None = None
        self._renaming = False
        self._rename_after = 0.0
        self._reconciled: object = None
        self._reconciling = False
        self._dropping = False
        self._log = log.bind(
            task=assignment.task, collection=want.full_name, epoch=assignment.epoch
        )
        self._troubles = Troubles(self._log, lambda: notify(assignment.assignment_id))
        self._intake = Intake(
            assignment,
            self._core,
            connections=connections,
            converter=self._converter,
            budget=budget,
            limit_bytes=limits.assignment_bytes,
            troubles=self._troubles,
            post=self._post,
            post_later=self._post_later,
            fail=self._fail,
            on_room=on_room,
        )

    # ---- from outside, all on the loop

    def start(self) -> None:
        self._owner = asyncio.create_task(
            self._run(), name=f"collection {self.assignment.want.full_name}"
        )

    def update(self, assignment: CollectionAssignment) -> None:
        def apply() -> None:
            self.assignment = assignment
            self._placed = _named(assignment.want, _name(self._placed))
            self._core.update(assignment.want)

        self._post(apply)

    def grant(self, horizons: list[tuple[str, int]]) -> None:
        def apply() -> None:
            for vchannel, horizon_ts in horizons:
                self._core.grant(vchannel, horizon_ts)

        self._post(apply)

    async def stop(self) -> None:
        """Reading ends at once, requests in flight come to their end; then nothing of it runs
        any more.
        """
        self._stopping = True
        self._halt.set()
        self._intake.close()
        self._wake.set()
        if self._owner is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._owner
        self._intake.account(final=True)

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def has_news(self) -> bool:
        """More has happened since the last report than that source time went on."""
        return not self._core.resting or self._said != self._gist()

    def _gist(self) -> object:
        lanes = self._core.lanes.values()
        return self._core.resting, replace(self._core.counters), [lane.closed for lane in lanes]

    def report(self) -> Report:
        self._said = self._gist()
        state, reason, message = self._state()
        lanes = tuple(
            LaneReport(
                lane.vchannel,
                lane.read_from,
                lane.resolved_ts,
                lane.closed,
                0 if self.failed else self._core.wanted_horizon(lane),
                self._intake.incarnation(lane.vchannel),
            )
            for lane in self._core.lanes.values()
        )
        labels = (self.assignment.task, self._placed.full_name)
        resolved = min((lane.resolved_ts for lane in lanes if not lane.closed), default=0)
        lag_ms = self._lag_ms()
        if lag_ms >= 0:
            metrics.LAG_SECONDS.labels(*labels).set(lag_ms / 1000)
        if resolved:
            metrics.CHECKPOINT_AGE.labels(*labels).set(tso_to_ms(resolved) / 1000)
        return Report(
            assignment_id=self.assignment.assignment_id,
            epoch=self.assignment.epoch,
            state=state,
            reason=reason,
            message=message,
            lanes=lanes,
            counters=replace(self._core.counters),
            lag_ms=lag_ms,
            conditions=tuple(sorted(self._conditions.items())),
            opened=self._opened,
            dropped=self._dropped,
            renamed_to=self._renamed_to,
        )

    def _lag_ms(self) -> int:
        lags = []
        for lane in self._core.lanes.values():
            if lane.closed:
                continue
            if lane.resolved_ts == 0 or lane.released_ts == 0:
                return -1
            lags.append(tso_to_ms(lane.released_ts) - tso_to_ms(lane.resolved_ts))
        return max(lags, default=0)

    def _state(self) -> tuple[str, str, str]:
        if self._failure is not None:
            # FAILED promises that nothing is in flight any more.
            state = "FAILED" if self._ended else "RETRYING"
            return state, self._failure.reason, self._failure.message
        if (trouble := self._troubles.first) is not None:
            return "RETRYING", trouble.reason, trouble.message
        waiting = self._core.waiting_partitions
        if waiting and self._waiting_since is not None:
            waited = time.monotonic() - self._waiting_since
            if waited > PARTITION_UNKNOWN_SECONDS:
                return (
                    "RETRYING",
                    "PARTITION_UNKNOWN",
                    f"rows wait for partitions {sorted(waiting)}, "
                    "which the source's metadata does not show",
                )
        return "RUNNING", "", ""

    # ---- the owner

    async def _run(self) -> None:
        try:
            await self._open()
            if not self._stopping and self._failure is None:
                await self._intake.open()
            self._tick_over()
            while not self._stopping and self._failure is None:
                await self._wake.wait()
                self._wake.clear()
                self._drain()
                self._act()
        except CdcError as error:
            self._fail(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._log.exception("assignment failed unexpectedly")
            self._fail(BugError("REPLICATOR_BUG", f"{type(error).__name__}: {error}"))
        finally:
            self._intake.close()
            if self._timer is not None:
                self._timer.cancel()
            if self._resting is not None:
                self._resting.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
            self._drain()  # what became durable meanwhile is part of the last word
            self._intake.account(final=self._failure is not None)
            self._ended = True
            if self._failure is not None:
                self._notify(self.assignment.assignment_id)

    async def _open(self) -> None:
        self._sink = sink = await self._connections.sink(self.assignment.sink)
        want = self.assignment.want
        self._work = SinkWork(
            sink,
            sink.target(want),
            self.assignment.sink,
            self.assignment.task,
            converter=self._converter,
            gate=self._gate,
            halt=self._halt,
            troubles=self._troubles,
        )
        if self.assignment.drop_granted or self._core.closed:
            # Only the drop is left; the collection may be gone from the sink already.
            self._core.mark_opened(0)
            self._act()
            return
        renamed_from = self.assignment.renamed_from
        places = [want]
        if renamed_from is not None and not self.assignment.recreate:
            # An owner before may have renamed it without living to say so.
            places.append(_named(want, renamed_from))
        answers: list[Opened] = []

        async def open_collection() -> None:
            if self.assignment.recreate:
                await self._intake.check()
                if renamed_from is not None:
                    old = _named(want, renamed_from)
                    await sink.drop_collection(old, sink_collection_id=0)
            await sink.ensure_database(want.database)
            for place in places:
                try:
                    opened = await self._open_at(sink, place)
                except UserError as error:
                    if error.reason not in _NOT_THERE or place is places[-1]:
                        raise
                else:
                    self._placed = place
                    answers.append(opened)
                    return

        if not await self._work.ddl("open", open_collection):
            return
        opened = answers[-1]
        if renamed_from is not None and self._placed is want:
            self._renamed_to = _name(want)
        self._work.retarget(sink.target(self._placed))
        self._bind()
        existing_until = 0
        if opened.adopted:
            existing_until = ms_to_tso(int(time.time() * 1000) + ADOPTION_MARGIN_MS)
        self._opened = (opened.sink_collection_id, opened.adopted, existing_until)
        self._conditions.update(opened.conditions)
        if opened.writes_in_flight:
            self._core.sequencer.limit_in_flight(opened.writes_in_flight)
        self._core.mark_opened(existing_until)
        self._log.info("collection opened", adopted=opened.adopted)
        self._notify(self.assignment.assignment_id)

    async def _open_at(self, sink: Sink, place: Collection) -> Opened:
        return await sink.open_collection(
            place,
            opened=self.assignment.opened,
            adopt=self.assignment.adopt_existing,
            recreate=self.assignment.recreate,
            sink_collection_id=self.assignment.sink_collection_id,
        )

    def _bind(self) -> None:
        self._log = self._log.bind(collection=self._placed.full_name)
        self._troubles.bind(self._log)

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _post_later(self, event: Callable[[], None]) -> None:
        """In its turn, but soon is enough: many quiet collections otherwise wake for every tick."""
        self._inbox.append(event)
        if self._resting is None:
            self._resting = asyncio.get_running_loop().call_later(REST_SECONDS, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._wake.set()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _act(self) -> None:
        for effect in self._core.step():
            match effect:
                case core.StartWrite(write):
                    self._spawn(self._write(write))
                case core.CreatePartition(partition_id, name):
                    self._spawn(self._create_partition(partition_id, name))
                case core.DropPartition(partition_id, name):
                    self._spawn(self._drop_partition(partition_id, name))
                case core.QueryPartition(partition_id):
                    self._waiting_since = self._waiting_since or time.monotonic()
                    self._query_partition(
                        self.assignment.assignment_id, self.assignment.epoch, partition_id
                    )
        if not self._core.waiting_partitions:
            self._waiting_since = None
        self._intake.relieve()
        self._intake.account()
        self._maybe_rename()
        self._maybe_reconcile()
        self._maybe_drop()
        if self._core.horizon_blocks():
            wanted = tuple(map(self._core.wanted_horizon, self._core.lanes.values()))
            if wanted != self._asked_horizons:
                self._asked_horizons = wanted
                self._notify(self.assignment.assignment_id)

    def _tick_over(self) -> None:
        """A timer of its own: a timeout around every wait costs more than what is waited for."""
        if self._timer is not None:
            self._post(self._housekeeping)
        self._timer = asyncio.get_running_loop().call_later(HOUSEKEEPING_SECONDS, self._tick_over)

    def _housekeeping(self) -> None:
        want = self.assignment.want
        if want.state is ObjectState.DROPPED and not self._core.closed:
            self._spawn(self._intake.look_for_log_ends())
        for partition_id in self._core.waiting_partitions:
            self._query_partition(
                self.assignment.assignment_id, self.assignment.epoch, partition_id
            )

    # ---- effects

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except CdcError as error:
            self._fail(error)
        except Exception as error:
            self._log.exception("unexpected failure")
            self._fail(BugError("REPLICATOR_BUG", f"{type(error).__name__}: {error}"))

    async def _write(self, write: Write) -> None:
        assert self._work is not None
        if await self._work.write(write):
            self._post(lambda: self._settle(write.write_id))

    def _settle(self, write_id: int) -> None:
        self._core.write_done(write_id)

    async def _create_partition(self, partition_id: int, name: str) -> None:
        assert self._sink is not None
        assert self._work is not None
        create = partial(self._sink.create_partition, self._placed, name)
        if await self._work.ddl(f"create partition {name}", create):
            self._post(lambda: self._core.partition_created(partition_id))

    async def _drop_partition(self, partition_id: int, name: str) -> None:
        assert self._sink is not None
        assert self._work is not None
        drop = partial(self._sink.drop_partition, self._placed, name)
        if await self._work.ddl(f"drop partition {name}", drop):
            self._log.info("partition dropped", partition=name)
            self._post(lambda: self._core.partition_dropped(partition_id))

    def _maybe_reconcile(self) -> None:
        """Indexes and load state follow once everything older than they is in the sink."""
        if self._reconciling or self._stopping or not self._core.opened or self._dropping:
            return
        if self._core.held_back:
            return
        want = self._placed
        if want is self._reconciled or want.state is ObjectState.DROPPED:
            return
        resolved = min(lane.resolved_ts for lane in self._core.lanes.values())
        if resolved == 0 or want == self._reconciled:
            return
        if any(index.create_ts > resolved for index in want.indexes):
            return  # as a whole, once everything older than the newest of them is in the sink
        self._reconciling = True
        self._spawn(self._reconcile(want))

    async def _reconcile(self, want: Collection) -> None:
        assert self._sink is not None
        assert self._work is not None
        try:
            if await self._work.ddl("reconcile indexes and load state", partial(self._mend, want)):
                self._reconciled = want
        finally:
            self._reconciling = False
            self._wake.set()

    async def _mend(self, want: Collection) -> None:
        assert self._sink is not None
        await reconcile(self._sink, want)

    def _maybe_rename(self) -> None:
        """Once everything older than the rename is in the sink, and nothing is under way there."""
        want = self.assignment.want
        if _name(want) == _name(self._placed) or self._renaming or self._stopping:
            return
        if not self._core.opened or self._core.closed or want.state is ObjectState.DROPPED:
            self._core.held_back = False
            return
        lanes = self._core.lanes.values()
        late = any(
            not lane.closed and lane.resolved_ts < self.assignment.rename_ts for lane in lanes
        )
        if late or time.monotonic() < self._rename_after:
            return
        self._core.held_back = True
        if self._core.at_rest and not self._reconciling:
            self._renaming = True
            self._spawn(self._rename(want))

    async def _rename(self, want: Collection) -> None:
        assert self._sink is not None
        assert self._work is not None
        done = False
        try:
            done = await self._work.attempt("rename", partial(self._rename_at, self._sink, want))
        finally:
            self._post(partial(self._rename_tried, want, done))

    async def _rename_at(self, sink: Sink, want: Collection) -> None:
        await sink.ensure_database(want.database)
        await sink.rename_collection(
            want,
            renamed_from=_name(self._placed),
            sink_collection_id=self.assignment.sink_collection_id,
        )

    def _rename_tried(self, want: Collection, done: bool) -> None:
        """Rows go on, under whichever name it has now."""
        self._renaming = self._core.held_back = False
        if not done:
            self._rename_after = time.monotonic() + RENAME_AGAIN_SECONDS
            return
        assert self._sink is not None
        assert self._work is not None
        before = self._placed.full_name
        self._placed = _named(self.assignment.want, _name(want))
        self._renamed_to = _name(want)
        self._work.retarget(self._sink.target(self._placed))
        metrics.forget(self.assignment.task, before)
        self._bind()
        self._log.info("renamed at the sink", before=before)
        self._notify(self.assignment.assignment_id)
        self._wake.set()

    def _maybe_drop(self) -> None:
        if (
            self._dropping
            or self._renaming
            or self._reconciling
            or self._stopping
            or not self.assignment.drop_granted
            or not self._core.sequencer.idle
        ):
            return
        self._dropping = True
        self._spawn(self._drop())

    async def _drop(self) -> None:
        assert self._sink is not None
        assert self._work is not None
        assignment = self.assignment
        names = {_name(self._placed), _name(assignment.want), assignment.renamed_from}
        for name in sorted(filter(None, names)):
            drop = partial(
                self._sink.drop_collection,
                _named(assignment.want, name),
                sink_collection_id=assignment.sink_collection_id,
            )
            if not await self._work.ddl("drop collection", drop):
                break
        else:
            self._dropped = True
            self._log.info("collection dropped")
            self._notify(self.assignment.assignment_id)

    def _fail(self, error: CdcError) -> None:
        if self._failure is None:
            self._log.error("collection failed", reason=error.reason, error=error.message)
            # Its traceback would keep the request alive for as long as the failure stands.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._failure = error
            self._halt.set()
            self._wake.set()
