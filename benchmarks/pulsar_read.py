"""How fast a topic of a real Pulsar is read: by the source's reader, and by a bare pulsar-client
reader in the same run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pulsar
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.registry import open_source

from tests.servers import PulsarServer

ENTRY_BYTES = 256 * 1024
ENTRIES = 2_000
ROUNDS = 3
HELPING_BYTES = 16 * 2**20
WAIT_SECONDS = 30.0
TOPIC = "by-dev-rootcoord-dml_0"


@dataclass(frozen=True, slots=True)
class PulsarRead:
    """The best of some rounds each, in turn; MiB of payload a second."""

    source: float
    bare: float


def measure() -> PulsarRead:
    with tempfile.TemporaryDirectory(prefix="milvus-cdc-bench-") as folder:
        with PulsarServer(Path(folder) / "pulsar") as server:
            server.retain(-1, -1)
            _write(server)
            ours, bare = [], []
            for _ in range(ROUNDS):
                bare.append(_bare(server))
                ours.append(asyncio.run(_ours(server)))
            return PulsarRead(max(ours), max(bare))


def _client(server: PulsarServer) -> pulsar.Client:
    quiet = pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull)
    return pulsar.Client(server.service_url, logger=quiet)


def _topic() -> str:
    return f"persistent://public/default/{TOPIC}"


def _write(server: PulsarServer) -> None:
    """As Milvus does: ZSTD, not batched. Vectors hardly shrink, nor do these bytes."""
    client = _client(server)
    zstd = pulsar.CompressionType.ZSTD
    producer = client.create_producer(
        _topic(), compression_type=zstd, batching_enabled=False, block_if_queue_full=True
    )
    for _ in range(ENTRIES):
        producer.send_async(os.urandom(ENTRY_BYTES), lambda *_: None)
    producer.flush()
    client.close()


def _bare(server: PulsarServer) -> float:
    client = _client(server)
    began = time.monotonic()
    reader = client.create_reader(_topic(), pulsar.MessageId.earliest)
    read = 0
    for _ in range(ENTRIES):
        read += len(reader.read_next(timeout_millis=int(WAIT_SECONDS * 1000)).data())
    seconds = time.monotonic() - began
    client.close()
    return read / 2**20 / seconds


async def _ours(server: PulsarServer) -> float:
    source = open_source(PulsarConfig(server.service_url, server.admin_url))
    try:
        first = (await source.log_range(TOPIC)).first
        began = time.monotonic()
        reader = await source.open(TOPIC, first)
        read = entries = 0
        while entries < ENTRIES:
            some = await reader.read(HELPING_BYTES, WAIT_SECONDS)
            assert some, f"nothing came after {entries} entries"
            read += sum(len(entry.payload) for entry in some)
            entries += len(some)
        seconds = time.monotonic() - began
        await reader.close()
        return read / 2**20 / seconds
    finally:
        await source.close()
