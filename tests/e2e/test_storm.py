"""After any storm of operations, with services killed and stopped in between, the sink is the
source: rows, and everything its public API shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from milvuscdc.v1 import task_service_pb2
from pymilvus import MilvusClient

from tests.e2e import metadata
from tests.e2e.pair import TASK, Pair
from tests.e2e.storm import ROOT_TOKEN, Storm
from tests.e2e.test_crashes import LOST_PEER
from tests.servers import Stack
from tests.servers.process import ManagedProcess

STEPS_BETWEEN_CRASHES = 20
SOAK_STEPS = 200
SETTLE_SECONDS = 240.0
QUIET_SECONDS = 3.0
TOKEN_VARIABLE = "MILVUS_CDC_SECRET_STORM"


def rage(stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> int:
    """One storm; returns the rows compared. AssertionError names the seed's command."""
    monkeypatch.setenv(TOKEN_VARIABLE, ROOT_TOKEN)
    storm = Storm(stack.source.uri, f"storm{seed}", seed)
    chaos = random.Random(f"chaos {seed}")
    try:
        with Pair(stack, folder, replicators=2) as pair:
            storm.begin()
            _create(pair, storm)
            for number in range(1, steps + 1):
                storm.step()
                if number % STEPS_BETWEEN_CRASHES == 0:
                    storm.done.append(_crash(pair, chaos))
            _settle(stack, storm)
            storm.load_everything()
            _settle(stack, storm)
            names = [f"{each.database}.{each.name}" for each in storm.living]
            pair.wait_running(*names, seconds=SETTLE_SECONDS)
            rows = pair.prove()
            pair.quiet(*LOST_PEER, "retrying", "recovered")
            storm.end()
            _gone(pair, stack, storm)
            pair.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=TASK))
            return rows
    except BaseException:
        print("\n".join(storm.done))
        again = f"test_storms and {'pulsar' if stack.pulsar else 'nats'}{seed}-"
        print(f"once more: make soak ARGS='-k \"{again}\"'  (seed {seed}, {steps} steps)")
        raise
    finally:
        storm.close()
        _sweep(stack, storm)


def _create(pair: Pair, storm: Storm) -> None:
    task = pair.task(f"{storm.prefix}_*.*")
    task.carry.rbac = True
    task.sink.milvus.token.env = TOKEN_VARIABLE
    pair.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=30)


def _crash(pair: Pair, chaos: random.Random) -> str:
    hard = chaos.random() < 0.6
    who: list[ManagedProcess] = [pair.controller]
    if chaos.random() < 0.5:
        who = [chaos.choice(pair.replicators)]
    if chaos.random() < 0.3:
        who = [pair.controller, chaos.choice(pair.replicators)]
    for process in who:
        process.restart(hard=hard)
    return f"{'kill' if hard else 'stop'} {', '.join(process.name for process in who)}"


def _settle(stack: Stack, storm: Storm) -> None:
    """Both sides say the same of themselves, and go on doing so."""
    databases = [*storm.databases, storm.extra]

    def ask(uri: str) -> metadata.Snapshot:
        roles = metadata.rbac(uri, storm.role_prefix, storm.databases)
        return metadata.snapshot(uri, databases) | roles

    wanted = ask(stack.source.uri)
    deadline = time.monotonic() + SETTLE_SECONDS
    same_since: float | None = None
    while True:
        try:
            lines = metadata.differences(wanted, ask(stack.sink.uri))
        except RuntimeError as moved:  # something went away between two questions
            lines = [str(moved)]
        now = time.monotonic()
        if lines:
            same_since = None
            assert now < deadline, "the sink is not the source:\n" + "\n".join(lines)
        elif same_since is None:
            same_since = now
        elif now - same_since > QUIET_SECONDS:
            return
        time.sleep(0.5)


def _gone(pair: Pair, stack: Stack, storm: Storm) -> None:
    """What was dropped at the source is dropped at the sink, databases too."""
    client = MilvusClient(uri=stack.sink.uri)
    pair.wait(
        "the sink is empty again",
        lambda: not any(name.startswith(f"{storm.prefix}_") for name in client.list_databases()),
        seconds=SETTLE_SECONDS,
    )
    client.close()


def _sweep(stack: Stack, storm: Storm) -> None:
    """Whatever a broken storm left, so that the next one begins on empty servers."""
    for uri in (stack.source.uri, stack.sink.uri):
        root = MilvusClient(uri=uri, token=ROOT_TOKEN)
        for role in root.list_roles():
            if role.startswith(storm.role_prefix):
                for database in storm.databases:
                    for grant in root.describe_role(role, db_name=database)["privileges"]:
                        root.revoke_privilege(
                            role,
                            grant["object_type"],
                            grant["privilege"],
                            grant["object_name"],
                            db_name=database,
                        )
                root.drop_role(role)
        for database in root.list_databases():
            if database.startswith(f"{storm.prefix}_"):
                client = MilvusClient(uri=uri, token=ROOT_TOKEN, db_name=database)
                for name in client.list_collections():
                    for alias in client.describe_collection(name)["aliases"]:
                        client.drop_alias(alias)
                    client.drop_collection(name)
                client.close()
                root.drop_database(database)
        root.close()


@pytest.mark.timeout(900)
def test_a_short_storm(nats_stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rage(nats_stack, tmp_path, monkeypatch, seed=1, steps=60)


def _storms(queue: str, count: int, *marks: pytest.MarkDecorator) -> Iterator[Any]:
    for seed in range(1, count + 1):
        yield pytest.param(queue, seed, id=f"{queue}{seed}-", marks=marks)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("queue", "seed"), [*_storms("nats", 50), *_storms("pulsar", 10, pytest.mark.pulsar)]
)
def test_storms(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    queue: str,
    seed: int,
) -> None:
    stack: Stack = request.getfixturevalue(f"{queue}_stack")
    assert rage(stack, tmp_path, monkeypatch, seed=seed, steps=SOAK_STEPS)
