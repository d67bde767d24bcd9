"""Commands about replicators: what they send, show, and how they end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from milvuscdc.v1 import fleet_service_pb2 as pb

from tests.unit.cli.fake_api import FakeTasks, serve
from tests.unit.cli.test_command import Api


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    tasks = FakeTasks()
    server, address = await serve(tasks)
    yield Api(tasks, address)
    await server.stop(None)


async def test_a_drain_is_followed_to_its_end(api: Api) -> None:
    done = await api.run("replicator", "drain", "r1", "--within", "30", "--force")
    assert done.code == 0
    assert "2 of 3 left" in done.err
    request = api.tasks.requests[0]
    assert (request.name, request.timeout.seconds, request.force) == ("replicators/r1", 30, True)
    api.tasks.fleet.drain_ends_as = pb.Drain.STATE_EXPIRED
    done = await api.run("replicator", "drain", "replicators/r1")
    assert done.code == 1
    assert "the drain is expired; 1 stay with it" in done.err
    assert not api.tasks.requests[-2].HasField("timeout")


async def test_a_drain_of_the_last_one_says_what_would_stop(api: Api) -> None:
    done = await api.run("replicator", "drain", "last")
    assert done.code == 3
    assert "would stop 2: a.b, a.c" in done.err
    assert "--force" in done.err


async def test_marks(api: Api) -> None:
    done = await api.run("replicator", "cordon", "r1", "--validate-only")
    assert done.code == 0
    assert "ALIVE,CORDONED" in done.out
    assert api.tasks.requests[-1].validate_only
    assert "CORDONED" not in (await api.run("replicator", "uncordon", "r1")).out
    assert (await api.run("replicator", "drain", "r1", "--cancel")).code == 0
    assert isinstance(api.tasks.requests[-1], pb.CancelDrainRequest)


async def test_a_watch_shows_changes_as_lines(api: Api) -> None:
    done = await api.run("replicator", "watch", "r1")
    assert api.tasks.requests[0].name == "replicators/r1"
    assert [line.split()[0] for line in done.out.splitlines()] == ["added", "modified"]
    assert done.code == 3, "the server refused to go on"


async def test_a_move_waits_until_it_is_there(api: Api) -> None:
    done = await api.run("assignment", "move", "u.1", "--to", "r1")
    assert done.code == 0
    request = api.tasks.requests[0]
    assert (request.name, request.replicator) == ("assignments/u.1", "replicators/r1")
    # It came to somebody else.
    done = await api.run("assignment", "move", "u.1", "--to", "r9")
    assert done.code == 1
    assert "is not at replicators/r9" in done.err


async def test_a_plan_is_shown(api: Api) -> None:
    done = await api.run("assignment", "rebalance", "--dry-run", "--max-moves", "4")
    request = api.tasks.requests[0]
    assert (request.validate_only, request.max_moves) == (True, 4)
    assert "a.b" in done.out
    assert done.out.splitlines()[-1].split() == ["r2", "0.0", "1.0"]
