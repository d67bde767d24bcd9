"""Starts what the demo needs: a stack of real servers, the controller, two replicators.

Law: everything lives below one temporary folder and is stopped by its own process id, backwards.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import yaml
from milvuscdc.v1 import fleet_service_pb2_grpc, task_service_pb2_grpc

from tests.servers import Stack
from tests.servers.services import ControllerProcess, ReplicatorProcess


class Demo:
    """The servers and processes of one run; `with` starts and stops them all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="milvus-cdc-demo-"))
        self.stack = Stack(self.folder / "servers")
        self.controller = ControllerProcess(self.folder / "controller")
        self.replicators = [
            ReplicatorProcess(self.folder / name, self.controller.address, name)
            for name in ("replicator-a", "replicator-b")
        ]
        self.task_file = self.folder / "task.yaml"
        self._channel = grpc.insecure_channel(self.controller.address)
        self.tasks = task_service_pb2_grpc.TaskServiceStub(self._channel)
        self.fleet = fleet_service_pb2_grpc.FleetServiceStub(self._channel)
        self._keep_logs = False

    def metrics(self) -> dict[str, str]:
        """Metrics page by service, of those that run."""
        pages = {self.controller.name: self.controller.metrics_url}
        return pages | {r.name: r.metrics_url for r in self.replicators if r.running}

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

    @property
    def variable(self) -> str:
        """What a shell exports to talk to this controller."""
        return f"MILVUS_CDC_CONTROLLER={self.controller.address}"

    def run(self, *arguments: str) -> int:
        """Runs a `milvus-cdc` command as a user would, its output on ours; its exit code."""
        print(f"\n$ {shlex.join(['milvus-cdc', *arguments])}", flush=True)
        name, _, address = self.variable.partition("=")
        return subprocess.run(
            [str(_script("milvus-cdc")), *arguments],
            env={**os.environ, name: address},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode

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
        for server in reversed(self.stack.servers):
            # Their data goes with the folder: nobody needs their orderly end.
            server.stop(grace=2)
        if self._keep_logs:
            for data in self.folder.glob("**/data"):
                shutil.rmtree(data, ignore_errors=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _script(name: str) -> Path:
    """An installed command of this interpreter's environment."""
    beside = Path(sys.executable).parent / name
    found = beside if beside.exists() else Path(shutil.which(name) or beside)
    if not found.exists():
        raise RuntimeError(f"{name} is not installed: pip install -e '.[dev]'")
    return found
