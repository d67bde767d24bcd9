"""One etcd, a source Milvus with its queue and a sink Milvus, stopped in order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict

from tests.servers.certificates import Authority
from tests.servers.ensemble import Ensemble
from tests.servers.etcd import EtcdServer
from tests.servers.kafka import KafkaServer
from tests.servers.milvus import MilvusServer
from tests.servers.process import ManagedProcess
from tests.servers.pulsar import PulsarServer

SourceQueue = Literal["natsmq", "kafka", "pulsar"]


class Addresses(TypedDict):
    """What a client needs to reach a stack, as written to `addresses.json`."""

    etcd_endpoint: str
    source_uri: str
    source_root_path: str
    source_cluster: str
    source_mq: str
    nats_url: str | None
    kafka_brokers: str | None
    pulsar_url: str | None
    sink_uri: str
    sink_root_path: str
    sink_cluster: str
    pids: dict[str, int]


class Stack(Ensemble):
    """A source Milvus writing to NATS, Kafka or Pulsar and a sink Milvus, sharing one etcd.

    Law: the queue outlives its Milvus and etcd outlives both: a Milvus that lost either ignores
    TERM.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mq: SourceQueue = "natsmq",
        settings: Mapping[str, object] | None = None,
        sink: MilvusServer | None = None,
        etcd_beside: Authority | None = None,
    ) -> None:
        """`settings` is laid over milvus.yaml of both servers. `sink`: another one's, which runs
        and goes on; without it the stack has its own. RuntimeError when no broker of `mq` can run
        here. On Pulsar nothing is retained until a test says so. With `etcd_beside` etcd listens
        with mutual TLS beside plaintext.
        """
        self.folder = folder
        self.mq = mq
        self.etcd = EtcdServer(folder / "etcd", beside=etcd_beside)
        self.kafka: KafkaServer | None = None
        if mq == "kafka":
            # As Milvus' own chart has it: an insert may be larger than a broker's default.
            of_broker = {"message.max.bytes": str(10 * 2**20)}
            self.kafka = KafkaServer(folder / "kafka", settings=of_broker)
        self.pulsar = PulsarServer(folder / "pulsar") if mq == "pulsar" else None
        self.source = MilvusServer(
            folder / "source",
            etcd_endpoint=self.etcd.endpoint,
            root_path="source",
            cluster="source",
            mq=mq,
            kafka_brokers=self.kafka.brokers if self.kafka else None,
            pulsar=(self.pulsar.port, self.pulsar.web_port) if self.pulsar else None,
            settings=settings,
            name="source",
        )
        self._own_sink = sink is None
        self.sink = sink or MilvusServer(
            folder / "sink",
            etcd_endpoint=self.etcd.endpoint,
            root_path="sink",
            cluster="sink",
            settings=settings,
            name="sink",
        )

    @property
    def queue(self) -> KafkaServer | PulsarServer | None:
        """The broker; None where the source is its own."""
        return self.kafka or self.pulsar

    @property
    def servers(self) -> tuple[ManagedProcess, ...]:
        queue = (self.queue,) if self.queue else ()
        return (self.etcd, *queue, self.source, *([self.sink] if self._own_sink else []))

    def bring_up(self) -> None:
        self.etcd.spawn()
        if self.queue:
            self.queue.spawn()
        self.etcd.wait_ready()
        if self._own_sink:
            self.sink.spawn()
        if self.queue:
            self.queue.wait_ready()
        self.source.spawn()
        self.source.wait_ready()
        self.sink.wait_ready()

    def addresses(self) -> Addresses:
        return {
            "etcd_endpoint": self.etcd.url,
            "source_uri": self.source.uri,
            "source_root_path": self.source.root_path,
            "source_cluster": self.source.cluster,
            "source_mq": self.mq,
            "nats_url": self.source.nats_url if self.mq == "natsmq" else None,
            "kafka_brokers": self.kafka.brokers if self.kafka else None,
            "pulsar_url": self.pulsar.service_url if self.pulsar else None,
            "sink_uri": self.sink.uri,
            "sink_root_path": self.sink.root_path,
            "sink_cluster": self.sink.cluster,
            "pids": {server.name: server.pid for server in self.servers},
        }
