"""Calls to a controller that does not lead, passed on to the one that does, whatever they are.

Laws: a call is bytes in both directions, so every method of every version can be passed on; what
the caller sent reaches the leader (messages, half-close, metadata, the time left), what the leader
answers reaches the caller (metadata, messages, status with details); one message of each direction
is held at a time; a call is passed on once, never again; it ends with the leader's term. The
caller's credential stays here: the leader is told who he is, and believes it because of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from milvus_cdc.trust import caller
from milvus_cdc.trust.dialing import Credentials, Line

from milvus_cdc_controller.api_errors import ApiError, abort
from milvus_cdc_controller.store.election import Member

log = structlog.get_logger(__name__)

HOP = "milvus-cdc-hop"
"""Metadata of a call that was passed on: by whom."""
PEER = "milvus-cdc-peer"
"""And where it came from."""
CALLER = "milvus-cdc-caller-bin"
"""And who asked."""
CALLS_MAX = 5_000
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
_DETAILS_KEY = "grpc-status-details-bin"
_NOT_PASSED_ON = frozenset(
    (
        *("user-agent", "content-type", "te", "grpc-timeout"),
        *("grpc-encoding", "grpc-accept-encoding", "authorization", HOP, PEER, CALLER),
    )
)
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what one attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)

Context = grpc.aio.ServicerContext[bytes, bytes]
_Metadata = Iterable[tuple[str, Any]]


@dataclass(slots=True, eq=False)
class _Route:
    """To one leader, for its term."""

    leader: Member
    term: int
    line: Line
    calls: set[grpc.aio.StreamStreamCall[bytes, bytes]] = field(default_factory=set)
    over: bool = False


class Forwarder:
    """Told by `aim` who leads."""

    def __init__(self, me: str, credentials: Credentials | None = None) -> None:
        self._me = me
        self._credentials = credentials or Credentials()
        self._route: _Route | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> bool:
        """There is somebody to pass calls on to."""
        return self._route is not None

    def aim(self, leader: Member | None, term: int) -> None:
        """Ends the calls that are under way to another leader, or to an earlier term."""
        route = self._route
        if route is not None and leader == route.leader and term == route.term:
            return
        self._route = None
        if leader is not None:
            line = Line(leader.address, self._credentials, _OPTIONS)
            self._route = _Route(leader, term, line)
        if route is not None:
            route.over = True
            for call in tuple(route.calls):
                call.cancel()
            closing = asyncio.create_task(route.line.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.aim(None, 0)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def handler(self, method: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        """On the wire a unary call is a stream of one message."""

        async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
            try:
                await self._pass_on(method, requests, context)
            except ApiError as error:
                await abort(context, error)

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handle)
        return handler

    async def _pass_on(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        given = tuple(context.invocation_metadata() or ())
        route = self._route
        if route is None or any(key == HOP for key, _ in given):
            raise ApiError(
                "UNAVAILABLE",
                "NO_LEADER",
                "No controller leads at the moment; one will within seconds: try again.",
            )
        if len(route.calls) >= CALLS_MAX:
            raise ApiError(
                "RESOURCE_EXHAUSTED",
                "FORWARDING_FULL",
                f"{CALLS_MAX} calls are being passed on to the leader; call it directly, at "
                f"{route.leader.address}, or try again.",
            )
        metadata = [(key, value) for key, value in given if key not in _NOT_PASSED_ON]
        metadata += [(HOP, self._me), (PEER, context.peer()), (CALLER, caller.current().told())]
        metadata += self._credentials.metadata()
        stub: Any = route.line.channel.stream_stream(method)
        call = stub(timeout=context.time_remaining(), metadata=metadata)
        route.calls.add(call)
        sending = asyncio.create_task(_send(requests, call))
        try:
            await _answer(call, context)
        except grpc.aio.AioRpcError as error:
            trailing = tuple(error.trailing_metadata() or ())
            unexplained = not any(key == _DETAILS_KEY for key, _ in trailing)
            if route.over:
                raise _changed() from error
            # The second is what gRPC makes of a write that meets the end of the stream.
            broken = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
            if unexplained and error.code() in broken:
                raise ApiError(
                    "UNAVAILABLE",
                    "LEADER_UNREACHABLE",
                    f"The controller that leads, at {route.leader.address}, cannot be reached from "
                    f"here ({error.details()}): try again; if it stays so, check its `advertise`.",
                ) from error
            await context.abort(error.code(), error.details() or "", trailing)
        except asyncio.CancelledError:
            # The caller has gone, or the route.
            if route.over and call.cancelled():
                raise _changed() from None
            raise
        finally:
            route.calls.discard(call)
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where a call comes from, also when another controller has passed it on."""
    given: _Metadata = context.invocation_metadata() or ()
    return next((str(value) for key, value in given if key == PEER), context.peer())


def _changed() -> ApiError:
    return ApiError(
        "UNAVAILABLE",
        "LEADER_CHANGED",
        "Another controller leads now, or soon; what was asked for may have been done: try again.",
    )


async def _send(
    requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall[bytes, bytes]
) -> None:
    # How the call ended is said by its answer.
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        async for message in requests:
            await call.write(message)
        await call.done_writing()


async def _answer(call: grpc.aio.StreamStreamCall[bytes, bytes], context: Context) -> None:
    initial: _Metadata = await call.initial_metadata()
    if passed := tuple(initial):
        await context.send_initial_metadata(passed)
    async for message in call:
        await context.write(message)
    context.set_trailing_metadata(tuple(await call.trailing_metadata()))
