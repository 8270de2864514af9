"""A cluster with Serve, a database of its own that can be stopped, and a fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from seedcore.settings import Settings
from tests.servers import PostgresServer, embedded_binaries, running_server
from tests.serving import World, deployed, fleet


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server(embedded_binaries()) as server:
        yield server


@pytest.fixture(scope="module")
def deployment(server: PostgresServer) -> Iterator[tuple[Settings, str]]:
    with deployed(server, "web") as (settings, url):
        yield settings, url


@pytest_asyncio.fixture
async def world(deployment: tuple[Settings, str], server: PostgresServer) -> AsyncIterator[World]:
    async with fleet(server, *deployment) as world:
        yield world
