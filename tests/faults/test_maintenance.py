"""Maintenance of the database while a fleet changes and beats: it completes, and costs no change and no agent."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from seedcore.core.lifecycle import Status
from seedcore.core.timeouts import end
from seedcore.store.maintenance import migrate_database
from tests.faults.stage import HEALED_WITHIN_S, PAUSE_S, Stage
from tests.postgres.dumps import dump, restore
from tests.servers import PostgresServer
from tests.waiting import eventually

pytestmark = pytest.mark.slow

AGENTS = 40
WITHIN_S = 20.0
LASTS_S = 3.0
OUR_TABLES = ("registry_instance", "registry_transition", "cluster_metadata", "cluster_epoch", "registry_writer")


@pytest.fixture
async def busy(idle: Stage) -> Stage:
    """A fleet at work."""
    await idle.start(AGENTS)
    return idle


@asynccontextmanager
async def changing(stage: Stage) -> AsyncIterator[Callable[[], int]]:
    """Every agent changes its status all the time. Yields the number of changes so far."""
    count = 0

    async def change(number: int) -> None:
        nonlocal count
        for status in itertools.cycle((Status.DRAINING, Status.ALIVE)):
            await stage.turn(number, status)
            count += 1
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(change(number)) for number in range(AGENTS)]
    try:
        yield lambda: count
    finally:
        await end(*tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]


async def require_well(stage: Stage) -> None:
    """Every change is committed, in order and once; no agent is lost."""
    # the changes that were cut off at the end of the load are accepted too
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S + PAUSE_S)
    stage.require_history()
    await stage.require_fleet()


def dumped_and_restored(stage: Stage, folder: Path) -> None:
    server = stage.server
    file = folder / "dump"
    dump(server, server.dsn(stage.database), file, "custom")
    copy = server.create_database(template="template0")
    restore(server, server.dsn(copy), file, "custom")
    with psycopg.connect(server.dsn(copy)) as connection:
        # one moment of a database that changes: each status is that of the last transition
        wrong = connection.execute(
            "select count(*) from registry_instance i where status <> (select to_status from registry_transition t"
            " where t.instance_id = i.instance_id order by id desc limit 1)"
        ).fetchone()
        rows = connection.execute("select count(*) from registry_instance").fetchone()
    server.drop_database(copy)
    assert (wrong, rows) == ((0,), (AGENTS,))


def rewritten(stage: Stage, _folder: Path) -> None:
    for table in OUR_TABLES:
        stage.run(f"vacuum full {table}", f"reindex table concurrently {table}", f"analyze {table}")


def altered(stage: Stage, _folder: Path) -> None:
    for table in ("registry_instance", "registry_transition"):
        stage.run(
            f"alter table {table} add column of_the_owner integer default 7 not null",
            f"alter table {table} alter column of_the_owner type bigint",
            f"alter table {table} set (autovacuum_vacuum_scale_factor = 0.01)",
            f"create index of_the_owner on {table} (of_the_owner)",
            f"alter table {table} drop column of_the_owner",
            f"alter table {table} set (fillfactor = 60)",
        )


def locked_in_another_order(stage: Stage, _folder: Path) -> None:
    """Two tables are locked, the one that the registry locks last first: one of the two sides is refused at times."""
    ends_s = time.monotonic() + LASTS_S
    with stage.admin() as session:
        while time.monotonic() < ends_s:
            try:
                with session.transaction():
                    session.execute("lock table registry_transition in access exclusive mode")
                    time.sleep(0.02)
                    session.execute("lock table registry_instance in access exclusive mode")
            except psycopg.errors.DeadlockDetected:
                continue


@pytest.mark.parametrize("work", [dumped_and_restored, rewritten, altered, locked_in_another_order])
async def test_maintenance_under_load_completes_and_costs_no_change_and_no_agent(
    busy: Stage, work: Callable[[Stage, Path], None], tmp_path: Path
) -> None:
    async with changing(busy) as count:
        await eventually(lambda: count() > 2 * AGENTS)
        began_s = time.monotonic()
        for _ in range(3 if work in (rewritten, altered) else 1):
            before = count()
            await asyncio.to_thread(work, busy, tmp_path)
            # the load goes on
            await eventually(lambda before=before: count() > before + AGENTS)  # type: ignore[misc]
        assert time.monotonic() - began_s < WITHIN_S
    await require_well(busy)


@pytest.mark.parametrize("timeout", ["idle_in_transaction_session_timeout", "idle_session_timeout"])
async def test_timeouts_of_the_server_for_idle_sessions_cost_no_change_and_no_agent(busy: Stage, timeout: str) -> None:
    is_of_a_transaction = "transaction" in timeout
    busy.mend.callback(busy.run, f"alter system reset {timeout}", "select pg_reload_conf()")
    busy.run(f"alter system set {timeout} = '{20 if is_of_a_transaction else 2000}ms'", "select pg_reload_conf()")
    failures = (await busy.registry.health()).flush.failures
    busy.proxy.cut()

    async def is_connected_again() -> bool:
        return (await busy.registry.health()).flush.failures > failures and await busy.is_ready()

    await eventually(is_connected_again)
    failures = (await busy.registry.health()).flush.failures
    ends_s = time.monotonic() + LASTS_S
    for status, number in itertools.product((Status.DRAINING, Status.ALIVE) * 50, range(3)):
        if time.monotonic() > ends_s:
            break
        assert (await busy.turn(number, status)).durable
        await asyncio.sleep(0.05)
    assert (await busy.registry.health()).flush.failures == failures
    await require_well(busy)


async def test_timeout_for_idle_transactions_ends_no_migration(server: PostgresServer) -> None:
    name = server.create_database(template="template0")
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"alter database {name} set idle_in_transaction_session_timeout = '100ms'")
    assert await migrate_database(server.dsn(name))
    server.drop_database(name)
