"""A cluster with Serve, a database of its own that can be stopped, and a fleet; or a registry in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.proxy import Proxy
from tests.faults.stage import Stage
from tests.servers import PostgresServer
from tests.serving import deployment, server, tokens, world

__all__ = ["deployment", "server", "tokens", "world"]


@pytest.fixture
def proxy(server: PostgresServer) -> Iterator[Proxy]:
    proxy = Proxy(server.socket)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
async def idle(server: PostgresServer, proxy: Proxy) -> AsyncIterator[Stage]:
    """A registry that is not started."""
    database = server.create_database()
    stage = Stage(server, proxy, database)
    yield stage
    await stage.stop()
    server.drop_database(database)


@pytest.fixture
async def stage(idle: Stage) -> Stage:
    """The fleet at work."""
    await idle.start()
    return idle
