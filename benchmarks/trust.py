"""What trust costs: the same catch-up with plaintext and with mutual TLS, and knowing a caller.

With TLS are all connections of our services, and theirs to the source's etcd and the sink's Milvus.
The queue is in plaintext in both: Milvus' own NATS has no TLS; so is the source's API, which no row
passes.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import yaml
from milvus_cdc.trust.authentication import Authenticator
from milvus_cdc.trust.settings import AuthSettings
from milvuscdc.v1 import task_pb2, task_service_pb2_grpc, tls_pb2
from pymilvus import MilvusClient

from benchmarks import catchup
from benchmarks.rig import Rig
from benchmarks.rows import Table
from tests.servers.certificates import Authority
from tests.servers.milvus import MilvusServer
from tests.servers.services import ControllerProcess
from tests.servers.trust_authority import AUDIENCE, ISSUER, Issuer, hashed
from tests.servers.trust_authority import Authority as OwnAuthority

DIM = 128
ROWS_PER_INSERT = 1_000
ROUNDS = 3
CHECKS = 20_000
FIRST_CHECKS = 300
KNOWN_TOKENS = 1_000
FIRST_CHECK = "web token, its first call in a minute"
"""Signatures are verified once a minute."""


@dataclass(frozen=True, slots=True)
class TlsCost:
    """Catch-ups in turn, each kind with a replicator made for it."""

    plain: list[catchup.CatchUp]
    secured: list[catchup.CatchUp]

    @property
    def ratio(self) -> float:
        """Of the best of each: what else runs on the machine only makes one slower."""
        return max(run.rate for run in self.secured) / max(run.rate for run in self.plain)

    @property
    def cpu_ratio(self) -> float:
        """Of the replicator's CPU time for the same rows, which other processes hardly change."""
        return _least(self.secured, ("replicator",)) / _least(self.plain, ("replicator",))

    @property
    def whole_cpu_ratio(self) -> float:
        """The same of source, replicator and sink together: what the pace is where they have one
        machine to share.
        """
        all_three = ("source", "replicator", "sink")
        return _least(self.secured, all_three) / _least(self.plain, all_three)


def _least(runs: Sequence[catchup.CatchUp], of: Sequence[str]) -> float:
    return min(sum(run.cpu_per_million[name] for name in of) for run in runs)


class _SecuredRig(Rig):
    """Services with mutual TLS beside those of a rig that runs, with its source and its etcd."""

    def __init__(self, plain: Rig, authority: Authority) -> None:
        self.queue, self.tick_ms = plain.queue, plain.tick_ms
        self.folder = plain.folder / "secured"
        self._authority = authority
        self._client = authority.issue("client")
        sink = MilvusServer(
            self.folder / "sink",
            etcd_endpoint=plain.stack.etcd.endpoint,
            root_path="secured-sink",
            cluster="secured-sink",
            settings={"proxy": {"timeTickInterval": plain.tick_ms}},
            name="secured-sink",
            authority=authority,
            client_certificates=True,
        )
        there: Any = SimpleNamespace(
            etcd=plain.stack.etcd, source=plain.stack.source, kafka=plain.stack.kafka, sink=sink
        )
        self.stack = there
        own = OwnAuthority(self.folder / "authority").issue("services")
        settings: dict[str, Any] = {
            "tls": own.server,
            "auth": {"certificates": [{"name": "services", "roles": ["admin", "replicator"]}]},
        }
        self.controller = ControllerProcess(
            self.folder / "controller", credentials=own.credentials, **settings
        )
        self.of_replicators = {
            "credentials": own.credentials,
            "controllerTls": own.client,
            **settings,
        }
        self.replicator = self._new_replicator()
        self._channel = grpc.secure_channel(self.controller.address, own.credentials)
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self._channel)
        self._replicators = [self.replicator]

    def task(self, name: str, collections: Sequence[str]) -> task_pb2.Task:
        task = super().task(name, collections)
        tls = tls_pb2.Tls(
            ca_file=str(self._authority.ca_file),
            certificate_file=str(self._client.certificate),
            key_file=str(self._client.key),
        )
        task.source.etcd.endpoints[:] = [self.stack.etcd.secured_endpoint]
        task.source.etcd.tls.CopyFrom(tls)
        task.sink.milvus.tls.CopyFrom(tls)
        return task

    def drop_at_sink(self, name: str) -> None:
        client = MilvusClient(
            uri=self.stack.sink.uri,
            secure=True,
            server_name="localhost",
            ca_pem_path=str(self._authority.ca_file),
            client_pem_path=str(self._client.certificate),
            client_key_path=str(self._client.key),
        )
        try:
            client.drop_collection(name)
        finally:
            client.close()

    def __enter__(self) -> _SecuredRig:
        try:
            self.stack.sink.start()
            self.controller.start()
            self.replicator.start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self, *, keep_logs: bool = False) -> None:
        self._channel.close()
        for process in (*self._replicators, self.controller):
            process.stop()
        # With mutual TLS it needs a quarter of a minute to end by itself; nothing is kept.
        self.stack.sink.kill()


def tls_cost(queue: str, rows: int, say: Callable[[str], None]) -> TlsCost:
    """Starts its own servers: a source and two sinks."""
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-authority-") as folder:
        authority = Authority(Path(folder))
        found = TlsCost([], [])
        with Rig(queue, etcd_beside=authority) as plain, _SecuredRig(plain, authority) as secured:
            table = Table(f"trust_{DIM}", DIM)
            fill_rate = catchup.prepare(plain, table, rows, ROWS_PER_INSERT)
            for turn in range(ROUNDS):
                for name, rig, runs in (
                    ("plaintext", plain, found.plain),
                    ("mutual TLS", secured, found.secured),
                ):
                    run = catchup.catch_up(rig, table, rows, ROWS_PER_INSERT, fill_rate)
                    runs.append(run)
                    say(f"trust: {name}, turn {turn + 1}: {run.rate:,.0f} rows/s")
        return found


def check_costs() -> dict[str, float]:
    """Microseconds of knowing a caller, per call, by what he shows."""
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-tokens-") as folder:
        return asyncio.run(_check_costs(Path(folder)))


async def _check_costs(folder: Path) -> dict[str, float]:
    issuer = Issuer()
    tokens, keys = folder / "tokens.yaml", folder / "jwks.json"
    keys.write_bytes(issuer.jwks())
    lines = [
        {"sha256": hashed(f"token-{number}"), "name": f"n{number}", "roles": ["viewer"]}
        for number in range(KNOWN_TOKENS)
    ]
    tokens.write_text(yaml.safe_dump({"tokens": lines}))
    authority = OwnAuthority(folder / "authority")
    shown = {
        "x509_common_name": [b"alice"],
        "x509_pem_cert": [authority.issue("alice").certificate.read_bytes()],
    }
    authenticator = Authenticator(
        AuthSettings.model_validate(
            {
                "certificates": [{"name": "alice", "roles": ["viewer"]}],
                "tokensFile": str(tokens),
                "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwksFile": str(keys)},
            }
        )
    )
    authenticator.start()
    try:
        web = issuer.token(roles=["viewer"])
        new = [issuer.token(roles=["viewer"], jti=str(n)) for n in range(FIRST_CHECKS)]
        return {
            "static token": await _each(authenticator, ["token-7"] * CHECKS, {}),
            "web token": await _each(authenticator, [web] * CHECKS, {}),
            FIRST_CHECK: await _each(authenticator, new, {}),
            "certificate": await _each(authenticator, [""] * CHECKS, shown),
        }
    finally:
        await authenticator.close()


async def _each(who: Authenticator, tokens: Sequence[str], peer: dict[str, Any]) -> float:
    """The median of ten parts: a part that something else interrupted does not count."""
    metadata = [((("authorization", f"Bearer {token}"),) if token else ()) for token in tokens]
    size = len(tokens) // 10
    parts = []
    for first in range(0, size * 10, size):
        began = time.perf_counter()
        for one in metadata[first : first + size]:
            await who.caller(one, peer)
        parts.append((time.perf_counter() - began) / size * 1e6)
    return statistics.median(parts)
