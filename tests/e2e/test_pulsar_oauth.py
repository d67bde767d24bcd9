"""A source whose Pulsar asks everyone for a token is followed with those of an identity provider:
from CreateTask to equal rows, through changes of the client's secret, which is kept nowhere.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvuscdc.v1 import task_pb2
from milvuscdc.v1 import task_service_pb2 as api_pb

from tests.contract.identity_provider import Provider, openid_provider
from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import TASK, Pair, error_info
from tests.e2e.test_secrets_stay_secret import forms
from tests.servers import Authority, EtcdServer, MilvusServer, PulsarServer, Stack
from tests.servers.pulsar_security import PulsarSecurity
from tests.servers.services import ReplicatorProcess

pytestmark = pytest.mark.pulsar

FIRST, SECOND, THIRD = "plant-first-Vb5nQ8", "plant-second-Ke2wM7", "plant-third-Ts9xF4"
WRONG = "plant-wrong-Gy6pL3"
TOKEN_SECONDS = 13
"""Renewed when a good ten have passed; and a token that ends before that, because the machine
stood still, is old enough to be fetched anew when the broker refuses it.
"""
DATABASE = "by_oauth"
COLLECTION = f"{DATABASE}.{SHAPES[0].name}"
FIELD = "source.pulsar.oauth.client_secret"


@dataclass(slots=True)
class Guarded:
    """Stands for a Stack; etcd and sink are another one's."""

    etcd: EtcdServer
    pulsar: PulsarServer
    source: MilvusServer
    sink: MilvusServer
    kafka: None = None

    @property
    def security(self) -> PulsarSecurity:
        assert self.pulsar.security is not None
        return self.pulsar.security


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, pulsar_available: None, nats_stack: Stack
) -> Iterator[Guarded]:
    """Its Milvus logs in by a token of its own; `reader` may consume and nothing else."""
    folder = tmp_path_factory.mktemp("guarded")
    with ExitStack() as running:
        broker = PulsarServer(folder / "pulsar", secured=True)
        running.callback(broker.kill)  # nothing is kept
        broker.start()
        for role, rights in (("milvus", ["produce", "consume"]), ("reader", ["consume"])):
            broker.admin("POST", f"namespaces/public/default/permissions/{role}", rights)
        assert broker.security is not None
        source = MilvusServer(
            folder / "source",
            etcd_endpoint=nats_stack.etcd.endpoint,
            root_path="guarded",
            cluster="guarded",
            mq="pulsar",
            pulsar=(broker.port, broker.web_port),
            settings={
                "pulsar": {
                    "authPlugin": "org.apache.pulsar.client.impl.auth.AuthenticationToken",
                    "authParams": f"token:{broker.security.token('milvus')}",
                }
            },
            name="guarded",
        )
        running.callback(source.kill)
        source.start()
        yield Guarded(nats_stack.etcd, broker, source, nats_stack.sink)


@dataclass(slots=True)
class Given:
    """Whom the provider was asked by, and what it gave."""

    provider: Provider
    authority: Authority
    tokens: list[str]
    last_ends: int = 0
    """When the newest token does, in seconds since 1970."""

    def asked_with(self, secret: str) -> int:
        return [form["client_secret"] for form in self.provider.asked].count(secret)

    @property
    def refused(self) -> int:
        return len(self.provider.asked) - len(self.tokens)


@pytest.fixture
def given(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    """Reached by TLS alone; its tokens are those of `reader`."""
    authority = Authority(tmp_path_factory.mktemp("provider"))

    def make(seconds: int) -> str:
        seen.last_ends = int(time.time()) + seconds
        seen.tokens.append(guarded.security.token("reader", expires_unix_s=seen.last_ends))
        return seen.tokens[-1]

    with openid_provider(make, authority.server("provider")) as provider:
        provider.secret, provider.seconds = FIRST, TOKEN_SECONDS
        seen = Given(provider, authority, [])
        yield seen


def task_of(pair: Pair, guarded: Guarded, given: Given, secret: Path) -> task_pb2.Task:
    task = pair.task(f"{DATABASE}.*")
    pulsar = task.source.pulsar
    pulsar.service_url = guarded.security.service_url
    pulsar.admin_url = guarded.security.admin_url
    pulsar.tls.ca_file = str(guarded.security.ca_file)
    pulsar.oauth.issuer_url = given.provider.url
    pulsar.oauth.client_id = "alice-client"
    pulsar.oauth.client_secret.file = str(secret)
    pulsar.oauth.ca_file = str(given.authority.ca_file)
    return task


def found_in(produced: dict[str, bytes], value: str) -> set[str]:
    sought = list(forms(value))
    return {place for place, text in produced.items() if any(form in text for form in sought)}


@pytest.mark.timeout(300)
def test_followed_by_a_providers_tokens_while_its_secret_changes(
    guarded: Guarded, given: Given, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hidden, answers = tmp_path_factory.mktemp("hidden"), list[Any]()
    (hidden / "secret").write_text(FIRST)
    (hidden / "wrong").write_text(WRONG)
    load = Load(guarded.source.uri, DATABASE, shapes=SHAPES[:1], pause_seconds=0.1)
    load.create()
    debug = {"format": "json", "level": "debug"}
    pair = Pair(guarded, tmp_path, replicators=0, log=debug)  # type: ignore[arg-type]
    address, secrets = pair.controller.address, {"folders": [str(hidden)]}
    replicator = ReplicatorProcess(tmp_path, address, "replicator-0", secrets=secrets, log=debug)
    pair.replicators.append(replicator)
    with pair:
        task = task_of(pair, guarded, given, hidden / "wrong")
        with pytest.raises(grpc.RpcError) as wrong:
            pair.tasks.CreateTask(api_pb.CreateTaskRequest(task=task), timeout=60)
        info = error_info(wrong.value)
        assert (info.reason, info.metadata["field"]) == ("QUEUE_ACCESS_DENIED", f"task.{FIELD}")
        assert wrong.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "invalid_client" in str(wrong.value.details())
        answers += [info, repr(wrong.value)]

        load.start()
        task = task_of(pair, guarded, given, hidden / "secret")
        answers.append(pair.tasks.CreateTask(api_pb.CreateTaskRequest(task=task), timeout=60))
        pair.wait_running(COLLECTION, seconds=120)
        assert given.asked_with(FIRST) >= 1
        # A new secret at the provider and in the file: nobody notices, though no token by the first
        # one holds any more.
        old_ends, given.provider.secret = given.last_ends, SECOND
        (hidden / "secret").write_text(SECOND)
        pair.wait(
            "the new secret alone opens",
            lambda: given.asked_with(SECOND) >= 2 and time.time() > old_ends,
        )
        load.stop()
        assert pair.prove() > 0
        pair.quiet()

        # Forgotten in the file: with the last token it is a person's to mend.
        given.provider.secret = THIRD
        load.start()
        failed = task_pb2.COLLECTION_STATE_FAILED
        pair.wait("it is told", lambda: pair.collections()[COLLECTION].state == failed)
        told = pair.collections()[COLLECTION]
        assert told.reason == "QUEUE_ACCESS_DENIED"
        assert FIELD in told.message
        answers += [told, pair.get()]
        with pytest.raises(grpc.RpcError) as unlisted:  # of the REST API
            pair.holds()
        assert error_info(unlisted.value).reason == "QUEUE_ACCESS_DENIED"
        answers += [error_info(unlisted.value), repr(unlisted.value)]
        assert given.refused < 6, "a storm"
        (hidden / "secret").write_text(THIRD)
        pair.tasks.RetryTask(api_pb.RetryTaskRequest(name=TASK), timeout=30)
        pair.wait_running(COLLECTION, seconds=120)
        load.stop()
        assert pair.prove() > 0
        answers += [pair.get(), pair.collections(), pair.assignments(), pair.holds()]
        for process in (pair.controller, replicator):
            with urllib.request.urlopen(process.metrics_url, timeout=10) as page:
                answers.append(page.read().decode())

    assert given.asked_with(WRONG) == 1, "a storm"
    produced = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    produced["answers"] = repr(answers).encode()
    assert found_in(produced, "alice-client") >= {"controller.db", "answers"}
    assert found_in(produced, "invalid_client") >= {"replicator-0.log", "answers"}
    for value in (FIRST, SECOND, THIRD, WRONG):
        assert found_in(produced, value) == set()
    for token in given.tokens:
        assert found_in(produced, token.rpartition(".")[2]) == set()
