"""From a Milvus with TLS to one with mutual TLS, their metadata in an etcd with mutual TLS: rows
arrive and can be compared; each hop with something wrong is refused when the task is created.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from milvus_cdc.cli.main import main as command
from milvus_cdc.etcd import EtcdSecurity
from milvus_cdc.follow import ChangeBatch, Follower, NatsConfig
from milvus_cdc.milvus_endpoint import open_endpoint
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.tls import Fields, TlsFiles
from milvuscdc.v1 import task_pb2, task_service_pb2, tls_pb2
from pymilvus import DataType, MilvusClient

from tests.e2e.pair import Pair, error_info
from tests.servers import Authority, EtcdServer, KafkaServer, MilvusServer, PulsarServer
from tests.servers import Pair as Certificate
from tests.servers.secured import etcd_over_tls

ROOT = "root:Milvus"
TOKEN = "MILVUS_CDC_SECRET_TOKEN"

Change = Callable[[task_pb2.Task, "Secured"], object]


@dataclass(slots=True)
class Secured:
    """Stands for a Stack."""

    authority: Authority
    stranger: Authority
    etcd: EtcdServer
    source: MilvusServer
    sink: MilvusServer
    client: Certificate
    kafka: KafkaServer | None = None
    pulsar: PulsarServer | None = None

    def tls(self, certificate: Certificate | None = None) -> tls_pb2.Tls:
        tls = tls_pb2.Tls(ca_file=str(self.authority.ca_file))
        if certificate is not None:
            tls.certificate_file = str(certificate.certificate)
            tls.key_file = str(certificate.key)
        return tls

    def connect(self, server: MilvusServer) -> MilvusClient:
        return MilvusClient(
            uri=server.uri,
            token=ROOT,
            secure=True,
            server_name="localhost",
            ca_pem_path=str(self.authority.ca_file),
            client_pem_path=str(self.client.certificate),
            client_key_path=str(self.client.key),
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder / "authority")
    of_milvus, client = authority.issue("milvus"), authority.issue("client")
    settings = {
        "common": {"security": {"authorizationEnabled": True}},
        **etcd_over_tls(authority, of_milvus),
    }
    with ExitStack() as running:
        etcd = running.enter_context(
            EtcdServer(folder / "etcd", authority=authority, client_certificates=True)
        )
        servers = [
            MilvusServer(
                folder / name,
                etcd_endpoint=etcd.endpoint,
                root_path=name,
                cluster=name,
                mq="natsmq" if name == "source" else "rocksmq",
                settings=settings,
                name=name,
                authority=authority,
                client_certificates=name == "sink",
            )
            for name in ("source", "sink")
        ]
        for server in servers:
            # With mutual TLS it needs a quarter of a minute to end by itself; nothing is kept.
            running.callback(server.kill)
            server.spawn()
        for server in servers:
            server.wait_ready()
        stranger = Authority(folder / "stranger", "stranger")
        source, sink = servers
        yield Secured(authority, stranger, etcd, source, sink, client)


@pytest.fixture(scope="module")
def pair(secured: Secured, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    monkey = pytest.MonkeyPatch()
    with monkey.context() as variables:
        variables.setenv(TOKEN, ROOT)
        variables.setenv(f"{TOKEN}_WRONG", "root:wrong horse")
        with Pair(secured, tmp_path_factory.mktemp("pair")) as pair:  # type: ignore[arg-type]
            yield pair


def task_of(pair: Pair, secured: Secured, include: str) -> task_pb2.Task:
    task = pair.task(include)
    task.source.etcd.tls.CopyFrom(secured.tls(secured.client))
    task.source.milvus.tls.CopyFrom(secured.tls())
    task.sink.milvus.tls.CopyFrom(secured.tls(secured.client))
    task.source.milvus.token.env = task.sink.milvus.token.env = TOKEN
    return task


def create(pair: Pair, task: task_pb2.Task, **options: Any) -> None:
    request = task_service_pb2.CreateTaskRequest(task=task, **options)
    pair.tasks.CreateTask(request, timeout=60)


def make(secured: Secured, name: str) -> None:
    source = secured.connect(secured.source)
    schema = source.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=8)
    index = source.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="L2")
    source.create_collection(name, schema=schema, index_params=index)
    source.close()


def insert(secured: Secured, name: str, first: int) -> None:
    """200 rows."""
    source = secured.connect(secured.source)
    vectors = np.random.default_rng(first).random((200, 8), dtype=np.float32)
    source.insert(name, [{"id": first + n, "vector": list(v)} for n, v in enumerate(vectors)])
    source.close()


def test_rows_go_through_and_certificates_may_be_replaced(pair: Pair, secured: Secured) -> None:
    name = f"rows_{uuid.uuid4().hex[:8]}"
    make(secured, name)
    insert(secured, name, 0)
    create(pair, task_of(pair, secured, f"default.{name}"))
    pair.wait_running(f"default.{name}")
    assert pair.prove(f"default.{name}") == 200
    # Another certificate in the same files, and the sink has to be connected to anew.
    before = secured.client.certificate.read_bytes()
    assert secured.authority.issue("client") == secured.client
    assert secured.client.certificate.read_bytes() != before
    insert(secured, name, 1000)
    assert pair.prove(f"default.{name}") == 400
    log = pair.replicators[0].log_path.read_text()
    assert "changed TLS files are used from now on" in log
    pair.quiet()


@pytest.mark.parametrize("who", ["source", "sink"])
@pytest.mark.parametrize("server", ["source", "sink"])
async def test_either_side_reaches_either_server(secured: Secured, who: str, server: str) -> None:
    """The source has TLS, the sink mutual TLS."""
    at: MilvusServer = getattr(secured, server)
    spec = task_pb2.MilvusEndpoint(
        uri=at.uri, tls=secured.tls(secured.client if server == "sink" else None)
    )
    spec.token.env = TOKEN
    secrets = SecretResolver(env_prefix="MILVUS_CDC_", environ={TOKEN: ROOT})
    async with open_endpoint(spec, secrets, who=who) as client:
        await client.call("ShowCollections", milvus_pb2.ShowCollectionsRequest())


async def test_the_library_follows(secured: Secured) -> None:
    name = f"library_{uuid.uuid4().hex[:8]}"
    make(secured, name)
    insert(secured, name, 0)
    tls = TlsFiles.of(secured.tls(secured.client), Fields("tls"))
    keys: set[int] = set()
    async with (
        asyncio.timeout(60),
        Follower(
            etcd=[secured.etcd.endpoint],
            etcd_security=EtcdSecurity(tls),
            root_path="source",
            queue=NatsConfig(secured.source.nats_url),
            select=[f"default.{name}"],
        ) as follower,
    ):
        async for item in follower:
            if isinstance(item, ChangeBatch):
                for changes in item.changes:
                    keys.update(map(int, changes.keys(item.table)))
            if len(keys) == 200:
                break
    assert keys == set(range(200))


def _no_certificate(tls: tls_pb2.Tls) -> None:
    tls.certificate_file = tls.key_file = ""


def _strange_ca(tls: tls_pb2.Tls, secured: Secured) -> None:
    tls.ca_file = str(secured.stranger.ca_file)


def _strange_certificate(tls: tls_pb2.Tls, secured: Secured) -> None:
    other = secured.stranger.issue("client")
    tls.certificate_file, tls.key_file = str(other.certificate), str(other.key)


def _log_in(etcd: task_pb2.EtcdMetadata) -> None:
    etcd.username, etcd.password.env = "cdc", TOKEN


def _plaintext(endpoint: task_pb2.MilvusEndpoint) -> None:
    endpoint.ClearField("tls")
    endpoint.uri = endpoint.uri.replace("https:", "http:")


WRONG: dict[str, tuple[Change, str, str]] = {
    "etcd, wrong authority": (
        lambda task, by: _strange_ca(task.source.etcd.tls, by),
        "TLS_SERVER_UNTRUSTED",
        "task.source.etcd.tls.ca_file",
    ),
    "etcd, no certificate": (
        lambda task, by: _no_certificate(task.source.etcd.tls),
        "TLS_CLIENT_REFUSED",
        "task.source.etcd.tls.certificate_file",
    ),
    "etcd, no TLS": (
        lambda task, by: task.source.etcd.ClearField("tls"),
        "TLS_NEEDED",
        "task.source.etcd.tls",
    ),
    "etcd, a user where there are none": (
        lambda task, by: _log_in(task.source.etcd),
        "ETCD_AUTH",
        "task.source.etcd.username",
    ),
    "source, wrong password": (
        lambda task, by: setattr(task.source.milvus.token, "env", f"{TOKEN}_WRONG"),
        "SOURCE_UNAUTHENTICATED",
        "task.source.milvus.token",
    ),
    "sink, wrong password": (
        lambda task, by: setattr(task.sink.milvus.token, "env", f"{TOKEN}_WRONG"),
        "SINK_UNAUTHENTICATED",
        "task.sink.milvus.token",
    ),
    "source, wrong authority": (
        lambda task, by: _strange_ca(task.source.milvus.tls, by),
        "TLS_SERVER_UNTRUSTED",
        "task.source.milvus.tls.ca_file",
    ),
    "source, no TLS": (
        lambda task, by: _plaintext(task.source.milvus),
        "TLS_NEEDED",
        "task.source.milvus.tls",
    ),
    "sink, wrong authority": (
        lambda task, by: _strange_ca(task.sink.milvus.tls, by),
        "TLS_SERVER_UNTRUSTED",
        "task.sink.milvus.tls.ca_file",
    ),
    "sink, the system's authorities": (
        lambda task, by: task.sink.milvus.ClearField("tls"),
        "TLS_SERVER_UNTRUSTED",
        "task.sink.milvus.tls.ca_file",
    ),
    "sink, another server's name": (
        lambda task, by: setattr(task.sink.milvus.tls, "server_name", "milvus.example"),
        "TLS_SERVER_NAME",
        "task.sink.milvus.tls.server_name",
    ),
    "sink, no certificate": (
        lambda task, by: _no_certificate(task.sink.milvus.tls),
        "TLS_CLIENT_REFUSED",
        "task.sink.milvus.tls.certificate_file",
    ),
    "sink, certificate of a stranger": (
        lambda task, by: _strange_certificate(task.sink.milvus.tls, by),
        "TLS_CLIENT_REFUSED",
        "task.sink.milvus.tls.certificate_file",
    ),
    "sink, a file that is not there": (
        lambda task, by: setattr(task.sink.milvus.tls, "ca_file", "/no/such.pem"),
        "TLS_FILE_UNUSABLE",
        "task.sink.milvus.tls.ca_file",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_with_its_field(pair: Pair, secured: Secured, what: str) -> None:
    change, reason, field = WRONG[what]
    task = task_of(pair, secured, "elsewhere.*")
    task.name = "tasks/wrong"
    change(task, secured)
    with pytest.raises(grpc.RpcError) as refused:
        create(pair, task)
    info = error_info(refused.value)
    assert (info.reason, info.metadata["field"]) == (reason, field)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "wrong horse" not in str(refused.value.details())


def test_a_user_is_made_at_a_sink_with_mutual_tls(
    secured: Secured,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    password = tmp_path / "password"
    password.write_text("Correct-Horse-1")
    call = ["sink", "create-user", "--uri", secured.sink.uri, "--user", "reader"]
    call += ["--password-file", str(password), "--token-env", TOKEN]
    monkeypatch.setenv(TOKEN, ROOT)
    files = {"certificate": secured.client.certificate, "key": secured.client.key}
    trust = ["--milvus-ca-file", str(secured.authority.ca_file)]
    own = [f"--milvus-{what}-file={path}" for what, path in files.items()]
    assert command(call) == 3
    assert "--milvus-ca-file: the certificate of" in capsys.readouterr().err
    assert command([*call, *trust]) == 3
    assert "--milvus-certificate-file: " in capsys.readouterr().err
    assert command([*call, *trust, *own]) == 0
