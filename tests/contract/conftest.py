"""Real servers that several modules of contract tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import KafkaServer


@pytest.fixture(scope="session")
def kafka_broker(
    tmp_path_factory: pytest.TempPathFactory, kafka_available: None
) -> Iterator[KafkaServer]:
    """A broker that no Milvus uses, with logins and rights; each test takes topics of its own and
    leaves it running.
    """
    with KafkaServer(tmp_path_factory.mktemp("kafka-sink"), secured=True) as server:
        yield server
