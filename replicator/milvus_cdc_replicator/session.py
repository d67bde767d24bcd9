"""The stream to the controller: hello, assignments in, progress out, heartbeats; and again after
every break.

Laws: a lost stream stops nothing, only the end of the lease stops writing. What is sent is the
newest state, so the outbox holds at most one Progress per assignment. Starting and letting go of
one assignment happen one after the other; Released is said when nothing of it runs any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial

import grpc
import structlog
from milvus_cdc.control import api_error
from milvus_cdc.errors import UserError
from milvus_cdc.model import RateLimits, split_assignment_id
from milvus_cdc.trust.dialing import Credentials
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc as pb_grpc

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.holdings import Holdings, Verdict
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.gate import WriteGate, boottime
from milvus_cdc_replicator.jobs import JobRunner
from milvus_cdc_replicator.metadata import MetadataRunner
from milvus_cdc_replicator.pacing import Pacers
from milvus_cdc_replicator.report import to_progress
from milvus_cdc_replicator.retention import RetentionWatch
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.settings import MIB, Settings
from milvus_cdc_replicator.spec import (
    Assignment,
    CollectionAssignment,
    MetadataAssignment,
    from_assign,
)

log = structlog.get_logger()

PROTOCOL = 1
HOUSEKEEPING_SECONDS = 0.2
PATIENCE = 0.7
"""Part of the grace period for it: the rest is for letting go without the controller's help."""
AFTER_BREAK_SECONDS = 10.0
"""Sinks are compared again within it: who was away may have missed something."""
RESTING_SECONDS = 3.0
"""Where nothing happens, a checkpoint may be this much older; the controller may ask for more."""
RECONNECT_SECONDS = (0.1, 0.3, 1.0)
REFUSED_SECONDS = 5.0
"""Before it is tried again by one whose credential was refused: a person has to mend that."""
WELCOME_SECONDS = 5.0
SILENT_PART = 0.6
"""Of the lease: a controller that has acknowledged nothing for so long is given up, so that another
one is found before the lease ends.
"""
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * MIB),
    ("grpc.max_send_message_length", 64 * MIB),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what one attempt may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

Runner = CollectionRunner | MetadataRunner


class Replicator:
    """Everything one process runs. `run()` until `drain()`."""

    def __init__(
        self,
        settings: Settings,
        version: str,
        connections: Connections,
        *,
        dial: Callable[[str], grpc.aio.Channel] | None = None,
    ) -> None:
        """`dial` opens a channel to the controller's address, instead of one with the settings'
        credentials. Raises UserError for files of theirs that cannot be used.
        """
        self._credentials = Credentials(
            tls=settings.controller_tls,
            token_from=settings.controller_token,
            insecure=settings.insecure,
            prefix="controller",
        )
        self._dial = dial or partial(self._credentials.channel, options=CHANNEL_OPTIONS)
        self._settings = settings
        self._version = version
        self._connections = connections
        self._limits = settings.limits()
        self._budget = Budget(settings.memory_mib * MIB)
        self._lease = Lease()
        self._gate = WriteGate(self._lease, settings.writes.in_flight_per_sink)
        self._pacers = Pacers()
        self._holdings = Holdings()
        self._runners: dict[str, Runner] = {}
        self._instance_id = str(uuid.uuid4())
        self._connects = 0
        self._wanted: dict[str, Assignment] = {}
        self._jobs = JobRunner(connections, self._send)
        self._retention = RetentionWatch(connections)
        self._outbox: deque[pb.ConnectRequest] = deque()
        self._outbox_ready = asyncio.Event()
        self._flushed = asyncio.Event()
        self._due: set[str] = set()
        self._progress_seq = 0
        self._reported_at: dict[str, float] = {}
        self._heartbeat_seq = 0
        self._heartbeat_seconds = 3.0
        self._progress_seconds = 1.0
        self._patience = WELCOME_SECONDS
        self._silence_ms = 0
        self._resting_seconds = RESTING_SECONDS
        self._dialled = 0
        self._draining = False
        self._closing = False
        self._turns: dict[str, asyncio.Task[None]] = {}
        """The last start or release of each assignment that is still under way."""
        self._fewer = asyncio.Event()
        """Something was taken back, or the stream was lost."""
        self.connected = asyncio.Event()

    @property
    def holds_anything(self) -> bool:
        return bool(self._holdings.all())

    async def run(self) -> None:
        """Connects, serves, reconnects; returns after `drain()`."""
        attempt = 0
        housekeeping = asyncio.create_task(self._housekeeping())
        try:
            while not self._closing:
                refused = False
                try:
                    await self._serve()
                    attempt = 0
                except grpc.aio.AioRpcError as error:
                    if self._closing:
                        break
                    if self.connected.is_set():
                        attempt = 0
                    self._say_lost(error)
                    self._dialled += 1
                    refused = error.code() in _REFUSED
                finally:
                    self.connected.clear()
                    self._fewer.set()
                    metrics.CONNECTED.set(0)
                if not self._closing:
                    delay = RECONNECT_SECONDS[min(attempt, len(RECONNECT_SECONDS) - 1)]
                    if refused:
                        delay = REFUSED_SECONDS
                    attempt += 1
                    await asyncio.sleep(delay * (0.5 + random.random()))
        finally:
            housekeeping.cancel()
            await self._jobs.close()
            await self._retention.close()
            for runner in list(self._runners.values()):
                await runner.stop()

    def _say_lost(self, error: grpc.aio.AioRpcError) -> None:
        """Raises UserError where connecting anew would do harm."""
        refusal = api_error(error)
        if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, *_REFUSED):
            log.error(
                "the controller refuses this replicator",
                controller=self._address,
                reason=refusal.reason,
                message=refusal.message,
            )
            if refusal.reason == "INSTANCE_IN_USE":
                raise UserError(refusal.reason, refusal.message)
            return
        log.warning(
            "stream to the controller lost"
            if self.connected.is_set()
            else "controller not reachable",
            controller=self._address,
            code=error.code().name,
            detail=error.details(),
        )

    async def drain(self, patience_seconds: float = 0.0) -> None:
        """Hands over: the controller takes back a few at a time while the rest runs on. What is
        left after `patience_seconds` is let go at once; then the stream ends.
        """
        self._draining = True
        self._heartbeat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while self.holds_anything and self.connected.is_set():
                    self._fewer.clear()
                    await self._fewer.wait()
        for assignment_id, held in self._holdings.all().items():
            self._let_go(assignment_id, held.epoch)
        while self._turns:
            await asyncio.wait(self._turns.values())
        if self.connected.is_set():
            self._flushed.clear()
            self._outbox_ready.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._flushed.wait(), 2.0)
            await asyncio.sleep(0.2)  # let the last messages leave the transport
        self._closing = True
        self._outbox_ready.set()

    # ---- one stream

    @property
    def _address(self) -> str:
        """The controller whose turn it is; the next one's after a failure."""
        addresses = self._settings.controller
        return addresses[self._dialled % len(addresses)]

    async def _serve(self) -> None:
        async with self._dial(self._address) as channel:
            stub = pb_grpc.ReplicationServiceStub(channel)
            self._outbox.clear()
            self._patience = WELCOME_SECONDS
            self._connects += 1
            call = stub.Connect(
                self._requests(self._connects), metadata=self._credentials.metadata()
            )
            responses = aiter(call)
            try:
                while True:
                    async with asyncio.timeout(self._patience):
                        response = await anext(responses)
                    self._receive(response)
                    if self._closing:
                        call.cancel()
                        return
            except StopAsyncIteration:
                failure = "the controller ended the stream"
            except TimeoutError:
                failure = f"the controller was silent for {self._patience:g} s"
            if self._closing:
                return
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details=failure,
            )

    async def _requests(self, stream: int) -> AsyncIterator[pb.ConnectRequest]:
        hello = pb.Hello(
            name=self._settings.name,
            instance_id=self._instance_id,
            version=self._version,
            protocol_max=PROTOCOL,
            protocol_min=PROTOCOL,
            capacity=self._settings.capacity,
            cluster=self._settings.cluster,
            connects=stream,
            labels=self._settings.labels,
            held=[
                pb.HeldAssignment(assignment_id=a, epoch=h.epoch, version=h.version)
                for a, h in self._holdings.all().items()
            ],
        )
        yield pb.ConnectRequest(hello=hello)
        # gRPC still waits here for the next message of a stream that the other side has ended: it
        # would take that one from its successor, and lose it.
        while stream == self._connects:
            if (message := self._next_request()) is not None:
                yield message
                continue
            if self._closing:
                return
            self._outbox_ready.clear()
            self._flushed.set()
            await self._outbox_ready.wait()

    def _next_request(self) -> pb.ConnectRequest | None:
        if self._outbox:
            return self._outbox.popleft()
        while self._due and self.connected.is_set():
            runner = self._runners.get(self._due.pop())
            if runner is not None:
                return pb.ConnectRequest(progress=self._progress(runner))
        return None

    def _progress(self, runner: Runner) -> pb.Progress:
        self._progress_seq += 1
        self._reported_at[runner.assignment.assignment_id] = time.monotonic()
        progress = to_progress(runner.report(), self._progress_seq)
        if isinstance(runner, MetadataRunner):
            runner.reported(self._progress_seq)
        self._retention.add(progress, runner.assignment)
        return progress

    def _send(self, message: pb.ConnectRequest) -> None:
        self._outbox.append(message)
        self._outbox_ready.set()

    def _notify(self, assignment_id: str) -> None:
        """This assignment has something to say before its turn."""
        self._due.add(assignment_id)
        self._outbox_ready.set()

    def _receive(self, response: pb.ConnectResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self._welcome(response.welcome)
            case "assign":
                self._assign(response.assign)
            case "revoke":
                self._revoke(response.revoke)
            case "heartbeat_ack":
                self._patience = max(SILENT_PART * self._lease.ttl, 2 * self._heartbeat_seconds + 1)
                self._lease.heartbeat_acked(response.heartbeat_ack.seq)
                if response.heartbeat_ack.HasField("resting_interval"):
                    self._rest(response.heartbeat_ack.resting_interval.ToTimedelta())
                self._gate.renewed()
            case "progress_ack":
                ack = response.progress_ack
                runner = self._runners.get(ack.assignment_id)
                if runner is None or runner.assignment.epoch != ack.epoch:
                    return
                if isinstance(runner, MetadataRunner):
                    runner.acked(ack.seq)
                elif ack.horizons:
                    runner.grant([(h.vchannel, h.horizon_ts) for h in ack.horizons])
            case "job_request":
                self._jobs.start(response.job_request)
            case "job_cancel":
                self._jobs.cancel(response.job_cancel.job_id)
            case "task_limits":
                limits = response.task_limits.limits
                self._pacers.tell(
                    response.task_limits.task_uid,
                    RateLimits(limits.rows_per_second, limits.bytes_per_second),
                )
            case "synced":
                self._pacers.synced()
            case _:
                pass  # what a newer controller may say

    def _welcome(self, welcome: pb.Welcome) -> None:
        log.info("connected to the controller", controller_id=welcome.controller_id)
        self._pacers.connected()
        self._lease.configure(welcome.lease_ttl.ToTimedelta().total_seconds())
        self._patience = max(WELCOME_SECONDS, self._lease.ttl)
        self._silence_ms = welcome.silence.ToMilliseconds()
        self._heartbeat_seconds = welcome.heartbeat_interval.ToTimedelta().total_seconds()
        self._progress_seconds = welcome.progress_interval.ToTimedelta().total_seconds()
        self.connected.set()
        metrics.CONNECTED.set(1)
        self._heartbeat()
        self._due.update(self._runners)
        self._outbox_ready.set()
        for runner in self._runners.values():
            if isinstance(runner, CollectionRunner):
                runner.outlast(self._silence_ms)
                runner.compare_soon(random.uniform(0, AFTER_BREAK_SECONDS))

    def _rest(self, interval: timedelta) -> None:
        seconds = max(RESTING_SECONDS, interval.total_seconds())
        if seconds != self._resting_seconds:
            self._resting_seconds = seconds
            for runner in self._runners.values():
                runner.rest(seconds)

    def _heartbeat(self) -> None:
        self._heartbeat_seq += 1
        self._lease.heartbeat_sent(self._heartbeat_seq, boottime())
        self._send(
            pb.ConnectRequest(
                heartbeat=pb.Heartbeat(seq=self._heartbeat_seq, draining=self._draining)
            )
        )

    async def _housekeeping(self) -> None:
        """Heartbeats and progress by the clock."""
        loop = asyncio.get_running_loop()
        next_heartbeat = next_progress = loop.time()
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            now = loop.time()
            if self.connected.is_set():
                if now >= next_heartbeat:
                    next_heartbeat = max(next_heartbeat + self._heartbeat_seconds, now)
                    self._heartbeat()
                if now >= next_progress:
                    next_progress = max(next_progress + self._progress_seconds, now)
                    self._report_news()
            metrics.QUEUE_BYTES.set(self._budget.held)
            metrics.LEASE_SECONDS.set(self._lease.remaining(boottime()))
            metrics.ASSIGNMENTS.set(len(self._runners))
            self._connections.wake_readers()

    def _report_news(self) -> None:
        now = time.monotonic()
        due, resting = [], []
        for assignment_id, runner in self._runners.items():
            age = now - self._reported_at.get(assignment_id, 0)
            if runner.has_news:
                due.append(assignment_id)
            elif age >= runner.resting_seconds / 2:
                resting.append((age, assignment_id))
        # So many a round that all have their turn in time, and not all of them at once.
        turns = math.ceil(len(self._runners) * self._progress_seconds / self._resting_seconds)
        due += [assignment_id for _, assignment_id in sorted(resting, reverse=True)[:turns]]
        if due:
            self._due.update(due)
            self._outbox_ready.set()

    # ---- assignments

    def _assign(self, message: pb.Assign) -> None:
        ids = (message.assignment_id, message.epoch, message.version)
        try:
            assignment = from_assign(message)
        except ValueError as error:
            log.error("assignment refused", assignment_id=message.assignment_id, error=str(error))
            self._send(_nack(ids, "UNSUPPORTED_ASSIGNMENT", str(error)))
            return
        assignment_id, epoch, version = ids
        if self._draining and not self._holdings.holds(assignment_id, epoch):
            nack = _nack(ids, "DRAINING", "this replicator is stopping")
            self._in_turn(assignment_id, partial(self._say, nack))
            return
        verdict = self._holdings.assign(*ids)
        match verdict:
            case Verdict.STALE:
                return
            case Verdict.SPENT:
                self._in_turn(assignment_id, partial(self._say, _released(assignment_id, epoch)))
                return
            case Verdict.UPDATE:
                self._update(assignment_id, assignment)
            case Verdict.START | Verdict.REPLACE:
                self._in_turn(assignment_id, partial(self._start, assignment_id))
        self._wanted[assignment_id] = assignment
        self._send(
            pb.ConnectRequest(ack=pb.Ack(assignment_id=assignment_id, epoch=epoch, version=version))
        )

    def _update(self, assignment_id: str, assignment: Assignment) -> None:
        """For what runs; a start that waits for its turn takes the newest by itself."""
        runner = self._runners.get(assignment_id)
        if runner is None or runner.assignment.epoch != assignment.epoch:
            return
        if isinstance(runner, CollectionRunner) and isinstance(assignment, CollectionAssignment):
            runner.update(assignment)
        elif isinstance(runner, MetadataRunner) and isinstance(assignment, MetadataAssignment):
            runner.update(assignment)

    def _in_turn(self, assignment_id: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` when all that was begun before for this assignment has ended."""
        before = self._turns.get(assignment_id)

        async def turn() -> None:
            if before is not None:
                await asyncio.wait({before})
            try:
                await work()
            except Exception:
                log.exception("unexpected failure", assignment_id=assignment_id)

        def forget(task: asyncio.Task[None]) -> None:
            if self._turns.get(assignment_id) is task:
                del self._turns[assignment_id]

        task = asyncio.create_task(turn(), name=f"turn of {assignment_id}")
        self._turns[assignment_id] = task
        task.add_done_callback(forget)

    async def _say(self, message: pb.ConnectRequest) -> None:
        self._send(message)

    async def _start(self, assignment_id: str) -> None:
        old = self._runners.get(assignment_id)
        held = self._holdings.all().get(assignment_id)
        if old is not None and held is not None and old.assignment.epoch == held.epoch:
            return  # an earlier turn took this word already
        if old is not None:
            del self._runners[assignment_id]
            await old.stop()
            held = self._holdings.all().get(assignment_id)
        if held is None:
            return  # revoked meanwhile: its release has the next turn
        assignment = self._wanted[assignment_id]
        runner: Runner
        if isinstance(assignment, CollectionAssignment):
            runner = CollectionRunner(
                assignment,
                connections=self._connections,
                gate=self._gate,
                budget=self._budget,
                limits=self._limits,
                notify=self._notify,
                query_partition=self._query_partition,
                on_room=self._connections.wake_readers,
                pacer=self._pacers.of(split_assignment_id(assignment_id)[0]),
            )
            runner.outlast(self._silence_ms)
        else:
            runner = MetadataRunner(
                assignment,
                connections=self._connections,
                gate=self._gate,
                notify=self._notify,
                reconcile_seconds=self._settings.reconcile_seconds,
            )
        runner.rest(self._resting_seconds)
        self._runners[assignment_id] = runner
        runner.start()

    def _revoke(self, message: pb.Revoke) -> None:
        log.info(
            "revoked",
            assignment_id=message.assignment_id,
            epoch=message.epoch,
            reason=message.reason,
        )
        self._let_go(message.assignment_id, message.epoch)

    def _let_go(self, assignment_id: str, epoch: int) -> None:
        self._holdings.revoke(assignment_id, epoch)
        self._fewer.set()
        self._in_turn(assignment_id, partial(self._release, assignment_id, epoch))

    async def _release(self, assignment_id: str, epoch: int) -> None:
        """Stops it, tells the final checkpoint, lets go."""
        runner = self._runners.get(assignment_id)
        if runner is not None and runner.assignment.epoch <= epoch:
            del self._runners[assignment_id]
            await runner.stop()
            self._due.discard(assignment_id)
            self._send(pb.ConnectRequest(progress=self._progress(runner)))
            del self._reported_at[assignment_id]
            self._retention.drop(runner.assignment)
            self._pacers.forget({split_assignment_id(each)[0] for each in self._runners})
        self._send(_released(assignment_id, epoch))

    def _query_partition(self, assignment_id: str, epoch: int, partition_id: int) -> None:
        self._send(
            pb.ConnectRequest(
                partition_query=pb.PartitionQuery(
                    assignment_id=assignment_id, epoch=epoch, partition_id=partition_id
                )
            )
        )


def _released(assignment_id: str, epoch: int) -> pb.ConnectRequest:
    return pb.ConnectRequest(released=pb.Released(assignment_id=assignment_id, epoch=epoch))


def _nack(ids: tuple[str, int, int], reason: str, message: str) -> pb.ConnectRequest:
    assignment_id, epoch, version = ids
    return pb.ConnectRequest(
        nack=pb.Nack(
            assignment_id=assignment_id,
            epoch=epoch,
            version=version,
            reason=reason,
            message=message,
        )
    )


async def run_until(replicator: Replicator, stop: asyncio.Event, shutdown_seconds: float) -> None:
    """Runs until `stop`, then drains within the grace period."""
    running = asyncio.create_task(replicator.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        log.info("draining")
        with contextlib.suppress(TimeoutError):
            patience = PATIENCE * shutdown_seconds
            await asyncio.wait_for(replicator.drain(patience), shutdown_seconds)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    else:
        stopping.cancel()
        await running
