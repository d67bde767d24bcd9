"""The one door to every sink: nothing passes without the lease, nor more at once than a sink may
have.

The clock counts suspend (CLOCK_BOOTTIME), so a process that was frozen finds its lease expired when
it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from milvus_cdc.errors import RetryableError
from milvuscdc.v1 import task_pb2

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.core.lease import Lease

WRITE_TIMEOUT_SECONDS = 8.0
LEAST_TIMEOUT_SECONDS = 1.0
"""A write that has less than this before the lease ends is not worth starting."""
DDL_SECONDS = 30.0
DDL_LEAST_SECONDS = 3.0


class Halted(Exception):
    """The caller was told to stop while it waited."""


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class WriteGate:
    """Shared by all assignments of the process."""

    def __init__(self, lease: Lease, per_sink: int) -> None:
        self.core = lease
        self._per_sink = per_sink
        self._slots: dict[bytes, asyncio.Semaphore] = {}
        self._renewed = asyncio.Event()

    def renewed(self) -> None:
        """The lease may have grown."""
        self._renewed.set()

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
        semaphore = self._slots.get(key)
        if semaphore is None:
            semaphore = self._slots[key] = asyncio.Semaphore(self._per_sink)
        async with semaphore:
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
