"""When the owner of a collection is woken though nothing has come: once a second for its chores,
for ticks that something waits for, for an unfinished request whose time has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.intake import Intake
from milvus_cdc_replicator.sink_object import SinkObject
from milvus_cdc_replicator.sink_work import look_again

HOUSEKEEPING_SECONDS = 1.0
REST_SECONDS = 0.1


class Alarms:
    """`wake` makes the owner look, `post` hands it an event, `housekeeping` is one."""

    def __init__(
        self,
        core: AssignmentCore,
        *,
        intake: Intake,
        sink_object: SinkObject,
        chores: Callable[[], bool],
        housekeeping: Callable[[], None],
        post: Callable[[Callable[[], None]], None],
        wake: Callable[[], None],
    ) -> None:
        """`chores`: there is something to do for `housekeeping` in any case."""
        self._core = core
        self._intake = intake
        self._object = sink_object
        self._chores = chores
        self._housekeeping = housekeeping
        self._post = post
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    def tick_over(self) -> None:
        """A timer of its own: a timeout around every wait costs more than what is waited for."""
        if self._timer is not None:
            if self._chores() or self._object.waits or not self._core.resting:
                self._post(self._housekeeping)
        self._timer = asyncio.get_running_loop().call_later(HOUSEKEEPING_SECONDS, self.tick_over)

    def tick_waits(self) -> None:
        """It is taken with the next report or row, or soon where something else waits for its
        time: many quiet collections otherwise wake for every tick.
        """
        if self._resting is None and self._object.waits:
            self._resting = asyncio.get_running_loop().call_later(REST_SECONDS, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._wake()

    def mind_lingering(self) -> None:
        """An unfinished request goes out when its time has come, or its memory is needed."""
        sequencer = self._core.sequencer
        if not sequencer.lingering:
            return
        if not self._intake.has_memory or self._object.waits:
            sequencer.hurry()
            self._post(look_again)
        elif self._linger is None:
            loop = asyncio.get_running_loop()
            self._linger = loop.call_later(self._object.arrangement.linger_seconds, self._lingered)

    def _lingered(self) -> None:
        self._linger = None
        self._post(self._core.sequencer.hurry)

    def linger_anew(self) -> None:
        """How long is another now."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._resting is not None:
            self._resting.cancel()
        if self._linger is not None:
            self._linger.cancel()
