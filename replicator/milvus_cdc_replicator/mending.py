"""Carries one difference out at a sink collection.

Laws: a partition is made or dropped while nobody else does, after a look that it is still called
for, and until the outcome is known. Whoever asks says why; this only does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from milvus_cdc.errors import RetryableError
from milvus_cdc.model import Collection
from milvus_cdc.sink import Sink
from milvus_cdc.sink.differences import Action, ObjectDifference

from milvus_cdc_replicator.cause import Place
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import pause
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.spec import CollectionAssignment

SURE_SECONDS = 1.0


class Mender:
    """Bound to one collection of one owner."""

    def __init__(
        self,
        sink: Sink,
        *,
        gate: WriteGate,
        halt: asyncio.Event,
        troubles: Troubles,
        partitions: asyncio.Lock,
        current: Callable[[], Collection],
    ) -> None:
        """`partitions` is held by whoever makes or drops one; `current` is what is wanted now."""
        self._sink = sink
        self._gate = gate
        self._halt = halt
        self._troubles = troubles
        self._partitions = partitions
        self._current = current

    async def mend(
        self, assignment: CollectionAssignment, want: Collection, difference: ObjectDifference
    ) -> bool:
        """False when it is no longer called for. Raises CdcError, Halted."""
        if difference.kind != "partition":
            await self.repair(assignment, want, difference)
            return True
        async with self._partitions:
            if self.made_meanwhile(difference):
                return False
            await self._surely(assignment, want, difference)
            return True

    def made_meanwhile(self, difference: ObjectDifference) -> bool:
        """The source has made a partition of that name since the comparison began, or its drop came
        with the log.
        """
        if difference.kind != "partition":
            return False
        there = any(p.name == difference.name for p in self._current().partitions)
        return there if difference.action is Action.DROP else not there

    async def repair(
        self, assignment: CollectionAssignment, want: Collection, difference: ObjectDifference
    ) -> None:
        """One try. Raises CdcError, Halted."""
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
                await self.repair(assignment, want, difference)
                return
            except RetryableError as error:
                self._troubles.add(trouble_place(difference.place), error)
                await pause(self._halt, SURE_SECONDS)
            finally:
                self._troubles.clear(trouble_place(difference.place))


def trouble_place(place: Place) -> str:
    """Under what a trouble of an object is shown."""
    kind, name = place
    return f"{kind} {name}".strip()
