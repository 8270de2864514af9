"""What `seedcore doctor` shows of a real primary and its standby, to the superuser and to a role with few rights."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from seedcore.cli.doctor import look_at_database
from seedcore.cli.findings import Finding, Grade
from seedcore.settings import Settings
from tests.postgres.test_failover import Pair, pair_of
from tests.servers import PostgresServer
from tests.waiting import eventually

READER = "reader"
ROLES = ("postgres", READER)


@pytest.fixture(scope="module")
def servers(postgres18: PostgresServer) -> Iterator[Pair]:
    """A pair that these tests share; each begins with both servers, asynchronously."""
    with pair_of(postgres18) as pair:
        change(pair, f"create role {READER} login", f"grant select on all tables in schema public to {READER}")
        yield pair


@pytest.fixture
def pair(servers: Pair) -> Iterator[Pair]:
    servers.standby.start()
    yield servers
    set_on(servers)


def change(pair: Pair, *statements: str) -> None:
    with psycopg.connect(pair.primary.dsn(pair.database), autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement.encode())


def set_on(pair: Pair, **settings: str) -> None:
    """Reset the settings of the primary, but for these."""
    with psycopg.connect(pair.primary.dsn(), autocommit=True) as admin:
        admin.execute("set synchronous_commit = local")
        admin.execute("alter system reset all")
        for name, value in settings.items():
            admin.execute(sql.SQL("alter system set {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        admin.execute("select pg_reload_conf()")


@contextmanager
def running(*arguments: str | Path) -> Iterator[None]:
    process = subprocess.Popen(arguments)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def found_by(pair: Pair, role: str) -> dict[str, Finding]:
    dsn = pair.primary.dsn(pair.database, role)
    return {one.check: one for one in await look_at_database(Settings(pg_dsn=SecretStr(dsn)))}


async def finds(pair: Pair, role: str, grade: Grade, *parts: str) -> None:
    """Wait until doctor shows this as the replication."""

    async def is_shown() -> bool:
        one = (await found_by(pair, role))["replication"]
        return one.grade is grade and all(part in one.found for part in parts)

    await eventually(is_shown)


async def test_commits_that_no_standby_confirms_are_a_failure(pair: Pair) -> None:
    set_on(pair, synchronous_standby_names="ANY 1 (walreceiver, other)")
    for role in ROLES:
        await finds(pair, role, Grade.OK, "synchronous")
    set_on(pair, synchronous_standby_names="unknown")
    for role in ROLES:
        await finds(pair, role, Grade.FAILED, "0 of the 1", "unknown")
    set_on(pair, synchronous_standby_names="2 (walreceiver, other)")
    for role in ROLES:
        await finds(pair, role, Grade.FAILED, "1 of the 2")
    set_on(pair, synchronous_standby_names="*")
    for role in ROLES:
        await finds(pair, role, Grade.OK, "synchronous")
    pair.standby.stop()
    for role in ROLES:
        await finds(pair, role, Grade.FAILED, "0 of the 1")


async def test_a_commit_that_waits_is_counted_by_its_own_role_and_by_a_role_that_sees_all(pair: Pair) -> None:
    change(pair, "create table scratch ()", f"grant insert on scratch to {READER}")
    pair.standby.stop()
    set_on(pair, synchronous_standby_names="*")
    dsn = pair.primary.dsn(pair.database, READER)
    with psycopg.connect(dsn, autocommit=True) as waits:
        insert = threading.Thread(target=partial(waits.execute, "insert into scratch default values"))
        insert.start()
        for role in ROLES:
            await finds(pair, role, Grade.FAILED, "1 commit waiting")
        set_on(pair)
        insert.join(10)
        assert not insert.is_alive()


async def test_an_archiver_is_no_standby(pair: Pair, postgres18: PostgresServer) -> None:
    for role in ROLES:
        await finds(pair, role, Grade.WARNING, "1 standby,")
    pair.standby.stop()
    folder = pair.primary.folder / "archive"
    folder.mkdir()
    folder.chmod(0o777)
    program = postgres18.binaries / "pg_receivewal"
    with running(program, "-h", pair.primary.folder, "-U", "postgres", "-D", folder, "--no-loop"):
        await eventually(lambda: pair.query("select from pg_stat_replication where state = 'streaming'"))
        for role in ROLES:
            await finds(pair, role, Grade.OK, "no standby")
        set_on(pair, synchronous_standby_names="*")
        for role in ROLES:
            await finds(pair, role, Grade.FAILED, "0 of the 1")


async def test_a_subscriber_can_confirm_commits_and_is_no_standby(pair: Pair, postgres18: PostgresServer) -> None:
    set_on(pair, wal_level="logical")
    pair.standby.stop()
    pair.primary.stop()
    pair.primary.start()
    change(pair, "create publication everything for all tables")
    program = postgres18.binaries / "pg_recvlogical"
    change(pair, "select pg_create_logical_replication_slot('subscriber', 'pgoutput')")
    where = ("-h", pair.primary.folder, "-U", "postgres", "-d", pair.database, "--slot", "subscriber")
    options = ("-o", "proto_version=1", "-o", "publication_names=everything", "-f", os.devnull, "--no-loop")
    with running(program, *where, "--start", *options):
        await eventually(lambda: pair.query("select from pg_stat_replication where state = 'streaming'"))
        for role in ROLES:
            await finds(pair, role, Grade.OK, "no standby")
        set_on(pair, wal_level="logical", synchronous_standby_names="pg_recvlogical")
        for role in ROLES:
            await finds(pair, role, Grade.OK, "synchronous")
    set_on(pair, wal_level="logical")
    await eventually(lambda: not pair.query("select from pg_replication_slots where active"))
    change(pair, "select pg_drop_replication_slot('subscriber')", "drop publication everything")


async def test_a_standby_is_not_taken_for_the_primary(pair: Pair) -> None:
    dsn = pair.standby.dsn(pair.database)
    found = {one.check: one for one in await look_at_database(Settings(pg_dsn=SecretStr(dsn)))}
    assert found["replication"].grade is Grade.SKIPPED


async def test_settings_that_a_crash_makes_costly_are_shown(pair: Pair) -> None:
    # as the servers of the tests are
    assert "fsync and full_page_writes off" in (await found_by(pair, READER))["crash safety"].found
    set_on(pair, fsync="on", full_page_writes="on")

    async def is_safe() -> bool:
        return (await found_by(pair, READER))["crash safety"].grade is Grade.OK

    await eventually(is_safe)


async def test_a_role_that_may_not_read_the_schema_sees_the_rest(pair: Pair) -> None:
    change(pair, "create role stranger login")
    found = await found_by(pair, "stranger")
    assert found["schema"].grade is Grade.FAILED
    assert "permission denied" in found["schema"].found
    assert "--grant" in (found["schema"].remedy or "")
    assert "replication" in found
