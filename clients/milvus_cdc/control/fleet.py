"""The calls about the fleet: controllers, replicators, assignments and holds.

Law: a watch survives broken connections and proxies that cut it; it begins anew with all as it is
then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from milvuscdc.v1 import fleet_service_pb2, hold_pb2, task_pb2

from milvus_cdc.control.connection import MAX_BACKOFF_SECONDS, PAGE_SIZE, Connection
from milvus_cdc.control.names import assignment_name, replicator_name, task_name
from milvus_cdc.control.refusal import api_error, was_cut


class FleetCalls(Connection):
    """Half of a ControlClient."""

    async def list_controllers(self) -> list[fleet_service_pb2.Controller]:
        """All that run; none is the leader while one is being elected."""
        request = fleet_service_pb2.ListControllersRequest()
        return list((await self._call(self._fleet.ListControllers, request)).controllers)

    async def list_replicators(self) -> list[fleet_service_pb2.Replicator]:
        request = fleet_service_pb2.ListReplicatorsRequest(page_size=PAGE_SIZE)
        return [r async for r in self._pages(self._fleet.ListReplicators, request, "replicators")]

    async def list_assignments(
        self, *, task: str = "", replicator: str = ""
    ) -> list[fleet_service_pb2.AssignmentInfo]:
        request = fleet_service_pb2.ListAssignmentsRequest(
            page_size=PAGE_SIZE, task=task_name(task) if task else "", replicator=replicator
        )
        return [a async for a in self._pages(self._fleet.ListAssignments, request, "assignments")]

    async def list_holds(
        self, *, task: str = "", source: task_pb2.Source | None = None
    ) -> list[hold_pb2.Hold]:
        """With a task or a source, orphans at its queue, too."""
        request = hold_pb2.ListHoldsRequest(task=task_name(task) if task else "", source=source)
        return list((await self._call(self._fleet.ListHolds, request)).holds)

    async def delete_hold(
        self,
        name: str,
        *,
        task: str = "",
        source: task_pb2.Source | None = None,
        forget: bool = False,
    ) -> None:
        """An orphan, at the queue of a task or source; or `forget` one whose queue is gone."""
        request = hold_pb2.DeleteHoldRequest(
            name=name, task=task_name(task) if task else "", source=source, forget=forget
        )
        await self._call(self._fleet.DeleteHold, request)

    async def get_replicator(self, name: str) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.GetReplicatorRequest(name=replicator_name(name))
        return await self._replicator(self._fleet.GetReplicator, request)

    async def cordon_replicator(
        self, name: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.Replicator:
        """It gets nothing new until it is uncordoned; the mark belongs to the name."""
        request = fleet_service_pb2.CordonReplicatorRequest(
            name=replicator_name(name), validate_only=validate_only
        )
        return await self._replicator(self._fleet.CordonReplicator, request)

    async def uncordon_replicator(
        self, name: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.UncordonReplicatorRequest(
            name=replicator_name(name), validate_only=validate_only
        )
        return await self._replicator(self._fleet.UncordonReplicator, request)

    async def drain_replicator(
        self,
        name: str,
        *,
        within_seconds: float = 0.0,
        force: bool = False,
        validate_only: bool = False,
    ) -> fleet_service_pb2.Replicator:
        """Begins it; `drain` of the replicator (see `watch_replicators`) says how far it is."""
        request = fleet_service_pb2.DrainReplicatorRequest(
            name=replicator_name(name), force=force, validate_only=validate_only
        )
        if within_seconds:
            request.timeout.FromMilliseconds(round(within_seconds * 1000))
        return await self._replicator(self._fleet.DrainReplicator, request)

    async def cancel_drain(self, name: str) -> fleet_service_pb2.Replicator:
        request = fleet_service_pb2.CancelDrainRequest(name=replicator_name(name))
        return await self._replicator(self._fleet.CancelDrain, request)

    async def _replicator(self, method: Any, request: Any) -> fleet_service_pb2.Replicator:
        replicator: fleet_service_pb2.Replicator = (await self._call(method, request)).replicator
        return replicator

    async def move_assignment(
        self, name: str, replicator: str, *, validate_only: bool = False
    ) -> fleet_service_pb2.AssignmentInfo:
        """Begins it; the assignment's `epoch` grows when it has a new owner."""
        request = fleet_service_pb2.MoveAssignmentRequest(
            name=assignment_name(name),
            replicator=replicator_name(replicator),
            validate_only=validate_only,
        )
        answer = await self._call(self._fleet.MoveAssignment, request)
        assignment: fleet_service_pb2.AssignmentInfo = answer.assignment
        return assignment

    async def rebalance(
        self, *, max_moves: int = 0, validate_only: bool = False
    ) -> fleet_service_pb2.RebalancePlan:
        """The moves that even out the load; they begin unless `validate_only`."""
        request = fleet_service_pb2.RebalanceAssignmentsRequest(
            max_moves=max_moves, validate_only=validate_only
        )
        answer = await self._call(self._fleet.RebalanceAssignments, request)
        plan: fleet_service_pb2.RebalancePlan = answer.plan
        return plan

    async def watch_replicators(
        self, name: str = ""
    ) -> AsyncIterator[fleet_service_pb2.WatchReplicatorsResponse]:
        """All (or the one) as they are, then every change, for ever; begins anew by itself when
        the connection breaks, with all as they are then.
        """
        backoff, began = 0.2, False
        request = fleet_service_pb2.WatchReplicatorsRequest(
            name=replicator_name(name) if name else ""
        )
        while True:
            try:
                async for event in self._fleet.WatchReplicators(request):
                    backoff, began = 0.2, True
                    yield event
            except grpc.aio.AioRpcError as err:
                if not (began and was_cut(err)):
                    raise api_error(err) from err
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
