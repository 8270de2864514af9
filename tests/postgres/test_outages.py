"""The database away, deaf, or not ours: always one of our errors, soon, and never a password in it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo
from pydantic import SecretStr

from seedcore.composition import store_recipe
from seedcore.core.answers import InstanceFilter
from seedcore.core.changes import RegisterChange, Registration
from seedcore.core.errors import (
    ConfigurationError,
    InvalidInputError,
    RegistryError,
    StoreRejectedError,
    StoreUnavailableError,
)
from seedcore.core.instances import Beat, Instance
from seedcore.core.lifecycle import Status
from seedcore.settings import Settings
from seedcore.store.connections import Connections
from seedcore.store.dsn import checked_dsn, is_unverified
from seedcore.store.maintenance import inspect_database, migrate_database
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import START, hold, holds, iid, joins, turns
from tests.faults.proxy import Proxy
from tests.servers import GUARDED_ROLE, PostgresServer
from tests.waiting import eventually

SECRET = "hunter2-very-secret"
SOON = PoolLimits(max_size=2, connect_timeout_s=0.5, statement_timeout_s=0.5)
BOUND_S = 8.0  # of a wait that is over in far less


async def loaded(store: PostgresStore) -> list[Instance]:
    """Everyone who lives."""
    return [row async for row in store.load_live()]


CALLS: dict[str, Callable[[PostgresStore], Awaitable[object]]] = {
    "begin": lambda store: store.begin("cluster", None, 15.0),
    "set_current_epoch": lambda store: store.set_current_epoch("green"),
    "current_epoch": lambda store: store.current_epoch(),
    "register_many": lambda store: store.register_many([joins(1)]),
    "set_status_many": lambda store: store.set_status_many([turns(1, Status.ALIVE)]),
    "beat_many": lambda store: store.beat_many([Beat(iid(1))]),
    "expire_stale": lambda store: store.expire_stale(None, 10),
    "expire_old_epochs": lambda store: store.expire_old_epochs(10),
    "load_live": lambda store: loaded(store),
    "list_instances": lambda store: store.list_instances(InstanceFilter(), 10),
    "best_instances": lambda store: store.best_instances(["agent"]),
    "get_instance": lambda store: store.get_instance(iid(1)),
    "instances": lambda store: store.instances("agent", 10),
    "transitions": lambda store: store.transitions("agent", 10),
    "history": lambda store: store.history("agent", 10, 10),
}


def everything_said(error: BaseException) -> str:
    """All that a log or a user could see of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(error)


async def answers(store: PostgresStore) -> bool:
    """That the store can be used; an error where it cannot."""
    await store.current_epoch()
    return True


@pytest.fixture
async def reader(dsn: str) -> AsyncIterator[PostgresStore]:
    """An open store that never writes, with short bounds."""
    store = PostgresStore(dsn, SOON, read_only=True)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port without a listener."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


# Never reached


async def test_store_that_is_not_open_is_an_error_of_its_own(dsn: str) -> None:
    store = PostgresStore(dsn)
    with pytest.raises(StoreUnavailableError, match="not open"):
        await store.current_epoch()
    await store.close()


async def test_address_without_a_server_is_an_error_soon_and_without_the_password(
    closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = PostgresStore(f"postgresql://someone:{SECRET}@127.0.0.1:{closed_port}/db", SOON)
    started_s = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="refused") as caught:
        await store.open()
    # the pool tries on its own; its log must not contain it either
    with pytest.raises(StoreUnavailableError) as later:
        await store.current_epoch()
    assert time.monotonic() - started_s < BOUND_S
    await store.close()
    assert SECRET not in everything_said(caught.value) + everything_said(later.value) + caplog.text
    assert "\n" not in str(caught.value)


async def test_missing_socket_folder_is_an_absent_database(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError):
        await migrate_database(f"host={tmp_path} dbname=postgres user=postgres")


async def test_error_names_an_unknown_database(server: PostgresServer) -> None:
    store = PostgresStore(server.dsn("no_such_database"), SOON)
    with pytest.raises(StoreUnavailableError, match='"no_such_database" does not exist'):
        await store.open()
    await store.close()


@pytest.mark.parametrize("read_only", [False, True])
async def test_wrong_password_is_an_error_soon_and_not_in_its_text(
    server: PostgresServer, shared_database: str, read_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = PostgresStore(server.dsn(shared_database, GUARDED_ROLE, SECRET), SOON, read_only=read_only)
    if read_only:
        await store.open()
    started_s = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        await (store.current_epoch() if read_only else store.open())
    assert time.monotonic() - started_s < BOUND_S
    await store.close()
    assert read_only or "password authentication failed" in str(caught.value)
    assert SECRET not in everything_said(caught.value) + caplog.text


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://someone:{SECRET}@[::1/db",
        f"host=db password={SECRET} with spaces",
        f"host=db pasword={SECRET}",
        f"mysql://someone:{SECRET}@db/x",
        f"{SECRET}",
    ],
)
def test_unreadable_dsn_names_the_variable_and_not_the_password(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^SEEDCORE_PG_DSN: is not a PostgreSQL connection string") as caught:
        PostgresStore(dsn)
    assert SECRET not in everything_said(caught.value)
    with pytest.raises(ConfigurationError):
        checked_dsn(dsn)


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://someone:p@{SECRET}@db/x",
        f"postgresql://someone:p@{SECRET}@db:5432,other/x?sslmode=require",
        f"postgresql://someone:p/{SECRET}@db/x",
        f"postgresql://someone:{SECRET}/y@db/x",
        f"postgresql://someone:p@{SECRET}/y@db/x",
        f"postgresql://someone:{SECRET}",
        f"postgresql://someone:{SECRET}?sslmode=require",
        f"postgres://some@one:{SECRET}@db/x",
        f"postgresql://someone:p?x=y@{SECRET}@db/x",
        f"postgresql://someone:p#{SECRET}@db@/x",
        f"postgresql://someone:100%{SECRET}@db/x",
        f"host=someone:{SECRET}@db dbname=x",
        f"host=db port={SECRET}",
        f"host=db port=5432,{SECRET}",
        "host=db port=70000",
        f"host=db dbname=postgresql://someone:{SECRET}@db/x",
        f"host=db user=postgresql://someone:{SECRET}@db/x",
        f"host=db password={SECRET}\udc00",
    ],
)
async def test_part_of_a_password_that_is_read_as_something_else_is_in_no_message(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    calls: list[Callable[[], object]] = [
        lambda: PostgresStore(dsn),
        lambda: store_recipe(Settings(pg_dsn=SecretStr(dsn), data_dir=Path("/tmp/x"))),
        lambda: is_unverified(dsn),
        lambda: asyncio.run(migrate_database(dsn)),
        lambda: asyncio.run(inspect_database(dsn)),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=r"^SEEDCORE_PG_DSN: [^\n]*$") as caught:
            await asyncio.to_thread(call)
        assert SECRET not in everything_said(caught.value)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:p%40ss%2F@db.example:5432/x?application_name=a@b",
        "postgresql://me@db-1,db-2:5433/x?target_session_attrs=any",
        "postgresql://me@[2001:db8::1]:5432/x",
        "postgresql:///x?host=/run/postgresql&password=p@ss",
        "postgresql://%2Frun%2Fpostgresql/x",
        "host=@abstract dbname=x",
        "host=/run/a,/run/b port=5432, user='me@tenant' password='p@ss word'",
        "postgresql://me:p?a#b:c&d@db/x",
        "service=mine",
        "",
    ],
)
def test_dsn_that_is_complete_is_accepted(dsn: str) -> None:
    assert checked_dsn(dsn) == dsn


async def test_database_without_our_tables_is_an_error_of_its_own(bare_dsn: str) -> None:
    store = PostgresStore(bare_dsn, SOON, read_only=True)
    await store.open()
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        await store.current_epoch()
    await store.close()


# Gone and back


async def test_every_call_fails_while_the_server_is_stopped_and_works_after_its_return(
    server: PostgresServer, fresh_dsn: str
) -> None:
    store = PostgresStore(fresh_dsn, PoolLimits(max_size=2, connect_timeout_s=0.15))
    await store.open()
    await store.register_many([joins(1)])
    server.stop()
    try:
        for name, call in CALLS.items():
            started_s = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                await call(store)
            assert time.monotonic() - started_s < BOUND_S, name
    finally:
        server.start()

    await eventually(lambda: answers(store))
    # what was committed before the crash is there
    assert [row.instance_id for row in await loaded(store)] == [iid(1)]
    for call in CALLS.values():
        await call(store)
    await store.close()


async def test_store_opened_while_the_server_is_away_works_when_it_comes(
    server: PostgresServer, fresh_dsn: str
) -> None:
    store = PostgresStore(fresh_dsn, SOON)
    server.stop()
    try:
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await store.open()
    finally:
        server.start()
    await store.open()
    await eventually(lambda: store.register_many([joins(1)]))
    await store.close()


# Moved


@pytest.mark.parametrize("read_only", [False, True], ids=["writer", "reader"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
async def test_connections_follow_a_name_that_has_moved_while_the_old_server_lives_on(
    postgres15: PostgresServer, postgres18: PostgresServer, tmp_path: Path, read_only: bool, is_busy: bool
) -> None:
    name = tmp_path / "moved"
    name.symlink_to(postgres15.folder)
    dsn = f"host={name} dbname=postgres user=postgres"
    store = Connections(dsn, PoolLimits(max_size=2, connection_life_s=0.5), read_only=read_only)
    store.open()

    async def server() -> int:
        return int((await store.run([("select current_setting('server_version_num')::int / 10000", {})]))[0][0][0])

    assert await server() == 15
    # one that is being made is counted as busy: none is younger than the others when the name moves
    await eventually(lambda: _is_at_rest(store))
    name.unlink()
    name.symlink_to(postgres18.folder)
    if is_busy:
        await eventually(lambda: _is(server, 18), within_s=BOUND_S, every_s=0.01)
    else:
        await asyncio.sleep(0.6)
        assert await server() == 18
    await store.close()


async def _is_at_rest(store: Connections) -> bool:
    return store.use["busy"] == 0


async def _is(server: Callable[[], Awaitable[int]], version: int) -> bool:
    return await server() == version


# Slow


async def test_statement_that_takes_too_long_is_given_up(dsn: str, db: psycopg.Connection) -> None:
    store = PostgresStore(dsn, SOON)
    await store.open()
    await store.register_many([joins(1)])
    with db.transaction():
        db.execute("select from registry_instance for update")
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="statement timeout"):
            await store.set_status_many([turns(1, Status.ALIVE)])
        assert time.monotonic() - started_s < BOUND_S
    await store.set_status_many([turns(1, Status.ALIVE)])
    await store.close()


async def test_waiting_for_a_connection_is_bounded(dsn: str, db: psycopg.Connection) -> None:
    store = PostgresStore(dsn, PoolLimits(max_size=1, connect_timeout_s=0.2, statement_timeout_s=1.0))
    await store.open()
    await store.register_many([joins(1)])
    with db.transaction():
        db.execute("select from registry_instance for update")
        waits = await asyncio.gather(
            store.set_status_many([turns(1, Status.ALIVE)]),
            store.set_status_many([turns(1, Status.ALIVE)]),
            store.current_epoch(),
            return_exceptions=True,
        )
    assert all(isinstance(error, StoreUnavailableError) for error in waits)
    assert any("connection" in str(error) for error in waits)
    await store.current_epoch()
    await store.close()


async def test_deaf_server_is_given_up_and_used_again_when_it_hears(dsn: str) -> None:
    store = PostgresStore(dsn, PoolLimits(max_size=1, connect_timeout_s=0.2, statement_timeout_s=0.2))
    await store.open()
    await store.current_epoch()
    with psycopg.connect(dsn) as other:
        ((backend,),) = other.execute(
            "select pid from pg_stat_activity"
            " where application_name = 'seedcore-registry' and datname = current_database()"
        ).fetchall()
    os.kill(backend, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=r"no answer within 0\.4 s"):
            await store.current_epoch()
        assert time.monotonic() - started_s < BOUND_S
    finally:
        os.kill(backend, signal.SIGCONT)
    await eventually(lambda: answers(store))
    await store.close()


# Refused


@pytest.mark.parametrize("messages", range(6))
async def test_connection_lost_after_any_message_leaves_nothing_locked(
    server: PostgresServer, dsn: str, db: psycopg.Connection, messages: int
) -> None:
    proxy = Proxy(server.folder / ".s.PGSQL.5432")
    proxy.start()
    store = PostgresStore(proxy.dsn(db.info.dbname), SOON)
    await store.open()
    await store.register_many([joins(1)])
    proxy.lose_after(messages)
    with suppress(StoreUnavailableError):
        await store.set_status_many([turns(1, Status.ALIVE)])

    def is_quiet() -> bool:
        return not db.execute(
            "select from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
            "and state <> 'idle'"
        ).fetchall()

    await eventually(is_quiet)
    db.execute("set lock_timeout = '1s'")
    assert len(db.execute("select from registry_instance for update").fetchall()) == 1

    # over a new connection
    row = await eventually(lambda: store.get_instance(iid(1)))
    assert row is not None
    assert row.status is (Status.ALIVE if messages else Status.STARTING)
    await store.close()
    proxy.stop()


@pytest.mark.parametrize(
    "bad",
    [
        Registration(iid(2), ""),
        Registration(iid(2), "x" * 256),
        Registration(iid(2), "agent", ip_address="nowhere"),
        Registration(iid(2), "agent", pid=0),
        Registration(iid(2), "agent", pid=2**40),
        Registration("junk", "agent"),
        Registration(iid(2), "a\x00b"),
    ],
)
async def test_value_that_the_database_refuses_is_an_error_and_the_batch_leaves_nothing(
    store: PostgresStore, bad: Registration
) -> None:
    with pytest.raises(StoreRejectedError):
        await store.register_many([joins(1), RegisterChange(bad)])
    assert await store.get_instance(iid(1)) is None
    await store.register_many([joins(1)])


async def test_refused_status_batch_leaves_nothing(store: PostgresStore) -> None:
    await store.register_many([joins(1), joins(2)])
    with pytest.raises(StoreRejectedError):
        await store.set_status_many([turns(1, Status.ALIVE), turns(2, Status.ALIVE, cause="x" * 2000)])
    row = await store.get_instance(iid(1))
    assert row is not None
    assert row.status is Status.STARTING
    with pytest.raises(StoreRejectedError):
        await store.beat_many([Beat(iid(1)), Beat("junk")])


async def test_reader_reads_and_cannot_write(store: PostgresStore, reader: PostgresStore) -> None:
    await store.register_many([joins(1)])
    assert await reader.get_instance(iid(1)) is not None
    assert (await reader.current_epoch()).name == "epoch-1"
    for name in ("register_many", "set_current_epoch", "begin"):
        with pytest.raises(RegistryError, match="read-only"):
            await CALLS[name](reader)
    with pytest.raises(InvalidInputError):
        await reader.list_instances(InstanceFilter(), 10, "junk")


async def test_bounds_and_times_hold_whatever_the_session_is_set_to(server: PostgresServer, fresh_dsn: str) -> None:
    name = conninfo.conninfo_to_dict(fresh_dsn)["dbname"]
    with psycopg.connect(fresh_dsn, autocommit=True) as owner:
        for setting in (
            "timezone = 'Asia/Tokyo'",
            "datestyle = 'SQL, DMY'",
            "intervalstyle = 'iso_8601'",
            "default_transaction_isolation = 'serializable'",
            "statement_timeout = 0",
            "standard_conforming_strings = off",
        ):
            owner.execute(f"alter database {name} set {setting}")
    connections = Connections(
        conninfo.make_conninfo(fresh_dsn, options="-c work_mem=5MB"), PoolLimits(), read_only=False
    )
    connections.open()
    names = ("work_mem", "statement_timeout", "transaction_isolation", "transaction_read_only")
    wanted = ", ".join(f"current_setting('{name}')" for name in names)
    ((settings,),) = await connections.run([(f"select array[{wanted}]", {})])
    assert settings[0] == ["5MB", "10s", "read committed", "off"]
    await connections.close()
    store = PostgresStore(fresh_dsn)
    await store.open()
    until = START + timedelta(days=40_000)
    await store.register_many([joins(1)])
    await store.hold_many([holds(1, "back\\slash", until)])
    row = await store.get_instance(iid(1))
    assert row is not None
    assert (row.holds, row.cause) == ((hold("back\\slash", until),), hold("back\\slash").cause)
    assert row.started_at.tzinfo is row.holds[0].since.tzinfo is UTC
    as_of = (await store.list_instances(InstanceFilter(), 10)).as_of
    assert abs(as_of - datetime.now(UTC)) < timedelta(hours=1)
    await store.close()


async def test_time_that_python_does_not_know_is_an_error_of_ours(dsn: str, db: psycopg.Connection) -> None:
    store = PostgresStore(dsn)
    await store.open()
    await store.register_many([joins(1)])
    db.execute("update registry_instance set last_heartbeat = 'infinity'")
    with pytest.raises(StoreRejectedError, match="years 1 to 9999"):
        await store.get_instance(iid(1))
    await store.close()


async def test_pages_of_live_instances_are_read_to_the_end(dsn: str) -> None:
    store = PostgresStore(dsn, load_page=3)
    await store.open()
    await store.register_many([joins(number, f"agent-{number % 2}") for number in range(10)])
    assert sorted([row.instance_id async for row in store.load_live()]) == [iid(number) for number in range(10)]
    await store.close()


async def test_statements_are_counted(store: PostgresStore) -> None:
    before = store.statements
    await store.beat_many([Beat(iid(number)) for number in range(500)])
    assert store.statements == before + 1
