"""A NATS client that gets stuck, or ends by itself, is not taken for a quiet log."""

from __future__ import annotations

import asyncio

import pytest
from milvus_cdc.errors import RetryableError
from milvus_cdc.source import NatsConfig, nats_reader
from milvus_cdc.source.nats import NatsSource
from milvus_cdc.source.nats_connection import Connection
from milvus_cdc.source.nats_reader import NatsReader


class StuckSource(NatsSource):
    """Its connections hang, or are cancelled by their client."""

    def __init__(self, *, cancels: bool = False) -> None:
        super().__init__(NatsConfig("nats://127.0.0.1:1"))
        self.cancels = cancels
        self.connects = 0

    async def connect(self) -> Connection:
        self.connects += 1
        if self.cancels:
            raise asyncio.CancelledError
        await asyncio.Event().wait()
        raise AssertionError


async def _read_for_ever(reader: NatsReader) -> None:
    while True:
        assert await reader.read(1_000, 0.02) == []


async def test_a_reader_that_hears_nothing_says_so_and_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nats_reader, "SILENT_SECONDS", 0.05)
    source = StuckSource()
    reader = NatsReader(source, "dml_0", 1, b"")
    for connects in (1, 2):
        with pytest.raises(RetryableError, match="no answer about dml_0"):
            await _read_for_ever(reader)
        assert source.connects == connects
    await reader.close()


async def test_a_client_that_ends_by_itself_is_no_quiet_log() -> None:
    source = StuckSource(cancels=True)
    reader = NatsReader(source, "dml_0", 1, b"")
    with pytest.raises(RetryableError, match="gave up"):
        await reader.read(1_000, 5)
    await reader.close()
