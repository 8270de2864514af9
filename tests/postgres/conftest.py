"""Databases for the tests, on both servers: fresh ones, copied from the template, and a shared one made empty."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from seedcore.store.postgres import PostgresStore
from tests.servers import PostgresServer, forget_everything


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
def fresh_dsn(server: PostgresServer, database: str) -> str:
    """Reaches the fresh database."""
    return server.dsn(database)


@pytest.fixture
def bare_dsn(server: PostgresServer) -> Iterator[str]:
    """Reaches a fresh database with nothing in it, not even our schema."""
    name = server.create_database(template="template1")
    yield server.dsn(name)
    server.drop_database(name)


@pytest.fixture(scope="session")
def shared_database(server: PostgresServer) -> str:
    """A database for the tests that only need its tables to be empty."""
    return server.create_database()


@pytest.fixture
def db(server: PostgresServer, shared_database: str) -> Iterator[psycopg.Connection]:
    """A connection by hand, as psql's, with empty tables: each statement is its own transaction."""
    with psycopg.connect(server.dsn(shared_database), autocommit=True) as connection:
        forget_everything(connection)
        yield connection


@pytest.fixture
def dsn(server: PostgresServer, shared_database: str, db: psycopg.Connection) -> str:
    """Reaches the database that `db` is connected to."""
    return server.dsn(shared_database)


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[PostgresStore]:
    """An open store on the database that `db` is connected to."""
    store = PostgresStore(dsn)
    await store.open()
    yield store
    await store.close()
