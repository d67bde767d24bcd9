"""What several files of tests ask who calls with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.trust_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
async def address(world: World) -> AsyncIterator[str]:
    """Of a controller that listens with TLS and knows the world's tokens."""
    async with world.serving() as address:
        yield address
