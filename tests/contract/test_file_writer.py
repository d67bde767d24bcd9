"""The file writer on a real disk and a real S3 interface: owners, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.rows import ChangeOp
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import FileWriter
from milvus_cdc.sink.files.object_store import ObjectStore
from milvus_cdc.sink.files.opening import open_store
from milvus_cdc.sink.files.reading import History, find_collections
from milvus_cdc.sink.files.store import LocalStore, MissingError, Store
from milvus_cdc.sink.writer import Opening, SchemaChangeKind
from milvuscdc.v1 import sink_file_pb2

from tests.servers import Authority, S3Server, free_port
from tests.servers.s3 import KEY_ID, REGION, SECRET
from tests.unit.sink.files.samples import (
    batch,
    change,
    gone,
    numbers,
    plain,
    put,
    renamed,
    table_of,
    upto,
)

TABLE = table_of()
ENVIRON = {"TEST_KEY": KEY_ID, "TEST_SECRET": SECRET}


@dataclass
class Place:
    spec: sink_file_pb2.FileSink
    store: Store

    def writer(self, environ: dict[str, str] = ENVIRON, **options: Any) -> FileWriter:
        spec = sink_file_pb2.FileSink(**options)
        spec.MergeFrom(self.spec)
        return FileWriter(spec, SecretResolver(env_prefix="TEST_", environ=environ))

    def history(self) -> History:
        [found] = find_collections(self.store)
        return found.history()

    def parts(self) -> int:
        return sum("/part-" in entry.path for entry in self.store.entries("default"))


def s3_place(server: S3Server, bucket: str, prefix: str = "deep/prefix") -> Place:
    spec = sink_file_pb2.FileSink(uri=f"s3://{bucket}/{prefix}")
    spec.s3.endpoint = server.endpoint
    spec.s3.region = REGION
    spec.s3.access_key_id.env = "TEST_KEY"
    spec.s3.secret_access_key.env = "TEST_SECRET"
    return Place(
        spec,
        open_store(
            spec.uri,
            endpoint=server.endpoint,
            region=REGION,
            access_key_id=KEY_ID,
            secret_access_key=SECRET,
        ),
    )


def local_place(folder: Path) -> Place:
    return Place(sink_file_pb2.FileSink(uri=folder.as_uri()), LocalStore(folder))


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return local_place(tmp_path)
    server: S3Server = request.getfixturevalue("s3_server")
    return s3_place(server, server.make_bucket())


async def test_a_life(place: Place) -> None:
    writer = place.writer()
    assert await writer.probe()
    assert (await writer.open(TABLE, Opening.NEW, 1)).conditions == ()
    first = batch(put(TABLE, plain([1, 2, 3]), 1, partition="p"))
    await writer.write(TABLE, first, 20)
    updated = put(TABLE, plain([2], n=7), 2, op=ChangeOp.UPDATE, partition="p")
    await writer.write(TABLE, batch(updated, gone([1], 3)), 20)
    await writer.write(TABLE, first, 20)
    assert numbers(place.history()) == {2: 7, 3: 0}
    await writer.apply(change(SchemaChangeKind.DROP_PARTITION, TABLE, "p"), 20)
    now = renamed(TABLE, "shop", "odd name/%41+é")
    await writer.apply(
        change(SchemaChangeKind.RENAME_COLLECTION, now, renamed_from=("default", "articles")), 20
    )
    await writer.release(TABLE)
    await writer.close()

    again = place.writer()
    answer = await again.open(now, Opening.RESUME, 2)
    assert answer.checkpoints == (upto(3),)
    await again.write(now, batch(put(now, plain([5]), 9)), 20)
    assert numbers(place.history()) == {5: 0}
    await again.open(now, Opening.RECREATE, 3)
    assert numbers(place.history()) == {}
    await again.close()


async def test_the_old_owner_is_fenced(place: Place) -> None:
    old, new = place.writer(), place.writer()
    await old.open(TABLE, Opening.NEW, 1)
    await old.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
    await new.open(TABLE, Opening.RESUME, 2)
    with pytest.raises(RetryableError, match="FENCED"):
        await old.write(TABLE, batch(put(TABLE, plain([2]), 2)), 20)
    assert place.parts() == 1
    await new.write(TABLE, batch(put(TABLE, plain([2]), 2)), 20)
    assert numbers(place.history()) == {1: 0, 2: 0}
    await old.close()
    await new.close()


def test_one_of_many_creations_wins(place: Place) -> None:
    place.store.conditions()
    for at in range(5):
        with ThreadPoolExecutor(8) as pool:
            texts = [str(each).encode() for each in range(8)]
            won = list(pool.map(lambda text, at=at: place.store.create(f"x/{at}", text), texts))
        assert sum(won) == 1
        assert place.store.get(f"x/{at}") == texts[won.index(True)]


def test_a_store_keeps_what_it_is_given(place: Place) -> None:
    store = place.store
    names = ["a/b c/d%20=1/é.bin", "a/%2F/x", "a/b c/e"]
    for name in names:
        store.put(name, name.encode())
    assert sorted(entry.path for entry in store.entries("a")) == sorted(names)
    assert {entry.size for entry in store.entries("a/%2F")} == {len("a/%2F/x")}
    assert store.folders("a") == ["%2F", "b c"]
    assert store.entries("nothing") == []
    assert store.folders("nothing") == []
    large = uuid.uuid4().bytes * (40 * 2**20 // 16)
    store.put("large", memoryview(large))
    with store.open("large") as file:
        assert file.size() == len(large)
        file.seek(len(large) - 5)
        assert file.read() == large[-5:]
    for read in (store.get, store.open):
        with pytest.raises(MissingError):
            read("nothing")
    store.remove([*names, "large", "nothing"])
    assert store.entries("a") == []


# ---- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> int:
    """Takes all that is left; how much it was."""
    filled = 0
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            filled += file.write(bytes(4096))
    return filled


async def test_a_full_disk(small_disk: Path) -> None:
    place = local_place(small_disk)
    writer = place.writer()
    await writer.open(TABLE, Opening.NEW, 1)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
    ballast = small_disk / "ballast"
    filled = fill(ballast)
    before = place.store.entries("default")
    more = batch(put(TABLE, plain([2]), 2))
    for _ in range(3):
        with pytest.raises(RetryableError, match="DISK_FULL") as raised:
            await writer.write(TABLE, more, 20)
    assert "free some space" in raised.value.message
    assert raised.value.field == "sink.files.uri"
    # Nothing half is left, nothing half is seen.
    assert place.store.entries("default") == before
    assert numbers(place.history()) == {1: 0}
    # Room for the rows, but not for the manifest that names them.
    for room in range(1, 12):
        with ballast.open("r+b") as file:
            file.truncate(filled - room * 4096)
        try:
            await writer.write(TABLE, more, 20)
            break
        except RetryableError:
            assert place.store.entries("default") == before
    assert numbers(place.history()) == {1: 0, 2: 0}
    await writer.close()


async def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    place = local_place(Path("/proc"))
    with pytest.raises((UserError, RetryableError)) as raised:
        await place.writer().probe()
    assert raised.value.field == "sink.files.uri"


# ---- S3


async def s3_failures(writer: FileWriter) -> list[Exception]:
    """Of every call that goes to the store first."""
    found: list[Exception] = []
    calls: list[Callable[[], Any]] = [
        writer.probe,
        lambda: writer.open(TABLE, Opening.NEW, 1),
        lambda: writer.apply(change(SchemaChangeKind.DROP_COLLECTION, TABLE), 20),
    ]
    for call in calls:
        try:
            await call()
        except (UserError, RetryableError) as error:
            found.append(error)
    await writer.close()
    assert len(found) == len(calls)
    return found


async def test_no_such_bucket(s3_server: S3Server) -> None:
    for error in await s3_failures(s3_place(s3_server, "not-there").writer()):
        assert isinstance(error, UserError)
        assert error.reason == "BUCKET_MISSING"
        assert error.field == "sink.files.uri"
        assert "not-there" in error.message


async def test_wrong_key(s3_server: S3Server) -> None:
    place = s3_place(s3_server, s3_server.make_bucket())
    s3_server.lock(True)
    try:
        failures = await s3_failures(place.writer())
    finally:
        s3_server.lock(False)
    for error in failures:
        assert isinstance(error, UserError)
        assert error.reason == "SINK_UNAUTHENTICATED"
        assert error.field == "sink.files.s3"
        assert SECRET not in str(error)


async def test_a_key_that_is_known(s3_server: S3Server) -> None:
    """Where one has to be, as a store of one's own or a cloud's wants it."""
    place = s3_place(s3_server, s3_server.make_bucket())
    known = s3_server.make_key()
    s3_server.lock(True)
    try:
        writer = place.writer(environ={"TEST_KEY": known[0], "TEST_SECRET": known[1]})
        await writer.open(TABLE, Opening.NEW, 1)
        await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
        await writer.close()
        forged = place.writer(environ={"TEST_KEY": known[0], "TEST_SECRET": "wrong"})
        failures = await s3_failures(forged)
    finally:
        s3_server.lock(False)
    assert numbers(place.history()) == {1: 0}
    assert {(e.reason, e.field) for e in failures if isinstance(e, UserError)} == {
        ("SINK_UNAUTHENTICATED", "sink.files.s3")
    }


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = (Authority(tmp_path / name, name) for name in ("ours", "theirs"))
    with S3Server(tmp_path, authority=authority) as server:
        place = s3_place(server, server.make_bucket())
        monkeypatch.setenv("SSL_CERT_FILE", str(stranger.ca_file))
        for error in await s3_failures(place.writer()):
            assert isinstance(error, UserError)
            assert (error.reason, error.field) == ("TLS_SERVER_UNTRUSTED", "sink.files.s3.endpoint")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
        writer = place.writer()
        await writer.open(TABLE, Opening.NEW, 1)
        await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
        await writer.close()
        trusting = s3_place(server, place.store.uri.split("/")[2])
        assert numbers(trusting.history()) == {1: 0}


async def test_nobody_there(s3_server: S3Server) -> None:
    place = s3_place(s3_server, "bucket")
    place.spec.s3.endpoint = f"http://127.0.0.1:{free_port()}"
    for error in await s3_failures(place.writer()):
        assert type(error) is RetryableError
        assert error.reason == "SINK_UNAVAILABLE"
        assert "\n" not in error.message


async def test_a_store_that_hangs(s3_server: S3Server) -> None:
    """The call ends at its deadline; what it was about is looked up before the next one."""
    place = s3_place(s3_server, s3_server.make_bucket())
    writer = place.writer()
    await writer.open(TABLE, Opening.NEW, 1)
    await writer.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
    more = batch(put(TABLE, plain([2]), 2))
    s3_server.pause()
    try:
        begun = asyncio.get_running_loop().time()
        for _ in range(2):
            with pytest.raises(UnknownOutcomeError, match="SINK_TIMEOUT"):
                await writer.write(TABLE, more, 0.5)
        assert asyncio.get_running_loop().time() - begun < 3
    finally:
        s3_server.resume()
    await writer.write(TABLE, more, 20)
    assert numbers(place.history()) == {1: 0, 2: 0}
    assert place.parts() == 2
    await writer.close()


async def test_a_store_without_conditional_put(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = obstore.put

    def ignoring(*args: Any, **options: Any) -> Any:
        options.pop("mode", None)
        return given(*args, **options)

    monkeypatch.setattr(obstore, "put", ignoring)
    place = s3_place(s3_server, s3_server.make_bucket())
    old, new = place.writer(), place.writer()
    [(kind, _)] = (await old.open(TABLE, Opening.NEW, 1)).conditions
    assert kind == "NO_CONDITIONAL_PUT"
    await old.write(TABLE, batch(put(TABLE, plain([1]), 1)), 20)
    await new.open(TABLE, Opening.RESUME, 2)
    # Found by looking first.
    with pytest.raises(RetryableError, match="FENCED"):
        await old.write(TABLE, batch(put(TABLE, plain([2]), 2)), 20)
    assert numbers(place.history()) == {1: 0}
    await old.close()
    await new.close()


def test_a_key_without_its_secret(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="KEY_INCOMPLETE"):
        open_store("s3://b/p", access_key_id="x")
    spec = sink_file_pb2.FileSink(uri="s3://b/p")
    spec.s3.access_key_id.env = "OTHER"
    with pytest.raises(UserError, match="SECRET_NOT_ALLOWED") as raised:
        FileWriter(spec, SecretResolver(env_prefix="TEST_", environ={}))
    assert raised.value.field == "sink.files.s3.access_key_id"
    assert isinstance(open_store("s3://b"), ObjectStore)
