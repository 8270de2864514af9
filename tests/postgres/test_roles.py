"""The registry's own role: it does all that a registry does, and nothing of what an owner may."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InvalidInputError, SchemaError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.store.maintenance import check_grant_on_database, grant_on_database, migrate_database
from seedcore.store.migrations import Migration, known_migrations
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import holds, iid, joins, releases, turns
from tests.commands import command
from tests.servers import PostgresServer

ROLE = "registry-role"
OWNER = "registry-owner"


@pytest.fixture
def owner(server: PostgresServer) -> Iterator[str]:
    """The DSN of a database's owner; the role of the tests is gone afterwards."""
    dsn = server.dsn(server.create_database())
    yield dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        if connection.execute("select from pg_roles where rolname = %s", (ROLE,)).fetchone() is not None:
            connection.execute(f'drop owned by "{ROLE}"')
            connection.execute(f'drop role "{ROLE}"')


@pytest.fixture
def plain_owner(server: PostgresServer) -> Iterator[str]:
    """The DSN of an owner who is no superuser and may make no roles, of a database that is empty."""
    name = server.create_database(template="template1")
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f'create role "{OWNER}" login')
        admin.execute(f'alter database {name} owner to "{OWNER}"')
    yield server.dsn(name, user=OWNER)
    server.drop_database(name)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f'drop role if exists "{ROLE}"')
        admin.execute(f'drop role "{OWNER}"')


def run(dsn: str, *statements: str) -> list[tuple[object, ...]]:
    """Run statements, each its own transaction; what the last one answers."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


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
        await store.hold_many([holds(2, "upkeep"), releases(2)])
        await store.set_status_many([turns(1, Status.DEAD, 3, Cause(CauseKind.PROCESS_KILLED))])
        assert await store.beat_many([Beat(iid(2))]) == []
        better = Cause(CauseKind.OUT_OF_MEMORY, "of its node")
        assert await store.refine_causes({iid(1): better}) == [iid(1)]
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


async def test_registry_needs_nothing_of_what_every_role_may_do(owner: str) -> None:
    await grant_on_database(owner, ROLE, None)
    name = conninfo.conninfo_to_dict(owner)["dbname"]
    said = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    statements = [line.partition(";")[0] for line in said.splitlines() if line.startswith("revoke ")]
    assert len(statements) == 2
    beyond = ["create temporary table mine (id int)", "select lo_create(0)", "select lo_from_bytea(0, '')"]
    for statement in beyond:
        run(as_role(owner), statement)
    run(owner, *(statement.replace("database seedcore", f"database {name}") for statement in statements))
    for statement in [*beyond, "select lo_creat(-1)", "select lo_import('/etc/passwd')"]:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            run(as_role(owner), statement)
    store = PostgresStore(as_role(owner), PoolLimits(max_size=1))
    await store.open()
    await store.begin("cluster", None, 15.0)
    await store.register_many([joins(1, seq=1)])
    await store.close()


async def test_every_table_and_view_is_granted_for_what_the_registry_does_with_it(owner: str) -> None:
    await grant_on_database(owner, ROLE, None)
    rights = ", ".join(
        f"has_table_privilege('{ROLE}', c.oid, '{right}')" for right in ("select", "insert", "update", "delete")
    )
    found = run(
        owner,
        f"select c.relname::text, {rights} from pg_class c"
        " where c.relnamespace = current_schema()::regnamespace and c.relkind in ('r', 'v')",
    )
    read, kept, pruned = (True, False, False, False), (True, True, True, False), (True, True, True, True)
    assert {str(name): tuple(may) for name, *may in found} == {
        **dict.fromkeys(("schema_migration", "instance_row", "fleet", "active_instances", "active_instance"), read),
        **dict.fromkeys(("cluster_epoch", "cluster_metadata", "registry_writer"), kept),
        **dict.fromkeys(("registry_instance", "registry_transition", "superseded_cluster"), pruned),
    }


async def test_a_role_that_finds_an_old_schema_names_who_must_migrate(server: PostgresServer, owner: str) -> None:
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


async def test_what_others_have_in_the_schema_is_left_as_it_is(owner: str) -> None:
    run(
        owner,
        "create table theirs (id serial)",
        "create table never (id serial)",
        "create function secret() returns int language sql as 'select 1'",
        "revoke execute on function secret() from public",
        f'create role "{ROLE}" login',
        f'grant select, truncate on theirs to "{ROLE}"',
    )
    await grant_on_database(owner, ROLE, None)
    run(owner, "create table later (id serial)", "create function more() returns int language sql as 'select 1'")
    run(owner, "revoke execute on function more() from public")
    asked = [
        ("table_privilege", "theirs", "select", True),
        ("table_privilege", "theirs", "truncate", True),
        ("table_privilege", "never", "select", False),
        ("table_privilege", "later", "select", False),
        ("table_privilege", "later", "insert", False),
        ("sequence_privilege", "never_id_seq", "usage", False),
        ("sequence_privilege", "later_id_seq", "usage", False),
        ("sequence_privilege", "registry_version", "usage", True),
        ("function_privilege", "secret()", "execute", False),
        ("function_privilege", "more()", "execute", False),
        ("function_privilege", "beat(uuid)", "execute", True),
    ]
    for kind, name, right, may in asked:
        assert run(owner, f"select has_{kind}('{ROLE}', '{name}', '{right}')") == [(may,)], (name, right)


async def test_rights_on_tables_that_are_made_later_are_taken_back(owner: str) -> None:
    run(
        owner,
        f'create role "{ROLE}" login',
        f'alter default privileges in schema public grant select, insert, update, delete on tables to "{ROLE}"',
        f'alter default privileges in schema public grant usage, select on sequences to "{ROLE}"',
        f'alter default privileges in schema public grant execute on functions to "{ROLE}"',
    )
    await grant_on_database(owner, ROLE, None)
    assert run(owner, "select * from pg_default_acl") == []


async def test_what_our_own_role_had_beyond_its_needs_is_taken_from_it(owner: str) -> None:
    run(owner, f'create role "{ROLE}" login', f'grant all on registry_instance to "{ROLE}"')
    await grant_on_database(owner, ROLE, None)
    assert run(owner, f"select has_table_privilege('{ROLE}', 'registry_instance', 'truncate')") == [(False,)]


async def test_role_works_through_a_migration_that_adds_tables_and_functions(owner: str) -> None:
    await grant_on_database(owner, ROLE, None)
    known = known_migrations()
    step = Migration(
        len(known) + 1,
        f"{len(known) + 1:04}_more.sql",
        "create sequence more_number; create table more_rows (id bigint generated always as identity, of text);"
        "create function note_more() returns void language sql as 'insert into more_rows (of) values (null)';"
        "revoke execute on function note_more() from public",
    )
    # a role as old clients have it, which deletes nothing
    run(owner, 'drop role if exists "old-client"', 'create role "old-client"')
    try:
        run(owner, 'grant select, insert on registry_instance to "old-client"')
        assert await migrate_database(owner, migrations=[*known, step]) == [step.name]
        run(as_role(owner), "select note_more()", "select nextval('more_number')", "delete from more_rows")
        rights = ("select", "insert", "update", "delete")
        asked = ", ".join(f"has_table_privilege('old-client', 'more_rows', '{right}')" for right in rights)
        assert run(owner, f"select {asked}") == [(True, True, False, False)]
        # a role that only reads gets no rights
        assert run(owner, "select has_table_privilege('guarded', 'more_rows', 'select')") == [(False,)]
    finally:
        run(owner, 'drop owned by "old-client"', 'drop role "old-client"')


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("createrole", "createrole, createdb"),
        ("createdb", "has createrole, createdb"),
        ("replication", "replication or bypassrls"),
        ("bypassrls", "a role of the registry's own"),
        (f'in role "{OWNER}"', f"member of the owner, {OWNER}"),
        ('in role "mighty"', "member of mighty, which has"),
    ],
)
async def test_role_that_may_more_than_a_registry_needs_is_refused(
    server: PostgresServer, plain_owner: str, options: str, expected: str
) -> None:
    await migrate_database(plain_owner)
    run(server.dsn(), 'drop role if exists "mighty"', 'create role "mighty" createdb')
    run(server.dsn(), f'create role "{ROLE}" login {options}')
    try:
        with pytest.raises(SchemaError, match=expected):
            await check_grant_on_database(plain_owner, ROLE, with_password=False)
        with pytest.raises(SchemaError, match=expected):
            await grant_on_database(plain_owner, ROLE, None)
        asked = f"select has_table_privilege('{ROLE}', 'superseded_cluster', 'delete')"
        # by its own rights, not by those of who it is a member of
        run(server.dsn(), f'revoke "{OWNER}" from "{ROLE}"')
        assert run(plain_owner, asked) == [(False,)]
    finally:
        run(server.dsn(), f'drop role "{ROLE}"', 'drop role "mighty"')


async def test_owner_that_may_make_no_role_gets_a_remedy_before_anything_is_migrated(
    server: PostgresServer, plain_owner: str
) -> None:
    for given in (False, True):
        with pytest.raises(SchemaError, match=f'have an administrator run `create role "{ROLE}" login`'):
            await check_grant_on_database(plain_owner, ROLE, with_password=given)
    assert run(plain_owner, "select to_regclass('schema_migration') is null") == [(True,)]
    await migrate_database(plain_owner)
    with pytest.raises(SchemaError, match="have an administrator run"):
        await grant_on_database(plain_owner, ROLE, None)
    run(server.dsn(), f'create role "{ROLE}" login')
    with pytest.raises(SchemaError, match="may not change the password"):
        await grant_on_database(plain_owner, ROLE, "secret")
    assert not await grant_on_database(plain_owner, ROLE, None)
    store = PostgresStore(as_role(plain_owner), PoolLimits(max_size=2))
    await store.open()
    assert (await store.begin("cluster", None, 15.0)).name == "epoch-1"
    await store.close()


async def test_owner_who_may_make_roles_sets_the_password_of_those_he_made(
    server: PostgresServer, plain_owner: str
) -> None:
    run(server.dsn(), f'alter role "{OWNER}" createrole')
    await migrate_database(plain_owner)
    assert await grant_on_database(plain_owner, ROLE, "secret")
    assert not await grant_on_database(plain_owner, ROLE, "another")
    run(server.dsn(), f'drop role if exists "{ROLE}-2"', f'create role "{ROLE}-2" login')
    try:
        with psycopg.connect(server.dsn()) as connection:
            version = connection.info.server_version // 10000
        if version < 16:
            await check_grant_on_database(plain_owner, f"{ROLE}-2", with_password=True)
        else:
            # since 16 the right to make roles is none over those of others
            with pytest.raises(SchemaError, match="may not change the password"):
                await check_grant_on_database(plain_owner, f"{ROLE}-2", with_password=True)
        await check_grant_on_database(plain_owner, f"{ROLE}-2", with_password=False)
    finally:
        run(server.dsn(), f'drop role "{ROLE}-2"')


async def test_command_asks_before_it_migrates(plain_owner: str) -> None:
    asked = await asyncio.to_thread(command, "migrate", "--grant", ROLE, SEEDCORE_PG_DSN=plain_owner)
    assert (asked.code, "have an administrator run" in asked.stderr) == (1, True), asked.stderr
    assert run(plain_owner, "select to_regclass('schema_migration') is null") == [(True,)]
