"""Real servers shared by a whole test session, started on first use and stopped at its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.contract.pulsar_queue import SMALL_LEDGERS
from tests.e2e.carries import Carries
from tests.servers import (
    Authority,
    EtcdServer,
    KafkaServer,
    PostgresServer,
    PulsarServer,
    S3Server,
    Stack,
    kafka_unavailable_reason,
    postgres_unavailable_reason,
    pulsar_unavailable_reason,
)

PASSWORD = "correct horse"

# A property holds however busy the machine is.
settings.register_profile(
    "untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")

collect_ignore = ["plugin_package"]
"""A package of its own, whose tests run where it is installed (tests/contract)."""

SHARED_STACKS = pytest.StashKey[list[Stack]]()
"""Those that run now, for whoever cleans up in them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-tables",
        action="store_true",
        help="write what the tests saw into the README's tables, instead of comparing",
    )


@pytest.fixture(scope="session")
def carries(request: pytest.FixtureRequest) -> Carries:
    """The README's table of what each sink carries."""
    return Carries(update=request.config.getoption("--update-tables"))


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd no Milvus uses; each test takes a key prefix of its own."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="session")
def secured_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One that wants a client's certificate and a login, and whose tokens end after a second; each
    test takes a key prefix of its own.
    """
    folder = tmp_path_factory.mktemp("secured-etcd")
    with EtcdServer(
        folder,
        authority=Authority(folder / "authority"),
        client_certificates=True,
        options={"--auth-token-ttl": "1"},
    ) as server:
        server.enable_login(cdc=PASSWORD)
        yield server


@pytest.fixture(scope="session")
def nats_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A source Milvus on its own NATS and a sink Milvus; each test takes a database of its own.

    Who kills its servers takes a stack of his own: a Milvus that lost its session goes on working
    at it for minutes.
    """
    with Stack(tmp_path_factory.mktemp("nats-stack")) as stack:
        request.config.stash.setdefault(SHARED_STACKS, []).append(stack)
        yield stack


@pytest.fixture(scope="session")
def kafka_available() -> None:
    """Without Java and Maven: skipped, in CI a failure."""
    if reason := kafka_unavailable_reason():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kafka_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kafka_available: None
) -> Iterator[Stack]:
    """Like `nats_stack`, on a Kafka broker."""
    with Stack(tmp_path_factory.mktemp("kafka-stack"), mq="kafka") as stack:
        request.config.stash.setdefault(SHARED_STACKS, []).append(stack)
        yield stack


@pytest.fixture(scope="session")
def postgres_available() -> None:
    """Without PostgreSQL and pgvector: skipped, in CI a failure."""
    if reason := postgres_unavailable_reason():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres_server(
    tmp_path_factory: pytest.TempPathFactory, postgres_available: None
) -> Iterator[PostgresServer]:
    """Each test takes a database of its own; who kills it takes a server of his own."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_broker(
    tmp_path_factory: pytest.TempPathFactory, kafka_available: None
) -> Iterator[KafkaServer]:
    """A broker that no Milvus uses, with logins and rights; each test takes topics of its own and
    leaves it running.
    """
    with KafkaServer(tmp_path_factory.mktemp("kafka-sink"), secured=True) as server:
        yield server


@pytest.fixture(scope="session")
def pulsar_available() -> None:
    """Without Java and Maven: skipped, in CI a failure."""
    if reason := pulsar_unavailable_reason():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def pulsar_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pulsar_available: None
) -> Iterator[Stack]:
    """Like `nats_stack`, on a Pulsar broker whose namespace retains everything."""
    with Stack(tmp_path_factory.mktemp("pulsar-stack"), mq="pulsar") as stack:
        assert stack.pulsar is not None
        stack.pulsar.retain(-1)
        request.config.stash.setdefault(SHARED_STACKS, []).append(stack)
        yield stack


@pytest.fixture(scope="session")
def pulsar_broker(
    tmp_path_factory: pytest.TempPathFactory, pulsar_available: None
) -> Iterator[PulsarServer]:
    """A broker that no Milvus uses, without logins, whose ledgers are small; each test takes a
    namespace of its own and leaves it running.
    """
    with PulsarServer(tmp_path_factory.mktemp("pulsar"), settings=SMALL_LEDGERS) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Each test takes a bucket of its own."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def example_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/plugin_package as somebody would install it: a folder for PYTHONPATH, or sys.path."""
    folder = tmp_path_factory.mktemp("plugins")
    source, target = folder / "source", folder / "installed"
    # pip leaves things beside what it builds.
    shutil.copytree(Path(__file__).parent / "plugin_package", source)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, source],
        check=True,
        capture_output=True,
        text=True,
    )
    return target
