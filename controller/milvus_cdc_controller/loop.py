"""The shell around the core: one task steps it, another stores and sends what it decided.

Laws: events wait in one bounded queue; nothing decided is sent before everything decided with or
before it is stored; while the store does not answer, only heartbeats are acknowledged, so that
replicators work on with what they hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from milvus_cdc.errors import CdcError, RetryableError

from milvus_cdc_controller import clock
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.core.jobs import JobFailed, JobPayload, JobResult
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.journal import Journal
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.store import Store
from milvus_cdc_controller.store.records import encode

log = structlog.get_logger(__name__)

QUEUE_MAX = 10_000
TICK_SECONDS = 0.5
PROGRESS_WINDOW_SECONDS = 0.05
"""Checkpoints alone wait this long for others, so that one disk flush serves them all."""
ENCODED_AT_ONCE = 200
"""Records, before others get their turn: heartbeats, and the renewal of the leader's lease."""
RETRY_SECONDS_MAX = 5.0
OUTCOMES_MAX = 1_000
"""Events of one job that its caller has not yet taken."""

_TOO_SLOW = JobFailed("CALLER_TOO_SLOW", "The caller did not read the answers in time.")


MakeEvent = Callable[[ev.Instant], ev.Event]
_Waiting = tuple[bool, int, MakeEvent]
"""False for who is hurried; the number under which it came, which no other has."""


class Outward(Protocol):
    """Where effects go that are neither stored nor answers to a call."""

    def send(self, stream: int, message: fx.StreamMessage) -> None: ...

    def close_stream(self, effect: fx.CloseStream) -> None: ...

    def publish(self, effect: fx.Publish) -> None: ...

    def source(
        self, effect: fx.OpenSource | fx.CloseSource | fx.RefreshSource | fx.ReadPartition
    ) -> None: ...


class Refused(Exception):
    """The core said no."""

    def __init__(self, refusal: fx.Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(slots=True)
class _Pending:
    """What has been decided and not yet stored, and what leaves after it."""

    writes: dict[str, fx.Save | fx.Forget] = field(default_factory=dict)
    sends: list[fx.Effect] = field(default_factory=list)
    urgent: bool = False

    def add(self, decided: list[fx.Effect]) -> None:
        for effect in decided:
            match effect:
                case fx.Save(key=key) | fx.Forget(key=key):
                    self.writes.pop(key, None)
                    self.writes[key] = effect
                    self.urgent = self.urgent or not key.startswith("checkpoints/")
                case _:
                    self.sends.append(effect)
                    self.urgent = self.urgent or not (
                        isinstance(effect, fx.Send) and isinstance(effect.message, fx.ProgressAck)
                    )


class ControlLoop:
    """Owns the core. Everything else posts events, calls commands, or reads the world between
    steps.
    """

    def __init__(self, controller: Controller, store: Store, metrics: Metrics) -> None:
        self.controller = controller
        self._store = store
        self._outward: Outward
        self._metrics = metrics
        self._journal = Journal(metrics)
        self._queue: asyncio.PriorityQueue[_Waiting] = asyncio.PriorityQueue(QUEUE_MAX)
        self._posted = 0
        self._pending = _Pending()
        self._wake = asyncio.Event()
        self._calls: dict[int, asyncio.Future[TaskRecord | None]] = {}
        self._last_call = 0
        self._jobs: dict[str, asyncio.Queue[tuple[JobResult, bool]]] = {}
        self._jobs_begun = 0
        self._ended: CdcError | None = None
        self.store_error = ""
        """What is wrong with the store; empty while it answers."""

    async def run(self, outward: Outward) -> None:
        """Ends only by cancellation, or by LeadershipLost or a bug, which must end the reign."""
        self._outward = outward
        self._take(ev.Started(clock.now()))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._step_events())
            group.create_task(self._tick())
            group.create_task(self._store_and_send())

    def end(self, error: CdcError) -> None:
        """Nothing is taken any more; whoever waits for an answer is told the error."""
        self._ended = error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        for job_id in self._jobs:
            self._cut_short(job_id, JobFailed(error.reason, error.message, transient=True))
        while not self._queue.empty():  # room for those who wait to put something
            self._queue.get_nowait()

    def check(self) -> None:
        """For who waits for something to change in the world. Raises what the loop was ended
        with.
        """
        if self._ended is not None:
            raise self._ended

    async def post(self, make: MakeEvent, *, hurried: bool = False) -> None:
        """Waits while the queue is full. `make` gets the time at which the event is taken; who is
        hurried goes before all others.
        """
        if self._ended is None:
            await self._queue.put(self._waiting(make, hurried))

    async def beat(self, stream: int, make: MakeEvent) -> None:
        """A heartbeat: nobody is to fall silent because much else is to be done. It must not come
        before the Hello of its stream.
        """
        await self.post(make, hurried=stream in self.controller.world.streams)

    def _waiting(self, make: MakeEvent, hurried: bool) -> _Waiting:
        self._posted += 1
        return not hurried, self._posted, make

    async def call(self, make: Callable[[ev.Instant, int], ev.Command]) -> TaskRecord | None:
        """A command and its answer, given once it is stored. Raises Refused, and what the loop was
        ended with.
        """
        self.check()
        self._last_call += 1
        number = self._last_call
        future: asyncio.Future[TaskRecord | None] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            await self.post(lambda at: make(at, number))
            return await future
        finally:
            self._calls.pop(number, None)

    async def begin_job(self, payload: JobPayload, labels: tuple[tuple[str, str], ...] = ()) -> str:
        """Gives a job to a replicator with all `labels`; `next_of_job` brings what it says."""
        self.check()
        self._jobs_begun += 1
        job_id = f"call/{self._store.incarnation}/{self._jobs_begun}"
        self._jobs[job_id] = asyncio.Queue(OUTCOMES_MAX)
        await self.post(lambda at: ev.JobAsked(at, job_id, payload, labels))
        return job_id

    async def next_of_job(self, job_id: str) -> tuple[JobResult, bool]:
        """The next thing said, and whether it is the last."""
        return await self._jobs[job_id].get()

    async def end_job(self, job_id: str) -> None:
        """Forgets the job, and has it stopped when it still runs."""
        if self._jobs.pop(job_id, None) is not None:
            await self.post(lambda at: ev.JobCancelled(at, job_id))

    async def drain(self, seconds: float) -> None:
        """Waits until what has happened is stored, at most so long: what was reported counts."""
        self._last_call += 1
        stored: asyncio.Future[TaskRecord | None] = asyncio.get_running_loop().create_future()
        self._calls[self._last_call] = stored
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._queue.join()
                self._pending.add([fx.Reply(self._last_call)])
                self._wake.set()
                await stored

    # The task that owns the core.

    async def _step_events(self) -> None:
        while True:
            _, _, make = await self._queue.get()
            self._take(make(clock.now()))
            self._queue.task_done()
            if self.controller.unfinished and self._queue.empty():
                # Rather than at the next tick: by now what came meanwhile has been seen to.
                self._queue.put_nowait(self._waiting(ev.Ticked, False))
                await asyncio.sleep(0)
            # A burst must not keep the writer and the streams waiting.
            elif self._queue.qsize() % 64 == 0:
                await asyncio.sleep(0)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.post(ev.Ticked)

    def _take(self, event: ev.Event) -> None:
        decided = self.controller.step(event)
        self._journal.note(decided, self.controller.world)
        if isinstance(event, ev.Heartbeat):
            # Needs no store: `send` holds it back where the session is not yet synced.
            acks = [e for e in decided if _is_heartbeat_ack(e)]
            for effect in acks if self._store.certain else ():
                assert isinstance(effect, fx.Send)
                self._outward.send(effect.stream, effect.message)
            decided = [e for e in decided if not _is_heartbeat_ack(e)]
        if decided:
            self._pending.add(decided)
            self._wake.set()

    # The task that stores and sends.

    async def _store_and_send(self) -> None:
        while True:
            await self._wake.wait()
            if not self._pending.urgent:
                await asyncio.sleep(PROGRESS_WINDOW_SECONDS)
            self._wake.clear()
            batch, self._pending = self._pending, _Pending()
            if batch.writes:
                writes: dict[str, bytes | None] = {}
                for key, effect in batch.writes.items():
                    writes[key] = encode(effect.record) if isinstance(effect, fx.Save) else None
                    if len(writes) % ENCODED_AT_ONCE == 0:
                        await asyncio.sleep(0)
                await self._commit(writes)
            elif not self._store.certain:
                # A commit would have been refused: what was decided here may not hold any more.
                raise await self._store.lost()
            for following in batch.sends:
                self._let_out(following)

    async def _commit(self, writes: dict[str, bytes | None]) -> None:
        delay = 0.1
        while True:
            try:
                with self._metrics.store_write_seconds.time():
                    await self._store.commit(writes)
            except RetryableError as error:
                if not self.store_error:
                    log.warning("store does not answer", reason=error.reason, error=error.message)
                self.store_error = error.message
                self._metrics.errors.labels(
                    error_class=error.error_class, reason=error.reason
                ).inc()
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_SECONDS_MAX)
            else:
                if self.store_error:
                    log.info("store answers again")
                self.store_error = ""
                return

    def _let_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Send(stream=stream, message=message):
                self._outward.send(stream, message)
            case fx.CloseStream():
                self._outward.close_stream(effect)
            case fx.Reply(call=number, task=task, refusal=refusal):
                future = self._calls.get(number)
                if future is None or future.done():
                    return
                if refusal is not None:
                    future.set_exception(Refused(refusal))
                else:
                    future.set_result(task)
            case fx.Publish():
                self._outward.publish(effect)
            case fx.JobOutput(job_id=job_id, result=result, last=last):
                self._hand_out(job_id, result, last)
            case fx.OpenSource() | fx.CloseSource() | fx.RefreshSource() | fx.ReadPartition():
                self._outward.source(effect)
            case fx.Save() | fx.Forget():
                raise AssertionError("stored before")

    def _hand_out(self, job_id: str, result: JobResult, last: bool) -> None:
        queue = self._jobs.get(job_id)
        if queue is None:
            return
        try:
            queue.put_nowait((result, last))
        except asyncio.QueueFull:
            # Its caller does not read: the stream must not wait for it, so the job ends.
            log.warning("caller of a job is too slow", job=job_id)
            self._cut_short(job_id, _TOO_SLOW)

    def _cut_short(self, job_id: str, why: JobFailed) -> None:
        queue = self._jobs[job_id]
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait((why, True))


def _is_heartbeat_ack(effect: fx.Effect) -> bool:
    return isinstance(effect, fx.Send) and isinstance(effect.message, fx.HeartbeatAck)
