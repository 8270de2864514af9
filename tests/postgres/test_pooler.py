"""A real PgBouncer before PostgreSQL: session and transaction mode work, and statement mode is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import RegistryError, StoreUnavailableError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.store.maintenance import end_old_calls_of_database, grant_on_database, inspect_database, migrate_database
from seedcore.store.migrations import known_migrations
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import iid, joins, turns
from tests.postgres.earlier import make_earlier
from tests.programs import is_missing
from tests.servers import PostgresServer, pooler_program, running_pooler

# a writer of two connections, a reader of two, and what the command opens beside them
SESSIONS = "default_pool_size = 6"
SMALL = PoolLimits(max_size=2)
ROLE = "registry-behind-a-pooler"


@pytest.fixture(scope="module", params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, postgres15: PostgresServer) -> Iterator[str]:
    """The folder of the socket of a PgBouncer that is set to nothing but its mode and its size."""
    require_pgbouncer(request)
    sizes = (SESSIONS,) if request.param == "session" else ()
    with running_pooler(postgres15, request.param, *sizes) as folder:
        yield str(folder)


def require_pgbouncer(request: pytest.FixtureRequest) -> None:
    if pooler_program() is None:
        is_missing(request, "PgBouncer", "pgbouncer", "--require-pgbouncer")


@pytest.fixture
def bare(postgres15: PostgresServer) -> Iterator[str]:
    """The name of a database with nothing in it."""
    name = postgres15.create_database(template="template1")
    yield name
    postgres15.drop_database(name)


def through(pooler: str, database: str) -> str:
    return conninfo.make_conninfo(host=pooler, dbname=database, user="postgres")


async def test_registry_and_readers_work_while_they_share_few_servers(pooler: str, bare: str) -> None:
    dsn = through(pooler, bare)
    assert await migrate_database(dsn) == [migration.name for migration in known_migrations()]
    store, reader = PostgresStore(dsn, SMALL), PostgresStore(dsn, SMALL, read_only=True)
    await store.open()
    await reader.open()
    await store.begin("cluster", None, 15.0)
    await store.register_many([joins(number, f"agent-{number}", seq=1) for number in range(8)])

    async def write(number: int) -> None:
        for seq in range(2, 32):
            status = Status.DRAINING if seq % 2 else Status.ALIVE
            assert [row.kind.value for row in await store.set_status_many([turns(number, status, seq)])] == ["applied"]
            assert await store.beat_many([Beat(iid(number))]) == []

    async def read() -> None:
        for _ in range(60):
            await reader.list_instances(InstanceFilter(statuses=None, fresh_only=False), 100)
            await reader.best_instances([f"agent-{number}" for number in range(8)])
            await reader.current_epoch()

    await asyncio.gather(*map(write, range(8)), read(), read())
    assert [row.seq for row in (await reader.list_instances(InstanceFilter(statuses=None), 100)).items] == [31] * 8
    with pytest.raises(RegistryError, match="read-only"):
        await reader.set_current_epoch("green")
    await store.close()
    await reader.close()


async def test_bound_of_a_statement_holds_for_its_own_transaction_alone(
    pooler: str, bare: str, postgres15: PostgresServer
) -> None:
    dsn = through(pooler, bare)
    await migrate_database(dsn)
    store = PostgresStore(dsn, PoolLimits(max_size=1, statement_timeout_s=0.3))
    await store.open()
    await store.register_many([joins(1)])
    with psycopg.connect(postgres15.dsn(bare)) as owner:
        owner.execute("select from registry_instance for update")
        with pytest.raises(StoreUnavailableError, match="statement timeout"):
            await store.set_status_many([turns(1, Status.ALIVE)])
    await store.set_status_many([turns(1, Status.ALIVE)])
    with psycopg.connect(dsn) as other:
        assert other.execute("show statement_timeout").fetchone() == ("0",)
        assert other.execute("select count(*) from pg_prepared_statements where name <> ''").fetchone() == (0,)
        assert other.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (0,)
    await store.close()


async def test_owner_inspects_grants_and_ends_old_calls_through_it(
    pooler: str, bare: str, postgres15: PostgresServer
) -> None:
    dsn = through(pooler, bare)
    make_earlier(postgres15.dsn(bare), 10)
    with pytest.raises(StoreUnavailableError, match="name the server itself in SEEDCORE_PG_DSN"):
        await migrate_database(dsn, adopting=lambda _: None)
    await migrate_database(postgres15.dsn(bare), adopting=lambda _: None)
    assert await end_old_calls_of_database(dsn)
    assert not (await inspect_database(dsn)).missing
    try:
        assert await grant_on_database(dsn, ROLE, None)
    finally:
        with psycopg.connect(postgres15.dsn(bare), autocommit=True) as admin:
            admin.execute(f'drop owned by "{ROLE}"')
            admin.execute(f'drop role "{ROLE}"')


async def test_options_that_a_pooler_refuses_are_an_error_with_a_remedy(pooler: str, bare: str) -> None:
    dsn = conninfo.make_conninfo(through(pooler, bare), options="-c work_mem=5MB")
    with pytest.raises(StoreUnavailableError, match="remove options from the DSN and PGOPTIONS from the environment"):
        await migrate_database(dsn)


async def test_statement_mode_is_refused_in_one_line(
    request: pytest.FixtureRequest, bare: str, postgres15: PostgresServer
) -> None:
    require_pgbouncer(request)
    expected = (
        "^the database is away: [^\n]*the registry needs transactions: set the pooler to transaction or session mode.$"
    )
    with running_pooler(postgres15, "statement") as folder:
        dsn = through(str(folder), bare)
        for ask in (migrate_database, inspect_database):
            with pytest.raises(StoreUnavailableError, match=expected):
                await ask(dsn)
        await migrate_database(postgres15.dsn(bare))
        reader = PostgresStore(dsn, read_only=True)
        await reader.open()
        with pytest.raises(StoreUnavailableError, match=expected):
            await reader.current_epoch()
        await reader.close()
