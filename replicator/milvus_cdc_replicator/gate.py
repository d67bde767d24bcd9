"""The one door to every sink: nothing passes without the lease, nor more at once than a sink may
have; one that answers too late gets less at once until it answers in time.

The clock counts suspend (CLOCK_BOOTTIME), so a process that was frozen finds its lease expired when
it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

from milvus_cdc.errors import RetryableError
from milvuscdc.v1 import task_pb2

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.halting import Halted

WRITE_TIMEOUT_SECONDS = 8.0
LEAST_TIMEOUT_SECONDS = 1.0
"""A write that has less than this before the lease ends is not worth starting."""
DDL_SECONDS = 30.0
DDL_LEAST_SECONDS = 3.0
OPENED_AT_ONCE = 8
"""Of one sink's collections: hundreds that begin together would all be late, again and again."""
COMPARISONS = 8
"""Collections that are compared with one sink at once."""


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Slots:
    """Requests at once at one sink. A sink goes on with a request that was given up, and gets its
    repetition on top: what was too much stays too much unless less is sent. So a late answer halves
    what is sent at once, and every answer in time adds to it again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = 0.0

    @property
    def limit(self) -> int:
        return int(self._limit)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Room for one request, in order of arrival; sees from its end how the sink is doing."""
        await self._acquire()
        started = time.monotonic()
        try:
            yield
            self._limit = min(self._most, self._limit + 1 / self._limit)
        except RetryableError as error:
            # Those that began before the last halving tell nothing about it.
            if error.reason == "SINK_TIMEOUT" and started >= self._halved_at:
                self._limit = max(1.0, self._limit / 2)
                self._halved_at = time.monotonic()
            raise
        finally:
            self._used -= 1
            self._admit()

    async def _acquire(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(turn)
            else:
                self._used -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        for turn in list(self._waiting):
            if self._used >= self.limit:
                return
            if not turn.done():
                self._waiting.remove(turn)
                self._used += 1
                turn.set_result(None)


class WriteGate:
    """Shared by all assignments of the process."""

    def __init__(self, lease: Lease, per_sink: int) -> None:
        self.core = lease
        self._per_sink = per_sink
        self._slots: dict[bytes, Slots] = {}
        self._opening: dict[bytes, Slots] = {}
        self._renewed = asyncio.Event()
        self._comparing: dict[bytes, asyncio.Semaphore] = {}

    def renewed(self) -> None:
        """The lease may have grown."""
        self._renewed.set()

    def opening(self, sink: task_pb2.Sink) -> contextlib.AbstractAsyncContextManager[None]:
        """A turn to open a collection at a sink, waited for before its time begins to run."""
        key = sink.SerializeToString(deterministic=True)
        return self._opening.setdefault(key, Slots(OPENED_AT_ONCE)).one()

    def comparing(self, sink: task_pb2.Sink) -> asyncio.Semaphore:
        """Held by whoever only looks at a sink; one that does not answer keeps nobody else out."""
        key = sink.SerializeToString(deterministic=True)
        return self._comparing.setdefault(key, asyncio.Semaphore(COMPARISONS))

    @contextlib.asynccontextmanager
    async def ddl(self, halt: asyncio.Event) -> AsyncIterator[None]:
        """Schema changes: begun with enough lease, broken off before it ends; raises Halted, or
        RetryableError when the lease did not last.
        """
        timeout = await self._timeout(halt, DDL_SECONDS, DDL_LEAST_SECONDS)
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError as error:
            raise RetryableError(
                "SINK_TIMEOUT", f"a schema change at the sink took longer than {timeout:.0f} s"
            ) from error

    @contextlib.asynccontextmanager
    async def slot(self, sink: task_pb2.Sink, halt: asyncio.Event) -> AsyncIterator[float]:
        """Room for one write, and the seconds it may take; raises Halted."""
        key = sink.SerializeToString(deterministic=True)
        slots = self._slots.get(key)
        if slots is None:
            slots = self._slots[key] = Slots(self._per_sink)
        async with slots.one():
            timeout = await self._timeout(halt, WRITE_TIMEOUT_SECONDS, LEAST_TIMEOUT_SECONDS)
            with metrics.WRITES_IN_FLIGHT.track_inprogress():
                yield timeout

    async def _timeout(self, halt: asyncio.Event, wanted: float, least: float) -> float:
        while True:
            if halt.is_set():
                raise Halted
            timeout = self.core.write_timeout(boottime(), wanted, least)
            if timeout is not None:
                return timeout
            self._renewed.clear()
            renewed = asyncio.create_task(self._renewed.wait())
            halted = asyncio.create_task(halt.wait())
            _, pending = await asyncio.wait(
                {renewed, halted}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
            )
            for task in pending:
                task.cancel()
