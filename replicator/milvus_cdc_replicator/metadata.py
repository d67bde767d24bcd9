"""Runs a task's metadata assignment: databases, aliases and roles at the sink as wanted.

Laws: level-triggered: each version is applied whole, the newest wins, and every so often the sink
is looked at anew. What is in the way of one object is shown and hides no other; a version counts as
applied when nothing is in the way. With drift REPORT only what the source has changed is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Hashable

import structlog
from milvus_cdc.errors import BugError, CdcError, RetryableError
from milvus_cdc.model import Drift
from milvus_cdc.sink.differences import ObjectDifference
from milvus_cdc.sink.metadata import MetadataDiff, Repair, Trouble, wish_items

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.core.counters import Counters
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import Halted
from milvus_cdc_replicator.operations import OperationsReader
from milvus_cdc_replicator.report import Report
from milvus_cdc_replicator.spec import MetadataAssignment

log = structlog.get_logger()

RETRY_SECONDS = 2.0
RESTING_SECONDS = 60.0
"""Without news it is reported this seldom at least."""
CREDENTIAL_SECONDS = 10.0
"""How often a sink without a user is looked at, so that its roles follow soon."""
_NEVER = frozenset({"SINK_UNSUPPORTED", "SINK_ROLE_IN_USE"})
"""Reasons of a sink that will say the same again: a remark, not a trouble that lasts."""
_BEFORE_ALIASES = frozenset({"database", "alias"})


class MetadataRunner:
    """Start with `start()`, end with `stop()`; in between `update`, and `report` when asked."""

    def __init__(
        self,
        assignment: MetadataAssignment,
        *,
        connections: Connections,
        gate: WriteGate,
        notify: Callable[[str], None],
        reconcile_seconds: float,
    ) -> None:
        self.assignment = assignment
        self._connections = connections
        self._gate = gate
        self._notify = notify
        self._reconcile_seconds = reconcile_seconds
        self._halt = asyncio.Event()
        self.resting_seconds = RESTING_SECONDS
        self._changed = asyncio.Event()
        self._applied_version = 0
        self._aliases_version = 0
        self._applied: frozenset[Hashable] | None = None
        """The wishes that the sink was brought to fulfil; None while that is not known."""
        if assignment.applied_version >= assignment.version:
            self._applied = wish_items(assignment.wish)
        self._troubles: tuple[Trouble, ...] = ()
        self._conditions: tuple[tuple[str, str], ...] = ()
        self._operations: OperationsReader | None = None
        self._owner: asyncio.Task[None] | None = None
        self._log = log.bind(task=assignment.task)

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
        if self._operations is not None:
            await self._operations.stop()

    def rest(self, seconds: float) -> None:
        """How often it is to be reported while nothing happens."""
        self.resting_seconds = max(RESTING_SECONDS, seconds)

    @property
    def has_news(self) -> bool:
        """What happens is told at once; what the operations channel said, until it is stored."""
        return self._operations is not None and bool(self._operations.flushes)

    def reported(self, seq: int) -> None:
        """The report just asked for goes out under this number."""
        if self._operations is not None:
            self._operations.reported(seq)

    def acked(self, seq: int) -> None:
        """Everything in that report is stored."""
        if self._operations is not None:
            self._operations.acked(seq)

    def report(self) -> Report:
        # A user error too: it must not stop rows, so it stays visible and is tried again.
        first = next(iter(self._troubles), None)
        message = ""
        if first is not None:
            others = len(self._troubles) - 1
            message = f"{first.kind} {first.name}: {first.error.message}".replace(" :", ":")
            message += f" ({others} more)" if others else ""
        operations = self._operations
        return Report(
            assignment_id=self.assignment.assignment_id,
            epoch=self.assignment.epoch,
            state="RUNNING" if first is None else "RETRYING",
            reason="" if first is None else first.error.reason,
            message=message,
            lanes=(),
            counters=Counters(),
            lag_ms=-1,
            conditions=(*self._conditions, *(operations.conditions if operations else ())),
            opened=None,
            dropped=False,
            applied_version=self._applied_version,
            aliases_version=self._aliases_version,
            flushes=operations.flushes if operations else (),
            operations_read_from=operations.place if operations else b"",
        )

    async def _run(self) -> None:
        with self._connections.using(self.assignment.sink):
            await self._run_connected()

    async def _run_connected(self) -> None:
        while not self._halt.is_set():
            self._changed.clear()
            wanted = self.assignment
            try:
                await self._follow_operations(wanted)
                await self._apply(wanted)
            except Halted:
                return
            except Exception as unexpected:
                if isinstance(unexpected, CdcError):
                    error = unexpected
                else:
                    self._log.exception("metadata failed unexpectedly")
                    error = BugError("REPLICATOR_BUG", repr(unexpected))
                self._show((Trouble("sink", "", error),))
            self._notify(wanted.assignment_id)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._pause())

    def _pause(self) -> float:
        """Until the next look, in seconds; a change cuts it short."""
        seconds = self._reconcile_seconds
        if any(kind == "CREDENTIAL_NEEDED" for kind, _ in self._conditions):
            seconds = min(seconds, CREDENTIAL_SECONDS)
        if self._troubles:
            patient = not any(isinstance(each.error, RetryableError) for each in self._troubles)
            seconds = min(seconds, RETRY_SECONDS * (5 if patient else 1))
        return seconds * (0.75 + random.random() / 2)

    async def _follow_operations(self, wanted: MetadataAssignment) -> None:
        now = self._operations
        asked = wanted.operations
        if now is not None and asked is not None:
            was = now.operations
            same = (was.channel, was.flush, was.credentials) == (
                asked.channel,
                asked.flush,
                asked.credentials,
            )
            if same:
                return
        if now is not None:
            await now.stop()
            self._operations = None
        if asked is not None:
            self._operations = OperationsReader(
                wanted,
                asked,
                connections=self._connections,
                gate=self._gate,
                halt=self._halt,
                notify=lambda: self._notify(wanted.assignment_id),
            )
            self._operations.start()

    async def _apply(self, wanted: MetadataAssignment) -> None:
        sink = await self._connections.sink(wanted.sink)
        diff = await sink.look_at_metadata(wanted.wish)
        items = wish_items(wanted.wish)
        drifted: list[ObjectDifference] = []
        if wanted.drift is Drift.REPORT and self._applied is not None:
            changed = items - self._applied
            drifted = [each.difference for each in diff.repairs if each.item not in changed]
            diff.repairs = [each for each in diff.repairs if each.item in changed]
        for repair in diff.repairs:
            await self._mend(repair, diff)
        if drifted:
            diff.conditions.append(_drift(drifted))
        self._conditions = tuple(diff.conditions)
        self._show(tuple(diff.troubles))
        if not any(trouble.kind in _BEFORE_ALIASES for trouble in diff.troubles):
            self._aliases_version = wanted.version
        if not diff.troubles:
            self._applied_version = wanted.version
            self._applied = items

    async def _mend(self, repair: Repair, diff: MetadataDiff) -> None:
        if repair.mend is None:
            return
        difference = repair.difference
        try:
            async with self._gate.ddl(self._halt):
                await repair.mend()
        except CdcError as error:
            if error.reason in _NEVER:
                diff.conditions.append((error.reason, f"{difference.text}: {error.message}"))
            else:
                diff.troubles.append(Trouble(difference.kind, difference.name, error))
            return
        self._log.info(
            "mended",
            action=difference.action,
            kind=difference.kind,
            database=difference.database,
            name=difference.name,
            detail=difference.detail,
        )

    def _show(self, troubles: tuple[Trouble, ...]) -> None:
        known = {(each.kind, each.name, each.error.reason) for each in self._troubles}
        for trouble in troubles:
            if (trouble.kind, trouble.name, trouble.error.reason) not in known:
                self._log.warning(
                    "retrying",
                    kind=trouble.kind,
                    name=trouble.name,
                    reason=trouble.error.reason,
                    error=trouble.error.message,
                )
        self._troubles = troubles


def _drift(differences: list[ObjectDifference]) -> tuple[str, str]:
    shown = "; ".join(each.text for each in differences[:3])
    return ("DRIFT", f"{len(differences)} differences that the source did not cause: {shown}")
