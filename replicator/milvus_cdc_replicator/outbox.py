"""What is to be said to the controller, in order.

Laws: what is sent is the newest state: of each assignment at most one progress waits, and it is
made when its turn comes. What was meant for one stream is never said on the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable

from milvuscdc.v1 import replication_service_pb2 as pb


class Outbox:
    """Filled from everywhere, emptied by the stream that began last."""

    def __init__(
        self, connected: asyncio.Event, progress: Callable[[str], pb.Progress | None]
    ) -> None:
        """Progress is told while `connected`; `progress` makes that of an assignment, None where
        nothing of it runs any more.
        """
        self._connected = connected
        self._progress = progress
        self._messages: deque[pb.ConnectRequest] = deque()
        self._due: set[str] = set()
        self._ready = asyncio.Event()
        self._flushed = asyncio.Event()
        self._closing = False
        self.streams = 0
        """How many have begun."""

    def send(self, message: pb.ConnectRequest) -> None:
        self._messages.append(message)
        self._ready.set()

    def tell(self, assignment_ids: Iterable[str]) -> None:
        """These have something to say."""
        self._due.update(assignment_ids)
        self._ready.set()

    def tell_no_more(self, assignment_id: str) -> None:
        self._due.discard(assignment_id)

    def begin(self) -> int:
        """A stream does, with nothing of the one before; its number."""
        self._messages.clear()
        self.streams += 1
        return self.streams

    async def next(self, stream: int) -> pb.ConnectRequest | None:
        """What that stream has to send next; None when another one has begun, or after `close`."""
        # gRPC still waits here for the next message of a stream that the other side has ended: it
        # would take that one from its successor, and lose it.
        while stream == self.streams:
            if (message := self._first()) is not None:
                return message
            if self._closing:
                return None
            self._ready.clear()
            self._flushed.set()
            await self._ready.wait()
        return None

    async def flush(self, seconds: float) -> None:
        """Until all of it is sent, or so many seconds."""
        self._flushed.clear()
        self._ready.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._flushed.wait(), seconds)

    def close(self) -> None:
        """The stream ends when nothing is left."""
        self._closing = True
        self._ready.set()

    def _first(self) -> pb.ConnectRequest | None:
        if self._messages:
            return self._messages.popleft()
        while self._due and self._connected.is_set():
            progress = self._progress(self._due.pop())
            if progress is not None:
                return pb.ConnectRequest(progress=progress)
        return None
