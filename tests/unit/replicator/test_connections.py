"""How long a replicator stays connected to a sink."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.writer_sink import WriterSink
from milvus_cdc_replicator import connections as tested
from milvuscdc.v1 import task_pb2

MILVUS = task_pb2.Sink(milvus=task_pb2.MilvusEndpoint(uri="http://127.0.0.1:1"))
POSTGRES = task_pb2.Sink()
POSTGRES.postgres.host, POSTGRES.postgres.database = "127.0.0.1", "rows"
POSTGRES.postgres.user = "cdc"


@contextlib.asynccontextmanager
async def looked_after() -> AsyncIterator[tested.Connections]:
    connections = tested.Connections(SecretResolver(env_prefix="CDC_"))
    looking = asyncio.create_task(connections.look_after())
    try:
        yield connections
    finally:
        looking.cancel()
        await connections.close()


async def _opened(connections: tested.Connections, spec: task_pb2.Sink) -> object:
    sink = await connections.sink(spec)
    return sink.writer if isinstance(sink, WriterSink) else sink


@pytest.mark.parametrize("spec", [MILVUS, POSTGRES], ids=["milvus", "postgres"])
async def test_a_sink_is_left_when_nobody_works_with_it_any_more(
    spec: task_pb2.Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(tested, "UNUSED_SECONDS", 0.1)
    closed: list[object] = []
    async with looked_after() as connections:
        with connections.using(spec):
            first = await _opened(connections, spec)
            close = first.close  # type: ignore[attr-defined]

            async def leave() -> None:
                closed.append(first)
                await close()

            monkeypatch.setattr(first, "close", leave)
            with connections.using(spec):
                pass
            await asyncio.sleep(0.3)
            assert await _opened(connections, spec) is first, "one of two still works"
        with connections.using(spec):
            await asyncio.sleep(0.3)
            assert await _opened(connections, spec) is first, "somebody came in time"
        assert not closed
        while not closed:
            await asyncio.sleep(0.01)
        assert await _opened(connections, spec) is not first
