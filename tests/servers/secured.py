"""A stack every door of which wants a certificate: etcd's, both Milvus', and the queue's, before
which a side-car stands because Milvus' own NATS has no TLS.
"""

from __future__ import annotations

from pathlib import Path

from pymilvus import MilvusClient

from tests.servers.certificates import Authority, Pair
from tests.servers.ensemble import Ensemble
from tests.servers.etcd import EtcdServer
from tests.servers.milvus import MilvusServer, Settings
from tests.servers.process import ManagedProcess
from tests.servers.tls_front import TlsFront


def etcd_over_tls(authority: Authority, own: Pair) -> Settings:
    """Of milvus.yaml: how it reaches an etcd that wants certificates."""
    ssl = {
        "enabled": True,
        "tlsCert": str(own.certificate),
        "tlsKey": str(own.key),
        "tlsCACert": str(authority.ca_file),
        # etcd 3.5.1 speaks nothing newer, and Milvus asks for 1.3 by default.
        "tlsMinVersion": "1.2",
    }
    return {"etcd": {"ssl": ssl}}


class SecuredStack(Ensemble):
    """Source, sink and their etcd; `queue_url` is the side-car's."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.authority = authority
        self.of_milvus = authority.issue("milvus")
        """With which both Milvus come to their etcd."""
        self.etcd = EtcdServer(folder / "etcd", authority=authority, client_certificates=True)
        self.source, self.sink = (
            MilvusServer(
                folder / name,
                etcd_endpoint=self.etcd.endpoint,
                root_path=name,
                cluster=name,
                mq="natsmq" if name == "source" else "rocksmq",
                settings=etcd_over_tls(authority, self.of_milvus),
                name=name,
                authority=authority,
                client_certificates=True,
            )
            for name in ("source", "sink")
        )
        inner = self.source.nats_url.removeprefix("nats://")
        self.queue = TlsFront(folder / "queue", inner, authority, name="queue")
        self.queue_url = f"nats://{self.queue.address}"

    @property
    def servers(self) -> tuple[ManagedProcess, ...]:
        return (self.etcd, self.queue, self.source, self.sink)

    def connect(self, server: MilvusServer, who: Pair, database: str = "default") -> MilvusClient:
        return MilvusClient(
            uri=server.uri,
            db_name=database,
            secure=True,
            server_name="localhost",
            ca_pem_path=str(self.authority.ca_file),
            client_pem_path=str(who.certificate),
            client_key_path=str(who.key),
        )

    def stop(self) -> None:
        """At once: with mutual TLS a Milvus needs a quarter of a minute to end by itself."""
        for server in reversed(self.servers):
            server.kill()
