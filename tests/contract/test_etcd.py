"""The etcd client against a real etcd: keys, transactions, leases, watches through faults."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from milvus_cdc.catalog import CatalogueWatcher, Layout
from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.etcd import (
    Compacted,
    Compare,
    CompareOp,
    CompareTarget,
    CompareValue,
    DeleteOp,
    EtcdClient,
    GetOp,
    KeyRange,
    PutOp,
    Watch,
    WatchEvent,
    WatchLost,
)
from milvus_cdc.model import Catalogue
from milvuscdc.internal import etcd_rpc_pb2 as pb
from milvuscdc.internal import etcd_rpc_pb2_grpc as rpc
from milvuscdc.internal import milvus_meta_pb2 as meta_pb

from tests.servers import EtcdServer, free_port


@pytest.fixture
async def client(etcd_server: EtcdServer) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([etcd_server.url]) as client:
        yield client


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4().hex}/"


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """One that a test may kill."""
    with EtcdServer(tmp_path) as server:
        yield server


async def compact(server: EtcdServer, revision: int) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        await rpc.KVStub(channel).Compact(pb.CompactionRequest(revision=revision, physical=True))


async def events_of(watch: Watch, count: int) -> list[WatchEvent]:
    events: list[WatchEvent] = []
    while len(events) < count:
        events.extend((await watch.next()).events)
    return events


class TestKeys:
    async def test_put_get_delete(self, client: EtcdClient, prefix: str) -> None:
        put = await client.put(prefix + "a", b"\x00\xff")
        await client.put(prefix + "a", b"2")
        got = await client.get(prefix + "a")
        (kv,) = got.kvs
        assert (kv.key, kv.value, kv.version) == (prefix + "a", b"2", 2)
        assert (kv.create_revision, kv.mod_revision) == (put.revision, put.revision + 1)
        assert got.cluster_id == put.cluster_id != 0
        assert (await client.delete(KeyRange.key(prefix + "a"))).count == 1
        assert (await client.get(prefix + "a")).kvs == ()

    async def test_a_prefix_is_not_its_neighbour(self, client: EtcdClient, prefix: str) -> None:
        for key in ("a/1", "a/\x7f", "a0", "a"):
            await client.put(prefix + key, b"")
        listing = await client.list(KeyRange.prefix(prefix + "a/"))
        assert [kv.key for kv in listing.kvs] == [prefix + "a/1", prefix + "a/\x7f"]

    async def test_a_long_listing_is_of_one_revision(
        self, etcd_server: EtcdServer, prefix: str
    ) -> None:
        async with EtcdClient([etcd_server.url], page_keys=10) as client:
            ops = [PutOp(f"{prefix}{number:03}", bytes([number])) for number in range(95)]
            before = await client.txn([], ops)
            at = before.revision
            await client.put(prefix + "050", b"newer")
            listing = await client.list(KeyRange.prefix(prefix), revision=at)
            assert [kv.value for kv in listing.kvs] == [bytes([number]) for number in range(95)]
            assert listing.revision == at
            await client.txn([], ops)
            writing = asyncio.ensure_future(self._write_all(client, prefix))
            for _ in range(10):
                listing = await client.list(KeyRange.prefix(prefix))
                # One transaction writes all of them.
                assert len({kv.mod_revision for kv in listing.kvs}) == 1
            writing.cancel()
            names = await client.list(KeyRange.prefix(prefix, keys_only=True))
            assert {kv.value for kv in names.kvs} == {b""}
            assert len(names.kvs) == 95

    async def _write_all(self, client: EtcdClient, prefix: str) -> None:
        for turn in range(100_000):
            await client.txn([], [PutOp(f"{prefix}{n:03}", b"%d" % turn) for n in range(95)])

    async def test_values_beyond_four_mebibytes_in_all(
        self, client: EtcdClient, prefix: str
    ) -> None:
        for number in range(6):
            await client.put(f"{prefix}{number}", bytes(1_000_000))
        listing = await client.list(KeyRange.prefix(prefix))
        assert [len(kv.value) for kv in listing.kvs] == [1_000_000] * 6
        watch = client.watch(KeyRange.prefix(prefix), start_revision=listing.kvs[0].mod_revision)
        assert len(await events_of(watch, 6)) == 6
        await watch.close()
        await client.delete(KeyRange.prefix(prefix))

    async def test_a_compacted_revision(
        self, client: EtcdClient, etcd_server: EtcdServer, prefix: str
    ) -> None:
        first = await client.put(prefix + "a", b"1")
        last = await client.put(prefix + "a", b"2")
        await compact(etcd_server, last.revision)
        with pytest.raises(Compacted):
            await client.list(KeyRange.prefix(prefix), revision=first.revision)


class TestTransactions:
    async def test_compare_and_set(self, client: EtcdClient, prefix: str) -> None:
        key = prefix + "a"
        absent = Compare(key, CompareTarget.VERSION, 0)
        answer = await client.txn([absent], [PutOp(key, b"1")])
        assert answer.succeeded
        lost = await client.txn([absent], [PutOp(key, b"2")], [GetOp(KeyRange.key(key))])
        assert not lost.succeeded
        assert [[kv.value for kv in found] for found in lost.results] == [[b"1"]]
        (kv,) = (await client.get(key)).kvs
        unchanged = Compare(key, CompareTarget.MOD_REVISION, kv.mod_revision)
        assert (await client.txn([unchanged], [PutOp(key, b"3")])).succeeded
        assert not (await client.txn([unchanged], [PutOp(key, b"4")])).succeeded
        older = Compare(key, CompareTarget.MOD_REVISION, kv.mod_revision, CompareOp.GREATER)
        created = Compare(key, CompareTarget.CREATE_REVISION, kv.create_revision)
        unleased = Compare(key, CompareTarget.LEASE, 0)
        last = await client.txn(
            [CompareValue(key, b"3"), older, created, unleased], [DeleteOp(KeyRange.prefix(prefix))]
        )
        assert last.succeeded
        assert (await client.get(key)).kvs == ()


class TestLeases:
    async def test_keys_go_with_their_lease(self, client: EtcdClient, prefix: str) -> None:
        granted = await client.grant_lease(60)
        assert granted.ttl_seconds == 60
        await client.put(prefix + "a", b"", lease=granted.lease)
        assert (await client.get(prefix + "a")).kvs[0].lease == granted.lease
        assert await client.keep_alive(granted.lease) == 60
        await client.revoke_lease(granted.lease)
        assert (await client.get(prefix + "a")).kvs == ()
        assert await client.keep_alive(granted.lease) == 0
        await client.revoke_lease(granted.lease)


class TestWatch:
    async def test_from_a_revision_over_several_ranges(
        self, client: EtcdClient, prefix: str
    ) -> None:
        start = await client.put(prefix + "a/1", b"1")
        await client.put(prefix + "b", b"2")
        await client.put(prefix + "c", b"unwatched")
        watch = client.watch(
            KeyRange.prefix(prefix + "a/"),
            KeyRange.key(prefix + "b"),
            start_revision=start.revision,
        )
        events = await events_of(watch, 2)
        assert {event.key.removeprefix(prefix) for event in events} == {"a/1", "b"}
        await client.delete(KeyRange.key(prefix + "b"))
        (gone,) = await events_of(watch, 1)
        assert (gone.key, gone.value) == (prefix + "b", None)
        await watch.close()

    async def test_a_revision_is_never_split(self, client: EtcdClient, prefix: str) -> None:
        # Together more than etcd sends as one message, so it sends fragments.
        ops = [PutOp(f"{prefix}{number}", bytes(30_000)) for number in range(40)]
        written = [(await client.txn([], ops)).revision for _ in range(5)]
        watch = client.watch(KeyRange.prefix(prefix), start_revision=written[0])
        seen: list[int] = []
        while len(seen) < len(written):
            batch = await watch.next()
            revisions = Counter(event.mod_revision for event in batch.events)
            assert set(revisions.values()) == {len(ops)}
            assert batch.revision == max(revisions)
            seen.extend(sorted(revisions))
        assert seen == written
        await watch.close()
        await client.delete(KeyRange.prefix(prefix))

    async def test_cancelled_waiting_loses_nothing(self, client: EtcdClient, prefix: str) -> None:
        now = await client.get(prefix)
        watch = client.watch(KeyRange.prefix(prefix), start_revision=now.revision + 1)
        for number in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(watch.next(), 0.02)
            await client.put(prefix, b"%d" % number)
            (event,) = await events_of(watch, 1)
            assert event.value == b"%d" % number
        await watch.close()

    async def test_a_quiet_watch_stays(self, etcd_server: EtcdServer, prefix: str) -> None:
        async with EtcdClient([etcd_server.url], watch_idle_seconds=0.05) as client:
            now = await client.get(prefix)
            watch = client.watch(KeyRange.prefix(prefix), start_revision=now.revision + 1)
            waiting = asyncio.ensure_future(watch.next())
            done, _ = await asyncio.wait({waiting}, timeout=0.5)
            assert not done
            await client.put(prefix, b"1")
            assert (await waiting).events[0].value == b"1"
            await watch.close()

    async def test_compaction_is_told(
        self, client: EtcdClient, etcd_server: EtcdServer, prefix: str
    ) -> None:
        first = await client.put(prefix, b"1")
        last = await client.put(prefix, b"2")
        await compact(etcd_server, last.revision)
        watch = client.watch(KeyRange.prefix(prefix), start_revision=first.revision)
        with pytest.raises(Compacted) as caught:
            await watch.next()
        assert caught.value.compact_revision >= last.revision
        await watch.close()

    async def test_killed_and_restarted_it_goes_on_where_it_was(self, own_etcd: EtcdServer) -> None:
        async with EtcdClient([own_etcd.url], call_seconds=2) as client:
            first = await client.put("k", b"1")
            watch = client.watch(KeyRange.key("k"), start_revision=first.revision)
            assert (await watch.next()).events[0].value == b"1"
            own_etcd.kill()
            with pytest.raises(RetryableError, match="ETCD_UNAVAILABLE"):
                await watch.next()
            with pytest.raises(RetryableError, match="ETCD_UNAVAILABLE"):
                await client.get("k")
            await asyncio.to_thread(own_etcd.start)
            async with EtcdClient([own_etcd.url]) as other:
                await other.put("k", b"2")
                await other.put("k", b"3")
            assert [event.value for event in await self._until(watch, 2)] == [b"2", b"3"]
            await watch.close()

    async def test_a_frozen_server_is_noticed(self, own_etcd: EtcdServer) -> None:
        async with EtcdClient([own_etcd.url], call_seconds=0.5, watch_idle_seconds=0.2) as client:
            first = await client.put("k", b"1")
            watch = client.watch(KeyRange.key("k"), start_revision=first.revision + 1)
            waiting = asyncio.ensure_future(watch.next())
            await asyncio.wait({waiting}, timeout=0.5)
            own_etcd.pause()
            with pytest.raises(RetryableError, match="said nothing"):
                await waiting
            with pytest.raises(UnknownOutcomeError):
                await client.put("k", b"2")
            own_etcd.resume()
            async with EtcdClient([own_etcd.url], call_seconds=30) as other:
                await other.put("k", b"3")
            # The write of unknown outcome may have happened or not.
            seen = [event.value for event in await self._until(watch, 1)]
            while seen[-1] != b"3":
                seen += [event.value for event in await self._until(watch, 1)]
            assert seen in ([b"3"], [b"2", b"3"])
            await watch.close()

    async def test_a_wiped_server_is_not_the_same(self, tmp_path: Path) -> None:
        with EtcdServer(tmp_path) as server:
            async with EtcdClient([server.url], call_seconds=2) as client:
                for number in range(5):
                    last = await client.put("k", b"%d" % number)
                watch = client.watch(KeyRange.key("k"), start_revision=last.revision)
                await watch.next()
                server.stop()
                (tmp_path / "data").rename(tmp_path / "lost")
                await asyncio.to_thread(server.start)
                with pytest.raises(WatchLost):
                    await self._until(watch, 1)
                await watch.close()

    async def _until(self, watch: Watch, count: int) -> list[WatchEvent]:
        """Events, trying again while the server comes back."""
        events: list[WatchEvent] = []
        while len(events) < count:
            try:
                events.extend((await watch.next()).events)
            except WatchLost:
                raise
            except RetryableError:
                await asyncio.sleep(0.1)
        return events


class TestEndpoints:
    async def test_a_dead_endpoint_is_passed_over(
        self, etcd_server: EtcdServer, prefix: str
    ) -> None:
        dead = f"127.0.0.1:{free_port()}"
        async with EtcdClient([dead, etcd_server.url]) as client:
            answer = await client.put(prefix, b"1")
            watch = client.watch(KeyRange.key(prefix), start_revision=answer.revision)
            assert (await watch.next()).events[0].value == b"1"
            await watch.close()

    async def test_a_silent_endpoint_is_passed_over_for_reads(
        self, etcd_server: EtcdServer, prefix: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            async with EtcdClient([f"127.0.0.1:{port}", etcd_server.url], call_seconds=1) as client:
                assert (await client.get(prefix)).revision > 0

    async def test_no_endpoint_answers(self) -> None:
        async with EtcdClient([f"127.0.0.1:{free_port()}"], call_seconds=1) as client:
            with pytest.raises(RetryableError, match="ETCD_UNAVAILABLE") as caught:
                await client.put("k", b"")
            # Nothing was sent, so nothing can have happened.
            assert not isinstance(caught.value, UnknownOutcomeError)

    @pytest.mark.parametrize("endpoints", [[], [""], ["https://h:1"], ["http://"]])
    def test_bad_endpoints(self, endpoints: list[str]) -> None:
        with pytest.raises(UserError, match="ETCD_ENDPOINT"):
            EtcdClient(endpoints)

    async def test_an_etcd_that_wants_a_user(self, own_etcd: EtcdServer) -> None:
        async with grpc.aio.insecure_channel(own_etcd.endpoint) as channel:
            call: Any = channel.unary_unary
            # AuthUserAdd, AuthUserGrantRole and AuthEnable, by hand: no program of ours calls them.
            await call("/etcdserverpb.Auth/UserAdd")(b"\x0a\x04root\x12\x02pw")
            await call("/etcdserverpb.Auth/RoleAdd")(b"\x0a\x04root")
            await call("/etcdserverpb.Auth/UserGrantRole")(b"\x0a\x04root\x12\x04root")
            await call("/etcdserverpb.Auth/AuthEnable")(b"")
        async with EtcdClient([own_etcd.url]) as client:
            with pytest.raises(UserError, match="ETCD_AUTH"):
                await client.get("k")
            watch = client.watch(KeyRange.key("k"), start_revision=1)
            with pytest.raises(UserError, match="ETCD_AUTH"):
                await watch.next()
            await watch.close()


class TestCatalogueWatcher:
    """With keys written by hand; real metadata is in the integration tests."""

    layout = Layout("r")

    def database(self, number: int, name: str) -> PutOp:
        info = meta_pb.DatabaseInfo(id=number, name=name, state=1, created_time=1)
        key = f"r/meta/root-coord/database/db-info/{number}"
        return PutOp(key, info.SerializeToString())

    async def names_until(self, catalogues: AsyncIterator[Catalogue | CdcError], name: str) -> None:
        async for each in catalogues:
            if isinstance(each, Catalogue) and name in {it.name for it in each.databases}:
                return

    async def test_survives_a_kill_and_a_compaction(self, own_etcd: EtcdServer) -> None:
        async with EtcdClient([own_etcd.url], call_seconds=2) as client:
            watcher = CatalogueWatcher(client, self.layout)
            await client.txn([], [self.database(1, "default")])
            async with aclosing(watcher.watch()) as catalogues:
                await self.names_until(catalogues, "default")
                own_etcd.kill()
                error = await anext(catalogues)
                assert isinstance(error, RetryableError)
                assert error.reason == "SOURCE_ETCD_UNAVAILABLE"
                with pytest.raises(RetryableError, match="SOURCE_ETCD_UNAVAILABLE"):
                    await watcher.read()
                await asyncio.to_thread(own_etcd.start)
                async with EtcdClient([own_etcd.url]) as other:
                    await other.txn([], [self.database(2, "two")])
                    last = await other.txn([], [self.database(3, "three")])
                    await compact(own_etcd, last.revision)
                await self.names_until(catalogues, "three")
                await client.txn([], [self.database(4, "four")])
                await self.names_until(catalogues, "four")

    async def test_a_burst_is_one_catalogue_and_the_clock_is_none(
        self, own_etcd: EtcdServer
    ) -> None:
        async with EtcdClient([own_etcd.url]) as client:
            watcher = CatalogueWatcher(client, self.layout)
            async with aclosing(watcher.watch()) as catalogues:
                first = await anext(catalogues)
                assert isinstance(first, Catalogue)
                assert first.databases == ()
                for number in range(1, 6):
                    tick = PutOp("r/kv/gid/timestamp", (number << 32).to_bytes(8, "big"))
                    await client.txn([], [tick, PutOp(f"r/meta/segment-index/{number}", b"")])
                await client.txn([], [self.database(number, f"d{number}") for number in (1, 2)])
                second = await anext(catalogues)
                assert isinstance(second, Catalogue)
                assert [each.name for each in second.databases] == ["d1", "d2"]
                assert second.tso == ((5 << 32) // 1_000_000) << 18
                await client.put("r/kv/gid/timestamp", (1 << 32).to_bytes(8, "big"))
                back = await anext(catalogues)
                assert isinstance(back, Catalogue)
                assert back.tso < second.tso

    async def test_a_bad_value_is_an_error_until_it_is_mended(self, own_etcd: EtcdServer) -> None:
        async with EtcdClient([own_etcd.url]) as client:
            watcher = CatalogueWatcher(client, self.layout)
            async with aclosing(watcher.watch()) as catalogues:
                await anext(catalogues)
                await client.put("r/meta/root-coord/database/db-info/7", b"\xff")
                error = await anext(catalogues)
                assert isinstance(error, CdcError)
                assert error.reason == "SOURCE_METADATA_UNDECODABLE"
                await client.txn([], [self.database(7, "seven")])
                await self.names_until(catalogues, "seven")

    async def test_reads_are_fresh_and_shared(self, own_etcd: EtcdServer) -> None:
        async with EtcdClient([own_etcd.url]) as client:
            watcher = CatalogueWatcher(client, self.layout)
            early = asyncio.ensure_future(watcher.read())
            await asyncio.sleep(0)
            done = await client.txn([], [self.database(1, "default")])
            late = await asyncio.gather(*(watcher.read() for _ in range(20)))
            assert {id(each) for each in late} == {id(late[0])}
            assert late[0].revision >= done.revision
            assert [each.name for each in late[0].databases] == ["default"]
            await early
