"""TLS, clients' certificates and logins towards a real etcd: what is right works and goes on
working, what is wrong is a person's to mend, with its field, and is not tried again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.etcd import EtcdClient, EtcdSecurity, KeyRange, PutOp, Watch, WatchEvent
from milvus_cdc.tls import TlsFiles

from tests.contract.elections import LEASE_SECONDS, Candidate, security_of
from tests.integration.tcp_proxy import TcpProxy
from tests.servers import Authority, EtcdServer, Pair, free_port

WRONG = "wrong horse"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """That nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Any]:
    """TLS and logins; `nobody` is a user without rights."""
    with EtcdServer(tmp_path_factory.mktemp("tls-etcd"), authority=authority) as server:
        server.ask("auth/user/add", name="nobody", password="known")
        server.enable_login(cdc="correct horse")
        yield server


@pytest.fixture(scope="module")
def login_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """With logins, without TLS."""
    with EtcdServer(tmp_path_factory.mktemp("login-etcd")) as server:
        server.enable_login(cdc="correct horse")
        yield server


def files(authority: Authority, pair: Pair | None = None, **other: Any) -> TlsFiles:
    made = TlsFiles(str(authority.ca_file), **other)
    if pair is None:
        return made
    return replace(made, certificate_file=str(pair.certificate), key_file=str(pair.key))


def secured(server: EtcdServer) -> tuple[EtcdSecurity, TlsFiles]:
    security = security_of(server)
    assert security is not None
    assert security.tls is not None
    return security, security.tls


def put(content: Path | str, *, over: Path | str) -> None:
    Path(over).write_bytes(Path(content).read_bytes())


def login(password: str = "correct horse", user: str = "cdc", **other: Any) -> EtcdSecurity:
    return EtcdSecurity(username=user, password=lambda: password, **other)


@asynccontextmanager
async def client_of(server: EtcdServer, security: EtcdSecurity | None) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([server.endpoint], security=security, call_seconds=3) as client:
        yield client


async def refusal(server: EtcdServer, security: EtcdSecurity | None) -> UserError:
    """The same whether a call or a watch comes first."""
    async with client_of(server, security) as client:
        with pytest.raises(UserError) as called:
            await client.get("k")
        watch = client.watch(KeyRange.key("k"), start_revision=1)
        with pytest.raises(UserError) as watched:
            await watch.next()
        await watch.close()
    assert (watched.value.reason, watched.value.field) == (called.value.reason, called.value.field)
    assert called.value.field in called.value.message
    return called.value


async def events_of(watch: Watch, count: int) -> list[bytes | None]:
    """Trying again while no endpoint answers."""
    events: list[WatchEvent] = []
    async with asyncio.timeout(30):
        while len(events) < count:
            try:
                events.extend((await watch.next()).events)
            except RetryableError:
                await asyncio.sleep(0.1)
    return [event.value for event in events]


class TestTls:
    @pytest.mark.parametrize("name", ["", "localhost"])
    async def test_a_trusted_server(
        self, tls_etcd: EtcdServer, authority: Authority, name: str
    ) -> None:
        security = login(tls=files(authority, server_name=name))
        async with client_of(tls_etcd, security) as client:
            await client.put("k", b"1")
            assert (await client.get("k")).kvs[0].value == b"1"

    async def test_an_unknown_authority(self, tls_etcd: EtcdServer, stranger: Authority) -> None:
        said = await refusal(tls_etcd, login(tls=files(stranger)))
        assert (said.reason, said.field) == ("TLS_SERVER_UNTRUSTED", "tls.ca_file")

    async def test_the_systems_authorities(
        self, tls_etcd: EtcdServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = await refusal(tls_etcd, login(tls=TlsFiles()))
        assert (said.reason, said.field) == ("TLS_SERVER_UNTRUSTED", "tls.ca_file")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
        async with client_of(tls_etcd, login(tls=TlsFiles())) as client:
            await client.get("k")

    async def test_a_name_that_is_not_the_servers(
        self, tls_etcd: EtcdServer, authority: Authority
    ) -> None:
        said = await refusal(tls_etcd, login(tls=files(authority, server_name="etcd.example")))
        assert (said.reason, said.field) == ("TLS_SERVER_NAME", "tls.server_name")

    async def test_a_server_without_tls(
        self, etcd_server: EtcdServer, authority: Authority
    ) -> None:
        said = await refusal(etcd_server, EtcdSecurity(files(authority)))
        assert (said.reason, said.field) == ("TLS_NOT_SPOKEN", "tls")

    async def test_a_server_with_tls_asked_without(self, tls_etcd: EtcdServer) -> None:
        said = await refusal(tls_etcd, None)
        assert (said.reason, said.field) == ("TLS_NEEDED", "etcd.tls")

    async def test_a_certificate_of_ones_own(
        self, secured_etcd: EtcdServer, stranger: Authority
    ) -> None:
        good, tls = secured(secured_etcd)
        async with client_of(secured_etcd, good) as client:
            await client.get("k")
        bare = replace(good, tls=replace(tls, certificate_file="", key_file=""))
        said = await refusal(secured_etcd, bare)
        assert (said.reason, said.field) == ("TLS_CLIENT_REFUSED", "tls.certificate_file")
        assert "none" in said.message
        other = stranger.issue("client")
        strange = replace(tls, certificate_file=str(other.certificate), key_file=str(other.key))
        said = await refusal(secured_etcd, replace(good, tls=strange))
        assert (said.reason, said.field) == ("TLS_CLIENT_REFUSED", "tls.certificate_file")
        assert str(other.certificate) in said.message

    @pytest.mark.parametrize("field", ["ca_file", "certificate_file", "key_file"])
    async def test_files_that_cannot_be_used(
        self, tls_etcd: EtcdServer, authority: Authority, tmp_path: Path, field: str
    ) -> None:
        whole = files(authority, authority.issue("client"))
        changed: dict[str, Any] = {field: str(tmp_path / "missing.pem")}
        missing = replace(whole, **changed)
        said = await refusal(tls_etcd, login(tls=missing))
        assert (said.reason, said.field) == ("TLS_FILE_UNUSABLE", f"tls.{field}")
        other = authority.issue("another")
        wrong = {
            "ca_file": other.key,
            "certificate_file": other.key,
            "key_file": other.key,
        }[field]
        changed[field] = str(wrong)
        said = await refusal(tls_etcd, login(tls=replace(whole, **changed)))
        assert said.reason == "TLS_FILE_UNUSABLE"
        assert str(wrong) in said.message

    async def test_a_server_that_is_down_is_not_blamed_on_tls(self, authority: Authority) -> None:
        security = EtcdSecurity(files(authority))
        async with EtcdClient([f"127.0.0.1:{free_port()}"], security=security) as client:
            with pytest.raises(RetryableError, match="ETCD_UNAVAILABLE"):
                await client.get("k")

    async def test_an_endpoint_that_is_not_trusted_is_passed_over(
        self, tls_etcd: EtcdServer, stranger: Authority, authority: Authority, tmp_path: Path
    ) -> None:
        with EtcdServer(tmp_path, authority=stranger) as other:
            endpoints = [other.endpoint, tls_etcd.url]
            async with EtcdClient(endpoints, security=login(tls=files(authority))) as client:
                answer = await client.put("k", b"2")
                watch = client.watch(KeyRange.key("k"), start_revision=answer.revision)
                assert await events_of(watch, 1) == [b"2"]
                await watch.close()


class TestReplacedFiles:
    async def test_a_certificate_is_replaced(
        self, secured_etcd: EtcdServer, stranger: Authority
    ) -> None:
        good, tls = secured(secured_etcd)
        pair = stranger.issue("replaced")
        own = replace(tls, certificate_file=str(pair.certificate), key_file=str(pair.key))
        async with client_of(secured_etcd, replace(good, tls=own)) as client:
            with pytest.raises(UserError, match="TLS_CLIENT_REFUSED"):
                await client.get("k")
            # The key first, and half of it is not used.
            put(tls.key_file, over=pair.key)
            with pytest.raises(UserError, match=r"TLS_FILE_UNUSABLE: tls\.key_file"):
                await client.get("k")
            put(tls.certificate_file, over=pair.certificate)
            await client.get("k")

    async def test_half_a_replacement_stops_nothing(self, secured_etcd: EtcdServer) -> None:
        good, tls = secured(secured_etcd)
        assert secured_etcd.authority is not None
        async with client_of(secured_etcd, good) as client:
            start = await client.put("half", b"1")
            watch = client.watch(KeyRange.key("half"), start_revision=start.revision)
            assert await events_of(watch, 1) == [b"1"]
            other = secured_etcd.authority.issue("other")
            put(other.key, over=tls.key_file)
            await client.put("half", b"2")
            put(other.certificate, over=tls.certificate_file)
            await client.put("half", b"3")
            # The watch stayed on the connection it began on.
            assert await events_of(watch, 2) == [b"2", b"3"]
            await watch.close()

    async def test_the_authority_changes_during_a_watch(self, tmp_path: Path) -> None:
        old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new", "new-authority")
        trusted = tmp_path / "trusted.pem"
        trusted.write_bytes(old.ca_file.read_bytes())
        security = EtcdSecurity(TlsFiles(str(trusted)))
        with EtcdServer(tmp_path / "etcd", authority=old) as server:
            async with TcpProxy(server.endpoint) as proxy:
                async with (
                    client_of(server, security) as writer,
                    EtcdClient([proxy.address], security=security, call_seconds=3) as client,
                ):
                    start = await writer.put("k", b"1")
                    watch = client.watch(KeyRange.key("k"), start_revision=start.revision)
                    assert await events_of(watch, 1) == [b"1"]
                    # etcd reads its own at every handshake.
                    pair, its = new.server("etcd"), old.server("etcd")
                    put(pair.key, over=its.key)
                    put(pair.certificate, over=its.certificate)
                    proxy.cut()
                    await writer.put("k", b"2")
                    with pytest.raises(UserError, match="TLS_SERVER_UNTRUSTED"):
                        await watch.next()
                    trusted.write_bytes(old.ca_file.read_bytes() + new.ca_file.read_bytes())
                    await writer.put("k", b"3")
                    assert await events_of(watch, 2) == [b"2", b"3"]
                    await watch.close()


class TestLogin:
    async def test_one_login_for_many_calls(self, login_etcd: EtcdServer) -> None:
        before = login_etcd.logins
        async with client_of(login_etcd, login()) as client:
            await asyncio.gather(*(client.put(f"many/{n}", b"") for n in range(30)))
            granted = await client.grant_lease(60)
            assert await client.keep_alive(granted.lease) == 60
            watch = client.watch(KeyRange.prefix("many/"), start_revision=1)
            assert len(await events_of(watch, 30)) == 30
            await watch.close()
            await client.revoke_lease(granted.lease)
            assert await client.version()
        assert login_etcd.logins - before == 1

    async def test_a_wrong_password_is_tried_once(self, login_etcd: EtcdServer) -> None:
        before = login_etcd.logins
        passwords = [WRONG]
        security = replace(login(), password=lambda: passwords[0])
        async with client_of(login_etcd, security) as client:
            tries = (client.get("k") for _ in range(20))
            for said in await asyncio.gather(*tries, return_exceptions=True):
                assert isinstance(said, UserError)
                assert (said.reason, said.field) == ("ETCD_AUTH", "etcd.password")
                assert WRONG not in str(said)
            assert login_etcd.logins - before == 1
            # Replaced where it is kept.
            passwords[0] = "correct horse"
            await client.get("k")

    @pytest.mark.parametrize(
        ("security", "field"),
        [
            (login(WRONG), "etcd.password"),
            (login(user="stranger"), "etcd.password"),
            (None, "etcd.username"),
        ],
    )
    async def test_what_is_wrong_is_named(
        self, login_etcd: EtcdServer, security: EtcdSecurity | None, field: str
    ) -> None:
        said = await refusal(login_etcd, security)
        assert (said.reason, said.field) == ("ETCD_AUTH", field)

    async def test_a_user_without_the_right(
        self, tls_etcd: EtcdServer, authority: Authority
    ) -> None:
        said = await refusal(tls_etcd, login("known", "nobody", tls=files(authority)))
        assert (said.reason, said.field) == ("ETCD_AUTH", "etcd.username")
        assert "permission denied" in said.message

    async def test_an_etcd_without_users(self, etcd_server: EtcdServer) -> None:
        said = await refusal(etcd_server, login())
        assert (said.reason, said.field) == ("ETCD_AUTH", "etcd.username")
        assert "not enabled" in said.message

    async def test_a_cluster_knows_the_token_everywhere(self, login_etcd: EtcdServer) -> None:
        dead = f"127.0.0.1:{free_port()}"
        async with EtcdClient([dead, login_etcd.endpoint], security=login()) as client:
            await client.put("k", b"1")


class TestTokensThatEnd:
    async def test_during_a_watch_whose_connection_breaks(self, secured_etcd: EtcdServer) -> None:
        """Its tokens end after a second of silence."""
        security = security_of(secured_etcd)
        async with (
            TcpProxy(secured_etcd.endpoint) as proxy,
            client_of(secured_etcd, security) as writer,
            EtcdClient([proxy.address], security=security, call_seconds=3) as client,
        ):
            start = await writer.put("ends", b"0")
            watch = client.watch(KeyRange.key("ends"), start_revision=start.revision)
            assert await events_of(watch, 1) == [b"0"]
            before = secured_etcd.logins
            await asyncio.sleep(3)
            # A watch that runs needs no token.
            await writer.put("ends", b"1")
            assert await events_of(watch, 1) == [b"1"]
            await asyncio.sleep(3)
            proxy.cut()
            for number in range(2, 6):
                await writer.put("ends", b"%d" % number)
            assert await events_of(watch, 4) == [b"2", b"3", b"4", b"5"]
            assert secured_etcd.logins > before
            await watch.close()

    async def test_when_etcd_starts_again(self, login_etcd: EtcdServer) -> None:
        """It keeps them in memory only."""
        async with client_of(login_etcd, login()) as client:
            start = await client.put("k", b"1")
            granted = await client.grant_lease(60)
            watch = client.watch(KeyRange.key("k"), start_revision=start.revision)
            assert await events_of(watch, 1) == [b"1"]
            await asyncio.to_thread(login_etcd.restart)
            async with client_of(login_etcd, login()) as writer:
                await writer.put("k", b"2")
            assert await events_of(watch, 1) == [b"2"]
            assert await client.keep_alive(granted.lease) == 60
            await watch.close()

    async def test_a_write_with_an_ended_token_happens_once(self, login_etcd: EtcdServer) -> None:
        async with client_of(login_etcd, login()) as client:
            before = (await client.put("once", b"0")).revision
            for _ in range(5):
                await asyncio.to_thread(login_etcd.end_tokens, "cdc")
                await client.txn([], [PutOp("once", b"x")])
            assert (await client.get("once")).kvs[0].version == 6
            assert (await client.get("once")).revision == before + 5

    async def test_a_signed_token(self, tmp_path: Path) -> None:
        """JWT, whose time is over after a second however much it is used."""
        pair = Authority(tmp_path / "signing").issue("signing")
        keys = f"pub-key={pair.certificate},priv-key={pair.key}"
        options = {"--auth-token": f"jwt,{keys},sign-method=ES256,ttl=1s"}
        with EtcdServer(tmp_path / "etcd", options=options) as server:
            server.enable_login(cdc="correct horse")
            async with client_of(server, login()) as client:
                start = await client.put("k", b"")
                before = server.logins
                for number in range(8):
                    await client.put("k", b"%d" % number)
                    await asyncio.sleep(0.3)
                assert 1 <= server.logins - before <= 4
                watch = client.watch(KeyRange.key("k"), start_revision=start.revision + 1)
                assert len(await events_of(watch, 8)) == 8
                await watch.close()

    async def test_a_leader_stays_one(self, secured_etcd: EtcdServer) -> None:
        candidate = Candidate(secured_etcd, "stays")
        store = await candidate.win()
        for number in range(3):
            await asyncio.to_thread(secured_etcd.end_tokens, "cdc")
            await asyncio.sleep(LEASE_SECONDS / 2)
            await store.commit({"tasks/a": b"%d" % number})
        assert store.certain
        assert await store.load() == {"tasks/a": b"2"}
        await store.close()
        await candidate.election.leave()

    async def test_who_may_not_log_in_never_leads(self, secured_etcd: EtcdServer) -> None:
        security = replace(secured(secured_etcd)[0], password=lambda: WRONG)
        candidate = Candidate(secured_etcd, "refused", security=security)
        with pytest.raises(UserError) as said:
            await candidate.win()
        assert (said.value.reason, said.value.field) == ("ETCD_AUTH", "etcd.password")
        await candidate.election.leave()
