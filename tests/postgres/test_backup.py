"""A dump of a registry's database is restored, and the registry of another Ray cluster goes on with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import FencedError
from seedcore.core.lifecycle import Status
from seedcore.store.maintenance import grant_on_database, migrate_database
from seedcore.store.postgres import PostgresStore
from tests.builders import iid, joins, turns
from tests.postgres.catalog import catalog, differences
from tests.postgres.dumps import dump, dump_and_restore, restore
from tests.servers import PostgresServer

ROLE = "registry-of-a-dump"


@pytest.fixture
def restored(server: PostgresServer) -> Iterator[str]:
    """An empty database from template0, as PostgreSQL recommends."""
    name = server.create_database(template="template0")
    yield name
    server.drop_database(name)


@pytest.fixture
def roles(server: PostgresServer) -> Iterator[dict[str, str]]:
    """Owners of two databases who may not create roles, and their DSNs."""
    names = {"owner-before": server.create_database(template="template1"), "owner-after": ""}
    names["owner-after"] = server.create_database(template="template0")
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for owner, name in names.items():
            admin.execute(f'create role "{owner}" login')
            admin.execute(f'alter database {name} owner to "{owner}"')
    yield {owner: server.dsn(name, user=owner) for owner, name in names.items()}
    for name in names.values():
        server.drop_database(name)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for role in (*names, ROLE):
            admin.execute(f'drop role if exists "{role}"')


def require_pg_dump(request: pytest.FixtureRequest, server: PostgresServer) -> None:
    if not (server.binaries / "pg_dump").exists() and server.binaries == request.config.getoption("--postgres"):
        pytest.skip(f"pg_dump is not in {server.binaries}")


FORMS = pytest.mark.parametrize(
    ("server", "form"), [("postgres15", "plain"), ("postgres18", "custom")], indirect=["server"]
)


@FORMS
async def test_registry_of_another_cluster_goes_on_with_a_restored_dump(
    request: pytest.FixtureRequest, server: PostgresServer, database: str, restored: str, tmp_path: Path, form: str
) -> None:
    require_pg_dump(request, server)
    lost = PostgresStore(server.dsn(database))
    await lost.open()
    await lost.begin("the lost cluster", None, 15.0)
    await lost.register_many([joins(1, "eye", labels={"tier": "hot"}), joins(2, "ear")])
    await lost.set_status_many([turns(1, Status.ALIVE), turns(2, Status.DEAD, cause="done")])
    dump_and_restore(server, database, restored, tmp_path, form)
    assert differences(catalog(server.dsn(database)), catalog(server.dsn(restored))) == set()

    store = PostgresStore(server.dsn(restored))
    await store.open()
    epoch = await store.begin("the new cluster", None, 15.0)
    assert (epoch.name, store.term) == ("epoch-2", 2)
    assert store.database_id == lost.database_id
    assert await store.expire_old_epochs(100) == [iid(1)]
    await store.register_many([joins(3, "eye")])
    await store.set_status_many([turns(3, Status.ALIVE)])
    listed = await store.list_instances(InstanceFilter(), 10)
    assert [row.instance_id for row in listed] == [iid(3)]
    with psycopg.connect(server.dsn(restored)) as connection:
        transitions = connection.execute(
            "select to_status::text, cause_kind::text from registry_transition where logical_id = 'eye' order by id"
        ).fetchall()
    assert transitions == [
        ("starting", None),
        ("alive", None),
        ("dead", "epoch_retired"),
        ("starting", None),
        ("alive", None),
    ]
    # the lost one, were it pointed here, would not take it back
    back = PostgresStore(server.dsn(restored))
    await back.open()
    with pytest.raises(FencedError):
        await back.begin("the lost cluster", None, 15.0)
    for each in (lost, store, back):
        await each.close()


@FORMS
async def test_dump_of_a_database_whose_registry_has_a_role_is_restored_where_there_is_no_such_role(
    request: pytest.FixtureRequest, server: PostgresServer, roles: dict[str, str], tmp_path: Path, form: str
) -> None:
    require_pg_dump(request, server)
    before, after = roles["owner-before"], roles["owner-after"]
    await migrate_database(before)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f'create role "{ROLE}" login')
    await grant_on_database(before, ROLE, None)
    with psycopg.connect(before, autocommit=True) as connection:
        # as an earlier version left them
        connection.execute(f'alter default privileges in schema public grant select on tables to "{ROLE}"')
    lost = PostgresStore(conninfo.make_conninfo(before, user=ROLE))
    await lost.open()
    await lost.begin("the lost cluster", None, 15.0)
    await lost.register_many([joins(1, "eye")])
    await lost.close()
    dump(server, before, tmp_path / "seedcore.dump", form)

    # roles are the server's: the new one has neither that of the registry, nor the tables of the owner before
    with psycopg.connect(conninfo.make_conninfo(before, user="postgres"), autocommit=True) as admin:
        admin.execute(f'drop owned by "{ROLE}"')
        admin.execute(f'drop role "{ROLE}"')
    restore(server, after, tmp_path / "seedcore.dump", form)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f'create role "{ROLE}" login')
    await grant_on_database(after, ROLE, None)
    store = PostgresStore(conninfo.make_conninfo(after, user=ROLE))
    await store.open()
    await store.begin("the new cluster", None, 15.0)
    assert await store.expire_old_epochs(100) == [iid(1)]
    await store.register_many([joins(2, "eye")])
    await store.set_status_many([turns(2, Status.ALIVE)])
    assert [row.instance_id for row in (await store.list_instances(InstanceFilter(), 10)).items] == [iid(2)]
    await store.close()
