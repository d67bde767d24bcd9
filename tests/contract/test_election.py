"""Several controllers on one real etcd: one leads, and who does not lead any more changes
nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.errors import CdcError, UnknownOutcomeError
from milvus_cdc.etcd import EtcdClient, KeyRange
from milvus_cdc_controller.store import LeadershipLost
from milvus_cdc_controller.store.etcd import EtcdStore

from tests.contract.elections import LEASE_SECONDS, Candidate
from tests.servers import EtcdServer

Stand = Callable[[str], Candidate]
MANY: dict[str, bytes | None] = {f"collections/{i:03d}": b"new" for i in range(250)}
BOTH = pytest.mark.parametrize("stand", ["etcd_server", "secured_etcd"], indirect=True)


@pytest.fixture
async def stand(request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    """Makes candidates for one leadership; on a secured etcd for tests that say so."""
    etcd_server: EtcdServer = request.getfixturevalue(getattr(request, "param", "etcd_server"))
    prefix = f"test-{uuid.uuid4()}"
    all_of_them: list[Candidate] = []

    def one(name: str) -> Candidate:
        all_of_them.append(Candidate(etcd_server, prefix, name))
        return all_of_them[-1]

    yield one
    for candidate in all_of_them:
        await candidate.election.leave()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@BOTH
async def test_one_leads_the_others_know_whom_and_wait_for_its_resignation(stand: Stand) -> None:
    first, second = stand("first"), stand("second")
    store = await first.win()
    await store.commit({"tasks/a": b"1"})
    waiting = asyncio.create_task(second.win())
    await until(lambda: second.election.leader == first.me)
    await until(lambda: set(first.election.members) == {"first", "second"})
    assert first.election.leader == first.me
    assert not waiting.done()

    await store.close()
    assert not store.certain
    async with asyncio.timeout(LEASE_SECONDS):
        following = await waiting
    assert following.incarnation > store.incarnation
    assert await following.load() == {"tasks/a": b"1"}
    await until(lambda: first.election.leader == second.me)
    with pytest.raises(LeadershipLost):
        await store.commit({"tasks/a": b"2"})
    assert await following.load() == {"tasks/a": b"1"}
    await following.close()


@BOTH
async def test_a_leader_that_was_frozen_past_its_lease_changes_nothing(stand: Stand) -> None:
    zombie, other = stand("zombie"), stand("other")
    old = await zombie.win()
    await old.commit({"tasks/a": b"1"})
    await zombie.freeze()
    new = await other.win()
    await new.commit({"tasks/b": b"2"})
    # Even if its clock had stood still: the transaction itself is refused.
    assert zombie.term is not None
    zombie.term._until_ms += 3_600_000
    for writes in ({"tasks/a": b"9", "tasks/b": None}, dict(MANY)):
        with pytest.raises(LeadershipLost):
            await old.commit(writes)
    assert not old.certain
    assert (await old.lost()).reason == "LEADERSHIP_LOST"
    assert await new.load() == {"tasks/a": b"1", "tasks/b": b"2"}
    await old.close()
    assert new.certain
    await new.commit({"tasks/b": b"3"})
    await new.close()


async def test_a_leader_that_cannot_renew_stops_before_anybody_else_can_lead(
    tmp_path: Path,
) -> None:
    with EtcdServer(tmp_path) as server:
        candidate = Candidate(server, "silent")
        store = await candidate.win()
        loop = asyncio.get_running_loop()
        server.pause()
        paused = loop.time()
        async with asyncio.timeout(LEASE_SECONDS + 5):
            await store.lost()
        assert loop.time() - paused < LEASE_SECONDS, "while the lease certainly lasts"
        assert not store.certain
        server.resume()
        # etcd may go on with the old lease; it is ours to give up.
        await store.close()
        again = await candidate.win()
        assert again.incarnation > store.incarnation
        await again.close()
        await candidate.election.leave()


async def test_a_leader_whose_key_was_taken_away_is_told_by_its_next_commit(
    stand: Stand, etcd_server: EtcdServer
) -> None:
    first, second = stand("first"), stand("second")
    old = await first.win()
    await old.commit({"tasks/a": b"1"})
    async with EtcdClient(first.endpoints) as client:
        await client.delete(KeyRange.key(f"{first.prefix}/leader"))
        new = await second.win()
        with pytest.raises(LeadershipLost):
            await old.commit({"tasks/a": b"2"})
        assert await new.load() == {"tasks/a": b"1"}
        await new.close()


async def test_a_leader_knows_the_longest_lease_that_others_gave(stand: Stand) -> None:
    for name, lease_ms, inherited_ms in (
        ("first", 60_000, 0),
        ("second", 15_000, 60_000),
        ("third", 15_000, 60_000),
    ):
        candidate = stand(name)
        candidate.lease_ms = lease_ms
        store = await candidate.win()
        assert store.inherited_ms == inherited_ms
        if name == "third":
            await store.forget_inherited()
        await store.close()
    store = await stand("last").win()
    assert store.inherited_ms == 15_000


class Interrupted:
    """Takes the place of a store's etcd: the transactions whose turn it is get lost on the way, or
    their answers do.
    """

    def __init__(self, client: EtcdClient, *, pass_on: int, then: str) -> None:
        self._client = client
        self._left = pass_on
        self._then = then
        self.held: list[tuple[Any, ...]] = []

    async def txn(self, *request: Any) -> Any:
        if self._left > 0:
            self._left -= 1
            return await self._client.txn(*request)
        if self._then == "answer lost":
            await self._client.txn(*request)
        self.held.append(request)
        raise UnknownOutcomeError("ETCD_UNAVAILABLE", "no answer")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def interrupt(store: EtcdStore, *, pass_on: int = 0, then: str = "lost") -> Interrupted:
    interrupted = Interrupted(store._client, pass_on=pass_on, then=then)
    store._client = interrupted  # type: ignore[assignment]
    return interrupted


def mend(store: EtcdStore) -> None:
    store._client = store._client._client  # type: ignore[attr-defined]


@BOTH
async def test_a_request_that_was_given_up_and_arrives_late_changes_nothing(stand: Stand) -> None:
    store = await stand("one").win()
    late = interrupt(store)
    with suppress(CdcError):
        await store.commit({"tasks/a": b"1"})
    mend(store)
    await store.commit({"tasks/a": b"1"})
    await store.commit({"tasks/a": b"2"})
    answer = await store._client.txn(*late.held[0])
    assert not answer.succeeded
    assert await store.load() == {"tasks/a": b"2"}
    await store.close()


async def test_a_commit_whose_answer_was_lost_is_repeated_and_the_next_ones_follow(
    stand: Stand,
) -> None:
    store = await stand("one").win()
    interrupt(store, then="answer lost")
    with suppress(CdcError):
        await store.commit({"tasks/a": b"1", "tasks/b": b"1"})
    mend(store)
    await store.commit({"tasks/a": b"2", "tasks/c": b"2"})
    await store.commit({"tasks/c": None})
    assert await store.load() == {"tasks/a": b"2", "tasks/b": b"1"}
    await store.close()


@pytest.mark.parametrize("then", ["lost", "answer lost"])
async def test_a_large_commit_is_stored_whole_or_not_at_all_whenever_its_leader_dies(
    stand: Stand, then: str
) -> None:
    seen = set()
    for died_at in range(10):
        store = await stand(f"{then} {died_at}").win()
        await store.commit({key: b"old" for key in MANY})
        interrupt(store, pass_on=died_at, then=then)
        try:
            await store.commit(MANY)
            ended = True
        except CdcError:
            ended = False
        mend(store)
        await store.close()
        following = await stand(f"after {then} {died_at}").win()
        found = set((await following.load()).values())
        assert found in ({b"old"}, {b"new"}), f"half of it, died at transaction {died_at}"
        assert not ended or found == {b"new"}
        seen |= found
        # What was left behind does not come back.
        await following.commit({key: b"newer" for key in MANY})
        await following.close()
        last = await stand(f"last {then} {died_at}").win()
        assert set((await last.load()).values()) == {b"newer"}
        await last.close()
    assert seen == {b"old", b"new"}


@pytest.mark.parametrize("then", ["lost", "answer lost"])
async def test_a_large_commit_that_was_interrupted_is_never_half_there_after_the_next_one(
    stand: Stand, then: str
) -> None:
    store = await stand("one").win()
    for interrupted_at in range(8):
        interrupt(store, pass_on=interrupted_at, then=then)
        with suppress(CdcError):
            await store.commit(MANY)
        mend(store)
        await store.commit({"collections/000": b"newest", "tasks/a": None})
        found = await store.load()
        assert found.pop("collections/000") == b"newest"
        assert set(found.values()) <= {b"new"}
        assert len(found) in (0, len(MANY) - 1)
        await store.close()
        store = await stand(f"after {interrupted_at}").win()
        assert (await store.load()).get("collections/000") == b"newest"
        await store.commit({key: None for key in MANY})
    await store.close()
