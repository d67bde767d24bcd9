"""Heartbeats are answered ahead of everything else that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.controller import Controller
from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.loop import ControlLoop, MakeEvent
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.outbox import Outbox


class _Nothing:
    """Stores nothing and sends nothing."""

    incarnation, certain = 1, True

    async def commit(self, writes: Mapping[str, bytes | None]) -> None: ...

    def send(self, stream: int, message: fx.StreamMessage) -> None: ...


class _Watched(Controller):
    def __init__(self) -> None:
        super().__init__(Leases())
        self.taken: list[ev.Event] = []

    def step(self, event: ev.Event) -> list[fx.Effect]:
        if not isinstance(event, ev.Ticked | ev.Started):
            self.taken.append(event)
        return super().step(event)


def _hello(at: ev.Instant) -> ev.Event:
    return ev.Hello(at, 1, "a", "instance", "1", "peer", 1, 0, (), 0, ())


def _acked(number: int) -> MakeEvent:
    return lambda at: ev.Acked(at, 1, f"uid.{number}", 1, 1)


def _beat(at: ev.Instant) -> ev.Event:
    return ev.Heartbeat(at, 1, 1, False)


async def _taken(*, hello_first: bool) -> list[ev.Event]:
    controller = _Watched()
    loop = ControlLoop(controller, _Nothing(), Metrics())  # type: ignore[arg-type]
    running = asyncio.create_task(loop.run(_Nothing()))  # type: ignore[arg-type]
    await loop.post(_hello)
    if hello_first:
        while not controller.taken:
            await asyncio.sleep(0)
    for number in range(100):
        await loop.post(_acked(number))
    await loop.beat(1, _beat)
    while len(controller.taken) < 102:
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return controller.taken


def test_a_heartbeat_overtakes_what_waits_to_be_taken() -> None:
    taken = asyncio.run(_taken(hello_first=True))
    assert [type(event) for event in taken[:3]] == [ev.Hello, ev.Heartbeat, ev.Acked]
    acks = [event.assignment_id for event in taken if isinstance(event, ev.Acked)]
    assert acks == [f"uid.{number}" for number in range(100)], "the others keep their order"


def test_a_heartbeat_does_not_overtake_its_streams_hello() -> None:
    taken = asyncio.run(_taken(hello_first=False))
    assert [type(event) for event in (taken[0], taken[-1])] == [ev.Hello, ev.Heartbeat]


def test_an_answered_heartbeat_overtakes_what_waits_to_be_sent() -> None:
    outbox = Outbox()
    outbox.put(fx.Synced())
    asyncio.run(outbox.take())
    for number in range(3):
        outbox.put(fx.Revoke(f"uid.{number}", 1, "PAUSED"))
    outbox.put(fx.HeartbeatAck(1, 3_000))
    messages = asyncio.run(outbox.take())
    assert messages is not None
    assert isinstance(messages[0], fx.HeartbeatAck)
    assert [m.assignment_id for m in messages if isinstance(m, fx.Revoke)] == [
        "uid.0", "uid.1", "uid.2"
    ]  # fmt: skip


def test_an_answered_heartbeat_does_not_overtake_what_its_holder_must_know_first() -> None:
    outbox = Outbox()
    outbox.put(fx.Revoke("uid.1", 1, "STALE_EPOCH"))
    outbox.put(fx.Synced())
    outbox.put(fx.HeartbeatAck(1, 3_000))
    messages = asyncio.run(outbox.take()) or []
    assert [type(m) for m in messages] == [fx.Revoke, fx.Synced, fx.HeartbeatAck]
