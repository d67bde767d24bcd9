"""References to secrets: only what is allowed, and no value in a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver


def test_environment_variables_below_the_prefix() -> None:
    environ = {"CDC_TOKEN": " root:Milvus\n", "CDC_EMPTY": " ", "HOME": "/root"}
    secrets = SecretResolver(env_prefix="CDC_", environ=environ)
    assert secrets.env("CDC_TOKEN", field="sink.milvus.token") == "root:Milvus"
    for name, reason in (
        ("HOME", "SECRET_NOT_ALLOWED"),
        ("cdc_TOKEN", "SECRET_NOT_ALLOWED"),
        ("CDC_EMPTY", "SECRET_MISSING"),
        ("CDC_OTHER", "SECRET_MISSING"),
    ):
        with pytest.raises(UserError) as failed:
            secrets.env(name, field="sink.milvus.token")
        assert (failed.value.reason, failed.value.field) == (reason, "sink.milvus.token")
        assert "/root" not in failed.value.message


def test_an_empty_prefix_would_allow_everything() -> None:
    with pytest.raises(ValueError, match="prefix"):
        SecretResolver(env_prefix="")


def test_files_below_the_folders(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "outside").write_text("hidden")
    (allowed / "token").write_text("root:Milvus\n")
    (allowed / "empty").write_text("\n")
    (allowed / "binary").write_bytes(b"\xff\xfe")
    (allowed / "large").write_text("x" * 70_000)
    (allowed / "link").symlink_to(tmp_path / "outside")
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "inner").symlink_to(allowed / "token")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(allowed)])
    assert secrets.file(str(allowed / "token"), field="f") == "root:Milvus"
    assert secrets.file(str(allowed / "inner"), field="f") == "root:Milvus"
    for path, reason in (
        ("token", "SECRET_NOT_ALLOWED"),
        (str(tmp_path / "outside"), "SECRET_NOT_ALLOWED"),
        (str(allowed / ".." / "outside"), "SECRET_NOT_ALLOWED"),
        (str(allowed / "link"), "SECRET_NOT_ALLOWED"),
        (str(tmp_path / "allowed_not"), "SECRET_NOT_ALLOWED"),
        (f"{allowed}/a\0b", "SECRET_NOT_ALLOWED"),
        (str(allowed / "missing"), "SECRET_MISSING"),
        (str(allowed / "empty"), "SECRET_MISSING"),
        (str(allowed / "binary"), "SECRET_MISSING"),
        (str(allowed / "large"), "SECRET_MISSING"),
        (str(allowed), "SECRET_MISSING"),
    ):
        with pytest.raises(UserError) as failed:
            secrets.file(path, field="f")
        assert failed.value.reason == reason, path
        assert "hidden" not in failed.value.message
    with pytest.raises(UserError):
        secrets.file(str(allowed / "loop"), field="f")


def test_no_folder_allows_no_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    with pytest.raises(UserError) as failed:
        SecretResolver(env_prefix="CDC_").file(str(tmp_path / "token"), field="f")
    assert failed.value.reason == "SECRET_NOT_ALLOWED"
