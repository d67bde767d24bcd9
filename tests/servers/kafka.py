"""Real Apache Kafka 3.9.1 (KRaft) on loopback, one broker or several; Maven brings its jars once.

Law: data, ports and the cluster id stay through stop, kill and restart.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.servers.cache import cached_folder
from tests.servers.kafka_security import KafkaSecurity
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>milvuscdc.tests</groupId>
  <artifactId>kafka-broker</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>3.9.1</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""


def kafka_unavailable_reason() -> str | None:
    """What to do before a broker can run on this machine; None when it can."""
    missing = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    if not missing:
        return None
    return (
        f"Kafka needs {' and '.join(missing)} on PATH:"
        " apt-get install -y openjdk-17-jre-headless maven"
    )


@dataclass(frozen=True)
class Quorum:
    """Nodes of one cluster, by number from 1: what is written is on all of them, a majority is
    enough to go on.
    """

    cluster_id: str
    ports: tuple[tuple[int, int], ...]
    """Of each node: as a broker, as a controller."""

    @classmethod
    def of(cls, nodes: int) -> Quorum:
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        return cls(cluster_id, tuple((free_port(), free_port()) for _ in range(nodes)))


class KafkaServer(ManagedProcess):
    """One broker; `brokers` is `host:port`, of all of them where it is node `node` of a quorum.

    With `secured` it also listens where one has to log in, and knows rights; whoever comes without
    a login may do everything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "kafka",
        secured: bool = False,
        quorum: Quorum | None = None,
        node: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """RuntimeError with the way out when Java or Maven is missing or finds no jars."""
        if reason := kafka_unavailable_reason():
            raise RuntimeError(reason)
        self._quorum, self._node = quorum or Quorum.of(1), node
        self._settings = dict(settings or {})
        broker, controller = self._quorum.ports[node - 1]
        self.brokers = ",".join(f"127.0.0.1:{port}" for port, _ in self._quorum.ports)
        self.security = KafkaSecurity(folder) if secured else None
        self._listener, self._controller = f"127.0.0.1:{broker}", f"127.0.0.1:{controller}"
        self._classpath = f"{cached_folder('kafka-3.9.1', _resolve_jars) / 'lib'}/*"
        self._properties = folder / "server.properties"
        argv = ["java", *_JVM, "-cp", self._classpath, "kafka.Kafka", str(self._properties)]
        ports = (broker, controller, *(self.security.ports if self.security else ()))
        super().__init__(name, argv, folder, ports=ports, ready=self._answers, stop_grace=20)

    @property
    def classpath(self) -> str:
        """With Kafka's Java client on it."""
        return self._classpath

    def spawn(self) -> None:
        if not (self.folder / "data" / "meta.properties").exists():
            self._format()
        super().spawn()

    def _answers(self) -> bool:
        # librdkafka would log every refused connection; a broker not ready is no news here.
        settings = {"bootstrap.servers": self._listener, "log_level": "0"}
        try:
            return self._node in AdminClient(settings).list_topics(timeout=5).brokers
        except KafkaException:
            return False

    def _format(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        nodes = len(self._quorum.ports)
        voters = enumerate((port for _, port in self._quorum.ports), 1)
        copies, enough = str(nodes), str(nodes // 2 + 1)
        settings = {
            "process.roles": "broker,controller",
            "node.id": str(self._node),
            "controller.quorum.voters": ",".join(f"{at}@127.0.0.1:{port}" for at, port in voters),
            "listeners": f"PLAINTEXT://{self._listener},CONTROLLER://{self._controller}",
            "advertised.listeners": f"PLAINTEXT://{self._listener}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "default.replication.factor": copies,
            "min.insync.replicas": enough,
            "offsets.topic.replication.factor": copies,
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": enough,
            # The default of 50 makes a start, and a return after a crash, take seconds longer.
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            **self._settings,
        }
        scram: list[str] = []
        if self.security is not None:
            self.security.prepare()
            for key, value in self.security.settings().items():
                settings[key] = f"{settings[key]},{value}" if key in settings else value
            scram = self.security.storage_arguments()
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        tool = [
            "java",
            *_JVM,
            "-XX:TieredStopAtLevel=1",
            "-cp",
            self._classpath,
            "kafka.tools.StorageTool",
        ]
        # As one word: an id may begin with a hyphen.
        _run(
            [
                *tool,
                "format",
                f"--cluster-id={self._quorum.cluster_id}",
                "-c",
                str(self._properties),
                *scram,
            ]
        )


_JVM = ["-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]


def _resolve_jars(folder: Path) -> None:
    (folder / "pom.xml").write_text(_POM)
    goal = ["dependency:copy-dependencies", f"-DoutputDirectory={folder / 'lib'}"]
    _run(["mvn", "-q", "-B", "-ntp", "-f", str(folder / "pom.xml"), *goal])


def _run(argv: list[str]) -> None:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(argv)} ended with code {done.returncode}:\n{done.stdout}{done.stderr}"
        )
