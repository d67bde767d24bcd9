"""Servers of another generation or shape, put together as a source and a sink."""

from __future__ import annotations

from dataclasses import dataclass

from tests.servers import EtcdServer, KafkaServer, MilvusLiteServer, MilvusServer, PulsarServer


@dataclass(frozen=True)
class Route:
    """What a Pair needs of a stack: any source, any sink."""

    etcd: EtcdServer
    source: MilvusServer
    sink: MilvusServer | MilvusLiteServer
    kafka: KafkaServer | None = None
    pulsar: PulsarServer | None = None
