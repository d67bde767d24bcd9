"""Runs a task's metadata assignment: databases at the sink as at the source."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import structlog
from milvus_cdc.errors import BugError, CdcError, RetryableError

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.core.assignment import Counters
from milvus_cdc_replicator.gate import Halted, WriteGate
from milvus_cdc_replicator.report import Report
from milvus_cdc_replicator.spec import MetadataAssignment

log = structlog.get_logger()

RETRY_SECONDS = 2.0


class MetadataRunner:
    """Level-triggered: each version is applied whole, the newest wins."""

    def __init__(
        self,
        assignment: MetadataAssignment,
        *,
        connections: Connections,
        gate: WriteGate,
        notify: Callable[[str], None],
    ) -> None:
        self.assignment = assignment
        self._connections = connections
        self._gate = gate
        self._notify = notify
        self._halt = asyncio.Event()
        self._changed = asyncio.Event()
        self._applied_version = 0
        self._trouble: CdcError | None = None
        self._owner: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._changed.set()
        self._owner = asyncio.create_task(self._run(), name=f"metadata {self.assignment.task}")

    def update(self, assignment: MetadataAssignment) -> None:
        self.assignment = assignment
        self._changed.set()

    def grant(self, horizons: list[tuple[str, int]]) -> None:
        """Nothing to grant: no rows."""

    async def stop(self) -> None:
        self._halt.set()
        self._changed.set()
        if self._owner is not None:
            await self._owner

    @property
    def has_news(self) -> bool:
        """Never: what happens is told at once."""
        return False

    def report(self) -> Report:
        trouble = self._trouble
        state = "RUNNING"
        if trouble is not None:
            # A user error too: it must not stop rows, so it stays visible and is tried again.
            state = "RETRYING"
        return Report(
            assignment_id=self.assignment.assignment_id,
            epoch=self.assignment.epoch,
            state=state,
            reason=trouble.reason if trouble else "",
            message=trouble.message if trouble else "",
            lanes=(),
            counters=Counters(),
            lag_ms=-1,
            conditions=(),
            opened=None,
            dropped=False,
            applied_version=self._applied_version,
        )

    async def _run(self) -> None:
        while not self._halt.is_set():
            await self._changed.wait()
            self._changed.clear()
            wanted = self.assignment
            if self._halt.is_set() or wanted.version == self._applied_version:
                continue
            try:
                await self._apply(wanted)
            except Halted:
                return
            except Exception as unexpected:
                if isinstance(unexpected, CdcError):
                    error = unexpected
                else:
                    log.exception("databases failed unexpectedly", task=wanted.task)
                    error = BugError("REPLICATOR_BUG", repr(unexpected))
                if self._trouble is None or self._trouble.reason != error.reason:
                    log.warning(
                        "retrying databases",
                        task=wanted.task,
                        reason=error.reason,
                        error=error.message,
                    )
                self._trouble = error
                self._changed.set()
                delay = RETRY_SECONDS if isinstance(error, RetryableError) else 5 * RETRY_SECONDS
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._halt.wait(), delay * (0.5 + random.random()))
            else:
                self._trouble = None
                self._applied_version = wanted.version
            self._notify(wanted.assignment_id)

    async def _apply(self, wanted: MetadataAssignment) -> None:
        sink = await self._connections.sink(wanted.sink)
        for name, dropped in wanted.databases:
            async with self._gate.ddl(self._halt):
                if dropped:
                    await sink.drop_database(name)
                else:
                    await sink.ensure_database(name)
