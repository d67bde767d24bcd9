"""The example in deploy/examples/secure does what it says: rows arrive and are proved equal over
mutual TLS, also after the controller that leads was killed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pymilvus import MilvusClient

from examples.secure import Secure
from tests.servers import Stack

DATABASE = "vault"


@pytest.mark.timeout(300)
def test_rows_arrive_over_mutual_tls(nats_stack: Stack, tmp_path: Path) -> None:
    root = MilvusClient(nats_stack.source.uri)
    root.create_database(DATABASE)
    root.close()
    with Secure(nats_stack, tmp_path) as services:
        services.prove(DATABASE)
    for process in (*services.controllers, *services.replicators):
        text = process.log_path.read_text()
        assert "Traceback" not in text
        assert "PRIVATE KEY" not in text
