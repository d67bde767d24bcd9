"""ReplicationService: the streams to the replicators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import structlog
from milvus_cdc.trust import caller
from milvuscdc.v1 import replication_service_pb2 as pb
from milvuscdc.v1 import replication_service_pb2_grpc as rpc

from milvus_cdc_controller import wire
from milvus_cdc_controller.api_errors import ApiError, abort
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.forwarding import peer_of
from milvus_cdc_controller.outbox import Outbox
from milvus_cdc_controller.sealing import Seals

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop

log = structlog.get_logger(__name__)

HELLO_SECONDS = 10.0
STREAMS_MAX = 1_000
REFUSED = frozenset({"INSTANCE_IN_USE"})
"""Ends of a stream that the replicator must not answer by connecting anew."""

Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class Streams:
    """The open streams by number."""

    def __init__(self, most: int = STREAMS_MAX) -> None:
        self._most = most
        self._outboxes: dict[int, Outbox] = {}
        self._last = 0
        self._closed: tuple[str, str] | None = None

    def open(self) -> tuple[int, Outbox]:
        """Raises ApiError TOO_MANY_STREAMS."""
        if len(self._outboxes) >= self._most:
            raise ApiError(
                "RESOURCE_EXHAUSTED",
                "TOO_MANY_STREAMS",
                f"{self._most} replicators are connected already; stop one, or raise "
                "limits.streams in the controller's configuration.",
            )
        self._last += 1
        outbox = self._outboxes[self._last] = Outbox()
        if self._closed is not None:
            outbox.close(*self._closed)
        return self._last, outbox

    def forget(self, stream: int) -> None:
        self._outboxes.pop(stream, None)

    def send(self, stream: int, message: fx.StreamMessage) -> None:
        outbox = self._outboxes.get(stream)
        if outbox is not None and not outbox.put(message):
            log.warning("replicator reads too slowly, dropping its stream", stream=stream)
            outbox.close("STREAM_TOO_SLOW", "Too many messages wait to be read; connect anew.")

    def close(self, effect: fx.CloseStream) -> None:
        outbox = self._outboxes.get(effect.stream)
        if outbox is not None:
            outbox.close(effect.reason, effect.message)

    def close_all(self, reason: str, message: str) -> None:
        """Those that are opened later, too."""
        self._closed = (reason, message)
        for outbox in self._outboxes.values():
            outbox.close(reason, message)


class ReplicationService(rpc.ReplicationServiceServicer):
    def __init__(
        self,
        loop: ControlLoop,
        streams: Streams,
        controller_id: str,
        leases: Leases,
        progress_ms: int,
        silence_ms: int,
        cluster: str = "",
        seals: Seals | None = None,
    ) -> None:
        self._loop = loop
        self._streams = streams
        self._controller_id = controller_id
        self._leases = leases
        self._progress_ms = progress_ms
        self._silence_ms = silence_ms
        self._cluster = cluster
        self._seals = seals or Seals()

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        try:
            stream, outbox = self._streams.open()
        except ApiError as error:
            log.warning("replicator refused", reason=error.reason, peer=peer_of(context))
            await abort(context, error)
        reader: asyncio.Task[None] | None = None
        try:
            begin = await self._hello(stream, request_iterator, context)
            await self._loop.post(begin)
            reader = asyncio.create_task(self._read(stream, request_iterator, outbox))
            while True:
                messages = await outbox.take()
                if messages is None:
                    break
                for message in messages:
                    response = wire.response(
                        message,
                        self._controller_id,
                        self._leases,
                        self._progress_ms,
                        self._silence_ms,
                    )
                    self._seals.open_response(response)
                    yield response
            reason, text = outbox.closed or ("CLOSED", "")
            if reason != "HALF_CLOSED":
                kind = "FAILED_PRECONDITION" if reason in REFUSED else "UNAVAILABLE"
                raise ApiError(kind, reason, text)
        except ApiError as error:
            await abort(context, error)
        finally:
            self._streams.forget(stream)
            if reader is not None:
                reader.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reader
            await asyncio.shield(self._loop.post(lambda at: ev.StreamLost(at, stream)))

    async def _hello(
        self, stream: int, requests: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> wire.MakeEvent:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await anext(aiter(requests))
        except (TimeoutError, StopAsyncIteration):
            raise ApiError(
                "INVALID_ARGUMENT", "HELLO_MISSING", "The first message must be a Hello."
            ) from None
        hello = first.hello
        if first.WhichOneof("message") != "hello" or not hello.name or not hello.instance_id:
            raise ApiError(
                "INVALID_ARGUMENT",
                "HELLO_MISSING",
                "The first message must be a Hello with a name and an instance_id.",
            )
        bound = caller.current().replicator
        if bound and hello.name != bound:
            raise ApiError(
                "PERMISSION_DENIED",
                "REPLICATOR_NAME",
                f"The credential is of the replicator {bound!r}; {hello.name!r} needs its own.",
                metadata={"replicator": bound},
            )
        begin = wire.hello(stream, peer_of(context), hello)
        if begin is None:
            raise ApiError(
                "FAILED_PRECONDITION",
                "PROTOCOL_VERSION",
                f"The controller speaks protocol {wire.PROTOCOL_MIN} to {wire.PROTOCOL_MAX}, the "
                f"replicator {hello.protocol_min} to {hello.protocol_max}; upgrade the older one.",
            )
        if hello.cluster != self._cluster:
            raise ApiError(
                "FAILED_PRECONDITION",
                "CLUSTER_MISMATCH",
                f"This controller is of cluster {self._cluster!r}, the replicator {hello.name} of "
                f"{hello.cluster!r}; set `cluster` to the same in both, or give it another "
                "controller.",
                field="cluster",
                metadata={"controller": self._cluster, "replicator": hello.cluster},
            )
        log.info(
            "replicator connects",
            replicator=hello.name,
            instance=hello.instance_id,
            stream=stream,
            principal=caller.current().name,
        )
        return begin

    async def _read(
        self, stream: int, requests: AsyncIterator[pb.ConnectRequest], outbox: Outbox
    ) -> None:
        try:
            async for request in requests:
                make = wire.event(stream, request)
                if make is not None and request.WhichOneof("message") == "heartbeat":
                    await self._loop.beat(stream, make)
                elif make is not None:
                    await self._loop.post(make)
            outbox.close("HALF_CLOSED", "The replicator has ended the stream.")
        except (grpc.aio.BaseError, grpc.RpcError):
            outbox.close("STREAM_LOST", "The stream broke; connect anew.")
        except Exception as error:
            log.exception("a replicator's message could not be taken", stream=stream)
            outbox.close("BAD_MESSAGE", f"A message could not be understood: {error}")
