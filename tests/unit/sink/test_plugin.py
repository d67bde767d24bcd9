"""Plugins: found, checked, configured; whatever is wrong is told with its place and no secret."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from google.protobuf import struct_pb2
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink import memory_writer, plugin
from milvus_cdc.sink.registry import open_writer
from milvuscdc.v1 import task_pb2

SECRET = {"type": "string", "secret": True}


class Taker(memory_writer.MemoryWriter):
    """Shows what it was given."""

    CONFIG_SCHEMA: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {
            "url": {"type": "string", "pattern": "^https?://"},
            "retries": {"type": "integer", "minimum": 1},
            "password": SECRET,
            "login": {
                "type": "object",
                "properties": {"key": SECRET, "user": {"type": "string"}},
                "minProperties": 2,
            },
            "headers": {
                "type": "array",
                "items": {"type": "object", "properties": {"value": SECRET}},
            },
            "tokens": {"type": "array", "items": SECRET},
            # Names of a schema's own words.
            "secret": {"type": "boolean"},
            "properties": {"type": "string"},
        },
        "required": ["url"],
        "additionalProperties": False,
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({"destination": "unit"})
        self.config = config
        if config["url"] == "http://nowhere":
            raise UserError("INVALID_FIELD", "no such place", field="url")
        if config["url"] == "http://nothing":
            raise UserError("INVALID", "all of it")
        if config["url"] == "http://bug":
            raise KeyError(f"no room for {config['password']}")


class NoSchema:
    pass


class BadSchema(Taker):
    CONFIG_SCHEMA: ClassVar[Mapping[str, Any]] = {"type": "objekt"}


class HiddenSecret(Taker):
    CONFIG_SCHEMA: ClassVar[Mapping[str, Any]] = {"anyOf": [{"properties": {"password": SECRET}}]}


class Halfway:
    CONFIG_SCHEMA: ClassVar[Mapping[str, Any]] = {}
    capabilities = None

    def __init__(self, config: dict[str, Any]) -> None:
        pass


REGISTERED = {
    "taker": "Taker",
    "no_schema": "NoSchema",
    "bad_schema": "BadSchema",
    "hidden_secret": "HiddenSecret",
    "halfway": "Halfway",
    "no_class": "Nothing",
}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [(name, f"{__name__}:{value}") for name, value in REGISTERED.items()]
    values += [("no_module", "not.there:It"), ("twice", "a:A"), ("twice", "b:B")]
    points = list(
        itertools.starmap(lambda n, v: importlib.metadata.EntryPoint(n, v, plugin.SINKS), values)
    )
    monkeypatch.setattr(
        plugin, "entry_points", lambda *, group: points if group == plugin.SINKS else []
    )


def load(name: str, config: dict[str, Any]) -> Any:
    """As a task's sink."""
    sink = task_pb2.Sink()
    sink.plugin.name = name
    sink.plugin.config.update(config)
    environ = {"CDC_PASSWORD": "hunter2", "CDC_KEY": "hunter3"}
    return open_writer(sink, SecretResolver(env_prefix="CDC_", environ=environ))


def failure(name: str, config: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as raised:
        load(name, config)
    assert "hunter" not in raised.value.message
    return raised.value


def test_a_configuration_arrives_with_its_secrets() -> None:
    given = {
        "url": "http://here",
        "retries": 3,
        "password": {"env": "CDC_PASSWORD"},
        "login": {"key": {"env": "CDC_KEY"}, "user": "me"},
        "headers": [{"value": {"env": "CDC_KEY"}}, {}],
        "tokens": [{"env": "CDC_PASSWORD"}, {"env": "CDC_KEY"}],
        "secret": True,
        "properties": "x",
    }
    assert load("taker", given).config == {
        "url": "http://here",
        "retries": 3,
        "password": "hunter2",
        "login": {"key": "hunter3", "user": "me"},
        "headers": [{"value": "hunter3"}, {}],
        "tokens": ["hunter2", "hunter3"],
        "secret": True,
        "properties": "x",
    }
    assert type(load("taker", given).config["retries"]) is int


def test_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    config = struct_pb2.Struct()
    config.update({"url": "http://here", "password": {"file": str(tmp_path / "password")}})

    def load_with(*folders: str) -> Any:
        secrets = SecretResolver(env_prefix="CDC_", folders=folders)
        return plugin.load(plugin.SINKS, "taker", config, secrets=secrets, field="sink.plugin")

    assert load_with(str(tmp_path)).config["password"] == "hunter2"
    with pytest.raises(UserError) as raised:
        load_with()
    assert raised.value.reason == "SECRET_NOT_ALLOWED"
    assert raised.value.field == "sink.plugin.config.password"


@pytest.mark.parametrize(
    ("config", "place", "words"),
    [
        ({}, "", "'url' is a required property"),
        ({"url": "ftp://x"}, ".url", "does not match"),
        ({"url": "http://x", "retries": 0}, ".retries", "minimum"),
        ({"url": "http://x", "retries": 1.5}, ".retries", "integer"),
        ({"url": "http://x", "more": 1}, "", "'more' was unexpected"),
        ({"url": "http://x", "password": "hunter2"}, ".password", "is a secret"),
        ({"url": "http://x", "password": {}}, ".password", "is a secret"),
        ({"url": "http://x", "password": {"env": "A", "file": "/b"}}, ".password", "is a secret"),
        ({"url": "http://x", "login": {"key": "hunter2"}}, ".login.key", "is a secret"),
        ({"url": 5, "login": {"key": "hunter2", "user": "x"}}, ".login.key", "is a secret"),
        ({"url": "http://x", "headers": [{}, {"value": "hunter2"}]}, ".headers[1].value", "secret"),
        ({"url": "http://x", "tokens": ["hunter2"]}, ".tokens[0]", "is a secret"),
        ({"url": "http://x", "login": {}}, ".login", "{}"),
    ],
)
def test_what_does_not_fit_is_named(config: dict[str, Any], place: str, words: str) -> None:
    error = failure("taker", config)
    assert (error.reason, error.field) == ("INVALID_FIELD", f"sink.plugin.config{place}")
    assert words in error.message
    assert error.message.startswith(error.field)


@pytest.mark.parametrize(
    ("name", "words"),
    [("HOME", "SECRET_NOT_ALLOWED"), ("CDC_OTHER", "SECRET_MISSING")],
)
def test_secrets_that_are_not_to_be_had(name: str, words: str) -> None:
    error = failure("taker", {"url": "http://x", "tokens": [{"env": "CDC_KEY"}, {"env": name}]})
    assert (error.reason, error.field) == (words, "sink.plugin.config.tokens[1]")


def test_what_the_plugin_refuses_has_its_place_in_the_task() -> None:
    assert failure("taker", {"url": "http://nowhere"}).field == "sink.plugin.config.url"
    assert failure("taker", {"url": "http://nothing"}).field == "sink.plugin.config"


def test_names_that_nobody_registers() -> None:
    error = failure("tayker", {})
    assert (error.reason, error.field) == ("PLUGIN_UNKNOWN", "sink.plugin.name")
    assert "bad_schema, halfway" in error.message


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("no_module", {}, "ModuleNotFoundError"),
        ("no_class", {}, "Nothing"),
        ("no_schema", {}, "CONFIG_SCHEMA"),
        ("bad_schema", {}, "SchemaError: 'objekt'"),
        ("hidden_secret", {}, "marks a secret where none can be"),
        ("halfway", {}, "has no probe, violations, open, apply, write, release, close"),
        ("twice", {}, "a:A, b:B"),
        (
            "taker",
            {"url": "http://bug", "password": {"env": "CDC_PASSWORD"}},
            "KeyError: 'no room for ***'",
        ),
    ],
)
def test_plugins_that_are_broken(name: str, config: dict[str, Any], words: str) -> None:
    error = failure(name, config)
    assert (error.reason, error.field) == ("PLUGIN_BROKEN", "sink.plugin.name")
    assert words in error.message
