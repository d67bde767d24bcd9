"""Commands about holds: what they send and show."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.cli.fake_api import FakeTasks, serve
from tests.unit.cli.test_command import Api

TASK = """
name: tasks/gone
source:
  etcd: {endpoints: ["127.0.0.1:2379"]}
  pulsar: {serviceUrl: "pulsar://127.0.0.1:6650"}
sink: {milvus: {uri: "http://127.0.0.1:19530"}}
selection: {include: ["*.*"]}
start: {earliest: {}}
"""


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    tasks = FakeTasks()
    server, address = await serve(tasks)
    yield Api(tasks, address)
    await server.stop(None)


async def test_holds_are_listed_with_orphans_where_a_queue_is_named(
    api: Api, tmp_path: Path
) -> None:
    shown = await api.run("hold", "list")
    assert shown.out.split()[6:] == ["milvus-cdc-1-a/dml_0", "KEPT", "7", "900", "copy"]
    await api.run("hold", "list", "--task", "copy")
    assert api.tasks.requests[-1].task == "tasks/copy"
    file = tmp_path / "task.yaml"
    file.write_text(TASK)
    shown = await api.run("hold", "list", "-f", str(file), "-o", "json")
    assert api.tasks.requests[-1].source.pulsar.service_url == "pulsar://127.0.0.1:6650"
    states = [hold["state"] for hold in json.loads(shown.out)["holds"]]
    assert states == ["HOLD_STATE_KEPT", "HOLD_STATE_ORPHAN"]


async def test_an_orphan_is_removed_and_one_in_use_is_not(api: Api) -> None:
    done = await api.run("hold", "delete", "milvus-cdc-2-b/dml_0", "--task", "copy")
    assert done.code == 0
    request = api.tasks.requests[-1]
    assert (request.name, request.task) == ("holds/milvus-cdc-2-b/dml_0", "tasks/copy")
    refused = await api.run("hold", "delete", "holds/milvus-cdc-1-a/dml_0", "--forget")
    assert refused.code == 3
    assert api.tasks.requests[-1].forget
    assert "keeps the log for tasks/copy" in refused.err
