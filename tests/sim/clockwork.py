"""Virtual time: one scheduler, an event loop for every process, clocks that drift.

Laws: nothing happens but in the order of the scheduler's queue, so the same seed gives the same
run; a process reads no clock but that of its host; what is frozen or dead runs nothing, and what a
frozen one missed it finds due when it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, copy_context
from typing import Any
from unittest import mock

START_UNIX = 1_700_000_000.0
SPIN_MAX = 50_000
"""So many steps of one process without any time passing are a loop without end."""


class Timer:
    """Something to be done at a time of its own."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        self.call = None


class Handle(Timer):
    """What asyncio knows as one, and as a TimerHandle: without what only debugging needs."""

    __slots__ = ("context", "loop", "moment")

    def __init__(
        self, loop: Loop, call: Callable[..., object], args: tuple[Any, ...], context: Context
    ) -> None:
        self.call = call
        self.args = args
        self.loop = loop
        self.context = context
        self.moment = 0.0

    def cancel(self) -> None:
        self.call, self.args = None, ()

    def cancelled(self) -> bool:
        return self.call is None

    def when(self) -> float:
        return self.moment


class HostClock:
    """Of one machine: goes at a pace of its own, and says what time it is to people."""

    def __init__(self, clockwork: Clockwork, rate: float = 1.0, ahead: float = 0.0) -> None:
        self._clockwork = clockwork
        self.rate = rate
        self.origin = 1_000.0 + ahead
        self._ahead = ahead

    def now(self) -> float:
        """CLOCK_BOOTTIME and CLOCK_MONOTONIC."""
        return self.origin + self._clockwork.now * self.rate

    def true(self, local: float) -> float:
        """When this clock shows `local`."""
        return (local - self.origin) / self.rate

    def wall(self) -> float:
        return START_UNIX + self._ahead + self._clockwork.now


class Clockwork:
    """The queue of everything that will happen. `now` is true time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.running: Loop | None = None
        """The process that makes a step."""
        self._queue: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._runnable: deque[Loop] = deque()
        self._true = self.clock = HostClock(self)
        """`clock`: of the machine whose process is running; true time outside of all."""
        self.on_spin: Callable[[Loop], None] = lambda loop: None

    def after(self, seconds: float, call: Callable[..., object], *args: Any) -> Timer:
        return self.at(self.now + seconds, call, *args)

    def at(self, when: float, call: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(call, args)
        self.put(when, timer)
        return timer

    def put(self, when: float, timer: Timer) -> None:
        self._count += 1
        now = self.now
        heapq.heappush(self._queue, (when if when > now else now, self._count, timer))

    def ready(self, loop: Loop) -> None:
        self._runnable.append(loop)

    def enter(self, loop: Loop | None) -> Loop | None:
        """This one runs now; returns the one that did."""
        before, self.running = self.running, loop
        self.clock = self._true if loop is None else loop.clock
        return before

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        """Lets things happen until then, or until `stop` says so."""
        queue, runnable = self._queue, self._runnable
        self._run_ready()
        while queue and queue[0][0] <= until and not stop():
            self.now, _, timer = heapq.heappop(queue)
            if timer.call is None:
                continue
            if isinstance(timer, Handle):
                timer.loop.push(timer)
            else:
                call, timer.call = timer.call, None
                call(*timer.args)
            self.steps += 1
            if runnable:
                self._run_ready()
        if not stop():
            self.now = max(self.now, until)

    def _run_ready(self) -> None:
        while self._runnable:
            self._runnable.popleft().run_ready()


class Loop(asyncio.AbstractEventLoop):
    """The event loop of one process."""

    def __init__(self, clockwork: Clockwork, clock: HostClock, name: str) -> None:
        self.clockwork = clockwork
        self.clock = clock
        self.name = name
        self.frozen = False
        self.dead = False
        self.slept = 0.0
        """Local seconds spent frozen."""
        self._froze_at = 0.0
        self.broken: list[dict[str, Any]] = []
        """What nobody caught."""
        self._ready: deque[Handle] = deque()
        self._tasks: list[asyncio.Task[Any]] = []
        """Held, or the garbage collector would end them at a time of its own."""
        self._tasks_max = 64
        self._listed = False

    # ---- what asyncio asks of a loop

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.clockwork.running is self

    def is_closed(self) -> bool:
        return False

    def time(self) -> float:
        return self.clock.now()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(self, callback, args, context or copy_context())
        self._ready.append(handle)
        if not self._listed:
            self._wake()
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Handle:
        return self.call_at(self.clock.now() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Handle:
        handle = Handle(self, callback, args, context or copy_context())
        handle.moment = when
        self.clockwork.put(self.clock.true(when), handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, **_: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name)
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_max:
            self._tasks = [each for each in self._tasks if not each.done()]
            self._tasks_max = 64 + 2 * len(self._tasks)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self.broken.append(context)

    # ---- what the world does to it

    def run_ready(self) -> None:
        """Everything that is due, and what follows from it at once."""
        self._listed = False
        if self.frozen or self.dead:
            return
        self._run()

    def freeze(self) -> None:
        if not self.frozen:
            self.frozen, self._froze_at = True, self.time()

    def thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            self.slept += self.time() - self._froze_at
            self._wake()

    def kill(self) -> None:
        """Not another step is made. What is left is held until `bury`."""
        self.dead = True

    def bury(self) -> None:
        """Ends what a dead process left behind, out of the sight of the world."""
        self.frozen = False
        for _ in range(20):
            tasks = [each for each in self._tasks if not each.done()]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self._run()
        self._tasks.clear()
        self._ready.clear()

    def push(self, handle: Handle) -> None:
        """Its time has come."""
        self._ready.append(handle)
        self._wake()

    def _wake(self) -> None:
        if self._ready and not self._listed and not self.frozen and not self.dead:
            self._listed = True
            self.clockwork.ready(self)

    def _run(self) -> None:
        clockwork, ready = self.clockwork, self._ready
        before = clockwork.enter(self)
        asyncio._set_running_loop(self)
        count = 0
        try:
            while ready:
                handle = ready.popleft()
                call = handle.call
                if call is not None:
                    try:
                        handle.context.run(call, *handle.args)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self.call_exception_handler({"message": str(call), "exception": error})
                count += 1
                if count > SPIN_MAX:
                    clockwork.on_spin(self)
                    ready.clear()
        finally:
            asyncio._set_running_loop(None)
            clockwork.enter(before)


@contextlib.contextmanager
def virtual(clockwork: Clockwork) -> Iterator[None]:
    """Inside, every clock of the standard library is that of the process that runs."""

    def now(_clock: int = 0) -> float:
        clock = clockwork.clock
        return clock.origin + clockwork.now * clock.rate

    def now_ns(_clock: int = 0) -> int:
        clock = clockwork.clock
        return int((clock.origin + clockwork.now * clock.rate) * 1e9)

    with mock.patch.multiple(
        time,
        monotonic=now,
        monotonic_ns=now_ns,
        perf_counter=now,
        clock_gettime=now,
        clock_gettime_ns=now_ns,
        time=lambda: clockwork.clock.wall(),
        time_ns=lambda: int(clockwork.clock.wall() * 1e9),
    ):
        yield
