"""The schema is created once and completely, however many processes start at the same time."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import psycopg
import pytest

from seedcore.core.answers import InstanceFilter, OutcomeKind
from seedcore.core.errors import SchemaError, StoreUnavailableError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.store import migrations
from seedcore.store.maintenance import migrate_database
from seedcore.store.migrations import STARTER_LOCK, Migration, Waits, known_migrations, migrate, schema_folder
from seedcore.store.postgres import PostgresStore
from seedcore.store.rows import InstanceRow
from tests.builders import iid, joins, turns
from tests.servers import GUARDED_PASSWORD, GUARDED_ROLE, PostgresServer
from tests.waiting import eventually

SHIPPED = known_migrations()
FIRST = Migration(1, "0001_first.sql", "create table first (id int)")
SECOND = Migration(2, "0002_second.sql", "create table second (id int); insert into second values (1)")


async def apply(dsn: str, wanted: list[Migration], waits: Waits | None = None) -> list[str]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        return await migrate(connection, wanted, waits=waits)


def tables(dsn: str) -> set[str]:
    with psycopg.connect(dsn) as connection:
        return {name for (name,) in connection.execute("select tablename from pg_tables where schemaname = 'public'")}


def recorded(dsn: str) -> list[tuple[int, str]]:
    with psycopg.connect(dsn) as connection:
        return list(connection.execute("select number, name from schema_migration order by number"))


async def test_fresh_database_gets_every_file_once_in_order(bare_dsn: str) -> None:
    assert await migrate_database(bare_dsn) == [migration.name for migration in SHIPPED]
    assert {"registry_instance", "cluster_metadata", "cluster_epoch", "schema_migration"} <= tables(bare_dsn)
    assert recorded(bare_dsn) == [(migration.number, migration.name) for migration in SHIPPED]
    assert await migrate_database(bare_dsn) == []


async def test_opening_a_store_brings_the_schema_up_and_logs_it(
    bare_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = PostgresStore(bare_dsn)
    await store.open()
    await store.current_epoch()
    applied = [getattr(record, "migration", None) for record in caplog.records]
    assert [name for name in applied if name is not None] == [migration.name for migration in SHIPPED]
    caplog.clear()
    await store.open()
    await store.close()
    await store.open()
    assert "schema migration applied" not in caplog.text
    await store.close()


async def test_reader_does_not_touch_the_schema(bare_dsn: str) -> None:
    store = PostgresStore(bare_dsn, read_only=True)
    await store.open()
    await store.close()
    assert tables(bare_dsn) == set()


async def test_store_that_may_make_no_schema_leaves_an_empty_database_empty(bare_dsn: str) -> None:
    store = PostgresStore(bare_dsn, makes_schema=False)
    with pytest.raises(StoreUnavailableError, match=r"the database is empty.*run `seedcore migrate`"):
        await store.open()
    assert tables(bare_dsn) == set()
    await apply(bare_dsn, SHIPPED[:-1])
    await store.open()
    assert len(recorded(bare_dsn)) == len(SHIPPED)
    await store.close()


async def test_concurrent_starters_apply_each_file_once_between_them(bare_dsn: str) -> None:
    results = await asyncio.gather(*(migrate_database(bare_dsn) for _ in range(6)))
    assert sorted(name for names in results for name in names) == [migration.name for migration in SHIPPED]


async def test_later_file_is_applied_to_a_database_that_has_the_earlier(bare_dsn: str) -> None:
    assert await apply(bare_dsn, [FIRST]) == [FIRST.name]
    assert await apply(bare_dsn, [FIRST, SECOND]) == [SECOND.name]
    assert tables(bare_dsn) == {"schema_migration", "first", "second"}


async def test_file_that_changed_after_it_was_applied_is_refused(bare_dsn: str) -> None:
    await apply(bare_dsn, [FIRST])
    changed = Migration(1, "0001_first.sql", FIRST.sql + " -- better")
    with pytest.raises(SchemaError, match="applied files never change"):
        await apply(bare_dsn, [changed, SECOND])
    assert tables(bare_dsn) == {"schema_migration", "first"}


@pytest.mark.parametrize("ours", [[], [FIRST]])
async def test_database_that_newer_code_has_added_to_is_left_as_it_is(bare_dsn: str, ours: list[Migration]) -> None:
    await apply(bare_dsn, [FIRST, SECOND])
    assert await apply(bare_dsn, ours) == []
    assert recorded(bare_dsn) == [(1, FIRST.name), (2, SECOND.name)]


@pytest.mark.parametrize("ours", [[], [FIRST]])
@pytest.mark.parametrize("after", [[], [Migration(3, "0003_third.sql", "create table third (id int)")]])
async def test_database_that_newer_code_has_taken_from_is_refused(
    bare_dsn: str, ours: list[Migration], after: list[Migration]
) -> None:
    contract = Migration(2, "0002_contract_second.sql", SECOND.sql)
    await apply(bare_dsn, [FIRST, contract, *after])
    with pytest.raises(SchemaError, match="install the newer version") as caught:
        await apply(bare_dsn, ours)
    assert contract.name in str(caught.value)


async def test_newer_database_made_by_another_file_is_refused(bare_dsn: str) -> None:
    await apply(bare_dsn, [FIRST, SECOND])
    with pytest.raises(SchemaError, match="applied files never change"):
        await apply(bare_dsn, [Migration(1, "0001_first.sql", FIRST.sql + " -- better")])


@pytest.mark.parametrize("fault", ["create table half (id int); select 1/0", "not even sql", "create table half ("])
async def test_failing_file_leaves_nothing_and_can_be_mended(bare_dsn: str, fault: str) -> None:
    with pytest.raises(psycopg.Error):
        await apply(bare_dsn, [FIRST, Migration(2, "0002_second.sql", fault)])
    assert tables(bare_dsn) == {"schema_migration", "first"}
    assert recorded(bare_dsn) == [(1, FIRST.name)]
    assert await apply(bare_dsn, [FIRST, SECOND]) == [SECOND.name]


async def test_schema_that_cannot_be_brought_up_to_date_is_an_error_that_names_it(bare_dsn: str) -> None:
    with psycopg.connect(bare_dsn) as connection:
        connection.execute("create table registry_instance (id int)")
    with pytest.raises(SchemaError, match=r"could not be brought up to date: .*registry_instance"):
        await migrate_database(bare_dsn)
    assert tables(bare_dsn) == {"registry_instance"}


async def test_role_that_may_not_create_tables_gets_an_error(server: PostgresServer, bare_dsn: str) -> None:
    database = psycopg.conninfo.conninfo_to_dict(bare_dsn)["dbname"]
    with psycopg.connect(bare_dsn) as connection:
        # so it is by itself from PostgreSQL 15 on
        connection.execute("revoke create on schema public from public")
    with pytest.raises(SchemaError, match="permission denied"):
        await migrate_database(server.dsn(str(database), GUARDED_ROLE, GUARDED_PASSWORD))


async def test_step_that_waits_for_a_table_lets_other_sessions_pass(bare_dsn: str) -> None:
    await apply(bare_dsn, [FIRST])
    with psycopg.connect(bare_dsn) as reads, psycopg.connect(bare_dsn, autocommit=True) as other:
        reads.execute("select * from first")
        change = Migration(2, "0002_second.sql", "alter table first add column more int")
        applying = asyncio.create_task(apply(bare_dsn, [FIRST, change], Waits(table_s=0.2)))
        # it waits for the table, gives up, and waits again; the session that queued behind it was served meanwhile
        waits = "select pid from pg_locks where relation = 'first'::regclass and not granted"
        for _ in range(2):
            await eventually(lambda: other.execute(waits).fetchall())
            await asyncio.to_thread(other.execute, "select * from first")
            await eventually(lambda: not other.execute(waits).fetchall())
        assert not applying.done()
        reads.rollback()
        assert await applying == [change.name]


async def test_table_that_is_never_free_is_an_error(bare_dsn: str) -> None:
    waits = Waits(table_s=0.05, pause_s=0.01, attempts=3)
    await apply(bare_dsn, [FIRST])
    with psycopg.connect(bare_dsn) as reads:
        reads.execute("select * from first")
        change = Migration(2, "0002_second.sql", "alter table first add column more int")
        with pytest.raises(StoreUnavailableError, match="long transactions"):
            await apply(bare_dsn, [FIRST, change], waits)
    assert recorded(bare_dsn) == [(1, FIRST.name)]


async def test_starter_does_not_wait_for_ever_for_another(bare_dsn: str) -> None:
    with psycopg.connect(bare_dsn) as stuck:
        stuck.execute("select pg_advisory_xact_lock(%s)", (STARTER_LOCK,))
        with pytest.raises(psycopg.errors.LockNotAvailable, match="lock timeout"):
            await apply(bare_dsn, SHIPPED, Waits(starter_s=0.1))
    assert await migrate_database(bare_dsn) == [migration.name for migration in SHIPPED]


async def test_rows_that_break_the_rules_of_the_functions_beat_and_are_read(fresh_dsn: str) -> None:
    """As an adopted database has them, and as a later file may make them of rows that were good before."""
    labels = {"a": {"x": 1}, "b": 5, "c": None, **{f"k{number}": "v" for number in range(100)}}
    with psycopg.connect(fresh_dsn, autocommit=True) as connection:
        for number, logical_id in ((1, "  "), (2, "two\nlines"), (3, "agent")):
            connection.execute(
                "insert into registry_instance (instance_id, logical_id, cluster_epoch, status, labels)"
                " values (%s, %s, 'epoch-1', 'alive', %s)",
                (iid(number), logical_id, json.dumps(labels)),
            )
    store = PostgresStore(fresh_dsn)
    await store.open()
    assert await store.beat_many([Beat(iid(number)) for number in (1, 2, 3)]) == []
    listed = await store.list_instances(InstanceFilter(), 10)
    assert [row.logical_id for row in listed] == ["  ", "agent", "two\nlines"]
    assert {json.dumps(dict(row.labels), sort_keys=True) for row in listed} == {json.dumps(labels, sort_keys=True)}
    outcomes = await store.set_status_many([turns(number, Status.DEAD) for number in (1, 2, 3)])
    assert {outcome.kind for outcome in outcomes} == {OutcomeKind.APPLIED}
    await store.close()


_COLUMNS = ", ".join(
    "host(r.ip_address) as ip_address" if name == "ip_address" else f"r.{name}" for name in InstanceRow._fields
)
_LATER = f"""-- A column that a later release adds, as CONTRIBUTING.md allows.
alter table registry_instance add column zone text check (length(zone) <= 255);
create or replace view instance_row as
select {_COLUMNS}, r.zone
  from registry_instance r;
create or replace view active_instances as
select r.*
  from registry_instance r
  join fleet f on f.current_epoch = r.cluster_epoch
 where r.status = 'alive' and r.last_heartbeat >= f.renewed_since;
"""


async def test_store_works_on_a_database_to_which_a_later_file_added_a_column(fresh_dsn: str) -> None:
    store = PostgresStore(fresh_dsn)
    await store.open()
    await store.register_many([joins(1)])
    later = Migration(len(SHIPPED) + 1, f"{len(SHIPPED) + 1:04}_later.sql", _LATER)
    assert await apply(fresh_dsn, [*SHIPPED, later]) == [later.name]
    await store.register_many([joins(2), joins(1, seq=1, organ_id="vision")])
    await store.set_status_many([turns(number, Status.ALIVE, 2) for number in (1, 2)])
    assert await store.beat_many([Beat(iid(1)), Beat(iid(2))]) == []
    assert [row.organ_id for row in await store.list_instances(InstanceFilter(), 10)] == ["vision", None]
    assert set((await store.best_instances(["agent"])).value) == {"agent"}
    await store.close()


# Files


@pytest.mark.parametrize("name", ["1_short.sql", "0001-dash.sql", "0001_Upper.sql", "0001_.txt.sql", "first.sql"])
def test_stray_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("select 1")
    with pytest.raises(SchemaError, match="NNNN_name"):
        known_migrations(tmp_path)


@pytest.mark.parametrize("names", [["0002_a.sql"], ["0001_a.sql", "0003_c.sql"], ["0001_a.sql", "0001_b.sql"]])
def test_gap_or_double_in_the_numbers_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("select 1")
    with pytest.raises(SchemaError, match="without a gap"):
        known_migrations(tmp_path)


def test_files_are_known_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("0002_b.sql", "0001_a.sql", "notes.txt"):
        (tmp_path / name).write_text(f"-- {name} \u00e9", encoding="utf-8")
    found = known_migrations(tmp_path)
    assert [(migration.number, migration.name) for migration in found] == [(1, "0001_a.sql"), (2, "0002_b.sql")]
    assert found[0].sql == "-- 0001_a.sql \u00e9"
    assert found[0].sha256 != found[1].sha256


def test_installed_package_brings_its_files_and_a_checkout_has_them_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (schema_folder() / "0001_tables.sql").is_file()
    monkeypatch.setattr(migrations, "__file__", str(tmp_path / "seedcore" / "store" / "migrations.py"))
    assert schema_folder() == tmp_path / "schema"
    (tmp_path / "seedcore" / "schema").mkdir(parents=True)
    assert schema_folder() == tmp_path / "seedcore" / "schema"
