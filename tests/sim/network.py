"""The network: messages take time, are held up while a way is cut, and connections break.

Laws: what one connection carries in one direction arrives in order; a way that is cut holds what is
on it, and delivers it when it heals before the connection is given up; a request that has not
arrived by its deadline, or was given up before, never arrives, unless its caller is prepared for
that (`stray`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from milvus_cdc.errors import CdcError

from tests.sim.clockwork import Clockwork, Loop, Timer

T = TypeVar("T")

STRAY_SECONDS = 10.0
RETRANSMIT_SECONDS = 0.5
"""What is held up is tried again so often."""


class Network:
    """Ways between hosts and servers, by name; each direction is cut and slowed for itself."""

    def __init__(self, clockwork: Clockwork, rng: random.Random) -> None:
        self.clockwork = clockwork
        self._rng = rng
        self._cuts: dict[tuple[str, str], int] = defaultdict(int)
        self.slow: dict[str, float] = {}
        """Additional seconds at most for what goes to or from there."""
        self.loss = 0.0
        """How often a request or its answer is lost with its connection."""
        self.lag = 0.0
        """How often a request or its answer takes long, as long as its deadline allows."""

    def cut(self, source: str, sink: str) -> None:
        self._cuts[source, sink] += 1

    def mend(self, source: str, sink: str) -> None:
        self._cuts[source, sink] -= 1

    def heal(self) -> None:
        """Every way is open and good."""
        self._cuts.clear()
        self.slow.clear()
        self.loss = self.lag = 0.0

    def open(self, source: str, sink: str) -> bool:
        return not self._cuts.get((source, sink))

    def delay(self, source: str, sink: str) -> float:
        most = max(self.slow.get(source, 0.0), self.slow.get(sink, 0.0))
        return self._rng.uniform(0.001, 0.02) + (self._rng.random() * most if most else 0.0)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    def between(self, least: float, most: float) -> float:
        return self._rng.uniform(least, most)


class Server:
    """Something that answers requests: an etcd, a queue, a sink."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.down = False
        self.slow = 0.0
        """Seconds at most between its doing something and saying so."""


class Request:
    """One call of a process to a server, from its sending to its answer or its end."""

    def __init__(
        self,
        network: Network,
        loop: Loop,
        host: str,
        server: Server,
        act: Callable[[], object],
        timeout: float,
        stray: bool,
    ) -> None:
        self._network = network
        self._loop = loop
        self._host = host
        self._server = server
        self._act = act
        clockwork = network.clockwork
        self._deadline = clockwork.now + timeout / loop.clock.rate
        self.arrived = False
        self.answer: asyncio.Future[object] = loop.create_future()
        self._lost = network.chance(network.loss)
        self._stray = stray and self._lost and network.chance(0.5)
        delay = network.delay(host, server.name)
        if network.chance(network.lag):
            delay = network.between(0, timeout)
        self._timer: Timer | None = clockwork.after(delay, self._arrive)

    def abandon(self) -> None:
        """The caller has given up: what has not arrived never does."""
        if self._timer is not None and not self.arrived:
            self._timer.cancel()

    def _arrive(self) -> None:
        network, server = self._network, self._server
        clockwork = network.clockwork
        if clockwork.now >= self._deadline or self.answer.done():
            return
        if not network.open(self._host, server.name):
            self._timer = clockwork.after(RETRANSMIT_SECONDS, self._arrive)
            return
        if server.down:
            self._back(ConnectionRefusedError(server.name))
            return
        if self._stray:
            clockwork.after(network.between(0, STRAY_SECONDS), self._late)
        if self._stray or (self._lost and network.chance(0.5)):
            self._back(ConnectionResetError(server.name))
            return
        self.arrived = True
        try:
            answer = self._act()
        except Exception as error:
            answer = error
        if self._lost:
            answer = ConnectionResetError(server.name)
        delay = network.delay(server.name, self._host)
        if server.slow:
            delay += network.between(0, server.slow)
        if network.chance(network.lag):
            delay += network.between(0, 10)
        clockwork.after(delay, self._back, answer)

    def _late(self) -> None:
        """Carried out when nobody waits for it any more."""
        with contextlib.suppress(CdcError):
            self._act()

    def _back(self, answer: object) -> None:
        network = self._network
        if self.answer.done() or self._loop.dead:
            return
        if not network.open(self._server.name, self._host):
            network.clockwork.after(RETRANSMIT_SECONDS, self._back, answer)
        elif isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


async def remote(
    network: Network,
    host: str,
    server: Server,
    act: Callable[[], T],
    timeout: float,
    *,
    stray: bool = False,
) -> T:
    """Has the server do something. Raises TimeoutError, ConnectionResetError (it may have been
    done), ConnectionRefusedError (it was not), and what `act` raises.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    if loop.dead:
        raise ConnectionRefusedError(host)
    request = Request(network, loop, host, server, act, timeout, stray)
    timer = loop.call_later(timeout, _expire, request.answer)
    try:
        return await request.answer  # type: ignore[return-value]
    finally:
        timer.cancel()
        request.abandon()


def _expire(answer: asyncio.Future[object]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())
