"""A secret's file is replaced while connections are open."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import FileWriter
from milvus_cdc.sink.milvus import MilvusSink
from milvus_cdc.sink.writer_sink import WriterSink
from milvus_cdc_replicator import connections as tested
from milvuscdc.v1 import dead_letters_pb2, task_pb2


def authorization(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", base64.b64encode(token.encode()).decode()),)


async def test_an_open_milvus_goes_on_with_the_new_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested, "LOOK_SECONDS", 0.01)
    (tmp_path / "token").write_text("one")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(tmp_path)])
    connections = tested.Connections(secrets)
    endpoint = task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1")
    endpoint.token.file = str(tmp_path / "token")
    sink = await connections.sink(task_pb2.Sink(milvus=endpoint))
    source = await connections.source_client(endpoint)
    assert isinstance(sink, MilvusSink)
    assert sink._client.metadata == source.metadata == authorization("one")
    following = asyncio.create_task(connections.look_after())
    (tmp_path / "token").write_text("two")
    while source.metadata != authorization("two"):
        await asyncio.sleep(0.01)
    assert sink._client.metadata == authorization("two")
    # While there is none, what there was goes on.
    (tmp_path / "token").unlink()
    await asyncio.sleep(0.05)
    assert source.metadata == authorization("two")
    following.cancel()
    assert await connections.sink(task_pb2.Sink(milvus=endpoint)) is sink
    await connections.close()


async def test_whoever_comes_next_gets_what_was_opened_with_the_new_secret(tmp_path: Path) -> None:
    for name in ("id", "key"):
        (tmp_path / name).write_text("one")
    secrets = SecretResolver(env_prefix="CDC_", folders=[str(tmp_path)])
    connections = tested.Connections(secrets)
    spec = task_pb2.Sink()
    spec.files.uri = "s3://bucket/prefix"
    spec.files.parquet.SetInParent()
    spec.files.s3.endpoint, spec.files.s3.region = "http://127.0.0.1:1", "here"
    spec.files.s3.access_key_id.file = str(tmp_path / "id")
    spec.files.s3.secret_access_key.file = str(tmp_path / "key")
    letters = dead_letters_pb2.DeadLetters()
    letters.files.uri, letters.files.s3.region = "s3://bucket/letters", "here"
    letters.files.s3.CopyFrom(spec.files.s3)

    async def writer() -> FileWriter:
        sink = await connections.sink(spec)
        assert isinstance(sink, WriterSink)
        assert isinstance(sink.writer, FileWriter)
        return sink.writer

    first, place = await writer(), connections.dead_letters(letters)
    assert await writer() is first
    assert connections.dead_letters(letters) is place
    (tmp_path / "key").write_text("two")
    assert await writer() is not first
    assert connections.dead_letters(letters) is not place
    (tmp_path / "key").unlink()
    assert await writer() is await writer()
    await connections.close()
