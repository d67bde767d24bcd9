"""A sink and a format that another package brings (tests/plugin_package), installed by pip."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from milvus_cdc.errors import UserError
from milvus_cdc.format import Format
from milvus_cdc.format.registry import open_format
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.registry import open_writer
from milvus_cdc.sink.writer import Batch, Opening, Writer
from milvus_cdc.testing import samples
from milvuscdc.v1 import format_pb2, task_pb2

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/plugin_package"
KEY = "a key of some length"


@pytest.fixture
def installed(example_package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(example_package))
    return example_package


def secrets() -> SecretResolver:
    return SecretResolver(env_prefix="CDC_", environ={"CDC_KEY": KEY, "CDC_SHORT": "hunter2"})


def sink(name: str, config: dict[str, Any]) -> Writer:
    spec = task_pb2.Sink()
    spec.plugin.name = name
    spec.plugin.config.update(config)
    return open_writer(spec, secrets())


def signed(config: dict[str, Any]) -> Format:
    plugin = {"plugin": {"name": "signed_json", "config": config}}
    spec = json_format.ParseDict(plugin, format_pb2.Format())
    return open_format(spec, secrets(), "sink.kafka.format")


async def test_the_sink_of_a_task(installed: Path, tmp_path: Path) -> None:
    writer = sink("sqlite", {"path": str(tmp_path / "rows.db")})
    assert type(writer).__module__ == "milvus_cdc_example.sqlite_sink"
    assert (await writer.probe()).startswith("SQLite 3")
    table = samples.table("articles")
    await writer.open(table, Opening.NEW, 1)
    made = [samples.row(1, 1), samples.row(2, 2)]
    await writer.write(table, Batch((samples.put(table, made, 1),)), 10)
    await writer.write(table, Batch((samples.gone(table, [1], 2),)), 10)
    await writer.close()
    with closing(sqlite3.connect(tmp_path / "rows.db")) as db:
        found = db.execute("SELECT name, key, doc FROM rows").fetchall()
    assert [(name, key, json.loads(doc)) for name, key, doc in found] == [
        ("default.articles", 2, made[1])
    ]
    nowhere = sink("sqlite", {"path": str(tmp_path / "no/rows.db")})
    with pytest.raises(UserError) as raised:
        await nowhere.probe()
    assert raised.value.field == "sink.plugin.config.path"


async def test_the_format_of_a_task(installed: Path) -> None:
    config = {"key": {"env": "CDC_KEY"}, "digest": "sha512"}
    made = signed(config)
    table = samples.table("articles", key=samples.TEXT_KEY)
    await made.prepare(table)
    (record,) = made.encode(table, samples.put(table, [samples.row("é", 1)], 1))
    assert json.loads(record.key or b"") == "é"
    assert json.loads(record.value or b"") == samples.row("é", 1)
    signature = hmac.new(KEY.encode(), record.value, hashlib.sha512).hexdigest()
    assert record.headers == (("signature", signature.encode()),)
    (record,) = made.encode(table, samples.gone(table, ["é"], 1))
    assert (json.loads(record.key or b""), record.value) == ("é", None)
    assert b"CREATE" in (made.encode_schema(None, table).value or b"")
    await made.close()


async def test_our_sinks_take_the_format(installed: Path, tmp_path: Path) -> None:
    plugin = {"plugin": {"name": "signed_json", "config": {"key": {"env": "CDC_KEY"}}}}
    spec = {"files": {"uri": f"file://{tmp_path}", "jsonLines": {"format": plugin, "gzip": True}}}
    writer = open_writer(json_format.ParseDict(spec, task_pb2.Sink()), secrets())
    table = samples.table("articles")
    await writer.open(table, Opening.NEW, 1)
    changes = samples.put(table, [samples.row(1, 1)], 1)
    await writer.write(table, Batch((changes,), (samples.reached(1),)), 10)
    await writer.close()
    assert [each["value"] for each in lines(tmp_path)] == [samples.row(1, 1)]


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [gzip.decompress(each.read_bytes()) for each in folder.rglob("*.jsonl.gz")]
    return [json.loads(line) for each in found for line in each.splitlines()]


@pytest.mark.parametrize(
    ("config", "reason", "place"),
    [
        ({}, "INVALID_FIELD", ".config"),
        ({"key": "hunter2"}, "INVALID_FIELD", ".config.key"),
        ({"key": {"env": "CDC_KEY"}, "digest": "md5"}, "INVALID_FIELD", ".config.digest"),
        ({"key": {"env": "HOME"}}, "SECRET_NOT_ALLOWED", ".config.key"),
        ({"key": {"file": "/etc/passwd"}}, "SECRET_NOT_ALLOWED", ".config.key"),
        ({"key": {"env": "CDC_NONE"}}, "SECRET_MISSING", ".config.key"),
        ({"key": {"env": "CDC_SHORT"}}, "KEY_TOO_SHORT", ".config.key"),
    ],
)
def test_a_format_that_is_configured_badly(
    installed: Path, config: dict[str, Any], reason: str, place: str
) -> None:
    with pytest.raises(UserError) as raised:
        signed(config)
    error = raised.value
    assert "hunter" not in error.message
    assert (error.reason, error.field) == (reason, f"sink.kafka.format.plugin{place}")


@pytest.mark.parametrize(
    ("config", "place"),
    [({}, ""), ({"path": "rows.db"}, ".path"), ({"path": "/x", "paht": 1}, "")],
)
def test_a_sink_that_is_configured_badly(
    installed: Path, config: dict[str, Any], place: str
) -> None:
    with pytest.raises(UserError) as raised:
        sink("sqlite", config)
    error = raised.value
    assert (error.reason, error.field) == ("INVALID_FIELD", f"sink.plugin.config{place}")


def test_where_it_is_not_installed() -> None:
    with pytest.raises(UserError) as raised:
        sink("sqlite", {"path": "/x"})
    error = raised.value
    assert (error.reason, error.field) == ("PLUGIN_UNKNOWN", "sink.plugin.name")


def test_where_it_is_broken(
    example_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "installed"
    shutil.copytree(example_package, copy)
    (copy / "milvus_cdc_example/sqlite_sink.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(str(copy))
    for name in [each for each in sys.modules if each.startswith("milvus_cdc_example")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError) as raised:
        sink("sqlite", {"path": "/x"})
    error = raised.value
    assert (error.reason, error.field) == ("PLUGIN_BROKEN", "sink.plugin.name")
    assert "no_such_module" in error.message


def test_its_author_runs_the_contract(example_package: Path, tmp_path: Path) -> None:
    """With a pytest of his own settings."""
    shutil.copy(PACKAGE / "test_sqlite_sink.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(example_package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20


def test_the_document_shows_this_package() -> None:
    text = (ROOT / "docs/writing-a-sink.md").read_text()
    shown = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", text, re.DOTALL))
    files = {
        str(path.relative_to(PACKAGE)): path.read_text()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.name != "__init__.py" and path.suffix in (".py", ".toml")
    }
    assert shown == files
