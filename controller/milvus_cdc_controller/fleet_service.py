"""FleetService: which replicators there are and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milvuscdc.v1 import fleet_service_pb2 as pb
from milvuscdc.v1 import fleet_service_pb2_grpc as rpc

from milvus_cdc_controller import clock, present
from milvus_cdc_controller.api_errors import ApiError, unary
from milvus_cdc_controller.pages import page
from milvus_cdc_controller.validation import check

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop


class FleetService(rpc.FleetServiceServicer):
    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop

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
        named = [r for r in self._replicators() if r.name == request.name]
        if not named:
            raise ApiError(
                "NOT_FOUND", "REPLICATOR_NOT_FOUND", f"There is no {request.name}.", field="name"
            )
        # After a restart the process before may still be waiting for the end of its lease.
        newest = max(named, key=lambda r: r.connect_time.ToNanoseconds())
        return pb.GetReplicatorResponse(replicator=newest)

    @unary
    async def ListAssignments(
        self, request: pb.ListAssignmentsRequest
    ) -> pb.ListAssignmentsResponse:
        check(request)
        world = self._loop.controller.world
        infos = [present.assignment_message(world, grant) for grant in world.grants.values()]
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

    def _replicators(self) -> list[pb.Replicator]:
        world = self._loop.controller.world
        now = clock.now()
        return [
            present.replicator_message(world, session, now.mono_ms, now.wall_ms)
            for session in world.sessions.values()
        ]
