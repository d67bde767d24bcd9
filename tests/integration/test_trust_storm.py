"""Connections that come and go by the hundred, whole, broken and half-open, beside replicators at
work.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from milvuscdc.v1 import fleet_service_pb2, fleet_service_pb2_grpc, task_service_pb2_grpc
from milvuscdc.v1 import replication_service_pb2 as stream_pb
from milvuscdc.v1 import task_service_pb2 as pb

from tests.integration.connection_storm import HANDSHAKES, REFUSED_EVERY
from tests.integration.controller_harness import FakeReplicator, task_message, until
from tests.integration.trust_world import World
from tests.servers.trust_authority import Issued

GRANTS = [
    {"name": "alice", "roles": ["admin"]},
    {"name": "replicators", "roles": ["replicator"]},
]


async def storm(address: str, issued: Issued) -> dict[str, float]:
    """What the connections met."""
    arguments = (address, issued.ca, issued.certificate, issued.key)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.integration.connection_storm", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    seen: dict[str, float] = json.loads(out)
    return seen


@contextlib.asynccontextmanager
async def seen_by(world: World, address: str, name: str) -> AsyncIterator[Any]:
    credentials = world.authority.issue(name).credentials
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        yield SimpleNamespace(
            channel=channel,
            tasks=task_service_pb2_grpc.TaskServiceStub(channel),
            fleet=fleet_service_pb2_grpc.FleetServiceStub(channel),
        )


@pytest.mark.timeout(180)
async def test_connections_that_come_and_go_stop_no_replication(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(
            world.serving(
                tls=world.server.server,
                auth={"certificates": GRANTS},
                lease={"ttl": 6, "heartbeat": 1, "clockMargin": 0.2, "progress": 0.05},
            )
        )
        alice = await stack.enter_async_context(seen_by(world, address, "alice"))
        workers = await stack.enter_async_context(seen_by(world, address, "replicators"))
        first = await stack.enter_async_context(FakeReplicator(workers, "r1"))
        second = await stack.enter_async_context(FakeReplicator(workers, "r2"))
        both = (first, second)
        await alice.tasks.CreateTask(pb.CreateTaskRequest(task=task_message("copy", ("*.*",))))
        await until(lambda: first.collections() or second.collections())
        owner = first if first.collections() else second
        [assign] = owner.collections().values()
        states: Counter[int] = Counter()

        async def watch() -> None:
            request = fleet_service_pb2.WatchReplicatorsRequest()
            async for event in alice.fleet.WatchReplicators(request):
                if event.HasField("replicator"):
                    states[event.replicator.state] += 1

        resolved = 2_000

        async def report() -> None:
            nonlocal resolved
            place = assign.collection.vchannels[0].vchannel
            while True:
                point = stream_pb.VchannelReport(
                    vchannel=place, resolved_ts=resolved + 1, read_from=b"there"
                )
                seq = await owner.report(assign.assignment_id, vchannels=[point])
                await owner.acked(assign.assignment_id, seq)
                resolved += 1

        beside = [asyncio.create_task(watch()), asyncio.create_task(report())]
        beats = {replicator.name: replicator.beats_acked for replicator in both}
        try:
            seen = await storm(address, world.authority.issue("alice", file="storm"))
            reports = resolved - 2_000
            # New calls on new connections are answered.
            async with seen_by(world, address, "alice") as anew:
                await anew.tasks.ListTasks(pb.ListTasksRequest())
        finally:
            broken = [task for task in beside if task.done()]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        print(
            f"\n{seen}: {seen['handshakes'] / seen['seconds']:.0f} handshakes/s; beside them "
            f"{reports} reports stored and acknowledged, heartbeats acknowledged "
            f"{[r.beats_acked - beats[r.name] for r in both]}"
        )
        assert (seen["handshakes"], seen["refused"]) == (HANDSHAKES, HANDSHAKES // REFUSED_EVERY)
        assert not broken, "reports and watches went on"
        assert reports > 0
        # Both kept their streams and their leases, and the owner what it held.
        assert set(states) == {fleet_service_pb2.REPLICATOR_STATE_ALIVE}
        for replicator in both:
            assert replicator.ended is None
            assert replicator.beats_acked > beats[replicator.name]
            assert set(replicator.history) <= {"assign 1"}, "nothing was revoked or given anew"
        assert owner.collections()["default.books"].epoch == assign.epoch
        answer = await alice.tasks.ListTaskCollections(
            pb.ListTaskCollectionsRequest(parent="tasks/copy")
        )
        assert answer.collections[0].vchannels[0].resolved_ts >= resolved
