"""The side-car of examples/tls_front.py: mutual TLS in front of a server that has none."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.servers.certificates import Authority, Pair
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

_SCRIPT = Path(__file__).parents[2] / "examples" / "tls_front.py"


class TlsFront(ManagedProcess):
    """Passes `address` (`host:port`) on to `to`, for those with a certificate of `authority`."""

    def __init__(
        self, folder: Path, to: str, authority: Authority, *, name: str = "tls-front"
    ) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        own: Pair = authority.server(name)
        files = {"certificate": own.certificate, "key": own.key, "client-ca": authority.ca_file}
        argv: list[str | Path] = [sys.executable, _SCRIPT, f"--listen={self.address}", f"--to={to}"]
        argv += [f"--{option}={path}" for option, path in files.items()]
        super().__init__(name, argv, folder, ports=(port,))
