"""A hold on a real Pulsar keeps what is still to be read, through everything that deletes it, and
no more than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pulsar
import pytest
from milvus_cdc.errors import LogResetError, LogTruncatedError, RetryableError, UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.holds import HeldSource
from milvus_cdc.source.pulsar import PulsarSource
from milvus_cdc.source.pulsar_positions import decode, encode
from milvus_cdc.source.pulsar_reader import place_of

from tests.servers import PulsarServer

pytestmark = pytest.mark.pulsar

NAME = "milvus-cdc-test-1"


@pytest.fixture(scope="module")
def broker(
    tmp_path_factory: pytest.TempPathFactory, pulsar_available: None
) -> Iterator[PulsarServer]:
    """Its ledgers are rolled by tests alone."""
    with PulsarServer(tmp_path_factory.mktemp("pulsar-hold")) as server:
        yield server


class Topic:
    """One that Milvus writes to, reads and acknowledges at once."""

    def __init__(self, server: PulsarServer) -> None:
        self.server = server
        self.name = f"dml-{uuid4().hex[:8]}"
        self.source = PulsarSource(PulsarConfig(server.service_url, server.admin_url))
        self.bare = PulsarSource(PulsarConfig(server.service_url))

    @property
    def path(self) -> str:
        return f"persistent/public/default/{self.name}"

    async def append(self, *payloads: bytes) -> list[bytes]:
        """Their positions."""

        def send() -> list[bytes]:
            client = pulsar.Client(self.server.service_url, logger=_QUIET)
            topic = f"persistent://public/default/{self.name}"
            producer = client.create_producer(topic, batching_enabled=False)
            reading = client.subscribe(topic, "milvus")
            ids = [producer.send(payload) for payload in payloads]
            reading.acknowledge_cumulative(ids[-1])
            client.close()
            return [encode(place_of(each)) for each in ids]

        return await asyncio.to_thread(send)

    async def roll(self) -> None:
        """A new ledger, and something in it: what nobody holds of those before is deleted."""
        await asyncio.to_thread(self.server.roll, self.name)
        await self.append(b"after the roll")

    async def ledgers(self) -> list[int]:
        stats: Any = await asyncio.to_thread(self.server.admin, "GET", f"{self.path}/internalStats")
        return [ledger["ledgerId"] for ledger in stats["ledgers"]]

    async def gone(self, ledger: int) -> None:
        """Waits until the ledger has been deleted."""
        while ledger in await self.ledgers():
            await asyncio.sleep(0.1)

    async def connected(self, subscription: str) -> None:
        """Waits until somebody is connected to it: who moves it sends the others away, and they
        come back by themselves.
        """

        def consumers() -> Any:
            stats: Any = self.server.admin("GET", f"{self.path}/stats")
            return stats["subscriptions"][subscription]["consumers"]

        while not await asyncio.to_thread(consumers):
            await asyncio.sleep(0.1)

    async def read(self, position: bytes, count: int) -> list[bytes]:
        reader = await self.source.open(self.name, position)
        got: list[bytes] = []
        while len(got) < count:
            got += [entry.payload for entry in await reader.read(1 << 20, 5.0)]
        await reader.close()
        return got[:count]

    async def close(self) -> None:
        await self.source.close()
        await self.bare.close()


_QUIET = pulsar.FileLogger(pulsar.LoggerLevel.Error, "/dev/null")


@pytest.fixture
async def topic(broker: PulsarServer) -> AsyncIterator[Topic]:
    made = Topic(broker)
    yield made
    await made.close()


async def test_without_a_hold_the_log_is_gone_at_the_next_roll(topic: Topic) -> None:
    (first, *_) = await topic.append(b"a", b"b", b"c")
    await topic.roll()
    await topic.gone(decode(first).ledger)
    with pytest.raises(LogTruncatedError):
        await topic.read(first, 1)


@pytest.mark.parametrize("way", ["with", "without"])
async def test_what_is_held_survives_rolls_and_a_killed_broker_with_nobody_connected(
    topic: Topic, way: str
) -> None:
    """With the REST API and without."""
    places = await topic.append(*(b"%d" % n for n in range(8)))
    source = topic.source if way == "with" else topic.bare
    await source.holds.hold(topic.name, NAME).advance(places[3])
    await source.close()
    await topic.roll()
    if way == "with":
        topic.server.kill()
        topic.server.start()
    await topic.roll()
    await topic.roll()
    assert decode(places[3]).ledger in await topic.ledgers()
    assert await topic.read(places[3], 5) == [b"3", b"4", b"5", b"6", b"7"]


async def test_what_every_task_has_done_with_really_goes(topic: Topic) -> None:
    (old, *_) = await topic.append(b"old", b"older")
    hold = topic.source.holds.hold(topic.name, NAME)
    await hold.advance(None)
    await topic.roll()
    places = await topic.append(b"x", b"y", b"z")
    assert decode(old).ledger in await topic.ledgers(), "nothing was given up yet"
    await hold.advance(places[1])
    # Not even this entry's neighbour in the ledger goes before the next roll, but the old one does.
    await topic.roll()
    await topic.gone(decode(old).ledger)
    assert await topic.read(places[1], 2) == [b"y", b"z"]
    held = await hold.look()
    assert held.entries == 3
    assert held.size > 0


async def test_what_is_set_back_is_held_again(topic: Topic) -> None:
    places = await topic.append(b"a", b"b", b"c", b"d")
    hold = topic.source.holds.hold(topic.name, NAME)
    await hold.advance(places[3])
    await hold.advance(places[1])
    await topic.roll()
    assert await topic.read(places[1], 3) == [b"b", b"c", b"d"]
    assert (await hold.look()).entries == 4


async def test_the_log_s_end_can_be_held_and_a_place_that_is_gone_harms_nothing(
    topic: Topic,
) -> None:
    (old, *_) = await topic.append(b"a", b"b")
    hold = topic.source.holds.hold(topic.name, NAME)
    await hold.advance((await topic.source.log_range(topic.name)).end)
    await topic.roll()
    (new,) = await topic.append(b"c")
    await hold.advance(new)
    await topic.roll()
    await topic.gone(decode(old).ledger)
    await hold.advance(old)
    assert await topic.read(new, 2) == [b"c", b"after the roll"]


async def test_the_release_removes_it_for_good(topic: Topic) -> None:
    (first, *_) = await topic.append(b"a", b"b")
    hold = topic.source.holds.hold(topic.name, NAME)
    await hold.advance(first)
    await hold.release()
    await hold.release()
    stats: Any = topic.server.admin("GET", f"{topic.path}/stats")
    assert list(stats["subscriptions"]) == ["milvus"]
    await topic.roll()
    await topic.gone(decode(first).ledger)


async def test_a_forgotten_connection_hinders_nobody_for_long(topic: Topic) -> None:
    places = await topic.append(b"a", b"b", b"c")
    zombie = await asyncio.to_thread(topic.bare.connection.consumer, topic.name, NAME)
    hold = topic.source.holds.hold(topic.name, NAME)
    await hold.advance(places[2])
    assert (await hold.look()).entries == 1
    await topic.connected(NAME)
    with pytest.raises(RetryableError, match=NAME):
        await hold.release()
    await asyncio.to_thread(zombie.close)
    await hold.release()
    assert topic.name not in {held.pchannel for held in await topic.source.holds.find()}


async def test_orphans_are_found_by_the_rest_api_alone(topic: Topic) -> None:
    await topic.append(b"a", b"b")
    await topic.bare.holds.hold(topic.name, "milvus-cdc-left-over").advance(None)
    await topic.bare.holds.hold(topic.name, "somebody-else").advance(None)
    found = [h for h in await topic.source.holds.find() if h.pchannel == topic.name]
    assert [(h.name, h.entries) for h in found] == [("milvus-cdc-left-over", 2)]
    with pytest.raises(UserError, match="adminUrl") as refused:
        await topic.bare.holds.find()
    assert refused.value.reason == "HOLDS_NOT_LISTED"


async def test_a_topic_that_is_not_there_is_not_made(topic: Topic) -> None:
    with pytest.raises(LogResetError):
        await topic.source.holds.hold(topic.name, NAME).advance(None)
    await topic.source.holds.hold(topic.name, NAME).release()
    topics: Any = topic.server.admin("GET", "persistent/public/default")
    assert not [name for name in topics if topic.name in name]


async def test_policies_that_endanger_a_hold_are_told(topic: Topic) -> None:
    await topic.append(b"a")
    assert await topic.source.holds.warnings(topic.name) == []
    space = "namespaces/public/default"
    quota = {"limitSize": 1_000_000, "limitTime": -1, "policy": "producer_exception"}
    topic.server.admin("POST", f"{space}/backlogQuota?backlogQuotaType=destination_storage", quota)
    topic.server.admin("POST", f"{space}/messageTTL", 3600)
    topic.server.admin("POST", f"{space}/subscriptionExpirationTime", 3)
    try:
        told = await topic.source.holds.warnings(topic.name)
        assert [reason for reason, _ in told] == [
            "HOLD_STOPS_WRITERS", "HOLD_EXPIRES", "HOLD_EXPIRES",
        ]  # fmt: skip
        assert "1000000 bytes" in told[0][1]
        quota["policy"] = "consumer_backlog_eviction"
        topic.server.admin(
            "POST", f"{space}/backlogQuota?backlogQuotaType=destination_storage", quota
        )
        told = await topic.source.holds.warnings(topic.name)
        assert told[0][0] == "HOLD_EVICTED"
    finally:
        topic.server.admin("DELETE", f"{space}/backlogQuota?backlogQuotaType=destination_storage")
        topic.server.admin("DELETE", f"{space}/messageTTL")
        topic.server.admin("DELETE", f"{space}/subscriptionExpirationTime")
    assert await topic.bare.holds.warnings(topic.name) == []


async def test_the_source_says_that_its_log_is_held(topic: Topic) -> None:
    assert isinstance(topic.source, HeldSource)
