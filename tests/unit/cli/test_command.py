"""The command as a user starts it: what it prints, what it sends, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import yaml
from milvus_cdc.control import ApiError, ControlClient
from milvuscdc.v1 import task_pb2, task_service_pb2

from tests.unit.cli.fake_api import FakeTasks, serve

TASK = """\
name: tasks/products-dr
source:
  etcd: {endpoints: ["127.0.0.1:2379"], rootPath: by-dev, metaSubPath: meta}
  nats: {url: "nats://127.0.0.1:4222"}
  milvus: {uri: "http://127.0.0.1:19530"}
sink:
  milvus: {uri: "http://127.0.0.1:29530", token: {env: SINK_TOKEN}}
selection:
  include: ["*.*"]
  exclude: ["default.scratch_*"]
start: {earliest: {}}
adoptExisting: false
labels: {team: search}
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Api:
    def __init__(self, tasks: FakeTasks, address: str) -> None:
        self.tasks = tasks
        self.address = address

    async def run(self, *args: str, text: str = "") -> Ended:
        env = os.environ | {"MILVUS_CDC_CONTROLLER": self.address}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "milvus_cdc.cli.main",
            *args,
            env=env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate(text.encode())
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    async def create(self, text: str = TASK) -> Ended:
        return await self.run("task", "create", "-f", "-", text=text)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    tasks = FakeTasks()
    server, address = await serve(tasks)
    yield Api(tasks, address)
    await server.stop(None)


async def test_create_sends_the_file_as_it_is_meant(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(TASK)
    ended = await api.run("task", "create", "-f", str(path))
    assert (ended.code, ended.err) == (0, "")
    assert "tasks/products-dr" in ended.out
    task = api.tasks.tasks["tasks/products-dr"]
    assert task.source.etcd.root_path == "by-dev"
    assert task.sink.milvus.token.env == "SINK_TOKEN"
    assert task.start.WhichOneof("at") == "earliest"
    assert api.tasks.requests[0].request_id

    shown = await api.run("-o", "yaml", "task", "get", "products-dr")
    same = await api.run("task", "get", "tasks/products-dr", "-o", "json")
    data = json.loads(same.out)
    assert yaml.safe_load(shown.out) == data
    assert data["source"]["etcd"]["rootPath"] == "by-dev"
    for key in ("state", "etag"):
        del data[key]
    del api.tasks.tasks["tasks/products-dr"]
    again = await api.create(json.dumps(data))
    assert again.code == 0, again.err


async def test_validate_only_stores_nothing(api: Api) -> None:
    ended = await api.run("task", "create", "-f", "-", "--validate-only", text=TASK)
    assert (ended.code, api.tasks.tasks) == (0, {})
    assert "nothing was stored" in ended.out


@pytest.mark.parametrize(
    ("old", "new", "reason", "line", "says"),
    [
        ("rootPath", "rootpah", "UNKNOWN_KEY", 3, "did you mean `rootPath`?"),
        ("adoptExisting", "zebra", "UNKNOWN_KEY", 12, "known here: "),
        ("{env: SINK_TOKEN}", '"abc"', "LITERAL_SECRET", 7, "{env: NAME}"),
        ("start: {earliest: {}}", "start: {}", "CHOICE_MISSING", 11, "earliest, latest"),
        ("start: {earliest: {}}", "start: {earliest: }", "CHOICE_MISSING", 11, "earliest"),
        ("start: {earliest: {}}", "start: latest", "INVALID_FILE", 11, "earliest, latest"),
        ("  nats:", "  kafka: {brokers: [a:1]}\n  nats:", "TOO_MANY_CHOICES", 3, "source.nats"),
        ('  nats: {url: "nats://127.0.0.1:4222"}\n', "", "CHOICE_MISSING", 3, "nats, kafka"),
        ("selection:", "sink: {}\nselection:", "DUPLICATE_KEY", 8, "first in line 6"),
        ("{team: search}", "{team: a, team: b}", "DUPLICATE_KEY", 13, "labels.team"),
        ("rootPath: by-dev", "rootPath: by-dev, root_path: x", "DUPLICATE_KEY", 3, "root_path"),
        ("{earliest: {}}", "{earliest: {}", "INVALID_FILE", 12, "not YAML"),
        ('["*.*"]', '"*.*"', "INVALID_FILE", 0, "include"),
    ],
)
async def test_a_bad_file_is_refused_with_its_place(
    api: Api, old: str, new: str, reason: str, line: int, says: str
) -> None:
    assert old in TASK
    ended = await api.create(TASK.replace(old, new, 1))
    assert ended.code == 2, ended
    what, advice = ended.err.splitlines()
    assert what.startswith("error: ")
    assert advice.startswith("hint: ")
    assert reason in what
    assert says in ended.err
    if line:
        assert f"stdin:{line}: " in what
    assert not api.tasks.requests


async def test_a_refusal_names_reason_and_field(api: Api) -> None:
    await api.create()
    ended = await api.create()
    assert ended.code == 3
    assert ended.err.splitlines()[0] == (
        "error: it is there (ALREADY_EXISTS, TASK_EXISTS, field task.name)"
    )
    ended = await api.run("task", "get", "nobody")
    assert ended.code == 3
    assert "TASK_NOT_FOUND" in ended.err
    assert "task list" in ended.err


async def test_no_controller_is_its_own_exit_code() -> None:
    nowhere = Api(FakeTasks(), "127.0.0.1:1")
    ended = await nowhere.run("task", "list", "--timeout", "3")
    assert ended.code == 4
    assert "127.0.0.1:1" in ended.err
    assert "--controller" in ended.err


async def test_wrong_arguments_are_two_lines(api: Api) -> None:
    for args in (("task", "get"), ("task", "fly"), (), ("task", "list", "--label", "x")):
        ended = await api.run(*args)
        assert (ended.code, len(ended.err.splitlines())) == (2, 2), ended


async def test_lists_ask_for_every_page(api: Api) -> None:
    await api.create()
    await api.create(TASK.replace("products-dr", "other"))
    ended = await api.run("task", "list", "--state", "running", "--label", "team=search")
    assert [line.split()[0] for line in ended.out.splitlines()] == ["NAME", "other", "products-dr"]
    request = api.tasks.requests[-1]
    assert list(request.states) == [task_pb2.TASK_STATE_RUNNING]
    assert dict(request.labels) == {"team": "search"}
    data = json.loads((await api.run("task", "list", "-o", "json")).out)
    assert [task["name"] for task in data["tasks"]] == ["tasks/other", "tasks/products-dr"]
    assert "LOG_TRUNCATED resync it" in (await api.run("task", "collections", "other")).out
    assert "r1" in (await api.run("replicator", "list")).out
    assert "10.0.0.1:7070  LEADER" in (await api.run("controller", "list")).out
    shown = await api.run("assignment", "list", "--task", "other", "-o", "json")
    assert json.loads(shown.out)["assignments"][0]["task"] == "tasks/other"


async def test_update_builds_the_mask_of_what_was_given(api: Api) -> None:
    await api.create()
    await api.run("task", "update", "products-dr", "--include", "a.*", "--include", "b.*")
    request = api.tasks.requests[-1]
    assert list(request.update_mask.paths) == ["selection.include"]
    assert list(request.task.selection.include) == ["a.*", "b.*"]

    await api.run("task", "update", "products-dr", "--label", "x=1", "--no-label", "team")
    request = api.tasks.requests[-1]
    assert list(request.update_mask.paths) == ["labels"]
    assert (dict(request.task.labels), request.task.etag) == ({"x": "1"}, "e1")

    patch = "selection: {exclude: []}\nlabels: {y: z}\n"
    ended = await api.run("task", "update", "products-dr", "-f", "-", text=patch)
    assert ended.code == 0, ended
    request = api.tasks.requests[-1]
    assert list(request.update_mask.paths) == ["labels", "selection.exclude"]
    assert (await api.run("task", "update", "products-dr")).code == 2

    ended = await api.run(
        "task", "update", "products-dr", "--carry", "index=false", "--carry", "rbac=TRUE",
        "--drift", "report",
    )  # fmt: skip
    assert ended.code == 0, ended
    request = api.tasks.requests[-1]
    assert list(request.update_mask.paths) == ["carry.index", "carry.rbac", "drift"]
    assert (request.task.carry.index, request.task.carry.rbac) == (False, True)
    assert request.task.drift == task_pb2.DRIFT_REPORT
    patch = "carry: {rows: false}\ndrift: DRIFT_REPAIR\n"
    assert (await api.run("task", "update", "products-dr", "-f", "-", text=patch)).code == 0
    assert list(api.tasks.requests[-1].update_mask.paths) == ["carry.rows", "drift"]
    patch = "batching: {maxRows: 500, linger: 0.5s}\n"
    assert (await api.run("task", "update", "products-dr", "-f", "-", text=patch)).code == 0
    request = api.tasks.requests[-1]
    assert list(request.update_mask.paths) == ["batching.linger", "batching.max_rows"]
    assert request.task.batching.linger.ToMilliseconds() == 500
    for wrong in ("index", "index=maybe", "nothing=true"):
        ended = await api.run("task", "update", "products-dr", "--carry", wrong)
        assert (ended.code, wrong in ended.err) == (2, True)


async def test_pause_resume_retry_and_delete(api: Api) -> None:
    await api.create()
    assert "PAUSED" in (await api.run("task", "pause", "products-dr")).out
    assert "RUNNING" in (await api.run("task", "resume", "tasks/products-dr")).out
    assert (await api.run("task", "retry", "products-dr", "--collection", "a.b")).code == 0
    assert api.tasks.requests[-1].collection == "a.b"
    assert "stays at the sink" in (await api.run("task", "delete", "products-dr")).out
    assert api.tasks.tasks == {}


async def test_resync_wants_a_yes(api: Api) -> None:
    await api.create()
    args = ("task", "resync", "products-dr", "--collection", "a.b")
    ended = await api.run(*args)
    assert (ended.code, "--yes" in ended.err) == (2, True)
    assert len(api.tasks.requests) == 1
    assert (await api.run(*args, "--yes")).code == 0
    assert api.tasks.requests[-1].collection == "a.b"


async def test_diff_names_what_differs_and_ends_with_it(api: Api) -> None:
    await api.create()
    ended = await api.run("task", "diff", "products-dr", "--collection", "default.c")
    assert ended.code == 0, ended
    assert ended.out.splitlines()[-1] == "no difference, 1 collections looked at"
    assert list(api.tasks.requests[-1].collections) == ["default.c"]

    api.tasks.equal = False
    ended = await api.run("task", "diff", "products-dr")
    assert ended.code == 1
    for word in ("drop", "index", "default.c", "odd", "the source has no such index"):
        assert word in ended.out
    ended = await api.run("task", "diff", "products-dr", "-o", "json")
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert (ended.code, events[-1]) == (1, {"verdict": {"collections": 1, "differences": 1}})
    assert (await api.run("task", "diff", "nobody")).code == 3


async def test_verify_ends_with_the_verdict(api: Api) -> None:
    await api.create()
    ended = await api.run("verify", "products-dr", "--collection", "default.c")
    assert ended.code == 0, ended
    assert ended.out.splitlines()[-1].startswith("EQUAL: 1 of 1 collections")
    assert list(api.tasks.requests[-1].collections) == ["default.c"]

    api.tasks.equal = False
    ended = await api.run("verify", "products-dr", "--max-differences", "3")
    assert ended.code == 1
    assert "key '7' (v)" in ended.out
    assert "default.c: DIFFERENT; rows 10 at the source, 10 at the sink" in ended.out
    assert api.tasks.requests[-1].max_differences == 3
    ended = await api.run("verify", "products-dr", "-o", "json")
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert events[-1] == {"verdict": {"collections": 1, "rowsCompared": "10"}}
    assert (await api.run("verify", "nobody")).code == 3


@pytest.mark.parametrize(
    "how",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        None,
    ],
)
async def test_watch_goes_on_after_the_last_revision(api: Api, how: grpc.StatusCode | None) -> None:
    await api.create()
    api.tasks.watch_breaks, api.tasks.watch_break = 1, how
    ended = await api.run("task", "watch")
    assert ended.code == 3
    assert "REVISION_COMPACTED" in ended.err
    assert [line.split()[:2] for line in ended.out.splitlines()] == [
        ["added", "products-dr"],
        ["modified", "late"],
    ]
    watches = [r for r in api.tasks.requests if isinstance(r, task_service_pb2.WatchTasksRequest)]
    assert [r.revision for r in watches] == [0, 5]


async def test_a_create_is_repeated_under_one_request_id(api: Api) -> None:
    api.tasks.fail_creates = 2
    async with ControlClient(api.address) as client:
        made = await client.create_task(task_pb2.Task(name="tasks/t"))
        assert made.name == "tasks/t"
        assert len({request.request_id for request in api.tasks.requests}) == 1
        assert len(api.tasks.requests) == 3
        with pytest.raises(ApiError) as caught:
            await client.create_task(task_pb2.Task(name="tasks/t"))
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "TASK_EXISTS")
    assert (error.field, error.metadata) == ("task.name", {"k": "v"})


async def test_help_tells_the_exit_codes(api: Api) -> None:
    ended = await api.run("--help")
    assert "exit codes:" in ended.out
    assert (await api.run("version")).out.strip()
