"""What is shared by the readers of one Kafka."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any

import pytest
from milvus_cdc.source import KafkaConfig, kafka
from milvus_cdc.source.kafka import KafkaSource


async def test_readers_that_open_at_the_same_time_share_one_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second one, replaced at once, breaks off what is being asked on it."""
    made: list[object] = []

    class SlowToMake:
        def __init__(self, _settings: dict[str, Any]) -> None:
            time.sleep(0.05)
            made.append(self)

        def poll(self, timeout: float) -> None:
            pass

        def describe_cluster(self, request_timeout: float) -> Future[None]:
            answer: Future[None] = Future()
            answer.set_result(None)
            return answer

    monkeypatch.setattr(kafka, "AdminClient", SlowToMake)
    source = KafkaSource(KafkaConfig(("127.0.0.1:1",)))
    await asyncio.gather(*(source.probe() for _ in range(4)))
    assert len(made) == 1
