"""A replicator and the controller's words: what it starts, lets go of, and when it says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from milvus_cdc.errors import UserError
from milvus_cdc.model import ms_to_tso
from milvus_cdc.sink import CollectionTarget, DeleteBatch, RowBatch
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.source.memory import MemorySource
from milvus_cdc_replicator.session import Replicator
from milvus_cdc_replicator.settings import Settings
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc as rpc
from milvuscdc.v1 import task_pb2

from tests.unit.replicator.test_runner import (
    PCHANNEL,
    START,
    VCHANNEL,
    Connections,
    _schema,
    insert,
    tick,
    until,
)

BOOKS = "uid.7"


class FakeController(rpc.ReplicationServiceServicer):
    """Says what a test tells it to, acknowledges heartbeats, keeps everything it hears."""

    def __init__(self) -> None:
        self.heard: list[pb.ConnectRequest] = []
        self.refusal = ""
        self.resting_seconds = 0
        self.streams = 0
        self._out: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()
        self.port = 0

    async def Connect(
        self,
        request_iterator: AsyncIterator[pb.ConnectRequest],
        context: grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse],
    ) -> AsyncIterator[pb.ConnectResponse]:
        out = self._out = asyncio.Queue()
        self.streams += 1
        if self.refusal:
            info = error_details_pb2.ErrorInfo(reason=self.refusal, domain="milvuscdc.io")
            detail = any_pb2.Any()
            detail.Pack(info)
            code = code_pb2.FAILED_PRECONDITION
            status = status_pb2.Status(code=code, message="no", details=[detail])
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no", trailing)
        seconds = Duration(seconds=60)
        out.put_nowait(
            pb.ConnectResponse(
                welcome=pb.Welcome(
                    controller_id="c",
                    lease_ttl=seconds,
                    heartbeat_interval=seconds,
                    progress_interval=Duration(nanos=50_000_000),
                )
            )
        )
        reader = asyncio.create_task(self._read(request_iterator, out))
        try:
            while (message := await out.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.ConnectRequest],
        out: asyncio.Queue[pb.ConnectResponse | None],
    ) -> None:
        with contextlib.suppress(grpc.aio.BaseError, grpc.RpcError):
            async for request in requests:
                self.heard.append(request)
                if request.WhichOneof("message") == "heartbeat":
                    ack = pb.HeartbeatAck(seq=request.heartbeat.seq)
                    if self.resting_seconds:
                        ack.resting_interval.FromSeconds(self.resting_seconds)
                    out.put_nowait(pb.ConnectResponse(heartbeat_ack=ack))

    def say(self, **message: object) -> None:
        self._out.put_nowait(pb.ConnectResponse(**message))  # type: ignore[arg-type]

    def break_stream(self) -> None:
        self._out.put_nowait(None)

    def of(self, kind: str) -> list[pb.ConnectRequest]:
        return [m for m in self.heard if m.WhichOneof("message") == kind]

    def released(self) -> list[int]:
        return [m.released.epoch for m in self.of("released")]


class Bench:
    def __init__(self, controller: FakeController) -> None:
        self.controller = controller
        self.source, self.sink = MemorySource(), MemorySink()
        self.source.create(PCHANNEL)
        self.writing = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.sink.before_write = self._hold
        settings = Settings(name="r", controller=(f"127.0.0.1:{controller.port}",))
        self.connections = Connections(self.source, self.sink)
        self.replicator = Replicator(settings, "1", self.connections)  # type: ignore[arg-type]

    async def _hold(self, _target: CollectionTarget, _batch: RowBatch | DeleteBatch) -> None:
        self.writing.set()
        await self.may_end.wait()

    def assign(self, epoch: int, version: int = 1) -> None:
        self.controller.say(
            assign=pb.Assign(
                assignment_id=BOOKS,
                epoch=epoch,
                version=version,
                task="tasks/t",
                source=task_pb2.Source(nats=task_pb2.NatsQueue(url="nats://127.0.0.1:1")),
                sink=task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")),
                collection=pb.CollectionSpec(
                    database="default",
                    collection="c",
                    collection_id=7,
                    schema=_schema(),
                    shards=1,
                    opened=self.writing.is_set(),
                    sink_collection_id=int(self.writing.is_set()),
                    create_ts=START,
                    state=pb.CollectionSpec.STATE_CREATED,
                    partitions=[
                        pb.PartitionSpec(
                            partition_id=70,
                            name="_default",
                            create_ts=START,
                            state=pb.PartitionSpec.STATE_CREATED,
                        )
                    ],
                    vchannels=[
                        pb.VchannelSpec(
                            vchannel=VCHANNEL,
                            pchannel=PCHANNEL,
                            read_from=bytes(8),
                            horizon_ts=ms_to_tso(10**9),
                        )
                    ],
                ),
            )
        )

    def revoke(self, epoch: int) -> None:
        self.controller.say(revoke=pb.Revoke(assignment_id=BOOKS, epoch=epoch, reason="TEST"))

    async def write_in_flight(self) -> None:
        """Epoch 1 runs, and a request of it does not come back."""
        self.may_end.clear()
        self.assign(1)
        self.source.append(PCHANNEL, insert(START + 5, [1, 2]))
        self.source.append(PCHANNEL, tick(START + 9))
        await asyncio.wait_for(self.writing.wait(), 10)

    async def heartbeats_answered(self) -> None:
        """What was said before has been taken by now."""
        await asyncio.sleep(0.3)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    server = grpc.aio.server()
    controller = FakeController()
    rpc.add_ReplicationServiceServicer_to_server(controller, server)
    controller.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    bench = Bench(controller)
    run = asyncio.create_task(bench.replicator.run())
    try:
        await asyncio.wait_for(bench.replicator.connected.wait(), 10)
        yield bench
    finally:
        bench.may_end.set()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await bench.connections.close()
        await server.stop(None)


async def test_limits_bound_the_task_until_a_new_stream_does_not_tell_them() -> None:
    async with running() as bench:

        def tell(rows: int) -> None:
            limits = task_pb2.Limits(rows_per_second=rows)
            bench.controller.say(task_limits=pb.TaskLimits(task_uid="uid", limits=limits))

        def count() -> int:
            return bench.sink.count("default", "c")

        def limited() -> bool:
            return any(
                condition.type == "RATE_LIMITED"
                for message in bench.controller.of("progress")[-1:]
                for condition in message.progress.conditions
            )

        tell(1)
        bench.assign(1)
        bench.controller.say(synced=pb.Synced())
        for n in range(1, 201):
            bench.source.append(PCHANNEL, insert(START + n, [n]))
        bench.source.append(PCHANNEL, tick(START + 200))
        await until(limited)
        assert count() < 100
        bench.controller.break_stream()
        await until(lambda: bench.controller.streams == 2)
        await until(limited)
        assert count() < 100, "who cannot be heard keeps what was said"
        bench.controller.say(synced=pb.Synced())
        await until(lambda: count() == 200)


async def test_a_stop_answers_no_revoke_before_the_last_request_has_ended() -> None:
    """The controller learns of the stop by a heartbeat and revokes what it already lets go of."""
    async with running() as bench:
        await bench.write_in_flight()
        draining = asyncio.create_task(bench.replicator.drain())
        await until(lambda: any(m.heartbeat.draining for m in bench.controller.heard))
        bench.revoke(1)
        await bench.heartbeats_answered()
        assert bench.controller.released() == [], "a request is still on its way"
        bench.may_end.set()
        await until(lambda: bench.controller.released() != [])
        assert bench.sink.count("default", "c") == 2
        last = bench.controller.of("progress")[-1].progress
        assert last.vchannels[0].resolved_ts == START + 9, "its last word counts"
        await draining


async def test_a_revoke_said_twice_is_answered_only_when_nothing_runs() -> None:
    """As after a stream that broke in between."""
    async with running() as bench:
        await bench.write_in_flight()
        bench.revoke(1)
        await bench.heartbeats_answered()
        bench.controller.break_stream()
        await until(lambda: bench.controller.streams == 2)
        bench.revoke(1)
        await bench.heartbeats_answered()
        assert bench.controller.released() == []
        bench.may_end.set()
        await until(lambda: bench.controller.released() != [])


async def test_what_was_let_go_does_not_run_again_under_the_same_epoch() -> None:
    """A controller that has restarted meanwhile does not know of its revoke."""
    async with running() as bench:
        await bench.write_in_flight()
        bench.revoke(1)
        await bench.heartbeats_answered()
        bench.controller.break_stream()
        await until(lambda: bench.controller.streams == 2)
        bench.assign(1)
        await bench.heartbeats_answered()
        bench.may_end.set()
        await until(lambda: bench.controller.released() != [])
        written = len(bench.sink.writes)
        bench.source.append(PCHANNEL, insert(START + 15, [3]))
        bench.source.append(PCHANNEL, tick(START + 19))
        await bench.heartbeats_answered()
        assert len(bench.sink.writes) == written, "nobody may write under a released epoch"
        bench.assign(2)
        await until(lambda: bench.sink.count("default", "c") >= 3)


async def test_a_new_epoch_starts_when_the_old_one_has_ended() -> None:
    async with running() as bench:
        await bench.write_in_flight()
        bench.assign(2)
        bench.assign(3)
        bench.revoke(3)
        bench.assign(4)
        await bench.heartbeats_answered()
        assert bench.controller.released() == []
        assert len(bench.controller.of("ack")) >= 3
        bench.may_end.set()
        await until(lambda: len(bench.controller.released()) == 1)
        await until(lambda: bench.controller.of("progress")[-1].progress.epoch == 4)


async def test_an_assignment_for_a_stopping_replicator_is_refused_after_its_last_request() -> None:
    async with running() as bench:
        await bench.write_in_flight()
        draining = asyncio.create_task(bench.replicator.drain())
        await asyncio.sleep(0)
        bench.assign(1, version=2)
        await bench.heartbeats_answered()
        assert bench.controller.of("nack") == []
        bench.may_end.set()
        await until(lambda: bench.controller.of("nack") != [])
        assert bench.controller.of("nack")[0].nack.reason == "DRAINING"
        await draining


async def test_a_stop_goes_on_writing_until_what_it_holds_is_taken_back() -> None:
    async with running() as bench:
        bench.assign(1)
        await until(lambda: bench.controller.of("ack") != [])
        draining = asyncio.create_task(bench.replicator.drain(60.0))
        await until(lambda: any(m.heartbeat.draining for m in bench.controller.of("heartbeat")))
        bench.assign(1, version=2)
        await until(lambda: any(m.ack.version == 2 for m in bench.controller.of("ack")))
        bench.source.append(PCHANNEL, insert(START + 5, [1, 2]))
        bench.source.append(PCHANNEL, tick(START + 9))
        await until(lambda: bench.sink.count("default", "c") == 2)
        assert not draining.done()
        bench.revoke(1)
        await asyncio.wait_for(draining, 10)
        assert bench.controller.released() == [1]
        assert bench.controller.of("nack") == []


async def test_a_stop_does_not_wait_for_a_controller_that_is_gone() -> None:
    async with running() as bench:
        await bench.write_in_flight()
        bench.may_end.set()
        draining = asyncio.create_task(bench.replicator.drain(60.0))
        await bench.heartbeats_answered()
        bench.controller.break_stream()
        await asyncio.wait_for(draining, 10)
        assert not bench.replicator.holds_anything


@pytest.mark.parametrize("resting_seconds", [0, 60])
async def test_an_assignment_at_rest_reports_as_seldom_as_it_is_asked_to(
    resting_seconds: int,
) -> None:
    async with running() as bench:
        bench.controller.resting_seconds = resting_seconds
        bench.replicator._heartbeat()
        bench.assign(1)
        bench.source.append(PCHANNEL, insert(START + 5, [1]))
        bench.source.append(PCHANNEL, tick(START + 9))
        await asyncio.wait_for(bench.writing.wait(), 10)
        await asyncio.sleep(1)  # what that was news of is told
        told = len(bench.controller.of("progress"))
        await asyncio.sleep(3)
        assert (len(bench.controller.of("progress")) > told) == (not resting_seconds)
        # What happens is told at once.
        bench.source.append(PCHANNEL, insert(START + 15, [2]))
        bench.source.append(PCHANNEL, tick(START + 19))
        await until(lambda: bench.controller.of("progress")[-1].progress.rows_upserted == 2)


async def test_nothing_is_said_into_a_stream_that_has_ended() -> None:
    """gRPC goes on asking for messages of a stream that the other side has refused."""
    async with running() as bench:
        bench.controller.refusal = "CLUSTER_MISMATCH"
        bench.controller.break_stream()
        await until(lambda: bench.controller.streams == 5)
        bench.controller.refusal = ""
        heartbeats = len(bench.controller.of("heartbeat"))
        await asyncio.wait_for(bench.replicator.connected.wait(), 10)
        await until(lambda: len(bench.controller.of("heartbeat")) > heartbeats)
        asked = [f"job {n}" for n in range(8)]
        for job_id in asked:
            bench.controller.say(job_request=pb.JobRequest(job_id=job_id))
            await bench.heartbeats_answered()
        answered = [m.job_update.job_id for m in bench.controller.of("job_update")]
        assert answered == asked


async def test_streams_are_counted_and_a_twin_ends_by_itself() -> None:
    async with running() as bench:
        bench.controller.break_stream()
        await until(lambda: bench.controller.streams == 2)
        await until(lambda: len(bench.controller.of("hello")) == 2)
        counted = [m.hello.connects for m in bench.controller.of("hello")]
        assert counted == [1, 2]
    controller = FakeController()
    controller.refusal = "INSTANCE_IN_USE"
    server = grpc.aio.server()
    rpc.add_ReplicationServiceServicer_to_server(controller, server)
    controller.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    bench = Bench(controller)
    try:
        with pytest.raises(UserError) as raised:
            await asyncio.wait_for(bench.replicator.run(), 20)
        assert raised.value.reason == "INSTANCE_IN_USE"
        controller.refusal = "CLUSTER_MISMATCH"
        waiting = asyncio.create_task(Bench(controller).replicator.run())
        await until(lambda: controller.streams >= 3)
        assert not waiting.done(), "the controller may be the one to be mended"
        waiting.cancel()
    finally:
        await bench.connections.close()
        await server.stop(None)
