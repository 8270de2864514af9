"""One world for each store that has to keep the contract of core.ports.Store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conformance.worlds import MemoryWorld, PostgresWorld, World
from tests.servers import PostgresServer


@pytest.fixture(scope="session")
def dsn15(postgres15: PostgresServer) -> str:
    """A database for the suite: each test resets it, which is quicker than a database each."""
    return postgres15.dsn(postgres15.create_database())


@pytest.fixture(scope="session")
def dsn18(postgres18: PostgresServer) -> str:
    """The same in the embedded PostgreSQL."""
    return postgres18.dsn(postgres18.create_database())


@pytest.fixture(params=["memory", "dsn15", "dsn18"], ids=["memory", "postgres15", "postgres18"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A fresh store of each kind."""
    world: World = MemoryWorld() if request.param == "memory" else PostgresWorld(request.getfixturevalue(request.param))
    await world.reset()
    await world.store.open()
    yield world
    await world.close()
