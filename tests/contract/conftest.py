"""What several contracts are proved with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from milvus_cdc.sink.postgres import PostgresWriter

from tests.contract.postgres_samples import Database, until
from tests.servers import PostgresServer


@pytest.fixture
def database(postgres_server: PostgresServer) -> Database:
    return Database.fresh(postgres_server)


@pytest.fixture
async def writer(database: Database) -> AsyncIterator[PostgresWriter]:
    one = database.writer()
    yield one
    await one.close()
    await until(lambda: database.sessions() == 0)
