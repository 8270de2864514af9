"""A database of the earlier SeedCore becomes one of ours in place: nothing is lost, and its clients go on calling."""

from __future__ import annotations

import asyncio
import inspect
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from seedcore.cli.app import app
from seedcore.cli.doctor import look_at_database
from seedcore.cli.findings import Grade
from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import SchemaError, StoreUnavailableError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.settings import Settings
from seedcore.store.adoption.adopt import Adoption, Observer, Pace
from seedcore.store.adoption.sending import send
from seedcore.store.maintenance import end_old_calls_of_database, migrate_database
from seedcore.store.migrations import Migration, known_migrations
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import Connection, PoolLimits, connect
from tests.builders import joins, turns
from tests.conformance import test_changes, test_epochs, test_leases, test_reading, test_terms
from tests.conformance.worlds import PostgresWorld
from tests.postgres.catalog import catalog, differences
from tests.postgres.earlier import CURRENT, PAST, SHAPE, EarlierClient, OldClient, make_earlier
from tests.servers import GUARDED_PASSWORD, GUARDED_ROLE, PostgresServer, forget_everything
from tests.waiting import eventually

# what does not depend on the version of PostgreSQL
one_server = pytest.mark.parametrize("server", ["postgres18"], indirect=True)
slow = pytest.mark.slow
_ROWS = """
select instance_id::text, logical_id, cluster_epoch::text, status::text, actor_name, serve_route, node_id,
       ip_address::text, pid, started_at, stopped_at, last_heartbeat
  from registry_instance order by 1
"""
KEPT = {
    "beat(uuid)",
    "expire_old_epoch_instances()",
    "expire_stale_instances(integer)",
    "register_instance(uuid,text,uuid,text,text,text,inet,integer)",
    "set_current_epoch(uuid)",
    "set_instance_status(uuid,instancestatus)",
}
# ours, which have to be given one argument more as long as the others are there
GUARDED_CALLS = {
    "set_instance_status(uuid,instancestatus,bigint,text,causekind,text)",
    "expire_stale_instances(double precision,integer)",
    "expire_old_epoch_instances(integer)",
}


async def adopt(dsn: str) -> list[str]:
    """Adopt; the messages of the adoption."""
    messages: list[str] = []
    assert await migrate_database(dsn, adopting=messages.append) == [migration.name for migration in known_migrations()]
    return messages


@asynccontextmanager
async def adopting(dsn: str, pace: Pace | None = None, observer: Observer | None = None) -> AsyncIterator[Adoption]:
    """An adoption at another pace, or observed."""
    connection = await connect(dsn, PoolLimits())
    async with connection:
        yield Adoption(connection, lambda _: None, pace, observer)


def ask(dsn: str, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description is not None else []


@pytest.mark.parametrize("server", ["postgres15", pytest.param("postgres18", marks=slow)], indirect=True)
async def test_every_row_is_kept_while_an_old_client_goes_on_calling(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20_000)
    before = ask(bare_dsn, _ROWS)
    with OldClient(bare_dsn) as said:
        await eventually(lambda: said.calls > 30)
        messages = await adopt(bare_dsn)
        calls = said.calls
        await eventually(lambda: said.calls > calls + 60)
    assert said.failures == []
    assert said.longest_s < 1.0, said.longest
    after = {row[0]: row for row in ask(bare_dsn, _ROWS)}
    # a flip of the epoch ends no instance by itself
    assert [after[row[0]] for row in before] == before
    assert {uuid.UUID(key): row[3] for key, row in after.items() if row[1].startswith("old-")} == said.statuses
    assert len(after) == len(before) + len(said.statuses)
    ((current, number),) = ask(bare_dsn, "select current_epoch, epoch_number from cluster_metadata")
    assert uuid.UUID(current) == said.epoch
    assert number == ask(bare_dsn, "select max(number) from cluster_epoch")[0][0]
    # their life is history from the first to the last
    steps = ask(
        bare_dsn,
        "select distinct on (instance_id) instance_id, to_status::text from registry_transition order by 1, id desc",
    )
    assert dict(steps) == {uuid.UUID(key): row[3] for key, row in after.items()}
    assert "20,0" in messages[0]
    assert any("locked for" in line for line in messages)


async def test_adopted_database_is_as_a_new_one(bare_dsn: str, fresh_dsn: str) -> None:
    make_earlier(bare_dsn, 50)
    await adopt(bare_dsn)
    found = differences(catalog(bare_dsn), catalog(fresh_dsn))
    assert {name for kind, name in found if kind == "function"} == KEPT | GUARDED_CALLS
    assert {kind for kind, _ in found} == {"function", "comment"}
    assert await end_old_calls_of_database(bare_dsn)
    assert differences(catalog(bare_dsn), catalog(fresh_dsn)) == set()
    assert not await end_old_calls_of_database(bare_dsn)
    assert await migrate_database(bare_dsn, adopting=lambda _: None) == []


def _suite() -> list[Callable[[PostgresWorld], Any]]:
    """Every behaviour of a store that needs nothing but a store."""
    modules: list[ModuleType] = [test_changes, test_epochs, test_leases, test_reading, test_terms]
    found = [test for module in modules for name, test in vars(module).items() if name.startswith("test_")]
    return [test for test in found if list(inspect.signature(test).parameters) == ["world"]]


@one_server
async def test_stores_behave_on_an_adopted_database_as_on_a_new_one(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 50)
    await adopt(bare_dsn)
    ask(bare_dsn, "insert into cluster_epoch (epoch, number) values ('epoch-1', 0)")
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        forget_everything(connection)
    ask(bare_dsn, "update cluster_epoch set number = 1")
    world = PostgresWorld(bare_dsn)
    suite = _suite()
    assert len(suite) > 50
    await world.store.open()
    for test in suite:
        await world.reset()
        await test(world)
    await world.close()


async def test_registry_takes_over_the_living_of_an_adopted_database(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 50)
    await adopt(bare_dsn)
    assert len(ask(bare_dsn, "select from active_instances")) == 10
    store = PostgresStore(bare_dsn)
    await store.open()
    assert (await store.begin("cluster", None, 15.0)).name == str(CURRENT)
    listed = await store.list_instances(InstanceFilter(), 100)
    assert len(listed) == 10
    assert await store.beat_many([Beat(row.instance_id) for row in listed]) == []
    await store.set_status_many([turns(1, Status.ALIVE)])
    await store.register_many([joins(1, "new")])
    assert (await store.begin("another", None, 15.0)).name.startswith("epoch-")
    assert len(await store.expire_old_epochs(100)) == 16
    await store.close()


# The calls of old clients


@pytest.fixture
async def adopted(bare_dsn: str) -> str:
    make_earlier(bare_dsn)
    await adopt(bare_dsn)
    return bare_dsn


async def test_epochs_are_set_by_uuid_text_and_a_plain_literal(adopted: str) -> None:
    for number, statement in enumerate(
        (
            "select set_current_epoch('{}')",
            "select set_current_epoch('{}'::uuid)",
            "select set_current_epoch('{}'::text)",
            "select set_current_epoch(p_epoch => '{}'::uuid)",
        )
    ):
        epoch = uuid.UUID(int=number + 1)
        ask(adopted, statement.format(epoch))
        assert ask(adopted, "select current_epoch from cluster_metadata") == [(str(epoch),)]
    with psycopg.connect(adopted, autocommit=True) as connection:
        for value in (uuid.uuid4(), str(uuid.uuid4())):
            for _ in range(8):  # so that it is prepared
                connection.execute("select set_current_epoch(%s)", (value,))


_REGISTRATIONS = (
    "'{id}', 'agent', '{epoch}', 'actor', '/r', 'node', '10.0.0.1', 7",
    "'{id}'::uuid, 'agent'::text, '{epoch}'::uuid, 'actor'::text, '/r'::text, 'node'::text, '10.0.0.1'::inet, 7",
    "'{id}'::uuid, 'agent', '{epoch}'::text, 'actor', '/r', 'node', '10.0.0.1', 7",
    "'{id}', 'agent', '{epoch}'::uuid, 'actor', '/r', 'node', '10.0.0.1', 7",
    "'{id}', 'agent', '{epoch}', p_actor_name => 'actor', p_serve_route => '/r', p_node_id => 'node',"
    " p_ip_address => '10.0.0.1', p_pid => 7",
)


async def test_instances_are_registered_with_whatever_types(adopted: str) -> None:
    for arguments in _REGISTRATIONS:
        key, epoch = uuid.uuid4(), uuid.uuid4()
        ask(adopted, f"select register_instance({arguments.format(id=key, epoch=epoch)})")
        columns = "cluster_epoch, actor_name, serve_route, node_id, pid"
        row = ask(adopted, f"select {columns} from registry_instance where instance_id = %s", key)
        assert row == [(str(epoch), "actor", "/r", "node", 7)]


async def test_old_calls_answer_what_they_answered_and_do_what_ours_do(adopted: str) -> None:
    key = uuid.uuid4()
    register = "select register_instance(%s, 'a', %s, '', null, '', null, 0)"
    assert ask(adopted, register, key, CURRENT) == [("",)]
    assert ask(adopted, "select set_instance_status(%s, 'alive')", key) == [("",)]
    assert ask(adopted, "select beat(%s)", key) == [("",)]
    assert ask(adopted, "select beat(%s)", uuid.uuid4()) == [("",)]
    assert ask(adopted, "select logical_id, actor_name, pid from active_instance") == [("a", None, None)]
    assert ask(adopted, "select expire_stale_instances(1)") == [(0,)]
    ask(adopted, "update registry_instance set last_heartbeat = now() - interval '1 minute'")
    assert ask(adopted, "select expire_stale_instances(30)") == [(1,)]
    with pytest.raises(psycopg.Error, match="cannot become") as caught:
        ask(adopted, "select set_instance_status(%s, 'alive')", key)
    assert caught.value.sqlstate == "SC002"
    ask(adopted, register, uuid.uuid4(), CURRENT)
    ask(adopted, "select set_current_epoch(%s)", uuid.uuid4())
    assert ask(adopted, "select expire_old_epoch_instances()") == [(1,)]
    # ours beside them
    assert ask(adopted, "select expire_stale_instances(1.5, 10)") == []
    assert ask(adopted, "select expire_old_epoch_instances(10)") == []


_LATER = """-- What a later file may do: a column, in the views too.
alter table registry_instance add column zone text;
create or replace view active_instances as
select r.* from registry_instance r join fleet f on f.current_epoch = r.cluster_epoch
 where r.status = 'alive' and r.last_heartbeat >= f.renewed_since;
"""


@pytest.mark.parametrize("base", ["adopted", "new", "adopted by a version before"])
async def test_earlier_client_registers_beats_and_is_listed_with_its_defaults(bare_dsn: str, base: str) -> None:
    if base == "new":
        await migrate_database(bare_dsn)
    else:
        make_earlier(bare_dsn)
        await adopt(bare_dsn)
    if base == "adopted by a version before":
        known = known_migrations()
        later = Migration(len(known) + 1, f"{len(known) + 1:04}_later.sql", _LATER)
        assert await migrate_database(bare_dsn, migrations=[*known, later]) == [later.name]
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        client = EarlierClient(connection, "eye")
        for _ in range(7):  # psycopg prepares what is repeated
            client.register()
        client.set_status("alive")
        client.beat()
        assert client.list_active() == [("eye", None, None, None, "127.0.1.1", client.pid)]
        client.set_status("draining")
        client.set_status("dead")
        assert client.list_active() == []
        connection.execute("select expire_stale_instances()")
        connection.execute("select expire_stale_instances(15)")
        connection.execute("select expire_old_epoch_instances()")


async def test_empty_text_is_none_in_every_argument_of_every_call(adopted: str, fresh_dsn: str) -> None:
    names = ("actor_name", "serve_route", "node_id", "namespace", "actor_id", "organ_id")
    for dsn in (adopted, fresh_dsn):
        key = uuid.uuid4()
        given = ", ".join(f"p_{name} => %s" for name in names)
        ask(dsn, f"select register_instance(%s, 'eye', p_cluster_epoch => '', {given})", key, *("" for _ in names))
        ask(dsn, "select set_instance_status(%s, 'alive', null, '')", key)
        (row,) = ask(dsn, f"select cause_kind, {', '.join(names)} from registry_instance where instance_id = %s", key)
        assert row == (None,) * 7
        with pytest.raises(psycopg.Error, match="logical_id must not be empty"):
            ask(dsn, "select register_instance(%s, '')", uuid.uuid4())
    ask(adopted, "select register_instance(%s, 'a', %s::uuid, '', '', '', null, 0)", uuid.uuid4(), CURRENT)


async def test_call_that_waits_for_the_swap_is_done_after_it(bare_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_earlier(bare_dsn, 20)
    flip, key = uuid.uuid4(), uuid.uuid4()
    waits = [
        ("select set_current_epoch(%s)", (flip,)),
        ("select register_instance(%s, 'late', %s, 'a', '/a', 'n', '10.0.0.1', 7)", (key, uuid.uuid4())),
        ("select set_instance_status(%s, 'dead')", (ask(bare_dsn, "select instance_id from active_instances")[0][0],)),
        ("select expire_stale_instances(7)", ()),
        ("select expire_old_epoch_instances()", ()),
    ]
    threads = [threading.Thread(target=ask, args=(bare_dsn, query, *values)) for query, values in waits]
    failures: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(str(args.exc_value)))

    async def wait_for_calls(_connection: Connection, name: str, _parameters: object) -> None:
        if name == "swap":
            for thread in threads:
                thread.start()
            await eventually(lambda: ask(bare_dsn, _WAITING) == [(len(threads),)])

    async with adopting(bare_dsn, observer=wait_for_calls) as adoption:
        await adoption.run()
    for thread in threads:
        thread.join()
    assert failures == []
    assert ask(bare_dsn, "select current_epoch from cluster_metadata") == [(str(flip),)]
    assert ask(bare_dsn, "select logical_id from registry_instance where instance_id = %s", key) == [("late",)]
    assert ask(bare_dsn, "select nspname from pg_namespace where nspname ~ 'seedcore'") == []


_WAITING = "select count(distinct pid) from pg_locks where not granted"


async def test_who_might_call_and_read_may_do_so_afterwards(server: PostgresServer, bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20)
    grants = (
        f"grant select, insert, update on registry_instance to {GUARDED_ROLE}",
        f"grant select, insert, update on cluster_metadata to {GUARDED_ROLE}",
        f"grant select on active_instance to {GUARDED_ROLE}",
        "revoke execute on function beat(uuid) from public",
        f"grant execute on function beat(uuid) to {GUARDED_ROLE}",
    )
    for grant in grants:
        ask(bare_dsn, grant)
    await adopt(bare_dsn)
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute(f"set role {GUARDED_ROLE}")
        key = uuid.uuid4()
        connection.execute("select register_instance(%s, 'a', %s, 'a', '/a', 'n', '10.0.0.1', 7)", (key, uuid.uuid4()))
        connection.execute("select set_instance_status(%s, 'alive')", (key,))
        connection.execute("select beat(%s)", (key,))
        connection.execute("select set_current_epoch(%s)", (uuid.uuid4(),))
        assert connection.execute("select count(*) from active_instance").fetchone() == (0,)
    assert ask(bare_dsn, "select has_function_privilege('public', 'beat(uuid)', 'execute')") == [(False,)]


@one_server
async def test_owner_of_the_tables_needs_no_superuser(server: PostgresServer, bare_dsn: str) -> None:
    database = str(psycopg.conninfo.conninfo_to_dict(bare_dsn)["dbname"])
    ask(bare_dsn, f"grant all on schema public to {GUARDED_ROLE}")
    owned = server.dsn(database, GUARDED_ROLE, GUARDED_PASSWORD)
    make_earlier(owned, 20)
    with pytest.raises(SchemaError, match="permission denied for database"):
        await adopt(owned)
    assert len(ask(owned, _ROWS)) == 20
    ask(bare_dsn, f'grant create on database "{database}" to {GUARDED_ROLE}')
    await adopt(owned)
    assert await end_old_calls_of_database(owned)
    assert len(ask(owned, _ROWS)) == 20


# Rows that break our rules


@one_server
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("update registry_instance set logical_id = '' where pid = 1001", "1 with an empty logical_id"),
        ("update registry_instance set logical_id = repeat('x', 256) where pid = 1001", "more than 255 characters"),
        (
            "alter table registry_instance alter cluster_epoch drop not null;"
            " update registry_instance set cluster_epoch = null",
            "20 with no cluster_epoch",
        ),
        ("insert into cluster_metadata (id) values (2)", "cluster_metadata has 2 rows"),
        ("create view mine as select * from registry_instance", "view mine"),
        ("create table mine (id uuid references registry_instance)", "foreign key"),
        ("alter table registry_instance drop constraint registry_instance_pkey", "no unique index"),
    ],
)
async def test_what_cannot_be_kept_is_refused_and_nothing_is_changed(bare_dsn: str, change: str, expected: str) -> None:
    make_earlier(bare_dsn, 20)
    ask(bare_dsn, change)
    rows = ask(bare_dsn, _ROWS)
    with pytest.raises(SchemaError, match="not adopted") as caught:
        await adopt(bare_dsn)
    assert expected in str(caught.value)
    assert ask(bare_dsn, _ROWS) == rows
    assert ask(bare_dsn, "select nspname from pg_namespace where nspname ~ 'seedcore'") == []


@one_server
async def test_values_that_break_our_rules_are_kept_in_the_metadata(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20)
    changes = [
        "actor_name = '', node_id = repeat('n', 300), pid = 0 where actor_name = 'actor-1'",
        "started_at = null, last_heartbeat = null where actor_name = 'actor-2'",
        "stopped_at = '2024-05-01 00:00+00' where actor_name = 'actor-10'",
        "stopped_at = null where actor_name = 'actor-4'",
        "started_at = '-infinity', serve_route = repeat('r', 1025) where actor_name = 'actor-5'",
        "logical_id = E'two\\nlines' where actor_name = 'actor-6'",
    ]
    for change in changes:
        ask(bare_dsn, f"update registry_instance set {change}")
    await adopt(bare_dsn)

    def adopted(serve_route: str) -> Any:
        query = "select metadata -> 'adopted' from registry_instance where serve_route = %s or length(%s) = 0"
        return ask(bare_dsn, query, serve_route, serve_route)[0][0]

    assert adopted("/agents/1") == {"actor_name": "", "node_id": "n" * 300, "pid": 0}
    assert adopted("/agents/2") is None
    assert adopted("/agents/10")["stopped_at"].startswith("2024-05-01")
    assert adopted("/agents/4") is None
    assert ask(bare_dsn, "select metadata -> 'adopted' from registry_instance where actor_name = 'actor-5'") == [
        ({"started_at": "-infinity", "serve_route": "r" * 1025},)
    ]
    assert ask(bare_dsn, "select count(*) from registry_instance where started_at is not null") == [(20,)]
    assert ask(bare_dsn, "select stopped_at = last_heartbeat from registry_instance where actor_name = 'actor-4'") == [
        (True,)
    ]
    store = PostgresStore(bare_dsn)
    await store.open()
    assert len(await store.list_instances(InstanceFilter(statuses=None, fresh_only=False, epoch=None), 100)) > 0
    await store.close()


@one_server
@pytest.mark.parametrize("epochs", ["", "insert into cluster_metadata (id) values (1)"])
async def test_database_without_an_epoch_begins_with_the_first(bare_dsn: str, epochs: str) -> None:
    ask(bare_dsn, SHAPE)
    if epochs:
        ask(bare_dsn, epochs)
    await adopt(bare_dsn)
    assert ask(bare_dsn, "select current_epoch, epoch_number from cluster_metadata") == [("epoch-1", 1)]


@one_server
async def test_epochs_before_the_current_one_are_retired_and_one_that_warms_up_is_staged(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20)
    coming = uuid.uuid4()
    ask(bare_dsn, "select register_instance(%s, 'next', %s, 'a', '/a', 'n', '10.0.0.1', 7)", uuid.uuid4(), coming)
    await adopt(bare_dsn)
    epochs = ask(
        bare_dsn, "select epoch, current_at is not null, retired_at is not null from cluster_epoch order by number"
    )
    assert epochs == [(str(PAST), True, True), (str(CURRENT), True, False), (str(coming), False, False)]
    ask(bare_dsn, "select set_current_epoch(%s)", coming)
    with pytest.raises(psycopg.Error, match="retired"):
        ask(bare_dsn, "select set_current_epoch(%s)", PAST)


# Shapes


@one_server
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("alter table registry_instance add column organ text", "organ text"),
        ("alter table registry_instance alter cluster_epoch type text; ", "cluster_epoch"),
        ("drop view active_instance", "no view active_instance"),
        ("drop function beat(uuid)", "function beat"),
        (
            "drop function beat(uuid); create function beat(uuid) returns bool language sql as 'select true'",
            "answers boolean",
        ),
        ("alter type instancestatus add value 'lost'", "type instancestatus"),
        ("create table cluster_epoch (id int)", "there is also cluster_epoch"),
    ],
)
async def test_shape_that_is_neither_is_refused_in_plain_words(bare_dsn: str, change: str, expected: str) -> None:
    if "type text" in change:
        ask(
            bare_dsn,
            SHAPE.replace("cluster_epoch   uuid", "cluster_epoch text")
            .replace("r.cluster_epoch = m.current_epoch", "true")
            .replace("set search_path", ""),
        )
    else:
        make_earlier(bare_dsn, 5)
        ask(bare_dsn, change)
    with pytest.raises(SchemaError, match="neither our schema nor that of the earlier SeedCore") as caught:
        await adopt(bare_dsn)
    assert expected in str(caught.value)
    with pytest.raises(SchemaError, match="neither"):
        await migrate_database(bare_dsn)


@one_server
async def test_registry_adopts_nothing_by_itself_and_names_the_command(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 5)
    with pytest.raises(SchemaError, match="run `seedcore migrate`"):
        await migrate_database(bare_dsn)
    store = PostgresStore(bare_dsn)
    with pytest.raises(SchemaError, match="run `seedcore migrate`"):
        await store.open()
    await store.close()
    assert ask(bare_dsn, "select count(*) from active_instances") == [(1,)]


@one_server
def test_command_adopts_and_prints_what_it_does(bare_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_earlier(bare_dsn, 5)
    monkeypatch.setenv("SEEDCORE_PG_DSN", bare_dsn)
    result = CliRunner().invoke(app, ["migrate", "--end-old-calls"])
    assert result.exit_code == 0, result.output
    for line in ("database of the earlier SeedCore, with 5 instances", "copied 5 instances", "swapped", "are dropped"):
        assert line in result.output
    assert "the schema is up to date" in CliRunner().invoke(app, ["migrate"]).output


@one_server
async def test_doctor_names_the_command_that_adopts_it(bare_dsn: str) -> None:
    settings = Settings(pg_dsn=SecretStr(bare_dsn))
    make_earlier(bare_dsn, 3)
    [schema] = [finding for finding in await look_at_database(settings) if finding.check == "schema"]
    assert schema.grade is Grade.FAILED
    assert "`seedcore migrate` adopts it" in (schema.remedy or "")
    await adopt(bare_dsn)
    [schema] = [finding for finding in await look_at_database(settings) if finding.check == "schema"]
    assert schema.grade is Grade.OK
    ask(bare_dsn, "drop schema public cascade; create schema public; create table registry_instance (id int)")
    [finding] = await look_at_database(settings)
    assert finding.grade is Grade.FAILED
    assert "a database of the registry's own" in (finding.remedy or "")


# Interruptions


@one_server
@pytest.mark.parametrize(
    "at",
    [
        "copy_batch",
        "swap",
        "end_help",
        *(
            pytest.param(name, marks=slow)
            for name in (
                "prepare",
                "quiet",
                "note_changes",
                "copy_again",
                "write_history",
                "date_epochs",
                "differences",
                "settle_epochs",
                "keep_calls",
                "help_late_calls",
                "drop_schemas",
            )
        ),
    ],
)
async def test_interrupted_adoption_is_started_again(bare_dsn: str, at: str) -> None:
    make_earlier(bare_dsn, 45)
    before = ask(bare_dsn, _ROWS)
    sent = 0

    async def interrupt(connection: Connection, name: str, parameters: Any) -> None:
        nonlocal sent
        if name == "write_history":
            ask(bare_dsn, "select beat(%s)", before[0][0])
            ask(bare_dsn, "delete from registry_instance where instance_id = %s", before[1][0])
        sent += name == at
        if name == at and sent == (3 if at == "copy_batch" else 1):
            await send(connection, name, parameters)
            await connection.close()

    async with adopting(bare_dsn, Pace(batch=10), interrupt) as adoption:
        with pytest.raises((psycopg.OperationalError, StoreUnavailableError)):
            await adoption.run()
    # the server notices a little later that the session is gone
    await eventually(lambda: not ask(bare_dsn, "select 1 from pg_locks where locktype = 'advisory'"))
    ask(bare_dsn, "select beat(%s)", before[2][0])
    messages: list[str] = []
    await migrate_database(bare_dsn, adopting=messages.append)
    # nothing of the preparations was committed; or the swap was
    is_begun = at not in {"prepare", "quiet", "end_help", "drop_schemas"}
    assert ("an adoption was interrupted: it goes on" in messages) is is_begun
    after = ask(bare_dsn, _ROWS)
    assert [row[0] for row in after if row[0] != before[1][0]] == [row[0] for row in before if row[0] != before[1][0]]
    assert ask(bare_dsn, "select nspname from pg_namespace where nspname ~ 'seedcore'") == []
    assert ask(bare_dsn, "select tgname from pg_trigger where tgname ~ 'adoption'") == []
    assert (await migrate_database(bare_dsn, adopting=lambda _: None)) == []


@one_server
async def test_adoption_waits_for_a_long_transaction_and_lets_clients_by(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20)
    messages: list[str] = []
    with psycopg.connect(bare_dsn) as idle, OldClient(bare_dsn, flips=False) as said:
        idle.execute("select count(*) from active_instances")
        work = asyncio.create_task(migrate_database(bare_dsn, adopting=messages.append))
        await eventually(lambda: said.calls > 60)
        assert not work.done()
        idle.rollback()
        await work
    assert said.failures == []
    assert said.longest_s < 1.0


@one_server
async def test_adoption_gives_up_on_tables_that_are_never_free(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 20)
    with psycopg.connect(bare_dsn) as idle:
        idle.execute("select count(*) from active_instances")
        pid = idle.info.backend_pid
        async with adopting(bare_dsn, Pace(attempts=2, lock_wait_ms=20)) as adoption:
            with pytest.raises(StoreUnavailableError, match=f"now by the server's processes {pid}"):
                await adoption.run()
    assert await adopt(bare_dsn)


@one_server
async def test_two_do_not_adopt_at_once(bare_dsn: str) -> None:
    make_earlier(bare_dsn, 2000)
    results = await asyncio.gather(
        *(migrate_database(bare_dsn, adopting=lambda _: None) for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(result, list) for result in results) >= 1
    for result in results:
        assert isinstance(result, (list, StoreUnavailableError)), result
    assert ask(bare_dsn, "select count(*) from registry_instance") == [(2000,)]
