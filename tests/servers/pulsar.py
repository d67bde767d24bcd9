"""Real Apache Pulsar 3.0.7, standalone (no ZooKeeper) on loopback; Maven brings its jars once.

Law: data and ports stay through stop, kill and restart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.servers.cache import cached_folder
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess
from tests.servers.pulsar_security import PulsarSecurity

_POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>milvuscdc.tests</groupId>
  <artifactId>pulsar-broker</artifactId>
  <version>1</version>
  <dependencyManagement>
    <dependencies>
      <dependency>
        <groupId>org.apache.pulsar</groupId>
        <artifactId>pulsar</artifactId>
        <version>3.0.7</version>
        <type>pom</type>
        <scope>import</scope>
      </dependency>
    </dependencies>
  </dependencyManagement>
  <dependencies>
    <dependency>
      <groupId>org.apache.pulsar</groupId>
      <artifactId>pulsar-broker</artifactId>
      <version>3.0.7</version>
    </dependency>
  </dependencies>
</project>
"""

_LOG = """\
<Configuration status="ERROR">
  <Appenders>
    <Console name="out"><PatternLayout pattern="%d %p %c{1} - %m%n"/></Console>
  </Appenders>
  <Loggers><Root level="info"><AppenderRef ref="out"/></Root></Loggers>
</Configuration>
"""


def pulsar_unavailable_reason() -> str | None:
    """What to do before a broker can run on this machine; None when it can."""
    missing = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    if not missing:
        return None
    return (
        f"Pulsar needs {' and '.join(missing)} on PATH:"
        " apt-get install -y openjdk-17-jre-headless maven"
    )


class PulsarServer(ManagedProcess):
    """One broker: `service_url` for clients, `admin_url` for its REST API.

    With `secured` it asks everyone for a token or a client certificate, and also listens with TLS
    (`security`). Its namespace is `public/default`, without retention, as Pulsar comes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "pulsar",
        secured: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` is laid over standalone.conf. RuntimeError with the way out when Java or Maven
        is missing or finds no jars.
        """
        if reason := pulsar_unavailable_reason():
            raise RuntimeError(reason)
        self._settings = dict(settings or {})
        self.port, self.web_port = free_port(), free_port()
        self.service_url = f"pulsar://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{self.web_port}"
        self.security = PulsarSecurity(folder) if secured else None
        self._conf = folder / "standalone.conf"
        classpath = f"{cached_folder('pulsar-3.0.7', _resolve_jars) / 'lib'}/*"
        argv = [
            "java",
            *_JVM,
            f"-Dlog4j2.configurationFile={folder / 'log4j2.xml'}",
            *("-cp", classpath, "org.apache.pulsar.PulsarStandaloneStarter"),
            *("-c", str(self._conf), "-a", "127.0.0.1", "-nfw", "-nss"),
            *("--metadata-dir", str(folder / "metadata")),
            *("--bookkeeper-dir", str(folder / "bookkeeper")),
        ]
        ports = (self.port, self.web_port, *(self.security.ports if self.security else ()))
        super().__init__(name, argv, folder, ports=ports, ready=self._answers, stop_grace=20)

    def spawn(self) -> None:
        if not self._conf.exists():
            self._configure()
        super().spawn()

    def admin(self, method: str, path: str, body: object = None) -> object:
        """What the REST API answers below `/admin/v2/`, as its super user.

        urllib.error.HTTPError for what it refuses.
        """
        request = urllib.request.Request(
            f"{self.admin_url}/admin/v2/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self.security is not None:
            request.add_header("Authorization", f"Bearer {self.security.token('admin')}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    def retain(self, minutes: int, megabytes: int = -1, namespace: str = "public/default") -> None:
        """What everybody acknowledged is kept so long (−1: without end; 0 and 0: not at all)."""
        policy = {"retentionTimeInMinutes": minutes, "retentionSizeInMB": megabytes}
        self.admin("POST", f"namespaces/{namespace}/retention", policy)

    def roll(self, topic: str, namespace: str = "public/default") -> None:
        """Begins a new ledger: only then what is not retained goes."""
        self.admin("PUT", f"persistent/{namespace}/{topic}/unload")

    def _answers(self) -> bool:
        try:
            return self.admin("GET", "brokers/health") == "ok"
        except urllib.error.HTTPError:
            return False

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log4j2.xml").write_text(_LOG)
        settings = {
            "brokerServicePort": str(self.port),
            "webServicePort": str(self.web_port),
            **_SMALL,
        }
        if self.security is not None:
            self.security.prepare()
            settings |= self.security.settings()
        settings |= self._settings
        self._conf.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


_SMALL = {
    "clusterName": "standalone",
    "bindAddress": "127.0.0.1",
    "advertisedAddress": "127.0.0.1",
    "managedLedgerDefaultEnsembleSize": "1",
    "managedLedgerDefaultWriteQuorum": "1",
    "managedLedgerDefaultAckQuorum": "1",
    "managedLedgerCacheSizeMB": "32",
    "brokerDeleteInactiveTopicsEnabled": "false",
    "allowAutoTopicCreationType": "non-partitioned",
    "webSocketServiceEnabled": "false",
    "functionsWorkerEnabled": "false",
    "transactionCoordinatorEnabled": "false",
    "loadBalancerEnabled": "false",
    "numIOThreads": "2",
    "numHttpServerThreads": "8",
    "numExecutorThreadPoolSize": "2",
    "numCacheExecutorThreadPoolSize": "2",
    "numOrderedExecutorThreads": "2",
    "bookkeeperClientNumWorkerThreads": "2",
    "bookkeeperNumberOfChannelsPerBookie": "4",
    "allowLoopback": "true",
    "listeningInterface": "lo",
    "ledgerStorageClass": "org.apache.bookkeeper.bookie.storage.ldb.DbLedgerStorage",
    "dbStorage_writeCacheMaxSizeMb": "16",
    "dbStorage_readAheadCacheMaxSizeMb": "8",
    "dbStorage_rocksDB_blockCacheSize": "8388608",
    "dbStorage_rocksDB_writeBufferSizeMB": "4",
    "journalSyncData": "false",
    "journalMaxSizeMB": "64",
    "journalPreAllocSizeMB": "4",
    "nettyMaxFrameSizeBytes": "5253120",
    "diskUsageThreshold": "0.99",
    "diskUsageWarnThreshold": "0.98",
}
"""Everything that makes it start soon and stay small."""

_OPENED = (
    *("jdk.internal.loader", "java.lang", "java.io", "java.util.zip", "java.nio"),
    *("jdk.internal.misc", "jdk.internal.platform", "sun.net"),
)
_JVM = [
    *("-Xms64m", "-Xmx512m", "-XX:MaxDirectMemorySize=256m", "-XX:+UseSerialGC"),
    *("-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError"),
    *("-Dio.netty.leakDetectionLevel=disabled", "-Dpulsar.allocator.exit_on_oom=true"),
    "-Dio.netty.tryReflectionSetAccessible=true",
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED),
    "--add-opens=java.management/sun.management=ALL-UNNAMED",
]


def _resolve_jars(folder: Path) -> None:
    (folder / "pom.xml").write_text(_POM)
    goal = [
        "dependency:copy-dependencies",
        f"-DoutputDirectory={folder / 'lib'}",
        "-DincludeScope=runtime",
    ]
    argv = ["mvn", "-q", "-B", "-ntp", "-f", str(folder / "pom.xml"), *goal]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(argv)} ended with code {done.returncode}:\n{done.stdout}{done.stderr}"
        )
