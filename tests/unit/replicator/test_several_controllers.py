"""A replicator that knows several controllers: it finds one that answers, and gives up one that
does not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from google.protobuf.duration_pb2 import Duration
from milvus_cdc.model import ms_to_tso
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.source.memory import MemorySource
from milvus_cdc_replicator.session import Replicator
from milvus_cdc_replicator.settings import Settings
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc as rpc

from tests.servers.ports import free_port
from tests.unit.replicator.test_runner import START, Connections, running, tick, until


class Controller(rpc.ReplicationServiceServicer):
    """Welcomes, and acknowledges heartbeats while it is not `silent`."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.hellos: list[pb.Hello] = []
        self.port = 0

    async def Connect(
        self,
        request_iterator: AsyncIterator[pb.ConnectRequest],
        context: grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse],
    ) -> AsyncIterator[pb.ConnectResponse]:
        async for request in request_iterator:
            if request.WhichOneof("message") == "hello":
                self.hellos.append(request.hello)
                welcome = pb.Welcome(
                    controller_id="c",
                    lease_ttl=Duration(seconds=1),
                    heartbeat_interval=Duration(nanos=100_000_000),
                    progress_interval=Duration(seconds=1),
                )
                yield pb.ConnectResponse(welcome=welcome)
            elif request.WhichOneof("message") == "heartbeat" and not self.silent:
                ack = pb.HeartbeatAck(seq=request.heartbeat.seq)
                yield pb.ConnectResponse(heartbeat_ack=ack)


@contextlib.asynccontextmanager
async def replicating(*controllers: Controller | None) -> AsyncIterator[Replicator]:
    """None is one that is not there."""
    servers = []
    ports = []
    for controller in controllers:
        if controller is None:
            ports.append(free_port())
            continue
        server = grpc.aio.server()
        rpc.add_ReplicationServiceServicer_to_server(controller, server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    settings = Settings(name="r", controller=tuple(f"127.0.0.1:{port}" for port in ports))
    connections = Connections(MemorySource(), MemorySink())
    replicator = Replicator(settings, "1", connections)  # type: ignore[arg-type]
    run = asyncio.create_task(replicator.run())
    try:
        yield replicator
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await connections.close()
        for server in servers:
            await server.stop(None)


async def test_the_next_one_is_tried_when_one_is_gone() -> None:
    there = Controller()
    async with replicating(None, None, there) as replicator:
        await asyncio.wait_for(replicator.connected.wait(), 20)
        assert len(there.hellos) == 1


async def test_one_that_falls_silent_is_given_up() -> None:
    first, second = Controller(), Controller()
    async with replicating(first, second) as replicator:
        await asyncio.wait_for(replicator.connected.wait(), 20)
        await asyncio.sleep(1.5)
        assert len(first.hellos) == 1, "it answers"
        first.silent = True
        await until(lambda: bool(second.hellos))
        assert second.hellos[0].instance_id == first.hellos[0].instance_id


async def test_horizons_outlast_the_time_without_a_leader() -> None:
    async with running(horizon_ts=START) as bench:
        bench.append(tick(START))
        await until(lambda: bench.runner.report().lanes[0].resolved_ts == START)
        usual = bench.runner.report().lanes[0].wanted_horizon_ts
        bench.runner.outlast(20_000)
        await until(lambda: bench.runner.report().lanes[0].wanted_horizon_ts > usual)
        wanted = bench.runner.report().lanes[0].wanted_horizon_ts
        # Asked for again when half is left, at the latest one report later.
        assert (wanted - START) // 2 - ms_to_tso(3_000) >= ms_to_tso(20_000)
