"""The registry's own role: it does all that a registry does, and nothing of what an owner may."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.errors import InvalidInputError, SchemaError
from seedcore.core.lifecycle import Status
from seedcore.core.model import Beat, InstanceFilter
from seedcore.store.connections import PoolLimits
from seedcore.store.postgres import PostgresStore, grant_on_database, migrate_database
from seedcore.store.roles import _KEPT, _PRUNED
from tests.builders import iid, joins, turns
from tests.servers import PostgresServer

ROLE = "registry-role"


@pytest.fixture
def owner(server: PostgresServer) -> Iterator[str]:
    """The DSN of a database's owner; the role of the tests is gone afterwards."""
    dsn = server.dsn(server.create_database())
    yield dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        if connection.execute("select from pg_roles where rolname = %s", (ROLE,)).fetchone():
            connection.execute(f'drop owned by "{ROLE}"')
            connection.execute(f'drop role "{ROLE}"')


def as_role(dsn: str) -> str:
    return conninfo.make_conninfo(dsn, user=ROLE)


async def test_a_registry_works_with_what_its_role_is_given(owner: str) -> None:
    assert await grant_on_database(owner, ROLE, None)
    assert not await grant_on_database(owner, ROLE, None)
    store = PostgresStore(as_role(owner), PoolLimits(max_size=2))
    try:
        await store.open()
        await store.begin("cluster", None, 15.0)
        await store.register_many([joins(number, f"agent {number}", seq=1) for number in (1, 2, 3)])
        await store.set_status_many([turns(number, Status.ALIVE, 2) for number in (1, 2, 3)])
        await store.set_status_many([turns(1, Status.DEAD, 3, "stopped")])
        assert await store.beat_many([Beat(iid(2))]) == []
        assert await store.explain_deaths({iid(1): "stopped: in good order"}) == [iid(1)]
        assert await store.expire_stale(15.0, 10) == []
        await store.stage_epoch("green")
        await store.set_current_epoch("green")
        assert set(await store.expire_old_epochs(10)) == {iid(2), iid(3)}
        assert [row.instance_id for row in await store.deaths(10)][-1] == iid(1)
        assert (await store.list_instances(InstanceFilter(), 10, None)).items == ()
        assert await store.prune_history(0.0, 100) > 0
    finally:
        await store.close()


@pytest.mark.parametrize(
    "forbidden",
    [
        "create table mine (id int)",
        "drop table registry_transition",
        "truncate registry_transition",
        "alter table registry_instance add column mine int",
        "alter table registry_instance disable trigger all",
        "create index mine on registry_instance (pid)",
        "create or replace function beat(uuid) returns text language sql as 'select 1::text'",
        "drop function beat(uuid)",
        "insert into schema_migration (number, name, sha256) values (9999, 'mine', '')",
        "delete from schema_migration",
        "delete from cluster_metadata",
        "delete from cluster_epoch",
        "create schema mine",
        "create role mine",
        "set role postgres",
        "set session_replication_role = replica",
        "select pg_read_file('/etc/passwd')",
        "copy (select 1) to program 'true'",
    ],
)
async def test_the_role_may_do_nothing_else(owner: str, forbidden: str) -> None:
    await grant_on_database(owner, ROLE, None)
    with psycopg.connect(owner, autocommit=True) as connection:
        # as PostgreSQL 15 and later have it from the start
        connection.execute("revoke create on schema public from public")
    with psycopg.connect(as_role(owner), autocommit=True) as connection, pytest.raises(psycopg.Error) as refused:
        connection.execute(forbidden)
    assert isinstance(refused.value, psycopg.errors.InsufficientPrivilege)


async def test_every_table_is_granted_or_the_owners_alone(owner: str) -> None:
    with psycopg.connect(owner, autocommit=True) as connection:
        tables = connection.execute("select tablename from pg_tables where schemaname = current_schema()").fetchall()
    assert {name for (name,) in tables} == {*_KEPT, *_PRUNED, "schema_migration"}


async def test_a_role_that_finds_an_old_schema_says_who_must_migrate(server: PostgresServer, owner: str) -> None:
    await grant_on_database(owner, ROLE, None)
    with psycopg.connect(owner, autocommit=True) as connection:
        connection.execute("delete from schema_migration where number = (select max(number) from schema_migration)")
    with pytest.raises(SchemaError, match="run `seedcore migrate` as the owner"):
        await migrate_database(as_role(owner))
    with pytest.raises(SchemaError, match="not up to date"):
        await grant_on_database(owner, ROLE, None)


@pytest.mark.parametrize("role", ["", "Role", 'a"b', "a b", "pg_monitor", "public", "x" * 64, "-a"])
async def test_what_can_be_no_role_is_refused(owner: str, role: str) -> None:
    with pytest.raises(InvalidInputError, match="--grant"):
        await grant_on_database(owner, role, None)


async def test_the_owner_itself_is_refused(owner: str) -> None:
    with pytest.raises(SchemaError, match="superuser"):
        await grant_on_database(owner, "postgres", None)


async def test_the_password_that_was_given_is_the_one_that_works(owner: str) -> None:
    await grant_on_database(owner, ROLE, "it's a \\ 'secret'")
    with psycopg.connect(owner, autocommit=True) as connection:
        row = connection.execute("select rolpassword from pg_authid where rolname = %s", (ROLE,)).fetchone()
    assert row is not None
    assert row[0].startswith("SCRAM-SHA-256$")
