"""Starts what the demo needs: a stack of real servers, the controller, two replicators.

Law: everything lives below one temporary folder and is stopped by its own process id, backwards.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import yaml
from milvuscdc.v1 import fleet_service_pb2_grpc, task_service_pb2_grpc

from tests.servers import ManagedProcess, Stack, free_port

LEASE_SECONDS = 6
HEARTBEAT_SECONDS = 1


class Demo:
    """The servers and processes of one run; `with` starts and stops them all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="milvus-cdc-demo-"))
        self.stack = Stack(self.folder / "servers")
        self.controller_address = f"127.0.0.1:{free_port()}"
        self.metrics: dict[str, str] = {}
        self.controller = self._controller()
        self.replicators = [self._replicator(f"replicator-{letter}") for letter in "ab"]
        self.task_file = self.folder / "task.yaml"
        self._channel = grpc.insecure_channel(self.controller_address)
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self._channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(self._channel)
        self._keep_logs = False

    @property
    def processes(self) -> list[ManagedProcess]:
        return [*self.stack.servers, self.controller, *self.replicators]

    def start_servers(self) -> None:
        self.stack.start()

    def start_services(self) -> None:
        """The controller first: a replicator waits for it anyway."""
        self.controller.start()
        for replicator in self.replicators:
            replicator.spawn()
        for replicator in self.replicators:
            replicator.wait_ready()

    def write_task(self, name: str) -> None:
        """What a user would write for these two clusters."""
        task = {
            "name": f"tasks/{name}",
            "source": {
                "etcd": {
                    "endpoints": [self.stack.etcd.endpoint],
                    "rootPath": self.stack.source.root_path,
                    "metaSubPath": "meta",
                },
                "nats": {"url": self.stack.source.nats_url},
                "milvus": {"uri": self.stack.source.uri},
            },
            "sink": {"milvus": {"uri": self.stack.sink.uri}},
            "selection": {"include": ["*.*"], "exclude": ["default.scratch_*"]},
            "start": {"earliest": {}},
        }
        self.task_file.write_text(yaml.safe_dump(task, sort_keys=False))

    def command(self, *arguments: str) -> list[str]:
        """A `milvus-cdc` command line for this controller."""
        return [str(_script("milvus-cdc")), "--controller", self.controller_address, *arguments]

    def run(self, *arguments: str, show: bool = True) -> int:
        """Runs a `milvus-cdc` command as a user would, its output on ours; its exit code."""
        argv = self.command(*arguments)
        if show:
            print(f"\n$ {typed(argv)}", flush=True)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode

    def keep_logs(self) -> Path:
        """Something went wrong: the logs and configurations stay behind, the data goes."""
        self._keep_logs = True
        return self.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()
        for process in reversed([self.controller, *self.replicators]):
            with contextlib.suppress(Exception):
                process.stop()
        self.stack.stop()
        if self._keep_logs:
            for data in self.folder.glob("**/data"):
                shutil.rmtree(data, ignore_errors=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _controller(self) -> ManagedProcess:
        metrics = f"127.0.0.1:{free_port()}"
        config = {
            "listen": self.controller_address,
            "metrics": metrics,
            "store": {"sqlite": {"path": str(self.folder / "controller.db")}},
            "lease": {"ttlSeconds": LEASE_SECONDS, "heartbeatSeconds": HEARTBEAT_SECONDS},
        }
        return self._service("controller", config, (self.controller_address, metrics))

    def _replicator(self, name: str) -> ManagedProcess:
        listen, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        config = {
            "controller": self.controller_address,
            "name": name,
            "listen": listen,
            "metrics": metrics,
        }
        return self._service(name, config, (listen, metrics), command="replicator")

    def _service(
        self, name: str, config: dict[str, Any], addresses: tuple[str, ...], command: str = ""
    ) -> ManagedProcess:
        self.metrics[name] = f"http://{addresses[-1]}/metrics"
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return ManagedProcess(
            name,
            [_script(f"milvus-cdc-{command or name}"), "--config", path],
            self.folder,
            ports=[int(address.rpartition(":")[2]) for address in addresses],
            ready_timeout=60,
        )


def typed(argv: list[str]) -> str:
    """A command line as one would type it."""
    return shlex.join([Path(argv[0]).name, *argv[1:]])


def _script(name: str) -> Path:
    """An installed command of this interpreter's environment."""
    beside = Path(sys.executable).parent / name
    found = beside if beside.exists() else Path(shutil.which(name) or beside)
    if not found.exists():
        raise RuntimeError(f"{name} is not installed: pip install -e '.[dev]'")
    return found
