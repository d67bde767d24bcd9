"""The example in deploy/examples/secure does what it says: rows arrive and are proved equal over
mutual TLS, also after the controller that leads was killed, and without a certificate nobody is
let through anywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.secure import Secure
from tests.servers import Authority
from tests.servers.secured import SecuredStack


@pytest.mark.timeout(300)
def test_every_connection_is_mutual_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        SecuredStack(tmp_path / "servers", Authority(tmp_path / "certificates")) as stack,
        Secure(stack, tmp_path / "services") as services,
    ):
        services.prove("vault")
        hops = services.hops()
    said = capsys.readouterr().out
    for hop in hops:
        (line,) = (each for each in said.splitlines() if each.startswith(f"{hop.name}  "))
        assert line.split()[-4:] == ["ok", "refused", "refused", "refused"]
    for process in (*services.controllers, *services.replicators):
        text = process.log_path.read_text()
        assert "Traceback" not in text
        assert "PRIVATE KEY" not in text
