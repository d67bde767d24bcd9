"""FleetService: which replicators there are, what they hold, and moving it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from milvuscdc.v1 import fleet_service_pb2 as pb
from milvuscdc.v1 import fleet_service_pb2_grpc as rpc
from milvuscdc.v1 import hold_pb2

from milvus_cdc_controller import clock
from milvus_cdc_controller.api_errors import ApiError, streaming, unary
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.moves import plan_by_hand
from milvus_cdc_controller.holds import delete_hold, list_holds
from milvus_cdc_controller.pages import page
from milvus_cdc_controller.present_fleet import (
    assignment_message,
    listed_grants,
    plan_message,
    replicator_messages,
)
from milvus_cdc_controller.validation import check

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

WATCH_SECONDS = 0.25
"""Between two looks for a watcher: states change by time, too, not only by events."""


class FleetService(rpc.FleetServiceServicer):
    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends every watch."""
        self._closed.set()

    @unary
    async def ListReplicators(
        self, request: pb.ListReplicatorsRequest
    ) -> pb.ListReplicatorsResponse:
        check(request)
        shown, token = page(
            self._replicators(),
            lambda r: f"{r.name} {r.instance_id}",
            request.page_size,
            request.page_token,
        )
        return pb.ListReplicatorsResponse(replicators=shown, next_page_token=token)

    @unary
    async def GetReplicator(self, request: pb.GetReplicatorRequest) -> pb.GetReplicatorResponse:
        check(request)
        return pb.GetReplicatorResponse(replicator=self._newest(request.name))

    @streaming
    async def WatchReplicators(
        self, request: pb.WatchReplicatorsRequest
    ) -> AsyncIterator[pb.WatchReplicatorsResponse]:
        check(request)
        told: dict[str, tuple[bytes, pb.Replicator]] = {}
        begun = False
        while True:
            there = {
                f"{r.name} {r.instance_id}": r
                for r in self._replicators()
                if request.name in ("", r.name)
            }
            for key, replicator in there.items():
                face = _face(replicator)
                if key not in told or told[key][0] != face:
                    kind = (
                        pb.WatchReplicatorsResponse.TYPE_MODIFIED
                        if key in told
                        else pb.WatchReplicatorsResponse.TYPE_ADDED
                    )
                    yield pb.WatchReplicatorsResponse(type=kind, replicator=replicator)
                told[key] = face, replicator
            for key in told.keys() - there.keys():
                kind = pb.WatchReplicatorsResponse.TYPE_DELETED
                yield pb.WatchReplicatorsResponse(type=kind, replicator=told.pop(key)[1])
            if not begun:
                begun = True
                yield pb.WatchReplicatorsResponse(type=pb.WatchReplicatorsResponse.TYPE_BOOKMARK)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._closed.wait()
                raise ApiError("UNAVAILABLE", "WATCH_ENDED", "The controller stops; watch anew.")

    @unary
    async def CordonReplicator(
        self, request: pb.CordonReplicatorRequest
    ) -> pb.CordonReplicatorResponse:
        check(request)
        name = _last(request.name)
        await self._loop.call(
            lambda at, call: ev.CordonReplicator(at, call, name, request.validate_only)
        )
        return pb.CordonReplicatorResponse(replicator=self._newest(request.name))

    @unary
    async def UncordonReplicator(
        self, request: pb.UncordonReplicatorRequest
    ) -> pb.UncordonReplicatorResponse:
        check(request)
        name = _last(request.name)
        last = self._newest(request.name)
        await self._loop.call(
            lambda at, call: ev.UncordonReplicator(at, call, name, request.validate_only)
        )
        # Without its mark a name that is not there is not listed any more.
        last.cordoned = last.cordoned and request.validate_only
        return pb.UncordonReplicatorResponse(replicator=self._newest(request.name, last))

    @unary
    async def DrainReplicator(
        self, request: pb.DrainReplicatorRequest
    ) -> pb.DrainReplicatorResponse:
        check(request)
        name = _last(request.name)
        timeout_ms = request.timeout.ToMilliseconds() if request.HasField("timeout") else 0
        await self._loop.call(
            lambda at, call: ev.DrainReplicator(
                at, call, name, timeout_ms, request.force, request.validate_only
            )
        )
        return pb.DrainReplicatorResponse(replicator=self._newest(request.name))

    @unary
    async def CancelDrain(self, request: pb.CancelDrainRequest) -> pb.CancelDrainResponse:
        check(request)
        name = _last(request.name)
        await self._loop.call(lambda at, call: ev.CancelDrain(at, call, name))
        return pb.CancelDrainResponse(replicator=self._newest(request.name))

    @unary
    async def ListAssignments(
        self, request: pb.ListAssignmentsRequest
    ) -> pb.ListAssignmentsResponse:
        check(request)
        world = self._loop.controller.world
        infos = [assignment_message(world, grant) for grant in listed_grants(world)]
        shown, token = page(
            (
                info
                for info in infos
                if request.task in ("", info.task) and request.replicator in ("", info.replicator)
            ),
            lambda info: info.name,
            request.page_size,
            request.page_token,
            request.task,
            request.replicator,
        )
        return pb.ListAssignmentsResponse(assignments=shown, next_page_token=token)

    @unary
    async def MoveAssignment(self, request: pb.MoveAssignmentRequest) -> pb.MoveAssignmentResponse:
        check(request)
        key = _last(request.name)
        target = _last(request.replicator)
        await self._loop.call(
            lambda at, call: ev.MoveAssignment(at, call, key, target, request.validate_only)
        )
        world = self._loop.controller.world
        if key not in world.grants:
            raise ApiError(
                "ABORTED",
                "ASSIGNMENT_GONE",
                f"{request.name} went away meanwhile: it is not wanted any more.",
                field="name",
            )
        return pb.MoveAssignmentResponse(assignment=assignment_message(world, world.grants[key]))

    @unary
    async def RebalanceAssignments(
        self, request: pb.RebalanceAssignmentsRequest
    ) -> pb.RebalanceAssignmentsResponse:
        check(request)
        world = self._loop.controller.world
        planned = plan_by_hand(world, request.max_moves)
        message = plan_message(world, planned)
        if planned and not request.validate_only:
            await self._loop.call(lambda at, call: ev.Rebalance(at, call, request.max_moves))
        return pb.RebalanceAssignmentsResponse(plan=message)

    @unary
    async def ListHolds(self, request: hold_pb2.ListHoldsRequest) -> hold_pb2.ListHoldsResponse:
        check(request)
        return hold_pb2.ListHoldsResponse(holds=await list_holds(self._loop, request))

    @unary
    async def DeleteHold(self, request: hold_pb2.DeleteHoldRequest) -> hold_pb2.DeleteHoldResponse:
        check(request)
        await delete_hold(self._loop, request)
        return hold_pb2.DeleteHoldResponse()

    def _replicators(self) -> list[pb.Replicator]:
        return replicator_messages(self._loop.controller.world, clock.now())

    def _newest(self, name: str, gone: pb.Replicator | None = None) -> pb.Replicator:
        """After a restart the process before may still be waiting for the end of its lease."""
        named = [r for r in self._replicators() if r.name == name]
        if not named and gone is not None:
            return gone
        if not named:
            raise ApiError(
                "NOT_FOUND", "REPLICATOR_NOT_FOUND", f"There is no {name}.", field="name"
            )
        return max(named, key=lambda r: r.connect_time.ToNanoseconds())


def _last(name: str) -> str:
    return name.partition("/")[2]


def _face(replicator: pb.Replicator) -> bytes:
    """Without what changes by itself and is no news."""
    face = pb.Replicator()
    face.CopyFrom(replicator)
    face.ClearField("heartbeat_time")
    face.ClearField("lease_expire_time")
    face.ClearField("rows_per_second")
    face.ClearField("bytes_per_second")
    face.ClearField("load")
    return face.SerializeToString(deterministic=True)
