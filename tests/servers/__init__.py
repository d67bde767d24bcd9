"""Real servers for tests, demo and benchmarks: loopback only, free ports, all below one folder."""

from tests.servers.certificates import Authority, Pair
from tests.servers.etcd import EtcdServer
from tests.servers.kafka import KafkaServer, Quorum, kafka_unavailable_reason
from tests.servers.lite import MilvusLiteServer
from tests.servers.milvus import MilvusServer
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer, postgres_unavailable_reason
from tests.servers.process import ManagedProcess, ServerStartError
from tests.servers.pulsar import PulsarServer, pulsar_unavailable_reason
from tests.servers.s3 import S3Server
from tests.servers.stack import Stack

__all__ = [
    "Authority",
    "EtcdServer",
    "KafkaServer",
    "ManagedProcess",
    "MilvusLiteServer",
    "MilvusServer",
    "Pair",
    "PostgresServer",
    "PulsarServer",
    "Quorum",
    "S3Server",
    "ServerStartError",
    "Stack",
    "free_port",
    "kafka_unavailable_reason",
    "postgres_unavailable_reason",
    "pulsar_unavailable_reason",
]
