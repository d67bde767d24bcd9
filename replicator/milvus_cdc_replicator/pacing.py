"""Writes of one task wait here for its limits, in order of their arrival, before they ask for the
lease or a slot at the sink.

Laws: who waits holds nothing that others need, and leaves at once when told to halt. A change of
the limits counts at once for those that wait; what is under way ends as it began.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

from milvus_cdc.model import RateLimits

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.core.pace import Pace
from milvus_cdc_replicator.halting import Halted

LOOK_AGAIN_SECONDS = 1.0
"""Time that is waited is counted at least so often."""


@dataclass(eq=False)
class _Turn:
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """It is the first, or what it waits for has changed."""


class _Queue:
    """Who waits for one thing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: deque[_Turn] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def look(self) -> None:
        """What they wait for has changed."""
        for turn in self._waiting:
            turn.news.set()

    async def wait(self, task: str, delay: Callable[[], float], halt: asyncio.Event) -> None:
        """Until it is the first, and `delay` (seconds) is 0. Raises Halted."""
        turn = _Turn()
        halted = asyncio.create_task(halt.wait())
        waited = metrics.RATE_LIMITED_SECONDS.labels(task)
        with self._queued(turn), contextlib.ExitStack() as stack:
            stack.callback(halted.cancel)
            while True:
                if halt.is_set():
                    raise Halted
                now, seconds = self._clock(), LOOK_AGAIN_SECONDS
                if self._waiting[0] is turn:
                    left = delay()
                    if not left:
                        return
                    seconds = min(seconds, left)
                turn.news.clear()
                news = asyncio.create_task(turn.news.wait())
                try:
                    await asyncio.wait(
                        {news, halted}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    news.cancel()
                waited.inc(max(0.0, self._clock() - now))

    @contextlib.contextmanager
    def _queued(self, turn: _Turn) -> Iterator[None]:
        self._waiting.append(turn)
        try:
            yield
        finally:
            self._waiting.remove(turn)
            if self._waiting:
                self._waiting[0].news.set()


class Places:
    """So many at once and no more; any number while `most` is 0."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = _Queue(clock)
        self._most = 0
        self._taken = 0

    def change(self, most: int) -> None:
        self._most = most
        self._queue.look()

    def free(self) -> bool:
        """Takes one if there is one, and nobody waits for it."""
        if self._queue or self._delay():
            return False
        self._taken += 1
        return True

    async def wait(self, task: str, halt: asyncio.Event) -> None:
        """Until one is free; takes it. Raises Halted."""
        await self._queue.wait(task, self._delay, halt)
        self._taken += 1

    def give_back(self) -> None:
        self._taken -= 1
        self._queue.look()

    def _delay(self) -> float:
        """Nobody knows when one is given back."""
        return LOOK_AGAIN_SECONDS if self._most and self._taken >= self._most else 0.0


class Pacer:
    """Of one task in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pace = Pace()
        self._queue = _Queue(clock)
        self.requests = Places(clock)
        """Each attempt of a write takes one for as long as it is under way."""
        self.openings = Places(clock)

    @property
    def limits(self) -> RateLimits:
        """What this process may do of the task's."""
        return self._pace.limits

    def change(self, limits: RateLimits) -> None:
        self._pace.change(limits, self._clock())
        self._queue.look()
        self.requests.change(limits.requests_in_flight)
        self.openings.change(limits.requests_in_flight)

    def free(self, rows: int, size: int) -> bool:
        """Takes it if it may start now, and nobody waits before it."""
        now = self._clock()
        if self._queue or self._pace.delay(rows, size, now):
            return False
        self._pace.take(rows, size, now)
        return True

    async def wait(self, task: str, rows: int, size: int, halt: asyncio.Event) -> None:
        """Until a write of so many rows and bytes may start. Raises Halted."""
        await self._queue.wait(task, lambda: self._pace.delay(rows, size, self._clock()), halt)
        self._pace.take(rows, size, self._clock())


class Pacers:
    """Of all tasks in this process, by uid."""

    def __init__(self) -> None:
        self._pacers: dict[str, Pacer] = {}
        self._told: set[str] = set()

    def of(self, task_uid: str) -> Pacer:
        return self._pacers.setdefault(task_uid, Pacer())

    def tell(self, task_uid: str, limits: RateLimits) -> None:
        self._told.add(task_uid)
        self.of(task_uid).change(limits)

    def connected(self) -> None:
        """A new stream: limits are told anew before `synced`."""
        self._told.clear()

    def synced(self) -> None:
        """What was not told since is over."""
        for task_uid, pacer in self._pacers.items():
            if task_uid not in self._told and pacer.limits != RateLimits():
                pacer.change(RateLimits())

    def forget(self, held: Container[str]) -> None:
        """Those without limits whose tasks (uids) are not among `held`."""
        for task_uid, pacer in list(self._pacers.items()):
            if task_uid not in held and pacer.limits == RateLimits():
                del self._pacers[task_uid]
