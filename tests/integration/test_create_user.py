"""`milvus-cdc sink create-user` against a real Milvus."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from milvus_cdc.cli.main import main
from pymilvus import MilvusClient

from tests.servers import Stack


def test_a_user_is_made_once(
    nats_stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user = f"user_{uuid.uuid4().hex[:8]}"
    secret = tmp_path / "password"
    secret.write_text("secret12\n")
    command = ["sink", "create-user", "--uri", nats_stack.sink.uri, "--user", user]
    command += ["--password-file", str(secret)]
    assert main(command) == 0
    assert user in MilvusClient(uri=nats_stack.sink.uri).list_users()
    assert main(command) == 3
    assert "already" in capsys.readouterr().err


def test_the_password_is_asked_for_twice(
    nats_stack: Stack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["secret12", "secret21"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    command = ["sink", "create-user", "--uri", nats_stack.sink.uri, "--user", "nobody_at_all"]
    assert main(command) == 2
    assert "differ" in capsys.readouterr().err
    assert "nobody_at_all" not in MilvusClient(uri=nats_stack.sink.uri).list_users()


def test_a_sink_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "password"
    secret.write_text("secret12")
    command = ["sink", "create-user", "--uri", "http://127.0.0.1:1", "--user", "ann"]
    command += ["--password-file", str(secret)]
    assert main(command) == 4
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    assert main([*command, "--token-env", "NO_SUCH_TOKEN"]) == 2
    assert "NO_SUCH_TOKEN" in capsys.readouterr().err
