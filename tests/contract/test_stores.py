"""One suite for every store: what was committed is there after a restart, and one controller at a
time has it.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc_controller.store import Store
from milvus_cdc_controller.store.sqlite import SqliteStore

from tests.contract.elections import Candidate
from tests.servers import EtcdServer

Open = Callable[[], Awaitable[Store]]


@pytest.fixture(params=["sqlite", "etcd", "secured etcd"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store each time it is called."""
    if request.param == "sqlite":
        path = tmp_path / "folder" / "store.db"
        return lambda: SqliteStore.open(path)
    server: EtcdServer = request.getfixturevalue(
        "etcd_server" if request.param == "etcd" else "secured_etcd"
    )
    prefix = f"test-{uuid.uuid4()}"
    return lambda: Candidate.lead(server, prefix)


async def test_what_is_committed_is_there_after_a_restart(open_store: Open) -> None:
    store = await open_store()
    assert await store.load() == {}
    await store.commit({"tasks/a": b"1", "tasks/b": b"\x00\xff", "tasks/c": b""})
    await store.commit({"tasks/a": b"2", "tasks/b": None, "tasks/missing": None})
    first = store.incarnation
    await store.close()
    again = await open_store()
    assert await again.load() == {"tasks/a": b"2", "tasks/c": b""}
    assert again.incarnation > first
    await again.close()


async def test_a_large_commit_is_whole(open_store: Open) -> None:
    store = await open_store()
    writes: dict[str, bytes | None] = {f"collections/{i:05d}": b"x" * 2000 for i in range(1000)}
    await store.commit(writes)
    assert await store.load() == writes
    await store.commit({key: None for key in writes})
    assert await store.load() == {}
    await store.close()


async def test_large_records_are_stored(open_store: Open) -> None:
    store = await open_store()
    writes: dict[str, bytes | None] = {f"tasks/{i}": b"x" * 900_000 for i in range(5)}
    await store.commit(writes)
    assert await store.load() == writes
    await store.close()


async def test_a_second_controller_on_a_file_is_refused(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    with pytest.raises(UserError) as refused:
        await SqliteStore.open(tmp_path / "store.db")
    assert refused.value.reason == "STORE_IN_USE"
    assert refused.value.field.startswith("store.")
    await store.commit({"tasks/a": b"1"})
    await store.close()
    again = await SqliteStore.open(tmp_path / "store.db")
    assert await again.load() == {"tasks/a": b"1"}
    await again.close()


async def test_sqlite_says_why_a_file_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "no.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UserError) as refused:
        await SqliteStore.open(path)
    assert refused.value.reason == "STORE_UNUSABLE"
