"""A database for each test, copied from the template, on both servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from seedcore.store.postgres import PostgresStore
from tests.servers import PostgresServer


@pytest.fixture(scope="session", params=["postgres15", "postgres18"])
def server(request: pytest.FixtureRequest) -> PostgresServer:
    """Each PostgreSQL in turn. A test that stops it starts it again."""
    server: PostgresServer = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def database(server: PostgresServer) -> Iterator[str]:
    """The name of a fresh database with our schema."""
    name = server.create_database()
    yield name
    server.drop_database(name)


@pytest.fixture
def empty_dsn(server: PostgresServer) -> Iterator[str]:
    """A fresh database with nothing in it."""
    name = server.create_database(template="template1")
    yield server.dsn(name)
    server.drop_database(name)


@pytest.fixture
def dsn(server: PostgresServer, database: str) -> str:
    """Reaches the fresh database."""
    return server.dsn(database)


@pytest.fixture
def db(dsn: str) -> Iterator[psycopg.Connection]:
    """A connection by hand, as psql's: each statement is its own transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    """An open store on the fresh database."""
    store = PostgresStore(dsn)
    await store.open()
    yield store
    await store.close()
