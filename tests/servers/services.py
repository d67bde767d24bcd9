"""Our own two services as managed processes: configuration written, health awaited, logs kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

LEASE_SECONDS = 6
HEARTBEAT_SECONDS = 1
CLOCK_MARGIN_SECONDS = 1
LEADER_LEASE_SECONDS = 2
ELECTED_LEASE_SECONDS = 10
"""Of replicators where controllers are elected: it outlasts an election."""


def _healthy(
    address: str, service: str, credentials: grpc.ChannelCredentials | None = None
) -> bool:
    try:
        with (
            grpc.secure_channel(address, credentials)
            if credentials is not None
            else grpc.insecure_channel(address)
        ) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=1
            )
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class ControllerProcess(ManagedProcess):
    """`milvus-cdc-controller`, on SQLite below `folder` unless `store` says otherwise.
    `credentials` are for asking about its health where it listens with TLS.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Mapping[str, Any] | None = None,
        name: str = "controller",
        credentials: grpc.ChannelCredentials | None = None,
        **settings: Any,
    ) -> None:
        port, metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{name}.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "listen": self.address,
                    "metrics": f"127.0.0.1:{metrics_port}",
                    "store": dict(store or {"sqlite": {"path": str(folder / "controller.db")}}),
                    "lease": {
                        "ttl": ELECTED_LEASE_SECONDS if "etcd" in (store or {}) else LEASE_SECONDS,
                        "heartbeat": HEARTBEAT_SECONDS,
                        "clockMargin": CLOCK_MARGIN_SECONDS,
                    },
                    "log": {"format": "json", "level": "info"},
                    **settings,
                }
            )
        )
        super().__init__(
            name,
            [sys.executable, "-m", "milvus_cdc_controller.app", "--config", config],
            folder,
            ports=[port, metrics_port],
            # Not "": without a leader it is alive and answers nothing.
            ready=lambda: _healthy(self.address, "milvuscdc.v1.TaskService", credentials),
        )


class ReplicatorProcess(ManagedProcess):
    """`milvus-cdc-replicator`; ready when it is connected to its controller."""

    def __init__(
        self,
        folder: Path,
        controller: str | Sequence[str],
        name: str,
        *,
        env: Mapping[str, str] | None = None,
        wait_connected: bool = True,
        program: Sequence[str | Path] = ("-m", "milvus_cdc_replicator.app"),
        credentials: grpc.ChannelCredentials | None = None,
        **settings: Any,
    ) -> None:
        port, metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{name}.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "controller": controller if isinstance(controller, str) else list(controller),
                    "name": name,
                    "listen": self.address,
                    "metrics": f"127.0.0.1:{metrics_port}",
                    "log": {"format": "json", "level": "info"},
                    **settings,
                }
            )
        )
        service = "replicator" if wait_connected else ""
        super().__init__(
            name,
            [sys.executable, *program, "--config", config],
            folder,
            env={**os.environ, **(env or {})},
            ports=[port, metrics_port],
            ready=lambda: _healthy(self.address, service, credentials),
            stop_grace=30.0,
        )
