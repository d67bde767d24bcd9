"""The PostgreSQL writer and what a person has to mend: connections, rights, credentials, TLS."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.rows import ChangeOp
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.writer import Opening
from milvuscdc.v1 import sink_postgres_pb2

from tests.contract.postgres_proxy import PostgresProxy
from tests.contract.postgres_samples import (
    Database,
    opened,
    plain,
    put,
    table_of,
    upto,
    write,
)
from tests.servers import Authority, Pair, free_port

UPDATE = ChangeOp.UPDATE


async def refused(writer: PostgresWriter) -> CdcError:
    with pytest.raises((UserError, RetryableError)) as raised:
        await writer.probe()
    await writer.close()
    return raised.value


async def test_probe(database: Database, writer: PostgresWriter) -> None:
    assert await writer.probe() == "PostgreSQL 16.14, pgvector not yet made"
    database.execute("CREATE EXTENSION vector")
    assert await writer.probe() == "PostgreSQL 16.14, pgvector 0.8.5"


async def test_connections_that_are_refused(database: Database) -> None:
    error = await refused(database.writer(password="wrong"))
    assert isinstance(error, UserError)
    assert (error.reason, error.field) == ("SINK_AUTHENTICATION_FAILED", "sink.postgres.password")
    assert "wrong" not in str(error)
    error = await refused(database.writer(user="nobody"))
    assert (error.reason, error.field) == ("SINK_AUTHENTICATION_FAILED", "sink.postgres.password")
    error = await refused(database.writer(database="nowhere"))
    assert isinstance(error, UserError)
    assert (error.reason, error.field) == ("SINK_DATABASE_MISSING", "sink.postgres.database")
    error = await refused(database.writer(port=free_port()))
    assert isinstance(error, RetryableError)
    assert (error.reason, error.field) == ("SINK_UNREACHABLE", "sink.postgres.host")
    error = await refused(database.writer(host="no-such-host.invalid"))
    assert isinstance(error, RetryableError)
    assert (error.reason, error.field) == ("SINK_UNREACHABLE", "sink.postgres.host")
    tls = sink_postgres_pb2.PostgresTls(mode=sink_postgres_pb2.POSTGRES_TLS_MODE_REQUIRE)
    error = await refused(database.writer(tls=tls))
    assert isinstance(error, UserError)
    assert (error.reason, error.field) == ("SINK_TLS_FAILED", "sink.postgres.tls")


@pytest.fixture
def plain_user(database: Database) -> Iterator[str]:
    name = f"user_{database.name}"
    database.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'correct horse'")
    yield name
    database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


async def test_rights(database: Database, plain_user: str) -> None:
    error = await refused(database.writer(user=plain_user))
    assert isinstance(error, UserError)
    assert (error.reason, error.field) == ("SINK_ACCESS_DENIED", "sink.postgres.user")
    assert f'GRANT CREATE ON DATABASE "{database.name}" TO "{plain_user}"' in error.message
    database.execute(f"GRANT CREATE ON DATABASE {database.name} TO {plain_user}")
    error = await refused(database.writer(user=plain_user))
    assert (error.reason, error.field) == ("PGVECTOR_MISSING", "sink.postgres.database")
    assert "CREATE EXTENSION vector" in error.message
    writer = database.writer(user=plain_user)
    table = table_of()
    with pytest.raises(UserError, match=r"PGVECTOR_MISSING.*CREATE EXTENSION vector"):
        await opened(writer, table)
    database.execute("CREATE EXTENSION vector")
    await writer.probe()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1])))
    database.execute('ALTER TABLE "default".articles OWNER TO CURRENT_USER')
    with pytest.raises(UserError, match=r"SINK_ACCESS_DENIED.*articles"):
        await write(writer, table, put(table, plain([2])))
    await writer.close()


async def test_credentials_that_expire(database: Database, plain_user: str) -> None:
    """Rows stop with what to do, and go on once the user may log in again."""
    database.execute(f"GRANT CREATE ON DATABASE {database.name} TO {plain_user}")
    database.execute("CREATE EXTENSION vector")
    writer, table = database.writer(user=plain_user), table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1])))
    database.execute(f"ALTER ROLE {plain_user} VALID UNTIL '2020-01-01'")
    # As a restart of the server, a failover or an idle limit ends connections.
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", plain_user
    )
    seen: list[CdcError] = []
    while not seen or not isinstance(seen[-1], UserError):
        assert len(seen) < 5
        with pytest.raises(CdcError) as raised:
            await write(writer, table, put(table, plain([2])))
        seen.append(raised.value)
    assert (seen[-1].reason, seen[-1].field) == (
        "SINK_AUTHENTICATION_FAILED",
        "sink.postgres.password",
    )
    database.execute(f"ALTER ROLE {plain_user} VALID UNTIL 'infinity'")
    await opened(writer, table, Opening.RESUME, epoch=2)
    await write(writer, table, put(table, plain([2])))
    assert database.numbers().keys() == {1, 2}
    await writer.close()


async def test_schemas_that_a_person_prepared(database: Database, plain_user: str) -> None:
    """Without any right to make some."""
    database.execute("CREATE EXTENSION vector")
    for schema in ("milvus_cdc", '"default"'):
        database.execute(f"CREATE SCHEMA {schema}; GRANT ALL ON SCHEMA {schema} TO {plain_user}")
    writer = database.writer(user=plain_user)
    await writer.probe()
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1]), op=UPDATE), checkpoints=[upto(1)])
    with pytest.raises(UserError, match=r"SINK_ACCESS_DENIED.*permission denied for database"):
        await opened(writer, table_of(database="other", collection_id=8))
    await writer.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, another-ca.pem, server.pem (for 127.0.0.1) and its key.pem."""
    if shutil.which("openssl") is None:
        reason = "certificates for tests are made by openssl: install it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.pem -days 3 -subj /CN=ca",
        "req -x509 -newkey rsa:2048 -nodes -keyout x.pem -out another-ca.pem -days 3 -subj /CN=x",
        "req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=server",
        "x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out server.pem"
        " -days 3 -extfile names",
    ):
        subprocess.run(["openssl", *line.split()], check=True, capture_output=True, cwd=folder)
    return folder


async def test_tls(database: Database, certificates: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "key.pem")
    async with PostgresProxy(database.server.port, context) as proxy:

        def over_tls(host: str, ca: str | None, mode: Any = 0) -> PostgresWriter:
            tls = sink_postgres_pb2.PostgresTls(mode=mode)
            if ca is not None:
                tls.ca_file = str(certificates / ca)
            return database.writer(host=host, port=proxy.port, tls=tls)

        writer = over_tls("127.0.0.1", "ca.pem")
        assert "PostgreSQL" in await writer.probe()
        table = table_of()
        await opened(writer, table)
        await write(writer, table, put(table, plain(range(2000)), op=UPDATE))
        assert len(database.numbers()) == 2000
        await writer.close()
        for host, ca, words in (
            ("127.0.0.1", "another-ca.pem", "certificate verify failed"),
            ("127.0.0.1", None, "certificate verify failed"),
            ("localhost", "ca.pem", "does not match host name"),
        ):
            error = await refused(over_tls(host, ca))
            assert isinstance(error, UserError)
            assert (error.reason, error.field) == ("SINK_TLS_FAILED", "sink.postgres.tls")
            assert words in error.message
        verify_ca = sink_postgres_pb2.POSTGRES_TLS_MODE_VERIFY_CA
        require = sink_postgres_pb2.POSTGRES_TLS_MODE_REQUIRE
        for writer in (
            over_tls("localhost", "ca.pem", verify_ca),
            over_tls("localhost", None, require),
        ):
            await writer.probe()
            await writer.close()


async def test_mutual_tls(database: Database, tmp_path: Path) -> None:
    authority, stranger = (Authority(tmp_path / name, name) for name in ("ours", "theirs"))
    own = authority.server("postgres")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.ca_file)
    context.load_cert_chain(own.certificate, own.key)
    context.verify_mode = ssl.CERT_REQUIRED
    async with PostgresProxy(database.server.port, context) as proxy:

        def showing(client: Pair | None) -> PostgresWriter:
            tls = sink_postgres_pb2.PostgresTls(ca_file=str(authority.ca_file))
            if client is not None:
                tls.certificate_file, tls.key_file = str(client.certificate), str(client.key)
            return database.writer(host="127.0.0.1", port=proxy.port, tls=tls)

        writer, table = showing(authority.issue("replicator")), table_of()
        assert "PostgreSQL" in await writer.probe()
        await opened(writer, table)
        await write(writer, table, put(table, plain(range(10)), op=UPDATE))
        assert len(database.numbers()) == 10
        await writer.close()
        for wrong in (None, stranger.issue("replicator")):
            error = await refused(showing(wrong))
            assert isinstance(error, UserError)
            assert (error.reason, error.field) == ("SINK_TLS_FAILED", "sink.postgres.tls")
