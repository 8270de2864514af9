"""A dump of a registry's database is restored, and the registry of another Ray cluster goes on with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from seedcore.core.errors import FencedError
from seedcore.core.lifecycle import Status
from seedcore.core.model import InstanceFilter
from seedcore.store.postgres import PostgresStore
from tests.builders import iid, joins, turns
from tests.postgres.catalog import catalog, differences
from tests.postgres.dumps import dump_and_restore
from tests.servers import PostgresServer


@pytest.fixture
def restored(server: PostgresServer) -> Iterator[str]:
    """An empty database, made as PostgreSQL says: of template0."""
    name = server.create_database(template="template0")
    yield name
    server.drop_database(name)


@pytest.mark.parametrize(("server", "form"), [("postgres15", "plain"), ("postgres18", "custom")], indirect=["server"])
async def test_registry_of_another_cluster_goes_on_with_a_restored_dump(
    request: pytest.FixtureRequest, server: PostgresServer, database: str, restored: str, tmp_path: Path, form: str
) -> None:
    if not (server.binaries / "pg_dump").exists() and server.binaries == request.config.getoption("--postgres"):
        pytest.skip(f"pg_dump is not in {server.binaries}")
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
    assert await store.expire_old_epochs(100) == [iid(1)]
    await store.register_many([joins(3, "eye")])
    await store.set_status_many([turns(3, Status.ALIVE)])
    listed = await store.list_instances(InstanceFilter(), 10)
    assert [row.instance_id for row in listed] == [iid(3)]
    with psycopg.connect(server.dsn(restored)) as connection:
        steps = connection.execute(
            "select to_status::text, cause from registry_transition where logical_id = 'eye' order by id"
        ).fetchall()
    assert steps == [
        ("starting", None),
        ("alive", None),
        ("dead", "epoch epoch-1 retired"),
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
