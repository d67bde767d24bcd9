"""Keeps one sink collection, rows aside, as the source has it: compared at the start, after a
change, after a break of a connection and every few minutes; mended, or only told.

Laws: what the source changed is always carried out; what others changed at the sink is mended under
REPAIR and left alone under REPORT. A repair that is refused stands as a trouble that names its
object, while rows and other repairs go on; it is tried again later, after a change or at the next
comparison, never at once. A repair that shows no effect is not repeated before something changes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.model import Carry, Collection, Drift, ObjectState, ms_to_tso
from milvus_cdc.sink import Sink
from milvus_cdc.sink.differences import DESCRIPTION, Action, ObjectDifference, is_missing

from milvus_cdc_replicator.cause import Place, by_source
from milvus_cdc_replicator.core.assignment import DROP_MARGIN_MS
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import Halted, pause, unless_halted
from milvus_cdc_replicator.mending import Mender, trouble_place
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.source_properties import SourceProperties
from milvus_cdc_replicator.spec import Applied, CollectionAssignment

LOOK_SECONDS = 60.0
ROUND_SECONDS = (0.5, 2.0)
"""Pauses before what was mended is looked at again; after the last one nothing is mended."""
AGAIN_SECONDS = (2.0, 5.0, 15.0, 60.0)
CONFIRM_SECONDS = 3.0
JITTER = 0.2
SHOWN = 3
COMPARE = "compare with the sink"


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
        self._mender = Mender(
            sink,
            gate=gate,
            halt=halt,
            troubles=troubles,
            partitions=partitions,
            current=current,
        )
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
        for seconds in (*ROUND_SECONDS, None):
            differences = await self._look(assignment, want, carry)
            if properties is None:
                differences = tuple(d for d in differences if not _is_property(d))
            for difference in filter(is_missing, differences):
                await self._mender.repair(assignment, want, difference)
            first = {d.place for d in differences} if first is None else first
            base = self._applied or assignment.applied
            caused = {
                d for d in differences if by_source(assignment, base, d, mended=mended, first=first)
            }
            ours = [d for d in differences if assignment.drift is Drift.REPAIR or d in caused]
            self._tell([d for d in differences if d not in ours])
            left = [
                d for d in ours if d.place not in refused and d.place not in self._without_effect
            ]
            self._clear({d.place for d in differences})
            if seconds is None or not left:
                break
            for difference in left:
                try:
                    await self._mend(assignment, want, difference, difference in caused)
                    mended.add(difference.place)
                except CdcError as error:
                    refused[difference.place] = _named(error, want, difference)
            await pause(self._halt, seconds)
        for difference in left:
            if self._mender.made_meanwhile(difference):
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
            self._troubles.add(trouble_place(place), trouble)
        if not self._standing:
            self._applied = Applied.of(assignment.want)
            self.applied_version = assignment.version

    async def _look(
        self, assignment: CollectionAssignment, want: Collection, carry: Carry
    ) -> tuple[ObjectDifference, ...]:
        async with self._gate.comparing(assignment.sink):
            look = partial(
                self._sink.diff, want, carry, sink_collection_id=assignment.sink_collection_id
            )
            found = await unless_halted(self._halt, look, seconds=LOOK_SECONDS)
        if not assignment.part:
            return found
        # It may be of another part, which has heard of it first, with rows in it.
        return tuple(d for d in found if (d.kind, d.action) != ("partition", Action.DROP))

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
            ask = partial(self._properties.of, want, assignment.source_database)
            found = await unless_halted(self._halt, ask, seconds=LOOK_SECONDS)
        except CdcError:
            if base is not None and want.alter_ts > base.alter_ts:
                raise  # a change that waits must be seen to wait
            return None
        if self._properties.unconfirmed:
            self.soon(CONFIRM_SECONDS)
        return found

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
            self._troubles.clear(trouble_place(place))
        self._without_effect &= places

    # ---- one repair

    async def _mend(
        self,
        assignment: CollectionAssignment,
        want: Collection,
        difference: ObjectDifference,
        caused: bool,
    ) -> None:
        if not await self._mender.mend(assignment, want, difference):
            return
        if difference.kind == "partition":
            self._note_emptied(assignment, difference)
        self._restored += difference.kind in ("collection", "partition")
        self.log.info(
            "change carried out" if caused else "drift mended",
            action=difference.action,
            object=difference.text,
        )

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


def note_emptied(conditions: dict[str, str], partitions: list[str]) -> None:
    """Says that partitions were dropped at the sink by somebody, and made anew without rows."""
    if partitions:
        conditions["PARTITION_EMPTIED"] = (
            f"dropped at the sink by somebody, made anew without their rows: {partitions}; "
            "`milvus-cdc task resync` fills the collection again"
        )


def _is_property(difference: ObjectDifference) -> bool:
    return difference.kind == "property" and difference.name != DESCRIPTION


def _named(error: CdcError, want: Collection, difference: ObjectDifference) -> CdcError:
    """The same error, saying of which object it speaks."""
    message = f"{want.full_name}, {difference.text}; {error.message}"
    if isinstance(error, RetryableError):
        return RetryableError(error.reason, message)
    return UserError(error.reason, f"{message}; tried again after a change and every few minutes")
