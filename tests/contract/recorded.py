"""Messages that a real Milvus 2.3.5 wrote, and reading all of them back by every call there is."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

from milvus_cdc.source import LogSource

_LOG = Path(__file__).parents[1] / "vectors" / "golden_msgstream_kafka_2.3.5.json"
TOPIC = "by-dev-rootcoord-dml_0"
RECORDED = [
    base64.b64decode(entry["value_b64"])
    for entry in json.loads(_LOG.read_text())
    if entry["topic"] == TOPIC
]


async def read_back(source: LogSource) -> None:
    """Raises what the source raises, and AssertionError for anything but the whole log."""
    await source.probe()
    found = await source.log_range(TOPIC)
    assert source.order(found.end) - source.order(found.first) == len(RECORDED)
    assert (await source.limits(TOPIC)).range == found
    assert await source.seek(TOPIC, 0) == found.first
    reader = await source.open(TOPIC, found.first, found.incarnation)
    try:
        payloads: list[bytes] = []
        async with asyncio.timeout(30):
            while len(payloads) < len(RECORDED):
                payloads += [entry.payload for entry in await reader.read(1 << 20, 1.0)]
        assert payloads == RECORDED
    finally:
        await reader.close()
