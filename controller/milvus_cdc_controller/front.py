"""Where calls come in: to the reign when this controller leads, else on to who does.

`FleetService.ListControllers` is answered by every controller itself, also when nobody leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from milvuscdc.v1 import fleet_service_pb2 as pb

from milvus_cdc_controller.api_errors import unary
from milvus_cdc_controller.forwarding import Forwarder
from milvus_cdc_controller.reign import Handlers, Reign
from milvus_cdc_controller.store.election import Member

OURS = "/milvuscdc.v1."

Roster = Callable[[], Iterable[tuple[Member, bool]]]
"""The controllers that are known to run, and whether they lead."""


class Front(grpc.GenericRpcHandler):
    """A server's only handler of our services."""

    def __init__(self, roster: Roster, forwarder: Forwarder) -> None:
        self.reign: Reign | None = None
        self._forwarder = forwarder
        self._own = Handlers()
        controllers = grpc.unary_unary_rpc_method_handler(
            _Controllers(roster).ListControllers,
            request_deserializer=pb.ListControllersRequest.FromString,
            response_serializer=pb.ListControllersResponse.SerializeToString,
        )
        self._own.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "milvuscdc.v1.FleetService", {"ListControllers": controllers}
                )
            ]
        )

    @property
    def answers(self) -> bool:
        """Calls need not be tried again now."""
        return self.leads or self._forwarder.open

    @property
    def leads(self) -> bool:
        return self.reign is not None and self.reign.leads

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not handler_call_details.method.startswith(OURS):
            return None
        own = self._own.find(handler_call_details)
        if own is not None:
            return own
        if self.reign is not None and self.reign.leads:
            return self.reign.handlers.find(handler_call_details)
        return self._forwarder.handler(handler_call_details.method)


class _Controllers:
    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    @unary
    async def ListControllers(
        self, request: pb.ListControllersRequest
    ) -> pb.ListControllersResponse:
        known = sorted(self._roster(), key=lambda entry: (entry[0].address, entry[0].id))
        return pb.ListControllersResponse(
            controllers=[_message(member, leads) for member, leads in known]
        )


def _message(member: Member, leads: bool) -> pb.Controller:
    start = Timestamp()
    start.FromMilliseconds(member.start_time_ms)
    return pb.Controller(
        name=f"controllers/{member.id}",
        role=pb.CONTROLLER_ROLE_LEADER if leads else pb.CONTROLLER_ROLE_FOLLOWER,
        address=member.address,
        host=member.host,
        version=member.version,
        start_time=start,
    )
