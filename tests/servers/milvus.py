"""A real standalone Milvus on loopback, 2.3.5 or 2.2.16, from its wheel, with an etcd of one's own.

Laws: data, ports and message queue stay through stop, kill and restart; the embedded etcd is
never used, so servers on one machine never collide. Formats: the wheel's own configuration
template and unpacking routine.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import grpc
import yaml
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from tests.servers.cache import cached_folder
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess
from tests.servers.wheels import MILVUS_2_2, unpacked_wheels

MessageQueue = Literal["rocksmq", "natsmq", "kafka", "pulsar"]
MilvusVersion = Literal["2.3.5", "2.2.16"]
Settings = dict[str, object]

_COMPONENT_PORTS = (
    "proxy_port",
    "proxy_internal_port",
    "root_coord_port",
    "query_coord_port",
    "query_node_port",
    "index_coord_port",
    "index_node_port",
    "data_coord_port",
    "data_node_port",
)
_COMPONENTS_WITH_IP = (
    *("rootCoord", "proxy", "queryCoord", "queryNode"),
    *("indexNode", "dataCoord", "dataNode"),
)


class MilvusServer(ManagedProcess):
    """Milvus standalone: `uri` for clients, `nats_url` for readers of its own queue (2.3.5)."""

    def __init__(
        self,
        folder: Path,
        *,
        etcd_endpoint: str,
        root_path: str,
        cluster: str,
        mq: MessageQueue = "rocksmq",
        kafka_brokers: str | None = None,
        pulsar: tuple[int, int] | None = None,
        settings: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        name: str = "milvus",
        version: MilvusVersion = "2.3.5",
    ) -> None:
        """`root_path` and `cluster` must be this server's alone below the etcd and the queue.

        `settings` is laid over milvus.yaml key by key (nested mappings); `env` reaches the process
        (`COMMON_TTMSGENABLED`, ...) and wins over the file. `pulsar`: its ports for clients and
        for its REST API.
        """
        if mq == "kafka" and not kafka_brokers:
            raise ValueError("mq='kafka' needs kafka_brokers, for instance '127.0.0.1:9092'")
        if mq == "pulsar" and not pulsar:
            raise ValueError("mq='pulsar' needs the ports of a broker")
        if mq == "natsmq" and version == "2.2.16":
            raise ValueError("Milvus 2.2 has no queue of its own that others can read: mq='kafka'")
        self.version = version
        self.root_path = root_path
        self.cluster = cluster
        self.mq = mq
        self.etcd_endpoint = etcd_endpoint
        self._holes = {hole: free_port() for hole in _COMPONENT_PORTS}
        self._metrics_port = free_port()
        self._nats_port = free_port() if mq == "natsmq" else None
        self.address = f"127.0.0.1:{self._holes['proxy_port']}"
        self.uri = f"http://{self.address}"
        self._kafka_brokers = kafka_brokers
        self._pulsar = pulsar
        self._settings = dict(settings or {})
        bin_dir = unpacked_binaries(version) / "bin"
        conf = folder / "conf"
        environment = {
            "LD_LIBRARY_PATH": str(bin_dir),
            "MILVUSCONF": str(conf),
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._metrics_port),
            "MQ_TYPE": mq,
            **({"KAFKA_BROKERLIST": kafka_brokers} if kafka_brokers else {}),
            **(env or {}),
        }
        ports = [self._holes["proxy_port"], self._metrics_port]
        if self._nats_port is not None:
            ports.append(self._nats_port)
        super().__init__(
            name,
            [bin_dir / "milvus", "run", "standalone"],
            folder,
            env=environment,
            ports=ports,
            ready=self._answers,
            ready_timeout=180,
        )

    @property
    def nats_url(self) -> str:
        """Where the server's own JetStream listens; RuntimeError unless `mq` is natsmq."""
        if self._nats_port is None:
            raise RuntimeError(f"{self.name} has no NATS: it runs on {self.mq}")
        return f"nats://127.0.0.1:{self._nats_port}"

    def spawn(self) -> None:
        self._write_configuration()
        super().spawn()

    def _answers(self) -> bool:
        health = f"http://127.0.0.1:{self._metrics_port}/healthz"
        with urllib.request.urlopen(health, timeout=5) as answer:
            if b"OK" not in answer.read():
                return False
        # The health page is green before every component has registered; ask a real question.
        with grpc.insecure_channel(self.address) as channel:
            try:
                reply = milvus_pb2_grpc.MilvusServiceStub(channel).ShowCollections(
                    milvus_pb2.ShowCollectionsRequest(), timeout=5
                )
            except grpc.RpcError:
                return False
        return bool(reply.status.code == 0 and reply.status.error_code == 0)

    def _write_configuration(self) -> None:
        data, conf, logs = (self.folder / part for part in ("data", "conf", "logs"))
        for path in (data, conf, logs):
            path.mkdir(parents=True, exist_ok=True)
        holes = {
            **{hole: str(port) for hole, port in self._holes.items()},
            "local_storage_dir": str(data),
            "rocksmq_data_dir": str(data / "rocksmq"),
            "rocketmq_data_dir": str(data / "rocksmq"),
            "etcd_data_dir": str(data / "etcd"),
            "system_log_path": str(logs),
        }
        document = yaml.safe_load(_fill(_template(self.version).read_text(), holes))
        _lay_over(document, self._own_settings(data, logs))
        _lay_over(document, self._settings)
        (conf / "milvus.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        glog = _package(self.version) / "data" / "glog.conf"
        if glog.exists():
            shutil.copyfile(glog, conf / "glog.conf")

    def _own_settings(self, data: Path, logs: Path) -> Settings:
        settings: Settings = {
            "etcd": {
                "endpoints": self.etcd_endpoint,
                "rootPath": self.root_path,
                "use": {"embed": False},
            },
            "msgChannel": {"chanNamePrefix": {"cluster": self.cluster}},
            "mq": {"type": self.mq},
            "log": {"level": "warn"},
            # A killed server's lease has to run out before its successor is admitted.
            "common": {"session": {"ttl": 15}},
            **{component: {"ip": "127.0.0.1"} for component in _COMPONENTS_WITH_IP},
        }
        if self._nats_port is not None:
            settings["natsmq"] = {
                "server": {
                    "port": self._nats_port,
                    "storeDir": str(data / "nats"),
                    # The default of 4 s is missed on a machine busy with several starts.
                    "initializeTimeout": 60_000,
                    "monitor": {"logFile": str(logs / "nats.log")},
                }
            }
        if self._kafka_brokers:
            settings["kafka"] = {
                "brokerList": self._kafka_brokers,
                "securityProtocol": "PLAINTEXT",
                "saslMechanisms": "PLAIN",
                "readTimeout": 10,
            }
            if self.version == "2.2.16":
                # It takes the first queue that has an address: rocksmq, Pulsar, then Kafka.
                settings |= {"rocksmq": {"path": ""}, "pulsar": {"address": ""}}
        if self._pulsar is not None:
            port, web_port = self._pulsar
            settings["pulsar"] = {"address": "127.0.0.1", "port": port, "webport": web_port}
        return settings


def unpacked_binaries(version: MilvusVersion = "2.3.5") -> Path:
    """The folder with the wheel's binaries, unpacked once per user."""

    def unpack(folder: Path) -> None:
        # By its file: two versions of the package cannot be imported under one name.
        file = _package(version) / "__init__.py"
        spec = importlib.util.spec_from_file_location("milvus_server_wheel", file)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{file} cannot be imported")
        package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        package._initialize_data_files(str(folder))

    return cached_folder(f"milvus-server-{version}", unpack)


def _package(version: MilvusVersion) -> Path:
    if version == "2.2.16":
        return unpacked_wheels(MILVUS_2_2) / "milvus"
    spec = importlib.util.find_spec("milvus")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the milvus==2.3.5 package is missing: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0])


def _template(version: MilvusVersion) -> Path:
    return _package(version) / "data" / "config.yaml.template"


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill `{{ name(type): default }}` holes; an unnamed one takes its default."""

    def value_of(hole: re.Match[str]) -> str:
        return values.get(hole["name"], (hole["default"] or "").strip())

    return re.sub(
        r"\{\{\s*(?P<name>\w+)(\(\w+\))?\s*(:(?P<default>[^}]*))?\}\}", value_of, template
    )


def _lay_over(document: Settings, changes: Mapping[str, object]) -> None:
    for key, value in changes.items():
        inner = document.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            _lay_over(inner, value)
        else:
            document[key] = value
