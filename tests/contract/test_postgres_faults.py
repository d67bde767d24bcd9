"""The PostgreSQL writer when things break: what is told, and each change takes effect once."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.rows import ChangeOp
from milvus_cdc.sink.postgres import PostgresWriter
from milvus_cdc.sink.postgres.connections import Transaction
from milvus_cdc.sink.postgres.ledger import Ledger
from milvus_cdc.sink.writer import Batch, Opening, SchemaChange, SchemaChangeKind

from tests.contract.postgres_proxy import PostgresProxy
from tests.contract.postgres_samples import (
    V1,
    Database,
    gone,
    opened,
    plain,
    put,
    table_of,
    until,
    upto,
    write,
)
from tests.servers import PostgresServer

UPDATE = ChangeOp.UPDATE


@pytest.fixture(scope="module")
def mortal_server(
    tmp_path_factory: pytest.TempPathFactory, postgres_available: None
) -> Iterator[PostgresServer]:
    """To be killed."""
    with PostgresServer(tmp_path_factory.mktemp("mortal-postgres")) as server:
        yield server


class Halt:
    """Stops a write when everything but its checkpoint and COMMIT is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self.on = asyncio.Event()
        self.armed = True
        store = Ledger.store

        async def halted(ledger: Ledger, t: Transaction, *rest: Any) -> None:
            if self.armed:
                self.armed = False
                self.reached.set()
                await self.on.wait()
            await store(ledger, t, *rest)

        monkeypatch.setattr(Ledger, "store", halted)


# ---- the server goes away


async def test_kill_in_mid_transaction(
    mortal_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database.fresh(mortal_server)
    writer = database.writer()
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1], 1)), checkpoints=[upto(1)])
    halt = Halt(monkeypatch)
    batch = Batch((put(table, plain([1, 2], 2), op=UPDATE, at=2),), (upto(2),))
    under_way = asyncio.create_task(writer.write(table, batch, 10))
    await halt.reached.wait()
    await asyncio.to_thread(mortal_server.kill)
    halt.on.set()
    with pytest.raises(RetryableError, match="SINK_CONNECTION_LOST") as raised:
        await under_way
    assert not isinstance(raised.value, UnknownOutcomeError)
    with pytest.raises(RetryableError, match="SINK_UNREACHABLE") as raised:
        await writer.write(table, batch, 10)
    assert raised.value.field == "sink.postgres.host"
    await asyncio.to_thread(mortal_server.start)
    assert database.numbers() == {1: 1}
    await writer.write(table, batch, 10)
    assert database.numbers() == {1: 2, 2: 2}
    assert await opened(writer, table, Opening.RESUME) == {V1: upto(2)}
    # A restart while nothing is under way is not noticed.
    await asyncio.to_thread(mortal_server.restart)
    await write(writer, table, gone([1], at=3))
    assert database.numbers() == {2: 2}
    await writer.close()


async def test_a_server_that_does_not_answer(
    mortal_server: PostgresServer,
) -> None:
    database = Database.fresh(mortal_server)
    writer = database.writer()
    table = table_of()
    await opened(writer, table)
    mortal_server.pause()
    try:
        # The postmaster alone stands still: who is connected is served, who is not waits.
        await write(writer, table, put(table, plain([1])))
        fresh = database.writer()
        began = time.monotonic()
        with pytest.raises(RetryableError, match=r"SINK_UNREACHABLE.*no answer in time"):
            await fresh.apply(SchemaChange(SchemaChangeKind.DROP_COLLECTION, table), 1.0)
        assert time.monotonic() - began < 2.5
        await fresh.close()
    finally:
        mortal_server.resume()
    await writer.close()


@pytest.mark.parametrize("committed", [True, False])
async def test_a_commit_without_an_answer(database: Database, committed: bool) -> None:
    table = table_of()
    async with PostgresProxy(database.server.port) as proxy:
        writer = database.writer(port=proxy.port)
        await opened(writer, table)
        await write(writer, table, put(table, plain([1], 1)), checkpoints=[upto(1)])
        batch = Batch((put(table, plain([1, 2], 2), op=UPDATE, at=2),), (upto(2),))
        proxy.on_request = lambda data: committed if b"COMMIT\0" in data else None
        with pytest.raises(UnknownOutcomeError):
            await writer.write(table, batch, 10)
        with pytest.raises(UnknownOutcomeError):
            await writer.write(table, batch, 10)
        proxy.on_request = lambda data: None
        await until(lambda: database.numbers() == ({1: 2, 2: 2} if committed else {1: 1}))
        # Who looks first does not write again what is there.
        database.execute('UPDATE "default".articles SET n = 100')
        await writer.write(table, batch, 10)
        expected = {1: 100, 2: 100} if committed else {1: 2, 2: 2}
        assert database.numbers() == expected
        assert await opened(writer, table, Opening.RESUME) == {V1: upto(2)}
        # Another batch than the one in doubt is written, whatever became of that one.
        proxy.on_request = lambda data: committed if b"COMMIT\0" in data else None
        with pytest.raises(UnknownOutcomeError):
            await write(writer, table, put(table, plain([3], 3), at=3))
        proxy.on_request = lambda data: None
        await write(writer, table, put(table, plain([3, 4], 4), at=4))
        assert database.numbers() == {**expected, 3: 4, 4: 4}
        await writer.close()


async def test_cancelled_while_its_commit_is_under_way(database: Database) -> None:
    """It is committed all the same, and whatever is written next goes on from there."""
    table = table_of()
    batch = Batch((put(table, plain([1], 1)),), (upto(1),))
    other = Batch((put(table, plain([1, 2], 2), op=UPDATE, at=2),), (upto(2),))
    async with PostgresProxy(database.server.port) as proxy:
        writer = database.writer(port=proxy.port)
        await opened(writer, table)
        for again, expected in ((batch, {1: 1}), (other, {1: 2, 2: 2})):
            under_way = asyncio.create_task(writer.write(table, batch, 10))

            def cancel(data: bytes, task: asyncio.Task[None] = under_way) -> None:
                if b"COMMIT\0" in data:
                    task.cancel()

            proxy.on_request = cancel
            await asyncio.wait({under_way})
            assert under_way.cancelled()
            proxy.on_request = lambda data: None
            await until(lambda: database.numbers()[1] == 1)
            await writer.write(table, again, 10)
            assert database.numbers() == expected
        await writer.close()


async def test_every_change_takes_effect_once_over_many_crashes(database: Database) -> None:
    """Connections break after any number of messages, and every other time the process with them; a
    trigger of the table keeps a list of what happened.
    """
    table = table_of()
    dice = random.Random(11)
    async with PostgresProxy(database.server.port) as proxy:
        writer = database.writer(port=proxy.port)
        await opened(writer, table)
        database.execute(
            "CREATE TABLE seen (n bigint);"
            " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO public.seen VALUES (NEW.n); RETURN NULL; END $$;"
            ' CREATE TRIGGER t AFTER INSERT OR UPDATE ON "default".articles'
            " FOR EACH ROW EXECUTE FUNCTION note()"
        )
        left = 0

        def bite(data: bytes) -> bool | None:
            nonlocal left
            left -= 1
            return None if left > 0 else dice.random() < 0.5

        proxy.on_request = bite
        done, epoch, failures, unknown = 0, 1, 0, 0
        while done < 24:
            left = dice.randrange(1, 16)
            try:
                at = done + 1
                ops = (ChangeOp.CREATE, UPDATE)
                changes = (
                    put(table, plain([at % 7, 100 + at], at), op=dice.choice(ops), at=at),
                    gone([100 + at - 3], at=at),
                )
                await writer.write(table, Batch(changes, (upto(at),)), 10)
                done = at
            except RetryableError as error:
                failures += 1
                unknown += isinstance(error, UnknownOutcomeError)
                if dice.random() < 0.5:
                    left = 10**9
                    await writer.close()
                    writer, epoch = database.writer(port=proxy.port), epoch + 1
                    held = await opened(writer, table, Opening.RESUME, epoch)
                    assert done <= held[V1].resolved_ts <= done + 1 if held else done == 0
                    done = held[V1].resolved_ts if held else 0
        await writer.close()
    assert failures > 8
    assert unknown > 0
    seen = sorted(row[0] for row in database.select("SELECT n FROM seen"))
    assert seen == sorted([*range(1, 25), *range(1, 25)])
    last = {at % 7: at for at in range(1, 25)}
    assert database.numbers() == {**last, **{100 + at: at for at in (22, 23, 24)}}


# ---- more than one owner


async def test_an_older_owner_writes_no_more(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table, epoch=3)
    await write(writer, table, put(table, plain([1], 1)), checkpoints=[upto(1)])
    newer = database.writer()
    assert await opened(newer, table, Opening.RESUME, 4) == {V1: upto(1)}
    for _ in range(2):
        with pytest.raises(RetryableError, match=r"SINK_FENCED.*epoch 4.*has 3"):
            await write(writer, table, put(table, plain([1], 2), op=UPDATE), checkpoints=[upto(2)])
    for kind in (SchemaChangeKind.DROP_COLLECTION, SchemaChangeKind.DROP_PARTITION):
        with pytest.raises(RetryableError, match="SINK_FENCED"):
            await writer.apply(SchemaChange(kind, table, "_default"), 5)
    with pytest.raises(RetryableError, match="SINK_FENCED"):
        await opened(writer, table, Opening.RECREATE, 3)
    assert database.numbers() == {1: 1}
    await write(newer, table, put(table, plain([2], 3)))
    assert await opened(newer, table, Opening.RESUME, 4) == {V1: upto(1)}
    await newer.close()


async def test_a_zombie_in_mid_transaction_is_ended(
    database: Database, writer: PostgresWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of()
    await opened(writer, table)
    halt = Halt(monkeypatch)
    zombie = asyncio.create_task(
        write(writer, table, put(table, plain([1], 1)), checkpoints=[upto(1)])
    )
    await halt.reached.wait()
    newer = database.writer()
    began = time.monotonic()
    assert await opened(newer, table, Opening.RESUME, 2) == {}
    assert time.monotonic() - began < 10
    await write(newer, table, put(table, plain([1], 2)), checkpoints=[upto(2)])
    halt.on.set()
    with pytest.raises(RetryableError, match="SINK_CONNECTION_LOST"):
        await zombie
    with pytest.raises(RetryableError, match="SINK_FENCED"):
        await write(writer, table, put(table, plain([1], 1)), checkpoints=[upto(1)])
    assert database.numbers() == {1: 2}
    assert await opened(newer, table, Opening.RESUME, 2) == {V1: upto(2)}
    await newer.close()


async def test_two_processes_open_at_once(database: Database) -> None:
    table = table_of()
    writers = [database.writer() for _ in range(4)]
    results = await asyncio.gather(
        *(opened(each, table, epoch=at) for at, each in enumerate(writers)), return_exceptions=True
    )
    assert all(isinstance(each, dict | RetryableError) for each in results), results
    await opened(writers[3], table, epoch=3)
    await write(writers[3], table, put(table, plain([1])))
    for each in writers[:3]:
        if results[writers.index(each)] == {}:
            with pytest.raises(RetryableError, match="SINK_FENCED"):
                await write(each, table, put(table, plain([1])))
    for each in writers:
        await each.close()


# ---- locks, time, room


async def test_a_lock_of_somebody_else(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1], 1)))
    update = put(table, plain([1], 2), op=UPDATE)
    with database.server.connect(database.name) as other:
        other.execute('BEGIN; SELECT * FROM "default".articles FOR UPDATE')
        began = time.monotonic()
        with pytest.raises(RetryableError, match="SINK_TIMEOUT") as raised:
            await write(writer, table, update, timeout=1.0)
        assert not isinstance(raised.value, UnknownOutcomeError)
        assert time.monotonic() - began < 2
        await until(lambda: database.sessions() == 0)
        under_way = asyncio.create_task(write(writer, table, update))
        await asyncio.sleep(0.3)
        other.execute("COMMIT")
        await under_way
    assert database.numbers() == {1: 2}


async def test_a_deadlock(database: Database, writer: PostgresWriter) -> None:
    table = table_of()
    await opened(writer, table)
    await write(writer, table, put(table, plain([1, 2], 1)))
    with database.server.connect(database.name) as other:
        other.execute("SET deadlock_timeout = '1min'")
        other.execute('BEGIN; UPDATE "default".articles SET n = 7 WHERE id = 2')
        under_way = asyncio.create_task(
            write(writer, table, put(table, plain([1, 2], 2), op=UPDATE))
        )
        await asyncio.sleep(0.4)
        query = 'UPDATE "default".articles SET n = 7 WHERE id = 1'
        await asyncio.to_thread(other.execute, query)
        with pytest.raises(RetryableError, match=r"SINK_ERROR.*deadlock"):
            await under_way
        other.execute("COMMIT")
    await write(writer, table, put(table, plain([1, 2], 2), op=UPDATE))
    assert database.numbers() == {1: 2, 2: 2}


async def test_cancelled_and_closed_under_load(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = database.writer(max_connections=1)
    tables = [table_of(collection=name, collection_id=at) for at, name in enumerate("abc")]
    for table in tables:
        await opened(writer, table)
    halt = Halt(monkeypatch)
    first = asyncio.create_task(write(writer, tables[0], put(tables[0], plain([1]))))
    await halt.reached.wait()
    # The only connection is taken.
    with pytest.raises(RetryableError, match=r"SINK_TIMEOUT.*all 1 connections.*max_connections"):
        await write(writer, tables[1], put(tables[1], plain([1])), timeout=0.3)
    first.cancel()
    halt.on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await until(lambda: database.sessions() == 0)
    halt.armed = True
    halt.on.clear()
    halt.reached.clear()
    second, third = (
        asyncio.create_task(write(writer, table, put(table, plain([1])))) for table in tables[:2]
    )
    await halt.reached.wait()
    await writer.close()
    halt.on.set()
    for task in (second, third):
        with pytest.raises(RetryableError, match=r"SINK_CONNECTION_LOST|SINK_CLOSED"):
            await task
    await until(lambda: database.sessions() == 0)
    assert database.numbers('"default".a') == {}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Outside of pytest's folders, which the server's user may not look into by access(2)."""
    folder = Path(tempfile.mkdtemp(prefix="milvus-cdc-small-"))
    folder.chmod(0o755)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


async def test_disk_full(postgres_server: PostgresServer, small_disk: Path) -> None:
    space = small_disk / "space"
    space.mkdir()
    shutil.chown(space, *_owner(postgres_server))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 * 1024 * 1024))
    database = Database.fresh(postgres_server)
    database.execute(f"CREATE TABLESPACE small LOCATION '{space}'")
    other = Database(postgres_server, f"{database.name}s")
    database.execute(f"CREATE DATABASE {other.name} TABLESPACE small")
    try:
        writer = other.writer()
        table = table_of()
        await opened(writer, table)

        async def fill() -> None:
            for at in range(100):
                rows = plain(range(at * 5000, at * 5000 + 5000))
                await write(writer, table, put(table, rows, at=at), checkpoints=[upto(at)])

        with pytest.raises(RetryableError, match=r"SINK_DISK_FULL.*make room"):
            await fill()
        ballast.unlink()
        at = (await opened(writer, table, Opening.RESUME))[V1].resolved_ts + 1
        keys = range(at * 5000, at * 5000 + 5000)
        await write(writer, table, put(table, plain(keys), at=at), checkpoints=[upto(at)])
        assert len(other.numbers()) == (at + 1) * 5000
        await writer.close()
    finally:
        database.execute(f"DROP DATABASE {other.name} WITH (FORCE)")
        database.execute("DROP TABLESPACE small")


def _owner(server: PostgresServer) -> tuple[int, int]:
    stat = server.data.stat()
    return stat.st_uid, stat.st_gid


async def test_rows_are_durable_whatever_the_database_defaults_to(
    database: Database,
) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off")
    database.execute(f"ALTER DATABASE {database.name} SET search_path = nowhere")
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    writer = database.writer()
    seen = []
    look = Ledger.claim

    async def claim(ledger: Ledger, t: Transaction, *rest: Any) -> None:
        seen.append(await t.row("SHOW synchronous_commit"))
        await look(ledger, t, *rest)

    table = table_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "claim", claim)
        await opened(writer, table)
        await write(writer, table, put(table, plain([1]), op=UPDATE))
    assert seen == [("on",)]
    await writer.close()


# ---- an older state


async def test_a_database_put_back_to_an_older_state(
    database: Database, writer: PostgresWriter
) -> None:
    table = table_of()
    await writer.open(table, Opening.NEW, 1)
    await write(writer, table, put(table, plain([1]), op=UPDATE, at=1))
    [(older,)] = database.select("SELECT last_write FROM milvus_cdc.collections")
    await write(writer, table, put(table, plain([2]), op=UPDATE, at=2))
    database.execute('DELETE FROM "default".articles WHERE id = 2')
    database.execute("UPDATE milvus_cdc.collections SET last_write = %s", older)
    with pytest.raises(UserError, match="SINK_PUT_BACK"):
        await write(writer, table, put(table, plain([3]), op=UPDATE, at=3))
    assert database.numbers() == {1: 0}
