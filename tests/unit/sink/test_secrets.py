"""References to secrets: only what is allowed, and no value in a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import RecordingResolver, SecretResolver, live, resolve, secrets_in
from milvuscdc.v1 import secret_pb2, task_pb2


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


def mounted(folder: Path, version: str, **files: str) -> None:
    """As Kubernetes mounts a Secret: files are links through `..data`, which is swapped whole."""
    inside = folder / f"..{version}"
    inside.mkdir(parents=True)
    for name, value in files.items():
        (inside / name).write_text(value)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(inside.name)
    before = (folder / "..data").resolve()
    (folder / "..new").rename(folder / "..data")
    if before.name != "..data":
        for each in before.iterdir():
            each.unlink()
        before.rmdir()


def test_a_mounted_folder_is_swapped(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    mounted(folder, "1", token="one", other="same")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(folder)])
    token = secret_pb2.Secret(file=str(folder / "token"))
    now = live(secrets, token, "f")
    recording = RecordingResolver(secrets)
    assert resolve(recording, token, "f") == now() == "one"
    unchanged = RecordingResolver(secrets)
    unchanged.file(str(folder / "other"), field="f")
    assert not recording.changed
    mounted(folder, "2", token="two", other="same")
    assert secrets.file(str(folder / "token"), field="f") == now() == "two"
    assert recording.changed
    assert not unchanged.changed
    # Taken away: what was read goes on to count, and opening anew says what is wrong.
    (folder / "token").unlink()
    assert now() == "two"
    with pytest.raises(UserError, match="cannot be read"):
        resolve(secrets, token, "f")


def test_the_allowed_folder_itself_is_a_link_that_is_swapped(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "token").write_text(version)
    (tmp_path / "current").symlink_to("1")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(tmp_path / "current")])
    assert secrets.file(str(tmp_path / "current/token"), field="f") == "1"
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(tmp_path / "current")
    assert secrets.file(str(tmp_path / "current/token"), field="f") == "2"
    with pytest.raises(UserError, match="may not be used"):
        secrets.file(str(tmp_path / "1/token"), field="f")


def test_no_error_carries_the_content_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"hidden\xff")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(tmp_path)])
    with pytest.raises(UserError) as failed:
        secrets.file(str(tmp_path / "binary"), field="f")
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__


def test_a_secret_that_was_not_opened_is_no_secret() -> None:
    secrets = SecretResolver(env_prefix="CDC_")
    assert resolve(secrets, secret_pb2.Secret(literal="open"), "f") == "open"
    assert resolve(secrets, secret_pb2.Secret(), "f") is None
    sealed = secret_pb2.Secret(sealed=secret_pb2.SealedSecret(key="one"))
    with pytest.raises(UserError, match="env or file"):
        resolve(secrets, sealed, "f")


def test_all_places_of_secrets_in_a_task_are_found() -> None:
    task = task_pb2.Task()
    task.source.milvus.token.env = "A"
    task.sink.kafka.security.sasl.password.file = "/b"
    task.sink.kafka.format.avro.registry.password.env = "C"
    task.dead_letters.files.s3.secret_access_key.env = "D"
    found = {path: secret.WhichOneof("ref") for path, secret in secrets_in(task)}
    assert found == {
        "source.milvus.token": "env",
        "sink.kafka.format.avro.registry.password": "env",
        "sink.kafka.security.sasl.password": "file",
        "dead_letters.files.s3.secret_access_key": "env",
    }
