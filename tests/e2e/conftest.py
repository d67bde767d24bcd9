"""Shared servers are left as they were found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import SHARED_STACKS
from tests.servers.tidy import empty


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test: nothing of it is left in the servers that all tests share."""
    yield
    for stack in request.config.stash.get(SHARED_STACKS, []):
        for server in (stack.source, stack.sink):
            empty(server.uri)
