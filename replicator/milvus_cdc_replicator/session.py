"""The stream to the controller: hello, assignments in, progress out, heartbeats; and again after
every break.

Law: a lost stream stops nothing, only the end of the lease stops writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import structlog
from milvus_cdc.control.refusal import api_error
from milvus_cdc.errors import UserError
from milvus_cdc.model import RateLimits, split_assignment_id
from milvus_cdc.trust.dialing import Credentials
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc as pb_grpc

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.assigned import Assigned
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.gate import WriteGate, boottime
from milvus_cdc_replicator.jobs import JobRunner
from milvus_cdc_replicator.metadata import MetadataRunner
from milvus_cdc_replicator.outbox import Outbox
from milvus_cdc_replicator.pacing import Pacers
from milvus_cdc_replicator.retention import RetentionWatch
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.settings import MIB, Settings
from milvus_cdc_replicator.spec import CollectionAssignment, MetadataAssignment
from milvus_cdc_replicator.telling import Telling

log = structlog.get_logger()

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
HOUSEKEEPING_SECONDS = 0.2
PATIENCE = 0.7
"""Part of the grace period for it: the rest is for letting go without the controller's help."""
RECONNECT_SECONDS = (0.1, 0.3, 1.0)
REFUSED_SECONDS = 5.0
"""Before it is tried again by one whose credential was refused: a person has to mend that."""
WELCOME_SECONDS = 5.0
FLUSH_SECONDS = 2.0
"""For the last messages."""
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
        self._instance_id = str(uuid.uuid4())
        self.connected = asyncio.Event()
        self._outbox = Outbox(self.connected, self._progress)
        self._jobs = JobRunner(connections, self._outbox.send)
        self._retention = RetentionWatch(connections)
        self._telling = Telling(self._retention)
        self._assigned = Assigned(
            self._outbox,
            self._telling,
            self._pacers,
            collection=self._collection,
            metadata=self._metadata,
        )
        self._heartbeat_seq = 0
        self._heartbeat_seconds = 3.0
        self._progress_seconds = 1.0
        self._patience = WELCOME_SECONDS
        self._dialled = 0
        self._closing = False

    @property
    def holds_anything(self) -> bool:
        return bool(self._assigned.holdings.all())

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
                    self._assigned.fewer.set()
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
            await self._assigned.stop()

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
        self._assigned.draining = True
        self._heartbeat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while self.holds_anything and self.connected.is_set():
                    self._assigned.fewer.clear()
                    await self._assigned.fewer.wait()
        await self._assigned.let_go_of_all()
        if self.connected.is_set():
            await self._outbox.flush(FLUSH_SECONDS)
            await asyncio.sleep(0.2)  # let the last messages leave the transport
        self._closing = True
        self._outbox.close()

    # ---- one stream

    @property
    def _address(self) -> str:
        """The controller whose turn it is; the next one's after a failure."""
        addresses = self._settings.controller
        return addresses[self._dialled % len(addresses)]

    async def _serve(self) -> None:
        async with self._dial(self._address) as channel:
            stub = pb_grpc.ReplicationServiceStub(channel)
            self._patience = WELCOME_SECONDS
            call = stub.Connect(
                self._requests(self._outbox.begin()), metadata=self._credentials.metadata()
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
            protocol_max=PROTOCOL_MAX,
            protocol_min=PROTOCOL_MIN,
            capacity=self._settings.capacity,
            cluster=self._settings.cluster,
            connects=stream,
            labels=self._settings.labels,
            takes_parts=True,
            held=[
                pb.HeldAssignment(assignment_id=a, epoch=h.epoch, version=h.version)
                for a, h in self._assigned.holdings.all().items()
            ],
        )
        yield pb.ConnectRequest(hello=hello)
        while (message := await self._outbox.next(stream)) is not None:
            yield message

    def _receive(self, response: pb.ConnectResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self._welcome(response.welcome)
            case "assign":
                self._assigned.assign(response.assign)
            case "revoke":
                self._assigned.revoke(response.revoke)
            case "heartbeat_ack":
                self._patience = max(SILENT_PART * self._lease.ttl, 2 * self._heartbeat_seconds + 1)
                self._lease.heartbeat_acked(response.heartbeat_ack.seq)
                if response.heartbeat_ack.HasField("resting_interval"):
                    self._assigned.rest(response.heartbeat_ack.resting_interval.ToTimedelta())
                self._gate.renewed()
            case "progress_ack":
                self._assigned.acked(response.progress_ack)
            case "job_request":
                self._jobs.start(response.job_request)
            case "job_cancel":
                self._jobs.cancel(response.job_cancel.job_id)
            case "task_limits":
                limits = response.task_limits.limits
                self._pacers.tell(
                    response.task_limits.task_uid,
                    RateLimits(
                        limits.rows_per_second, limits.bytes_per_second, limits.requests_in_flight
                    ),
                )
            case "synced":
                self._pacers.synced()
            case _:
                pass  # what a newer controller may say

    def _welcome(self, welcome: pb.Welcome) -> None:
        log.info(
            "connected to the controller",
            controller_id=welcome.controller_id,
            protocol=welcome.protocol,
        )
        self._pacers.connected()
        self._lease.configure(welcome.lease_ttl.ToTimedelta().total_seconds())
        self._patience = max(WELCOME_SECONDS, self._lease.ttl)
        self._heartbeat_seconds = welcome.heartbeat_interval.ToTimedelta().total_seconds()
        self._progress_seconds = welcome.progress_interval.ToTimedelta().total_seconds()
        self.connected.set()
        metrics.CONNECTED.set(1)
        self._heartbeat()
        self._outbox.tell(self._assigned.runners)
        self._assigned.connected(welcome.silence.ToMilliseconds())

    def _heartbeat(self) -> None:
        self._heartbeat_seq += 1
        self._lease.heartbeat_sent(self._heartbeat_seq, boottime())
        self._outbox.send(
            pb.ConnectRequest(
                heartbeat=pb.Heartbeat(seq=self._heartbeat_seq, draining=self._assigned.draining)
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
                    due = self._telling.due(
                        self._assigned.runners,
                        every_seconds=self._progress_seconds,
                        resting_seconds=self._assigned.resting_seconds,
                    )
                    if due:
                        self._outbox.tell(due)
            metrics.QUEUE_BYTES.set(self._budget.held)
            metrics.LEASE_SECONDS.set(self._lease.remaining(boottime()))
            metrics.ASSIGNMENTS.set(len(self._assigned.runners))
            self._connections.wake_readers()

    # ---- for the assignments

    def _collection(self, assignment: CollectionAssignment) -> CollectionRunner:
        return CollectionRunner(
            assignment,
            connections=self._connections,
            gate=self._gate,
            budget=self._budget,
            limits=self._limits,
            notify=self._notify,
            query_partition=self._query_partition,
            on_room=self._connections.wake_readers,
            pacer=self._pacers.of(split_assignment_id(assignment.assignment_id)[0]),
        )

    def _metadata(self, assignment: MetadataAssignment) -> MetadataRunner:
        return MetadataRunner(
            assignment,
            connections=self._connections,
            gate=self._gate,
            notify=self._notify,
            reconcile_seconds=self._settings.reconcile_seconds,
        )

    def _notify(self, assignment_id: str) -> None:
        """This assignment has something to say before its turn."""
        self._outbox.tell((assignment_id,))

    def _query_partition(self, assignment_id: str, epoch: int, partition_id: int) -> None:
        self._outbox.send(
            pb.ConnectRequest(
                partition_query=pb.PartitionQuery(
                    assignment_id=assignment_id, epoch=epoch, partition_id=partition_id
                )
            )
        )

    def _progress(self, assignment_id: str) -> pb.Progress | None:
        runner = self._assigned.runners.get(assignment_id)
        return self._telling.progress(runner) if runner is not None else None


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
