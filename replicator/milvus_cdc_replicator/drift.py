"""Keeps one sink collection, rows aside, as the source has it: compared at the start, after a
change, after a break of a connection and every few minutes; mended, or only told.

Laws: what the source changed is always carried out; what others changed at the sink is mended under
REPAIR and left alone under REPORT. A repair that is refused stands as a trouble that names its
object, while rows and other repairs go on; it is tried again later, after a change or at the next
comparison, never at once. A repair that shows no effect is not repeated before something changes. A
surplus partition is dropped only while none of that name is made.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.model import Carry, Collection, Drift, ObjectState, ms_to_tso
from milvus_cdc.sink import Sink
from milvus_cdc.sink.differences import DESCRIPTION, Action, ObjectDifference, is_missing

from milvus_cdc_replicator.gate import Halted, WriteGate
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.source_properties import SourceProperties
from milvus_cdc_replicator.spec import Applied, CollectionAssignment

LOOK_SECONDS = 60.0
ROUND_SECONDS = (0.5, 2.0)
"""Pauses before what was mended is looked at again; after the last one nothing is mended."""
AGAIN_SECONDS = (2.0, 5.0, 15.0, 60.0)
CONFIRM_SECONDS = 3.0
SURE_SECONDS = 1.0
JITTER = 0.2
DROP_MARGIN_MS = 60_000
"""The log's message of a partition's drop is a little later than the drop in the metadata."""
SHOWN = 3
COMPARE = "compare with the sink"

T = TypeVar("T")
Place = tuple[str, str]


def without_dropped(want: Collection, resolved_ts: int, dropped: frozenset[int]) -> Collection:
    """Without the partitions whose drop is certainly done at the sink: their names are surplus
    there. A drop that is on its way in the log keeps its partition's name; one that was carried out
    counts before the metadata, which is heard of later, shows it.
    """
    margin = ms_to_tso(DROP_MARGIN_MS)

    def done(partition_id: int, drop_ts: int) -> bool:
        return partition_id in dropped or 0 < drop_ts <= resolved_ts - margin

    partitions = tuple(
        p
        for p in want.partitions
        if not done(p.partition_id, 0 if p.state is ObjectState.CREATED else p.drop_ts)
    )
    return want if len(partitions) == len(want.partitions) else replace(want, partitions=partitions)


class Reconciler:
    """Bound to one collection of one owner. `due` says when to `run`."""

    def __init__(
        self,
        sink: Sink,
        *,
        gate: WriteGate,
        halt: asyncio.Event,
        troubles: Troubles,
        conditions: dict[str, str],
        properties: SourceProperties | None,
        partitions: asyncio.Lock,
        current: Callable[[], Collection],
        every_seconds: float,
        log: Any,
    ) -> None:
        """`partitions` is held by whoever makes or drops one; `current` is what is wanted now."""
        self._sink = sink
        self._gate = gate
        self._halt = halt
        self._troubles = troubles
        self._conditions = conditions
        self._properties = properties
        self._partitions = partitions
        self._current = current
        self._every = every_seconds
        self.log = log
        self.applied_version = 0
        self._applied: Applied | None = None
        self._seen_version = 0
        self._next = 0.0
        self._attempts = 0
        self._standing: dict[Place, CdcError] = {}
        """What could not be mended."""
        self._without_effect: set[Place] = set()
        self._turn = asyncio.Lock()
        self._restored = 0

    def due(self, version: int) -> bool:
        return version != self._seen_version or time.monotonic() >= self._next

    def soon(self, seconds: float = 0.0) -> None:
        """Look again at the latest in so many seconds."""
        self._next = min(self._next, time.monotonic() + seconds)

    async def run(self, assignment: CollectionAssignment, want: Collection) -> None:
        """Compares and mends. Raises UserError when the collection itself is gone."""
        async with self._turn:
            if assignment.version != self._seen_version:
                self._without_effect.clear()
            self._seen_version = assignment.version
            self._next = time.monotonic() + self._every * random.uniform(1 - JITTER, 1 + JITTER)
            try:
                await self._run(assignment, want)
            except Halted:
                return
            except RetryableError as error:
                self._troubles.add(COMPARE, error)
                self._again()
                return
            except UserError as error:
                if error.reason in ("SINK_COLLECTION_MISSING", "SINK_COLLECTION_REPLACED"):
                    raise
                self._troubles.add(COMPARE, error)
                return
            self._troubles.clear(COMPARE)
            if any(isinstance(error, RetryableError) for error in self._standing.values()):
                self._again()
            else:
                self._attempts = 0

    async def restore(self, assignment: CollectionAssignment, want: Collection) -> bool:
        """A write or change was refused for want of its collection or partition: True when that is
        back. Several may ask for it at once.
        """
        if assignment.drift is Drift.REPORT or not assignment.carry.schema:
            return False
        before = self._restored
        async with self._turn:
            if self._restored != before:
                return True
            try:
                found = await self._look(assignment, want, Carry(index=False, load=False))
                for difference in found:
                    if is_missing(difference):
                        return False
                    if difference.kind in ("collection", "partition"):
                        await self._mend(assignment, want, difference, False)
            except Halted:
                return False
            except CdcError as error:
                self.log.warning("cannot restore", reason=error.reason, error=error.message)
                return False
        return self._restored != before

    def _again(self) -> None:
        delay = AGAIN_SECONDS[min(self._attempts, len(AGAIN_SECONDS) - 1)]
        self._attempts += 1
        self.soon(delay * random.uniform(1 - JITTER, 1 + JITTER))

    # ---- one comparison

    async def _run(self, assignment: CollectionAssignment, want: Collection) -> None:
        properties = await self._effective(assignment, want)
        carry = assignment.carry
        if properties is not None:
            want = replace(want, properties=properties)
        refused: dict[Place, CdcError] = {}
        mended: set[Place] = set()
        first: set[Place] | None = None
        left: list[ObjectDifference] = []
        for pause in (*ROUND_SECONDS, None):
            differences = await self._look(assignment, want, carry)
            if properties is None:
                differences = tuple(d for d in differences if not _is_property(d))
            for difference in filter(is_missing, differences):
                await self._repair(assignment, want, difference)
            first = {d.place for d in differences} if first is None else first
            caused = {d for d in differences if self._caused(assignment, d, mended, first)}
            ours = [d for d in differences if assignment.drift is Drift.REPAIR or d in caused]
            self._tell([d for d in differences if d not in ours])
            left = [
                d for d in ours if d.place not in refused and d.place not in self._without_effect
            ]
            self._clear({d.place for d in differences})
            if pause is None or not left:
                break
            for difference in left:
                try:
                    await self._mend(assignment, want, difference, difference in caused)
                    mended.add(difference.place)
                except CdcError as error:
                    refused[difference.place] = _named(error, want, difference)
            await self._pause(pause)
        for difference in left:
            if self._made_meanwhile(difference):
                continue
            # Loading may fail later on, and may succeed when the sink has room again.
            if difference.kind != "load":
                self._without_effect.add(difference.place)
            refused[difference.place] = UserError(
                "SINK_CHANGE_WITHOUT_EFFECT",
                f"{want.full_name}, {difference.text}; the sink took the change and does not show "
                "it; `milvus-cdc task retry` tries it again",
            )
        for place, trouble in refused.items():
            self._standing[place] = trouble
            self._troubles.add(_where(place), trouble)
        if not self._standing:
            self._applied = Applied.of(assignment.want)
            self.applied_version = assignment.version

    async def _look(
        self, assignment: CollectionAssignment, want: Collection, carry: Carry
    ) -> tuple[ObjectDifference, ...]:
        async with self._gate.comparisons:
            return await self._unless_halted(
                partial(
                    self._sink.diff,
                    want,
                    carry,
                    sink_collection_id=assignment.sink_collection_id,
                )
            )

    async def _effective(
        self, assignment: CollectionAssignment, want: Collection
    ) -> tuple[tuple[str, str], ...] | None:
        """The properties as the source's API tells them, where it is given: the metadata of 2.3
        hides changes. None when they are not known now.
        """
        if self._properties is None or not assignment.carry.schema:
            return want.properties
        base = self._applied or assignment.applied
        try:
            found = await self._unless_halted(
                partial(self._properties.of, want, assignment.source_database)
            )
        except CdcError:
            if base is not None and want.alter_ts > base.alter_ts:
                raise  # a change that waits must be seen to wait
            return None
        if self._properties.unconfirmed:
            self.soon(CONFIRM_SECONDS)
        return found

    def _caused(
        self,
        assignment: CollectionAssignment,
        difference: ObjectDifference,
        mended: set[Place],
        first: set[Place],
    ) -> bool:
        """The source did it, since an owner last said that all was as wanted."""
        base, want = self._applied or assignment.applied, assignment.want
        touched = assignment.applied or base
        if base is None or touched is None or difference.place in mended:
            return True
        match difference.kind:
            case "index":
                changed = set(base.indexes) ^ set(want.indexes)
                names = {index.name for index in changed} | touched.touched_indexes
                return difference.name in names
            case "load":
                alive = Applied.of(want).partition_ids
                # Some servers let an index or a property be changed only after a release.
                released = difference.place not in first and bool(mended)
                changed_load = touched.touched_load or base.load != want.load
                return released or changed_load or base.partition_ids != alive
            case "property":
                return want.alter_ts > base.alter_ts
            case "partition":
                drop = difference.action is Action.DROP
                return any(
                    p.name == difference.name
                    and (
                        p.state is ObjectState.DROPPED
                        if drop
                        else p.partition_id not in base.partition_ids
                    )
                    for p in want.partitions
                )
        return False

    def _tell(self, differences: list[ObjectDifference]) -> None:
        if not differences:
            self._conditions.pop("DRIFT", None)
            return
        texts = "; ".join(difference.text for difference in differences[:SHOWN])
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        self._conditions["DRIFT"] = (
            f"differs at the sink by no change of the source: {texts}{more}; "
            "`milvus-cdc task diff` shows all, `task update --drift repair` mends it"
        )

    def _clear(self, places: set[Place]) -> None:
        for place in [place for place in self._standing if place not in places]:
            del self._standing[place]
            self._troubles.clear(_where(place))
        self._without_effect &= places

    # ---- one repair

    async def _mend(
        self,
        assignment: CollectionAssignment,
        want: Collection,
        difference: ObjectDifference,
        caused: bool,
    ) -> None:
        if difference.kind == "partition":
            async with self._partitions:
                if self._made_meanwhile(difference):
                    return
                await self._surely(assignment, want, difference)
            self._note_emptied(assignment, difference)
        else:
            await self._repair(assignment, want, difference)
        self._restored += difference.kind in ("collection", "partition")
        self.log.info(
            "change carried out" if caused else "drift mended",
            action=difference.action,
            object=difference.text,
        )

    def _made_meanwhile(self, difference: ObjectDifference) -> bool:
        """The source has made a partition of that name since the comparison began, or its drop came
        with the log.
        """
        if difference.kind != "partition":
            return False
        there = any(p.name == difference.name for p in self._current().partitions)
        return there if difference.action is Action.DROP else not there

    async def _repair(
        self, assignment: CollectionAssignment, want: Collection, difference: ObjectDifference
    ) -> None:
        async with self._gate.ddl(self._halt):
            await self._sink.repair(
                want, difference, sink_collection_id=assignment.sink_collection_id
            )

    async def _surely(
        self, assignment: CollectionAssignment, want: Collection, difference: ObjectDifference
    ) -> None:
        """Until its outcome is known: a late drop would hit a partition made meanwhile."""
        while True:
            try:
                await self._repair(assignment, want, difference)
                return
            except RetryableError as error:
                self._troubles.add(_where(difference.place), error)
                await self._pause(SURE_SECONDS)
            finally:
                self._troubles.clear(_where(difference.place))

    def _note_emptied(self, assignment: CollectionAssignment, difference: ObjectDifference) -> None:
        base = self._applied or assignment.applied
        if base is None or difference.action is not Action.CREATE:
            return
        emptied = [
            p.name
            for p in assignment.want.partitions
            if p.name == difference.name and p.partition_id in base.partition_ids
        ]
        note_emptied(self._conditions, emptied)

    # ---- waiting

    async def _unless_halted(self, call: Callable[[], Awaitable[T]]) -> T:
        """What only looks need not come to its end."""
        if self._halt.is_set():
            raise Halted
        work = asyncio.ensure_future(call())
        halted = asyncio.create_task(self._halt.wait())
        try:
            await asyncio.wait(
                {work, halted}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if work.done():
                return work.result()
            if halted.done():
                raise Halted
            raise RetryableError("SINK_TIMEOUT", f"no answer within {LOOK_SECONDS:.0f} s")
        finally:
            for task in (work, halted):
                task.cancel()
            await asyncio.gather(work, halted, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._halt.wait(), seconds)
        except TimeoutError:
            return
        raise Halted


def note_emptied(conditions: dict[str, str], partitions: list[str]) -> None:
    """Says that partitions were dropped at the sink by somebody, and made anew without rows."""
    if partitions:
        conditions["PARTITION_EMPTIED"] = (
            f"dropped at the sink by somebody, made anew without their rows: {partitions}; "
            "`milvus-cdc task resync` fills the collection again"
        )


def _is_property(difference: ObjectDifference) -> bool:
    return difference.kind == "property" and difference.name != DESCRIPTION


def _where(place: Place) -> str:
    kind, name = place
    return f"{kind} {name}".strip()


def _named(error: CdcError, want: Collection, difference: ObjectDifference) -> CdcError:
    """The same error, saying of which object it speaks."""
    message = f"{want.full_name}, {difference.text}; {error.message}"
    if isinstance(error, RetryableError):
        return RetryableError(error.reason, message)
    return UserError(error.reason, f"{message}; tried again after a change and every few minutes")
