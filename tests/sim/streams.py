"""The stream between a replicator and a controller, with gRPC taken out from under it.

Laws, gRPC's: each direction is in order; a side that hears nothing for a whole keepalive gives the
connection up, and so does one whose peer has died; a handler whose client is gone is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.sim.clockwork import Loop
from tests.sim.network import RETRANSMIT_SECONDS, Network

if TYPE_CHECKING:
    from milvus_cdc_controller.front import Front as ServerFront

_CONNECT: Any = SimpleNamespace(method="/milvuscdc.v1.ReplicationService/Connect")
KEEPALIVE_SECONDS = 15.0
LOOK_SECONDS = 5.0


class Aborted(Exception):
    """The handler has refused the call."""


class End:
    """One side of a stream: what has arrived there and was not yet taken."""

    def __init__(self, loop: Loop, host: str) -> None:
        self.loop = loop
        self.host = host
        self.error: str | None = None
        """Why it is over; None while it is not."""
        self.clean = False
        self._arrived: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def arrive(self, message: bytes) -> None:
        if self.error is None:
            self._arrived.append(message)
            self._wake()

    def end(self, why: str, *, clean: bool = False) -> None:
        if self.error is None:
            self.error, self.clean = why, clean
            self._wake()

    async def take(self) -> bytes | None:
        """The next message; None when it is over and nothing is left."""
        while not self._arrived:
            if self.error is not None:
                return None
            self._waiting = self.loop.create_future()
            await self._waiting
        return self._arrived.popleft()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Stream:
    """One connection of a replicator."""

    def __init__(self, network: Network, client: End, server: End) -> None:
        self._network = network
        self.client = client
        self.server = server
        self.serving: asyncio.Task[None] | None = None
        self._due = {True: 0.0, False: 0.0}
        """By direction (up): when the last message will arrive."""
        self._held: dict[bool, deque[Callable[[], None]]] = {True: deque(), False: deque()}
        now = network.clockwork.now
        self._heard = now
        network.clockwork.after(LOOK_SECONDS, self._look)

    @property
    def over(self) -> bool:
        return self.client.error is not None and self.server.error is not None

    def send(self, message: bytes, *, up: bool) -> None:
        sink = self.server if up else self.client
        self._transmit(lambda: sink.arrive(message), up=up)

    def close(self, why: str, *, up: bool, clean: bool = False) -> None:
        """One side has ended it: the other learns of it behind everything sent before."""
        source = self.client if up else self.server
        source.end(why, clean=clean)
        self._transmit(lambda: self.end(not up, why, clean=clean), up=up)

    def end(self, client: bool, why: str, *, clean: bool = False) -> None:
        side = self.client if client else self.server
        side.end(why, clean=clean)
        # grpc.aio cancels a handler whose client is gone.
        if not client and not clean and self.serving is not None and not side.loop.dead:
            side.loop.call_soon(self.serving.cancel)

    def died(self, *, client: bool) -> None:
        """The process at one side is no more; its kernel says so, when it can be heard."""
        (self.client if client else self.server).end("the process died")
        self._transmit(lambda: self.end(not client, "connection reset"), up=client)

    def _transmit(self, arrive: Callable[[], None], *, up: bool) -> None:
        network = self._network
        source, sink = (self.client, self.server) if up else (self.server, self.client)
        due = network.clockwork.now + network.delay(source.host, sink.host)
        self._due[up] = due = max(due, self._due[up])
        self._held[up].append(arrive)
        network.clockwork.at(due, self._pump, up)

    def _pump(self, up: bool) -> None:
        """What is first in this direction arrives, unless the way is cut."""
        held = self._held[up]
        if not held:
            return
        source, sink = (self.client, self.server) if up else (self.server, self.client)
        if not self._network.open(source.host, sink.host):
            if not sink.error:
                self._network.clockwork.after(RETRANSMIT_SECONDS, self._pump, up)
            return
        held.popleft()()
        if self._network.chance(self._network.loss / 20):
            self.end(True, "connection reset")
            self.end(False, "connection reset")

    def _look(self) -> None:
        """Keepalive: pings go both ways."""
        if self.over:
            return
        network, clockwork = self._network, self._network.clockwork
        pair = self.client.host, self.server.host
        alive = not any(end.loop.frozen or end.loop.dead for end in (self.client, self.server))
        if alive and network.open(*pair) and network.open(*reversed(pair)):
            self._heard = clockwork.now
        elif clockwork.now - self._heard > KEEPALIVE_SECONDS:
            for end in (self.client, self.server):
                if not end.loop.frozen:
                    self.end(end is self.client, "keepalive timed out")
        clockwork.after(LOOK_SECONDS, self._look)


class Front:
    """Where controllers can be reached. Replicators try one after the other."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.serving: dict[str, tuple[Loop, ServerFront]] = {}
        """By host, in the order in which they are tried."""
        self.hosts: list[str] = []
        self.streams: list[Stream] = []
        self.on_response: Callable[[pb.ConnectResponse], None] = lambda response: None
        """Hears what a controller says before it leaves."""

    def died(self, loop: Loop) -> None:
        for stream in self.streams:
            if stream.client.loop is loop:
                stream.died(client=True)
            elif stream.server.loop is loop:
                stream.died(client=False)

    def connect(self, client: End, host: str) -> Stream | None:
        """None where nobody listens."""
        found = self.serving.get(host)
        if found is None:
            return None
        loop, front = found
        server = End(loop, host)
        stream = Stream(self.network, client, server)
        self.streams = [each for each in self.streams if not each.over]
        self.streams.append(stream)
        stream._transmit(lambda: self._accept(stream, front), up=True)
        return stream

    def _accept(self, stream: Stream, front: ServerFront) -> None:
        loop = stream.server.loop
        if not loop.dead:
            stream.serving = loop.create_task(self._serve(stream, front))

    async def _serve(self, stream: Stream, front: ServerFront) -> None:
        context: Any = Context(stream.client.host)
        why, clean = "", True
        try:
            # Passing calls on is not made up here: who does not lead refuses.
            reign = front.reign if front.leads else None
            handler: Any = reign.handlers.find(_CONNECT) if reign is not None else None
            if handler is None:
                raise Aborted("UNAVAILABLE: this controller does not lead")
            async with aclosing(_requests(stream.server)) as requests:
                async with aclosing(handler.stream_stream(requests, context)) as responses:
                    async for response in responses:
                        self.on_response(response)
                        stream.send(response.SerializeToString(), up=False)
        except Aborted as error:
            why, clean = str(error), False
        finally:
            if not stream.server.loop.dead:
                stream.close(why or "ended", up=False, clean=clean)


async def _requests(server: End) -> AsyncGenerator[pb.ConnectRequest, None]:
    while (message := await server.take()) is not None:
        yield pb.ConnectRequest.FromString(message)
    if not server.clean:
        raise grpc.RpcError(server.error)


class Context:
    """As far as the handler uses grpc.aio.ServicerContext."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    async def abort(self, code: grpc.StatusCode, details: str = "", **_: Any) -> None:
        raise Aborted(f"{code.name}: {details}")

    async def abort_with_status(self, status: Any) -> None:
        raise Aborted(f"{status.code.name}: {status.details}")


class Channel:
    """As far as a replicator uses grpc.aio.Channel."""

    def __init__(self, front: Front, loop: Loop, host: str, address: str) -> None:
        self._front = front
        self._loop = loop
        self._host = host
        self._address = address
        self._calls: list[Call] = []

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self._calls:
            call.cancel()
            await call.ended()

    def stream_stream(self, *_: Any, **__: Any) -> Callable[[AsyncIterator[Any]], Call]:
        def begin(requests: AsyncIterator[Any], **_: Any) -> Call:
            call = Call(self._front, self._loop, self._host, self._address, requests)
            self._calls.append(call)
            return call

        return begin


class Call:
    """The client's side of one stream."""

    def __init__(
        self, front: Front, loop: Loop, host: str, address: str, requests: AsyncIterator[Any]
    ) -> None:
        self._end = End(loop, host)
        self._stream = front.connect(self._end, address)
        if self._stream is None:
            loop.call_later(0.01, self._end.end, "nobody listens there")
        self._writing = loop.create_task(self._write(requests))

    async def _write(self, requests: AsyncIterator[Any]) -> None:
        async with aclosing(requests) as messages:  # type: ignore[type-var]
            if self._stream is None:
                return
            async for message in messages:
                self._stream.send(message.SerializeToString(), up=True)
            self._stream._transmit(lambda: self._stream_end(), up=True)

    def _stream_end(self) -> None:
        """Half closed: nothing more comes from the client."""
        assert self._stream is not None
        self._stream.end(False, "half closed", clean=True)

    def cancel(self) -> None:
        self._writing.cancel()
        if self._stream is not None and self._end.error is None and not self._end.loop.dead:
            self._stream.close("cancelled by the client", up=True)

    async def ended(self) -> None:
        await asyncio.wait({self._writing})

    async def __aiter__(self) -> AsyncIterator[pb.ConnectResponse]:
        while (message := await self._end.take()) is not None:
            yield pb.ConnectResponse.FromString(message)
        if not self._end.clean:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details=self._end.error,
            )
