"""How much is sent to one sink at once, by what comes back."""

from __future__ import annotations

import asyncio

import pytest
from milvus_cdc.errors import RetryableError
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.gate import COMPARISONS, OPENED_AT_ONCE, Slots, WriteGate
from milvuscdc.v1 import task_pb2

LATE = RetryableError("SINK_TIMEOUT", "no answer in time")


class Requests:
    """Requests that end when the test says so."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.running: list[asyncio.Future[None]] = []

    async def send(self) -> None:
        async with self.slots.one():
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.running.append(answer)
            await answer

    async def start(self, count: int) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.send()) for _ in range(count)]
        await self.settle()
        return tasks

    async def end(self, error: Exception | None = None) -> None:
        ending, self.running = self.running, []
        for answer in ending:
            if answer.done():
                continue  # its sender was cancelled
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_a_sink_that_answers_too_late_gets_less_at_once_and_more_again_later() -> None:
    requests = Requests(Slots(8))
    tasks = await requests.start(100)
    sent_at_once = []
    for _ in range(5):
        sent_at_once.append(len(requests.running))
        await requests.end(LATE)
    assert sent_at_once == [8, 4, 2, 1, 1], "one burst of late answers counts once"
    while requests.running:
        await requests.end()
        sent_at_once.append(len(requests.running))
    assert max(sent_at_once[5:]) == 8, "never more than configured"
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(result is not None for result in results) == 8 + 4 + 2 + 1 + 1
    assert requests.slots.limit == 8


async def test_other_trouble_is_no_reason_to_send_less() -> None:
    requests = Requests(Slots(4))
    tasks = await requests.start(4)
    await requests.end(RetryableError("SINK_UNAVAILABLE", "refused"))
    assert requests.slots.limit == 4
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_sink_that_does_not_answer_keeps_no_comparison_of_others_out() -> None:
    gate = WriteGate(Lease(), 8)
    stuck, other = (
        task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri=f"http://{host}:1")) for host in "ab"
    )
    for _ in range(COMPARISONS):
        await gate.comparing(stuck).acquire()
    assert gate.comparing(stuck).locked()
    async with asyncio.timeout(1), gate.comparing(other):
        pass


async def test_collections_that_begin_together_are_opened_a_few_at_a_time_at_each_sink() -> None:
    gate = WriteGate(Lease(), 8)
    sinks = [task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri=f"http://{host}:1")) for host in "ab"]
    opening = [0, 0]
    most = [0, 0]
    answers = asyncio.Event()

    async def open_one(number: int) -> None:
        async with gate.opening(sinks[number]):
            opening[number] += 1
            most[number] = max(most[number], opening[number])
            if number == 0:
                await answers.wait()
            opening[number] -= 1

    stuck, others = (
        [asyncio.create_task(open_one(number)) for _ in range(100)] for number in (0, 1)
    )
    await asyncio.wait_for(asyncio.gather(*others), 10)
    assert opening == [OPENED_AT_ONCE, 0]
    answers.set()
    await asyncio.wait_for(asyncio.gather(*stuck), 10)
    assert most[0] == OPENED_AT_ONCE
    assert most[1] <= OPENED_AT_ONCE


async def test_who_gives_up_waiting_takes_no_room() -> None:
    requests = Requests(Slots(1))
    first, waiting, last = await requests.start(3)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await requests.end()
    assert len(requests.running) == 1
    last.cancel()
    await asyncio.gather(first, last, return_exceptions=True)
    (again,) = await requests.start(1)
    await requests.end()
    await again
