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
from functools import partial
from typing import Any

import structlog
from milvus_cdc.dead_letters import Place
from milvus_cdc.errors import BugError, CdcError
from milvus_cdc.model import ObjectState, split_assignment_id
from milvus_cdc.order.lane import Lane
from milvus_cdc.sink.writer_sink import Origin

from milvus_cdc_replicator.alarms import Alarms
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.convert import Converter
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.effects import (
    CreatePartition,
    DropPartition,
    QueryPartition,
    StartWrite,
)
from milvus_cdc_replicator.core.ops import Write
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.intake import Intake
from milvus_cdc_replicator.pacing import Pacer
from milvus_cdc_replicator.recount import Recounting
from milvus_cdc_replicator.report import Report
from milvus_cdc_replicator.reporting import Reporting
from milvus_cdc_replicator.schema import key_field
from milvus_cdc_replicator.settings import Limits
from milvus_cdc_replicator.sink_object import SinkObject
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.source_properties import SourceProperties
from milvus_cdc_replicator.spec import CollectionAssignment

log = structlog.get_logger()


PARTITION_UNKNOWN_SECONDS = 30.0


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
        pacer: Pacer | None = None,
    ) -> None:
        """`pacer`: of the task; without one it has no limits."""
        self.assignment = assignment
        self._connections = connections
        self._notify = notify
        self._query_partition = query_partition
        want = assignment.want
        key = key_field(want.schema)
        self._converter = Converter(key.field_id)
        self._core = AssignmentCore(
            want,
            [
                Lane(
                    lane.vchannel,
                    lane.pchannel,
                    read_from=lane.read_from,
                    resolved_ts=lane.resolved_ts,
                    horizon_ts=lane.horizon_ts,
                    closed=lane.closed,
                    stored_ts=lane.stored_ts,
                )
                for lane in assignment.lanes
            ],
            limits.writes,
            partition_key=key.partition_key,
        )
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner: asyncio.Task[None] | None = None
        self._stopping = False
        self._halt = asyncio.Event()
        self._ended = False
        self._failure: CdcError | None = None
        self._asked_horizons: tuple[int, ...] = ()
        self._told_ts = 0
        self.resting_seconds = 0.0
        self._waiting_since: float | None = None
        self._log = log.bind(
            task=assignment.task, collection=want.full_name, epoch=assignment.epoch
        )
        self._troubles = Troubles(self._log, lambda: notify(assignment.assignment_id))
        intake = partial(
            Intake,
            assignment,
            connections=connections,
            converter=self._converter,
            budget=budget,
            limit_bytes=limits.assignment_bytes,
            troubles=self._troubles,
            post=self._post,
            tick_waits=self._tick_waits,
            fail=self._fail,
            on_room=on_room,
        )
        self._intake = intake(self._core)
        self._object = SinkObject(
            assignment,
            self._core,
            converter=self._converter,
            gate=gate,
            pacer=pacer or Pacer(),
            halt=self._halt,
            troubles=self._troubles,
            check_log=self._intake.check,
            post=self._post,
            spawn=self._spawn,
            changed=lambda: notify(assignment.assignment_id),
            letters=self._letters,
            properties=self._source_properties(),
            reconcile_seconds=limits.reconcile_seconds,
        )
        self._core.carries_rows = assignment.carry.rows
        self._core.part = assignment.part
        self._stood_ts = 0
        self._recounting = Recounting(
            assignment,
            self._core,
            self._object,
            budget=budget,
            gate=gate,
            read=partial(intake, purpose="read for a recount"),
            halt=self._halt,
            named=not key.partition_key,
            post=self._post,
            spawn=self._spawn,
            changed=lambda: notify(assignment.assignment_id),
            log=self._log,
        )
        self._alarms = Alarms(
            self._core,
            intake=self._intake,
            sink_object=self._object,
            chores=self._chores,
            housekeeping=self._housekeeping,
            post=self._post,
            wake=self._wake.set,
        )
        self._reporting = Reporting(
            self._core,
            intake=self._intake,
            sink_object=self._object,
            recounting=self._recounting,
            connections=connections,
        )

    # ---- from outside, all on the loop

    def start(self) -> None:
        self._owner = asyncio.create_task(
            self._run(), name=f"collection {self.assignment.want.full_name}"
        )

    def update(self, assignment: CollectionAssignment) -> None:
        def apply() -> None:
            if assignment.batching != self.assignment.batching:
                self._alarms.linger_anew()
            self.assignment = assignment
            self._object.update(assignment)
            self._core.update(assignment.want)
            self._core.carries_rows = assignment.carry.rows

        self._post(apply)

    def compare_soon(self, seconds: float) -> None:
        """The sink is compared again, rows aside, at the latest in so many seconds."""
        self._object.compare_soon(seconds)

    def _tick_waits(self) -> None:
        self._alarms.tick_waits()

    def _letters(self) -> Place | None:
        wanted = self.assignment.dead_letters
        return None if wanted is None else self._connections.dead_letters(wanted)

    def _source_properties(self) -> SourceProperties | None:
        source = self.assignment.source
        if not source.HasField("milvus"):
            return None
        return SourceProperties(partial(self._connections.source_client, source.milvus))

    def outlast(self, silence_ms: int) -> None:
        """Horizons are to reach so far that rows go on while no controller leads."""
        self._post(lambda: setattr(self._core.horizons, "silence_ms", silence_ms))

    def rest(self, seconds: float) -> None:
        """How often it is reported while nothing happens; horizons are to reach so far."""
        self.resting_seconds = seconds
        self._post(lambda: setattr(self._core.horizons, "rest_ms", int(seconds * 1000)))

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
        self._recounting.leave_past()
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
        return self._reporting.has_news

    def report(self) -> Report:
        self._intake.take_ticks()
        return self._reporting.report(self.assignment, self._state(), failed=self.failed)

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
        with self._connections.using(self.assignment.sink):
            await self._run_connected()

    async def _run_connected(self) -> None:
        try:
            sink = await self._connections.sink(self.assignment.sink, self._origin)
            await self._object.open(sink)
            self._recounting.begin(sink)
            if not self._stopping and self._failure is None:
                self._act()
                await self._intake.open()
            self._alarms.tick_over()
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
            self._recounting.leave_past()
            self._alarms.close()
            while self._tasks:
                await asyncio.wait(self._tasks)
            self._drain()  # what became durable meanwhile is part of the last word
            self._intake.account(final=self._failure is not None)
            self._recounting.close()
            with contextlib.suppress(CdcError):
                await self._object.release()
            self._ended = True
            if self._failure is not None:
                self._notify(self.assignment.assignment_id)

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _drain(self) -> None:
        self._intake.take_ticks()
        while self._inbox:
            self._inbox.popleft()()

    def _act(self) -> None:
        for effect in self._core.step():
            match effect:
                case StartWrite(write):
                    self._spawn(self._write(write))
                case CreatePartition(partition_id, name, ts):
                    self._spawn(self._object.create_partition(partition_id, name, ts))
                case DropPartition(partition_id, name, ts):
                    self._spawn(self._object.drop_partition(partition_id, name, ts))
                case QueryPartition(partition_id):
                    self._waiting_since = self._waiting_since or time.monotonic()
                    self._query_partition(
                        self.assignment.assignment_id, self.assignment.epoch, partition_id
                    )
        if not self._core.waiting_partitions:
            self._waiting_since = None
        self._alarms.mind_lingering()
        self._intake.relieve()
        self._intake.account()
        self._object.act()
        self._recounting.act()
        self._tell_awaited()
        if self._core.stands_ts != self._stood_ts:
            self._stood_ts = self._core.stands_ts
            self._notify(self.assignment.assignment_id)
        if self._core.horizon_blocks():
            wanted = tuple(map(self._core.wanted_horizon, self._core.lanes.values()))
            if wanted != self._asked_horizons:
                self._asked_horizons = wanted
                self._notify(self.assignment.assignment_id)

    def _origin(self) -> Origin:
        assignment = self.assignment
        return Origin(
            assignment.task,
            split_assignment_id(assignment.assignment_id)[0],
            assignment.source_database,
            assignment.source_collection,
            assignment.epoch,
        )

    def _tell_awaited(self) -> None:
        """Who rests reports seldom; what an alias waits for is told at once."""
        awaited_ts = self.assignment.awaited_ts
        if awaited_ts > self._told_ts:
            lanes = self._core.lanes.values()
            if all(lane.closed or lane.resolved_ts >= awaited_ts for lane in lanes):
                self._told_ts = awaited_ts
                self._notify(self.assignment.assignment_id)

    def _chores(self) -> bool:
        want = self.assignment.want
        if self._object.arrangement.heartbeats or self._recounting.waits:
            return True
        return want.state is ObjectState.DROPPED and not self._core.closed

    def _housekeeping(self) -> None:
        want = self.assignment.want
        if want.state is ObjectState.DROPPED and not self._core.closed:
            self._spawn(self._intake.look_for_log_ends())
        if self._object.arrangement.heartbeats:
            self._spawn(self._object.heartbeat())
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
        if await self._object.write(write):
            self._post(lambda: self._settle(write.write_id))

    def _settle(self, write_id: int) -> None:
        write = self._core.write_done(write_id)
        if write.refused:
            self._recounting.refused(write)

    def _fail(self, error: CdcError) -> None:
        if self._failure is None:
            self._log.error("collection failed", reason=error.reason, error=error.message)
            # Its traceback would keep the request alive for as long as the failure stands.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._failure = error
            self._halt.set()
            self._wake.set()
