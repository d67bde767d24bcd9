"""The page for Prometheus of both services with TLS: the right and the wrong authority, files that
are replaced, and readers who never finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.trust import scraping
from milvus_cdc.trust.scraping import Scraping
from milvus_cdc.trust.settings import MetricsTls, ServerTls
from prometheus_client import CollectorRegistry, Counter

from tests.integration.trust_world import World, replace_file
from tests.servers.ports import free_port
from tests.servers.services import ReplicatorProcess
from tests.servers.trust_authority import Authority, Issued


def scrape(port: int, trusted: Path, issued: Issued | None = None) -> str:
    """As Prometheus does with `tls_config`. Raises httpx.HTTPError."""
    context = ssl.create_default_context(cafile=str(trusted))
    if issued is not None:
        context.load_cert_chain(issued.certificate, issued.key)
    with httpx.Client(verify=context, timeout=20) as client:
        return client.get(f"https://127.0.0.1:{port}/metrics").raise_for_status().text


def opens(port: int, trusted: Path, issued: Issued | None = None) -> bool:
    try:
        return "rows_seen" in scrape(port, trusted, issued)
    except httpx.HTTPError:
        return False


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("rows_seen", "Of this test", registry=registry)
    return registry


@contextlib.contextmanager
def served(tls: ServerTls | None, registry: CollectorRegistry) -> Iterator[int]:
    page = Scraping("127.0.0.1:0", tls, registry)
    try:
        yield page.port
    finally:
        page.close()


async def test_a_controller_shows_its_certificate(tmp_path: Path) -> None:
    world = World(tmp_path)
    place = f"127.0.0.1:{free_port()}"
    port = int(place.rpartition(":")[2])
    async with world.serving(metrics=place, metricsTls={}):
        page = await asyncio.to_thread(scrape, port, world.authority.file)
        assert "milvus_cdc_controller_leader 1.0" in page
        foreign = Authority(tmp_path / "other").file
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(scrape, port, foreign)
        with pytest.raises(httpx.HTTPError):
            await asyncio.to_thread(httpx.get, f"http://{place}/metrics", timeout=20)


def test_a_replicator_asks_who_reads(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    own, reader = authority.issue("replicator"), authority.issue("prometheus")
    replicator = ReplicatorProcess(
        tmp_path, "127.0.0.1:1", "r1", wait_connected=False, metricsTls=own.server
    )
    port = int(replicator.metrics_url.split(":")[2].partition("/")[0])
    replicator.start()
    try:
        assert "milvus_cdc_replicator_connected 0.0" in scrape(port, authority.file, reader)
        with pytest.raises(httpx.HTTPError):
            scrape(port, authority.file)
    finally:
        replicator.stop()


def test_who_reads_needs_a_certificate_of_the_authority(
    tmp_path: Path, registry: CollectorRegistry
) -> None:
    authority, other = Authority(tmp_path / "1"), Authority(tmp_path / "2")
    own, reader = authority.issue("own"), authority.issue("prometheus")
    over = authority.issue("prometheus", days=-1, file="over")
    with served(ServerTls.model_validate(own.server), registry) as port:
        assert opens(port, authority.file, reader)
        assert not opens(port, authority.file)
        assert not opens(port, authority.file, other.issue("prometheus"))
        assert not opens(port, authority.file, over)


def test_certificates_are_replaced_while_it_serves(
    tmp_path: Path, registry: CollectorRegistry
) -> None:
    first, second = Authority(tmp_path / "1"), Authority(tmp_path / "2")
    own, fresh = first.issue("own"), second.issue("own")
    readers = tmp_path / "readers.pem"
    readers.write_bytes(first.file.read_bytes())
    tls = ServerTls(certificate_file=own.certificate, key_file=own.key, client_ca_file=readers)
    by_first, by_second = first.issue("reader"), second.issue("reader")
    with served(tls, registry) as port:
        assert opens(port, first.file, by_first)
        # The certificate first: until its key comes, the pair before stays in use.
        replace_file(own.certificate, fresh.certificate.read_bytes())
        assert opens(port, first.file, by_first)
        replace_file(own.key, fresh.key.read_bytes())
        assert opens(port, second.file, by_first)
        assert not opens(port, first.file, by_first)
        replace_file(readers, second.file.read_bytes())
        assert opens(port, second.file, by_second)
        assert not opens(port, second.file, by_first)
        own.key.write_bytes(b"nonsense")
        assert opens(port, second.file, by_second), "a bad file changes nothing"


@pytest.mark.parametrize("with_tls", [True, False])
def test_who_never_finishes_keeps_nobody_out(
    tmp_path: Path, registry: CollectorRegistry, with_tls: bool
) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("own")
    tls = ServerTls(certificate_file=own.certificate, key_file=own.key) if with_tls else None
    with served(tls, registry) as port, contextlib.ExitStack() as idle:
        # Twice as many as it keeps: silent ones, and ones in the middle of a handshake or request.
        connections: list[socket.socket] = []
        for number in range(2 * scraping.CONNECTIONS_MAX):
            one = idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            if number % 2:
                one.sendall(b"\x16\x03\x01\x02\x00\x01" if with_tls else b"GET /metrics HTTP/1.0\r")
            connections.append(one)
        if with_tls:
            assert opens(port, authority.file)
        else:
            page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20)
            assert "rows_seen" in page.text
        # The oldest have made room, long before they would have been given up.
        connections[0].settimeout(scraping.SILENCE_SECONDS / 2)
        assert connections[0].recv(1) == b""


def test_what_cannot_be_used_is_named(tmp_path: Path, registry: CollectorRegistry) -> None:
    authority = Authority(tmp_path)
    own, other = authority.issue("own"), authority.issue("other")
    mixed = ServerTls(certificate_file=own.certificate, key_file=other.key)
    for tls, reason, field in (
        (mixed, "CERTIFICATE_INVALID", "metricsTls.keyFile"),
        (
            ServerTls(certificate_file=tmp_path / "none", key_file=own.key),
            "FILE_UNREADABLE",
            "metricsTls.certificateFile",
        ),
    ):
        with pytest.raises(UserError) as refused:
            Scraping("127.0.0.1:0", tls, registry)
        assert (refused.value.reason, refused.value.field) == (reason, field)
    with served(None, registry) as port:
        with pytest.raises(UserError, match="ADDRESS_UNUSABLE"):
            Scraping(f"127.0.0.1:{port}", None, registry)


def test_the_certificate_is_that_of_the_service_unless_another_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, other = authority.issue("own"), authority.issue("other")
    service = ServerTls.model_validate(own.server)
    assert MetricsTls().files(service) == ServerTls(
        certificate_file=own.certificate, key_file=own.key
    )
    named = MetricsTls.model_validate(other.server)
    assert named.files(service) == ServerTls.model_validate(other.server)
