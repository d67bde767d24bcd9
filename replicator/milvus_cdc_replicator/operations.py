"""Reads a source's operations channel for one task: flushes are told to the controller, credentials
are carried out here, in order.

Laws: what the channel says is told together with the place behind it, and told again until the
controller has stored both; nothing of it stops the databases, aliases and roles. A channel that is
not there is none: earlier sources have no such thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import structlog
from milvus_cdc.codec.operations import (
    CredentialOperation,
    FlushOperation,
    Operation,
    UnknownOperation,
    decode_operation,
)
from milvus_cdc.errors import (
    BugError,
    CdcError,
    LogResetError,
    LogTruncatedError,
    RetryableError,
)
from milvus_cdc.sink import Sink
from milvus_cdc.source import LogEntry, LogSource

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import Halted
from milvus_cdc_replicator.spec import MetadataAssignment, Operations

log = structlog.get_logger()

READ_BYTES = 1024 * 1024
READ_WAIT_SECONDS = 2.0
ABSENT_SECONDS = 5.0
ABSENT_SECONDS_MAX = 60.0
"""How often a channel that is not there is looked for: a source that has none seldom gets one."""
RETRY_SECONDS = 2.0
CREDENTIAL_ATTEMPTS = 5
_AT, _AFTER = b"\x00", b"\x01"
"""First byte of a place: the entry at the position is still to come, or has been seen to."""


class OperationsReader:
    """Start with `start()`, end with `stop()`."""

    def __init__(
        self,
        assignment: MetadataAssignment,
        operations: Operations,
        *,
        connections: Connections,
        gate: WriteGate,
        halt: asyncio.Event,
        notify: Callable[[], None],
    ) -> None:
        self.operations = operations
        self._assignment = assignment
        self._connections = connections
        self._gate = gate
        self._halt = halt
        self._notify = notify
        self._place = operations.read_from
        self._flushes: list[FlushOperation] = []
        self._told: dict[int, int] = {}
        """By number of the report: how many of the flushes it told."""
        self._from_first = False
        self._failed_users: dict[str, str] = {}
        self._missed = ""
        self._task: asyncio.Task[None] | None = None
        self._log = log.bind(task=assignment.task, channel=operations.channel)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"operations {self._assignment.task}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def flushes(self) -> tuple[FlushOperation, ...]:
        """Not known to be stored yet."""
        return tuple(self._flushes)

    @property
    def place(self) -> bytes:
        """Everything before it is among `flushes`, stored, or carried out."""
        return self._place

    @property
    def conditions(self) -> list[tuple[str, str]]:
        found = [
            ("CREDENTIAL_NOT_CARRIED", f"User {user!r} at the sink: {why}")
            for user, why in sorted(self._failed_users.items())
        ]
        if self._missed:
            found.append(("OPERATIONS_MISSED", self._missed))
        return found

    def reported(self, seq: int) -> None:
        self._told[seq] = len(self._flushes)

    def acked(self, seq: int) -> None:
        done = self._told.get(seq, 0)
        del self._flushes[:done]
        self._told = {s: n - done for s, n in self._told.items() if s > seq}

    async def _run(self) -> None:
        absent = ABSENT_SECONDS
        while not self._halt.is_set():
            delay = RETRY_SECONDS
            try:
                source = await self._connections.source(self._assignment.source)
                if await self._begin(source):
                    await self._follow(source)
                else:
                    delay = absent
                    absent = min(2 * absent, ABSENT_SECONDS_MAX)
            except (LogTruncatedError, LogResetError) as error:
                self._missed = (
                    f"The queue lost part of {self.operations.channel}: flushes and changed "
                    "passwords of that time are not carried."
                )
                self._log.warning("operations lost", error=error.message)
                self._place, self._from_first = b"", True
            except Halted:
                return
            except CdcError as error:
                self._log.warning(
                    "operations interrupted", reason=error.reason, error=error.message
                )
            except Exception as unexpected:
                self._log.exception("operations failed unexpectedly")
                delay = 5 * RETRY_SECONDS
                self._missed = repr(BugError("REPLICATOR_BUG", repr(unexpected)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._halt.wait(), delay * (0.5 + random.random()))

    async def _begin(self, source: LogSource) -> bool:
        """Knows where to read from; False while there is no such channel."""
        if self._place:
            return True
        try:
            found = await source.log_range(self.operations.channel)
        except LogResetError:
            # Everything it will ever hold is new.
            self._from_first = True
            return False
        self._place = _AT + (found.first if self._from_first else found.end)
        self._notify()
        return True

    async def _follow(self, source: LogSource) -> None:
        position = self._place[1:]
        seen = source.order(position) if self._place[:1] == _AFTER else -1
        try:
            reader = await source.open(self.operations.channel, position)
        except LogTruncatedError:
            found = await source.log_range(self.operations.channel)
            if source.order(found.first) > seen + 1 or self._place[:1] == _AT:
                raise
            # What the queue forgot had been seen to.
            self._place = _AT + found.first
            return
        try:
            sink = await self._connections.sink(self._assignment.sink)
            while not self._halt.is_set():
                for entry in await reader.read(READ_BYTES, READ_WAIT_SECONDS):
                    if source.order(entry.position) > seen:
                        await self._take(sink, entry)
        finally:
            with contextlib.suppress(CdcError):
                await reader.close()

    async def _take(self, sink: Sink, entry: LogEntry) -> None:
        operation: Operation = decode_operation(entry.payload)
        match operation:
            case FlushOperation() if self.operations.flush:
                self._flushes.append(operation)
            case CredentialOperation() if self.operations.credentials:
                await self._change_credential(sink, operation)
            case UnknownOperation(kind):
                metrics.OPERATIONS_LEFT.labels(kind).inc()
            case _:
                pass
        self._place = _AFTER + entry.position
        self._notify()

    async def _change_credential(self, sink: Sink, operation: CredentialOperation) -> None:
        change = operation.change
        for attempt in range(CREDENTIAL_ATTEMPTS):
            try:
                async with self._gate.ddl(self._halt):
                    await sink.change_credential(change)
            except RetryableError as error:
                failed = error.message
                await asyncio.sleep(RETRY_SECONDS * (attempt + random.random()))
            except CdcError as error:
                failed = error.message
                break
            else:
                self._failed_users.pop(change.user, None)
                self._log.info("credential carried", action=change.action, user=change.user)
                return
        self._failed_users[change.user] = failed
        self._log.warning("credential not carried", user=change.user, error=failed)
